"""What one waits for before the first result: importing, a first step, compiling."""

import json
import subprocess
import sys
from collections.abc import Callable

import torch
from torch._inductor.utils import fresh_cache

from bench.measure import seconds
from bench.phantoms import TINY, phantoms, tiny_model
from bench.stored import ROOT
from bench.towers import Batch, our_towers, plain_towers
from clinvla_fast.pretraining import compile_tower_blocks

DEPTH = 4


def test_import_and_first_step(measured, tmp_path):
    """The libraries are imported first, in the same process: 1 means that this package adds nothing to them."""
    tiny_model(phantoms(TINY)).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "bench.cold_start", str(tmp_path / "model")]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    libraries, ours = found["libraries"], found["ours"]
    measured.faster("libraries alone, of the import", [libraries], [libraries + ours])
    measured.faster("a steady step, of the first one", [found["steady"]], [found["first"]])


def seconds_to_compile(run: Callable[[], object]) -> float:
    """Of a first call, without what an earlier one has left on disk."""
    torch._dynamo.reset()
    with fresh_cache(), torch.no_grad():
        return seconds(run)


def test_compile(measured):
    """An image tower of the published width: one block for all, against a ViT as a whole."""
    plain, batch = plain_towers(depth=DEPTH).eval(), Batch.of(1)
    ours = our_towers(plain, torch.float32, adapters=True).eval()["vision"]
    compile_tower_blocks(ours, None)
    pixels = batch.pixels
    seconds_to_compile(lambda: torch.compile(torch.sin)(pixels))  # what the compiler itself takes to begin
    whole = seconds_to_compile(lambda: torch.compile(plain["vit"].forward_features)(pixels))
    blocks = seconds_to_compile(lambda: ours(batch.images, batch.present))
    measured.faster("than a whole ViT", [whole], [blocks])
