"""One of several processes: a rank's part of training steps of models, from its share of a batch.

Arguments: a folder of folders with what to run (job.pt), to write gradients to. Run under torchrun, or alone.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from clinvla_fast import ClinVLA, Recipe, StudyBatch, distributed
from clinvla_fast.cost import bytes_sent
from clinvla_fast.data.features import FeatureBatch
from clinvla_fast.distributed import data_parallel, part, process_group, rank, ranks
from clinvla_fast.fit import Stage
from clinvla_fast.modeling.adaptor import Adaptor
from clinvla_fast.modeling.masked_modeling import MaskedModeling
from clinvla_fast.presets import TowerTraining
from clinvla_fast.pretraining import Align, Fuse, Towers
from clinvla_fast.recipe import Optimization


def share(batch: StudyBatch | FeatureBatch, of: slice) -> StudyBatch | FeatureBatch:
    """The studies `of` a batch."""
    if isinstance(batch, FeatureBatch):
        return FeatureBatch(**{name: x[of] for name, x in vars(batch).items()})
    ends = [0, *batch.lengths.cumsum(0).tolist()]
    rows = {"images": batch.images[of], "present": batch.present[of], "lengths": batch.lengths[of]}
    return StudyBatch(**rows, tokens=batch.tokens[ends[of.start] : ends[of.stop]], row=of.start)


def stage_of(job: dict) -> Stage:
    torch.manual_seed(0)
    if "features" in job:
        adaptor = Adaptor(*job["widths"], width=16, heads=2, hidden=24)
        return Fuse(adaptor, torch.float32, 0)
    model = ClinVLA(job["vision"], job["text"], Recipe(**job["recipe"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.trainable().items():
            if "log_scales" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    if not job["masked_modeling"]:
        return Align(model, Optimization(chunk=job["chunk"]), 0, print)
    for tower in (model.vision.vit, model.text.bert):  # frozen in the model above; here they learn
        for module in tower.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point():
                    delattr(module, name)
                    module.register_parameter(name, torch.nn.Parameter(buffer.clone()))
    return Towers(MaskedModeling(model.vision, model.text, 4), TowerTraining(), 0)


def run(folder: Path) -> None:
    job = torch.load(folder / "job.pt", weights_only=True)
    batch = FeatureBatch(**job["features"]) if "features" in job else StudyBatch(**job["batch"])
    stage = stage_of(job).to(getattr(torch, job["dtype"])).train()
    own, wrapped = share(batch, part(len(batch))), stage
    if ranks() > 1:
        wrapped = data_parallel(stage)
    before = distributed.sent
    losses = stage.backward(wrapped, own, 7, 1.0, getattr(wrapped, "no_sync", nullcontext))
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.requires_grad}
    sent = distributed.sent - before
    found = {"loss": distributed.total(losses["loss"].item())[0] / ranks(), "gradients": gradients, "sent": sent}
    if isinstance(stage, Align):
        found["expected"] = bytes_sent(stage.model, len(batch), ranks(), int(batch.lengths.max()))
    torch.save(found, folder / f"{ranks()}-{rank()}.pt")


if __name__ == "__main__":
    with process_group(torch.device("cpu")):
        for job in sorted(Path(sys.argv[1]).glob("*/job.pt")):
            run(job.parent)
