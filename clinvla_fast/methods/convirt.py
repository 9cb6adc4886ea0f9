"""ConVIRT (Zhang et al. 2020): global alignment of a single view, trained end to end, the images' direction weighing
three quarters, at temperature 0.1."""

from ..recipe import Method, Optimization, Recipe

METHOD = Method(
    Recipe(
        adapters=(),
        trained=("towers",),
        views=("frontal",),
        keep=1.0,
        local_weight=0.0,
        image_share=0.75,
        scales=(10.0, 4.0, 5.0, 10.0),
        learn_scales=False,
    ),
    Optimization(epochs=200, tower_lr=1e-4, task_lr=1e-4, language_lr=1e-4, weight_decay=1e-6),
)
