"""Sizes, by name: two towers, and what methods change to fit them. A file a preset."""

from typing import Literal

from . import base, tiny
from .preset import Precision, Preset, TowerTraining

PresetName = Literal["tiny", "base"]
PRESETS: dict[str, Preset] = {"tiny": tiny.PRESET, "base": base.PRESET}

__all__ = ["PRESETS", "Precision", "Preset", "PresetName", "TowerTraining"]
