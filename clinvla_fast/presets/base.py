"""The papers' size: ViT-B/16 with masked-autoencoder weights, BioBERT."""

from .preset import Preset

PRESET = Preset(vision="vit_base_patch16_224.mae", text="dmis-lab/biobert-base-cased-v1.2")
