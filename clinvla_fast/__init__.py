"""clinvla_fast: medical vision-language alignment with frozen towers, fast.

Names are imported at first use: a command that only prepares files does not wait for PyTorch.
"""

from importlib import import_module

from .errors import DataError
from .study import VIEWS

_HOME = {
    "AdaptorModel": ".modeling.adaptor",
    "Captured": ".modeling.captured",
    "ClinVLA": ".modeling.model",
    "Collection": ".search",
    "Embeddings": ".study",
    "Recipe": ".recipe",
    "StudyBatch": ".study",
    "accelerate": ".twins",
    "embed": ".collection",
    "explain": ".evaluation.grounding",
    "restore": ".twins",
}
_MODULES = ("backend", "ops")

__all__ = [
    "VIEWS",
    "AdaptorModel",
    "Captured",
    "ClinVLA",
    "Collection",
    "DataError",
    "Embeddings",
    "Recipe",
    "StudyBatch",
    "accelerate",
    "backend",
    "embed",
    "explain",
    "ops",
    "restore",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
