"""Adaptor ("Freeze the backbones", Qin et al.): towers wholly frozen, any of them, their outputs computed once; one
block of cross-attention that both modalities share, trained by the global loss alone. Its sizes are chosen here."""

from ..recipe import Method, Optimization, Recipe

METHOD = Method(
    Recipe(adapters=(), fusion=True, width=512, local_weight=0.0, keep=1.0),
    Optimization(batch_size=256, weight_decay=0.05),
)
