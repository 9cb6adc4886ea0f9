"""ClinVLA (Hao et al. 2025, section 3 and Table 1): frozen towers, invertible, language and task adapters, a quarter of
the patches, global and local alignment."""

from ..recipe import Method, Optimization, Recipe

METHOD = Method(Recipe(), Optimization())
