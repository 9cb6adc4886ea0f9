"""What a training step of the published size computes, sends and holds on N processes: the table of docs/scaling.md.

    python -m bench.scaling

Everything is counted: FLOPs of a step while it runs, bytes by the formula that tests hold to what is really sent.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.models import published
from bench.stored import RESULTS, table
from clinvla_fast import ClinVLA, ops
from clinvla_fast.cost import bytes_sent, parameters, step_flops

VIEWS, WORDS, OWN = 2, 64, 32  # a study: two views, a report of mean length; studies a process
LONGEST = 128  # of a batch's reports, to which words are padded on the wire
PROCESSES = (1, 8, 64, 256, 1024)
RATE = 790e12 / 2  # FLOP/s: half of what an H200's bf16 matrix products reach
STORED = RESULTS / "scaling.json"
HEAD = ["processes", "batch", "towers, ms", "local loss, ms", "sent, MB", "gradients, MB", "wire, ms", "efficiency"]
WIRE = 50e9  # bytes a second a GPU: 400 Gb/s between machines


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


def rows(study: int, pair: float, sent: dict[int, int], trained: int) -> list[list[str]]:
    """The table, a row for so many processes; times follow from RATE and WIRE."""
    found = []
    for n in PROCESSES:
        batch, wire = n * OWN, 1e3 * sent[n] / WIRE
        towers, local = 1e3 * OWN * study / RATE, 1e3 * OWN * batch * pair / RATE
        gradients = 2 * (n - 1) / n * trained
        row = f"{n:,}", f"{batch:,}", f"{towers:.1f}", f"{local:.2f}", f"{sent[n] / 1e6:.1f}", f"{gradients / 1e6:.1f}"
        found.append([*row, f"{wire:.2f}", f"{towers / (towers + local + wire):.0%}"])
    return found


def scaling_table(counted: dict) -> str:
    """As Markdown, of what is stored."""
    sent = {int(n): of for n, of in counted["bytes_sent"].items()}
    return table(HEAD, rows(counted["study_flops"], counted["pair_flops"], sent, counted["trained_bytes"]))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = published(Path(folder))
        counted = {
            "command": "python -m bench.scaling",
            "study_flops": step_flops(model, VIEWS, WORDS),
            "pair_flops": pair_flops(model),
            "trained_bytes": sum(p.nbytes for p in model.trainable().values()),
            "bytes_of_all": 4 * parameters(model)["total"],
            "bytes_sent": {n: bytes_sent(model, n * OWN, n, LONGEST) for n in PROCESSES},
        }
        model.recipe = replace(model.recipe, local_weight=0.0)
        counted["bytes_sent_without_the_local_loss"] = bytes_sent(model, PROCESSES[-1] * OWN, PROCESSES[-1], LONGEST)
    STORED.write_text(json.dumps(counted, indent=1) + "\n")
    print(scaling_table(json.loads(STORED.read_text())))


if __name__ == "__main__":
    main()
