"""Phantom studies on disk, which are drawn once a process, and the tiny preset's model of them."""

import atexit
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from clinvla_fast import ClinVLA
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.data.shards import read_studies
from clinvla_fast.data.tokenizer import train_tokenizer
from clinvla_fast.methods import METHODS
from clinvla_fast.modeling.towers import make_tiny_text, make_tiny_vision, save_text, save_vision
from clinvla_fast.presets import PRESETS

PATIENTS = 150
TINY = 144
"""Pixels a side, as the main job draws them for the tiny preset."""


@cache
def scratch() -> Path:
    """A folder that goes when the process does."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def phantoms(size: int, patients: int = PATIENTS) -> Path:
    """Prepared studies of so many pixels a side."""
    out = scratch() / f"{patients}-patients-{size}"
    write_phantoms(out, patients=patients, seed=0, size=size)
    return out


@cache
def repeated(data: Path, times: int) -> Path:
    """The same shards so many times over, as a data set of its own."""
    out = scratch() / f"{data.name}-{times}-times"
    out.mkdir()
    manifest, copies = json.loads((data / "manifest.json").read_text()), []
    for shard in manifest["shards"]:
        name, kind = shard["file"].split("-", 1)[0], Path(shard["file"]).suffix
        for _ in range(times):
            copies.append(shard | {"file": f"{name}-{len(copies):06d}{kind}"})
            os.link(data / shard["file"], out / copies[-1]["file"])
    splits = {split: times * studies for split, studies in manifest["counts"]["splits"].items()}
    manifest |= {"shards": copies, "counts": manifest["counts"] | {"splits": splits}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


@cache
def tiny_model(data: Path) -> ClinVLA:
    """With random weights, in the adapters too: new ones would do nothing."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(study.report for study in read_studies(data, "train", images=False))
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    save_vision(make_tiny_vision(), folder / "vision")
    save_text(make_tiny_text(len(tokenizer)), tokenizer, folder / "text")
    model = ClinVLA(
        str(folder / "vision"), str(folder / "text"), PRESETS["tiny"].fit("clinvla", METHODS["clinvla"]).recipe
    )
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.02 * torch.randn_like(parameter)
    return model
