"""What a training step of the published size computes, sends and holds on N processes: the table of docs/scaling.md.

    python bench/scaling.py

Everything is counted: FLOPs of a step while it runs, bytes by the formula that tests hold to what is really sent.
"""

import tempfile
from pathlib import Path

import timm
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from clinvla_fast import ClinVLA, ops
from clinvla_fast.cost import bytes_sent, step_flops
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.towers import save_text, save_vision
from clinvla_fast.modeling.vision import VisionTower

VIEWS, WORDS, OWN = 2, 64, 32  # a study: two views, a report of mean length; studies a process
LONGEST = 128  # of a batch's reports, to which words are padded on the wire
PROCESSES = (1, 8, 64, 256, 1024)
RATE = 790e12 / 2  # FLOP/s: half of what an H200's bf16 matrix products reach
WIRE = 50e9  # bytes a second a GPU: 400 Gb/s between machines


def published(folder: Path) -> ClinVLA:
    """ViT-B/16 and BERT-base with random weights."""
    vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    save_vision(VisionTower(vit, (0.5,) * 3, (0.5,) * 3), folder / "vision")
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    words = {word: number for number, word in enumerate(special.values())}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece(words, unk_token="[UNK]")), **special)
    save_text(TextTower(BertModel(BertConfig(), add_pooling_layer=False)), tokenizer, folder / "text")
    return ClinVLA(str(folder / "vision"), str(folder / "text"), dtype=torch.bfloat16)


def pair_flops(model: ClinVLA) -> float:
    """Of the local loss of one image with one report, forward and backward."""
    patches, width = VIEWS * round(model.recipe.keep * model.vision.patches), model.recipe.width
    image, text = torch.randn(2, patches, width), torch.randn(2, WORDS - 2, width)
    masks = torch.ones(2, patches, dtype=torch.bool), torch.ones(2, WORDS - 2, dtype=torch.bool)
    for x in (image, text):
        x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ops.local_alignment(image, masks[0], text, masks[1], *torch.full((3,), 5.0)).sum().backward()
    return counter.get_total_flops() / 4


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder))
        study, pair = step_flops(model, VIEWS, WORDS), pair_flops(model)
    print(f"a study {study / 1e9:.1f} GFLOP, a pair {pair / 1e6:.1f} MFLOP, {OWN} studies a process\n")
    head = "processes", "batch", "towers, ms", "local loss, ms", "sent, MB", "gradients, MB", "wire, ms", "efficiency"
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    trained = sum(p.nbytes for p in model.trainable().values())
    for n in PROCESSES:
        batch, sent = n * OWN, bytes_sent(model, n * OWN, n, LONGEST)
        towers, local, wire = 1e3 * OWN * study / RATE, 1e3 * OWN * batch * pair / RATE, 1e3 * sent / WIRE
        gradients = 2 * (n - 1) / n * trained
        row = f"{n:,}", f"{batch:,}", f"{towers:.1f}", f"{local:.2f}", f"{sent / 1e6:.1f}", f"{gradients / 1e6:.1f}"
        print(f"| {' | '.join(row)} | {wire:.2f} | {towers / (towers + local + wire):.0%} |")


if __name__ == "__main__":
    main()
