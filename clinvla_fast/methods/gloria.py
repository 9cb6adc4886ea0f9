"""GLoRIA (Huang et al. 2021): global and local alignment of a single frontal view, trained end to end. Temperatures are
fixed; the two directions of each loss are summed, not averaged, hence the weights."""

from ..recipe import Method, Optimization, Recipe

METHOD = Method(
    Recipe(
        adapters=(),
        trained=("towers",),
        views=("frontal",),
        keep=1.0,
        global_weight=2.0,
        local_weight=2.0,
        scales=(10.0, 4.0, 5.0, 10.0),
        learn_scales=False,
    ),
    Optimization(batch_size=48, epochs=50, tower_lr=5e-5, task_lr=5e-5, language_lr=5e-5, weight_decay=1e-6, clip=0.25),
)
