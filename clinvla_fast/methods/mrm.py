"""MRM (Zhou et al. 2023): masked record modelling. Both towers from scratch, by reconstructing a quarter-seen image at
twice its resolution and half-masked words that see the mean patch. Nothing is aligned: its embeddings are features."""

from ..recipe import Method, Optimization, Recipe

METHOD = Method(
    Recipe(
        adapters=(),
        trained=("towers",),
        scratch=True,
        views=("frontal",),
        global_weight=0.0,
        local_weight=0.0,
        image_weight=1.0,
        word_weight=1.0,
        image_in_words="patches",
        target_scale=2,
    ),
    Optimization(batch_size=256, epochs=200, warmup=0.2, tower_lr=1.5e-4, task_lr=1.5e-4, weight_decay=0.05),
)
