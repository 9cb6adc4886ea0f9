"""Models of both presets' sizes with random weights: what is counted depends on sizes alone."""

from pathlib import Path

import timm
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from clinvla_fast import ClinVLA
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text, save_vision
from clinvla_fast.modeling.vision import VisionTower
from clinvla_fast.presets import PresetName

VOCABULARY = {"tiny": 1000, "base": 28996}  # base: BioBERT's


def save_towers(size: PresetName, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> tuple[str, str]:
    """Write both towers of a size, seeded; their folders. Base: ViT-B/16 and BERT-base. None: a tokenizer that knows no
    word."""
    torch.manual_seed(0)
    if size == "tiny":
        vision, text = make_tiny_vision(), make_tiny_text(VOCABULARY[size])
    else:
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        vision = VisionTower(vit, (0.5,) * 3, (0.5,) * 3)
        text = TextTower(BertModel(BertConfig(vocab_size=VOCABULARY[size]), add_pooling_layer=False))
    save_vision(vision, folder / "vision")
    save_text(text, tokenizer or _no_words(), folder / "text")
    return str(folder / "vision"), str(folder / "text")


def _no_words() -> PreTrainedTokenizerFast:
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    words = {word: number for number, word in enumerate(special.values())}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece(words, unk_token="[UNK]")), **special)


def published(folder: Path) -> ClinVLA:
    """ClinVLA of the published size, in bfloat16."""
    return ClinVLA(*save_towers("base", folder), dtype=torch.bfloat16)
