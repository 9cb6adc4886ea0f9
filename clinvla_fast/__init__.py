"""clinvla_fast: medical vision-language alignment with frozen towers, fast."""

from . import backend, ops
from .errors import DataError
from .modeling.model import ClinVLA
from .recipe import Recipe
from .study import VIEWS, Embeddings, StudyBatch

__all__ = ["VIEWS", "ClinVLA", "DataError", "Embeddings", "Recipe", "StudyBatch", "backend", "ops"]
