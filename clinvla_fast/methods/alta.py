"""ALTA (arXiv 2506.08990): adapters on the attention and beside the feed-forward network, norms and CLS trained, and
four losses: global, local, masked image reconstruction at twice the resolution, masked words that see the image.

As published, of the decoder only the ends are trained. Its blocks are MRM's there, and random here.
"""

from ..recipe import Method, Optimization, Recipe

METHOD = Method(
    Recipe(
        adapters=("attention", "mlp"),
        bottleneck=192,
        trained=("norms", "tokens"),
        missing_views=True,
        local_weight=1.0,
        image_weight=1.0,
        word_weight=1.0,
        image_in_words="cls",
        target_scale=2,
        train_decoder=False,
    ),
    Optimization(
        batch_size=96,
        epochs=30,
        schedule_epochs=100,
        warmup=0.1,
        language_lr=1.5e-4 * 96 / 256,
        task_lr=1.5e-4 * 96 / 256,
        tower_lr=1.5e-4 * 96 / 256,
        weight_decay=0.05,
        decay_vectors=False,
    ),
)
