"""The stages of pretraining: towers by masked modelling where a preset has none, then what the method trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import normalize

from . import ops
from .data.features import FeatureBatch
from .distributed import gathered, ranks, total
from .errors import DataError
from .evaluation.retrieval import retrieval_scores
from .fit import Stage
from .modeling.adaptor import Adaptor
from .modeling.masked_modeling import MaskedModeling, draw_masked_words
from .modeling.model import ClinVLA
from .modeling.packing import Packing
from .modeling.text import TextTower, text_block
from .modeling.vision import VisionTower, vision_block
from .objectives import collapse
from .presets import TowerTraining
from .recipe import Optimization
from .study import Embeddings, StudyBatch

if TYPE_CHECKING:  # which needs DALI
    from .data.loader import StudyLoader

_ALARM_PATIENCE = 5
_UNSEEN = 16  # pixels a side


class Towers(Stage):
    """Towers learn by masked modelling: patches of every present view, and words."""

    name = "towers"

    def __init__(self, model: MaskedModeling, settings: TowerTraining, seed: int):
        super().__init__(seed)
        self.model, self.settings = model, settings

    @property
    def image_size(self) -> int:
        """Of the images that it takes: small ones, where it does not look at them."""
        return _UNSEEN if self.model.vision is None else self.model.vision.image_size

    def forward(self, batch: StudyBatch, seed: int) -> dict[str, Tensor]:
        losses = {}
        if self.model.vision is not None:
            losses["image"] = self._image(batch, seed)
        if self.model.text is not None:
            losses["word"] = self._word(batch, seed)
        return {"loss": sum(losses.values()), **{name: loss.detach() for name, loss in losses.items()}}

    def _image(self, batch: StudyBatch, seed: int) -> Tensor:
        patches = self.model.vision.patches
        before = batch.present.new_zeros(batch.row, batch.present.shape[1])
        present, keep = torch.cat([before, batch.present]), round(self.settings.keep * patches)
        kept, _ = ops.draw_kept_patches(present, patches, keep, seed)
        return _of_all(self.model.image_loss(batch.images, batch.present, kept), len(kept))

    def _word(self, batch: StudyBatch, seed: int) -> Tensor:
        packing = Packing.of(batch.lengths, batch.tokens.device)
        masked = draw_masked_words(batch.lengths, self.settings.masked_words, seed, batch.row)
        loss = self.model.word_loss(batch.tokens, packing, masked.to(batch.tokens.device))
        return _of_all(loss, len(masked))


def _of_all(mean: Tensor, count: int) -> Tensor:
    """Of a mean over `count` here: what its mean over ranks is the mean over all of."""
    return mean if ranks() == 1 else mean * count * ranks() / total(count)[0]


class CollapseAlarm:
    """Watches the embeddings of training batches; speaks when they have been collapsed for a while.

    Args:
        stop: whether it raises DataError then, instead of warning.
    """

    def __init__(self, warn: Callable[[str], None], stop: bool = False):
        self.raised = False
        self._warn, self._stop, self._recent = warn, stop, deque(maxlen=_ALARM_PATIENCE)

    def __call__(self, embeddings: dict[str, Tensor], watching: bool) -> dict[str, float]:
        """Measure, and warn once. `watching` is false while a new model has not yet had time to spread out."""
        found = {kind: collapse(e) for kind, e in embeddings.items() if len(e) > 1}
        self._recent.append(watching and any(c.alarming for c in found.values()))
        if len(self._recent) == _ALARM_PATIENCE and all(self._recent) and not self.raised:
            self.raised = True
            message = (
                "collapse: the embeddings of different studies have become alike "
                f"({', '.join(f'{kind} variance {c.variance:.3f}, rank {c.rank:.1f}' for kind, c in found.items())}). "
                "Retrieval will be at chance. The cosine objective has no negatives: try --objective contrastive."
            )
            if self._stop:
                raise DataError(message)
            self._warn(message)
        return {f"{kind}_{name}": getattr(c, name) for kind, c in found.items() for name in ("variance", "rank")}

    def state(self) -> dict:
        return {"raised": self.raised, "recent": list(self._recent)}

    def load_state(self, state: dict) -> None:
        self.raised = state["raised"]
        self._recent.extend(state["recent"])


class Align(Stage):
    """A ClinVLA's losses, aligned and reconstructed; with `chunk`, its batch goes through the towers in parts.

    In parts, embeddings are computed first, without what a backward pass needs; the loss between all of them gives
    their gradients, and each part is computed again to take its share of them to the weights (GradCache, Gao et al.
    2021). Loss and gradients are those of the whole batch at once.
    """

    name = "align"

    def __init__(self, model: ClinVLA, optimization: Optimization, seed: int, warn: Callable[[str], None]):
        super().__init__(seed)
        self.model, self.chunk, self.warmup = model, optimization.chunk, optimization.warmup
        self.alarm = CollapseAlarm(warn, optimization.stop_on_collapse)
        self._last: dict[str, Tensor] = {}

    def forward(
        self,
        batch: StudyBatch,
        seed: int,
        counts: dict[str, float],
        pull: Callable[[Embeddings], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch; of a part of one, with what takes the place of the loss between embeddings there.

        Args:
            counts: what `reconstructed` counts, in the whole batch of all ranks.
        """
        embeddings, sums = self.model.train_on(batch, seed)
        losses = self._aligned(self.model.objective, embeddings) if pull is None else {"loss": pull(embeddings)}
        for name, lost in sums.items():
            losses[name] = lost * ranks() / max(1, counts[name])
            losses["loss"] = losses["loss"] + getattr(self.model.recipe, f"{name}_weight") * losses[name]
        return losses

    def backward(self, run: Callable, batch: StudyBatch, seed: int, share: float, quiet: Callable) -> dict[str, Tensor]:
        found = self.model.reconstructed(batch)
        counts = dict(zip(found, total(*found.values()), strict=True)) if found else {}
        if not self.chunk:
            losses = run(batch, seed, counts)
            (share * losses["loss"]).backward()
            return losses
        parts = batch.parts(self.chunk)
        if not self.model.aligns:
            return self._replay(run, parts, seed, share, quiet, counts, {"loss": torch.zeros(())}, lambda *_: _nothing)
        with torch.no_grad():
            seen = [self.model.train_on(part, seed, reconstruct=False)[0] for part in parts]
        whole, leaves = _with_leaves(_joined(seen))
        scales = self.model.objective.log_scales.detach().requires_grad_()
        losses = self._aligned(lambda e: functional_call(self.model.objective, {"log_scales": scales}, e), whole)
        losses["loss"].backward()
        ends = [0, *accumulate(map(len, parts))]

        def pull_of(number: int) -> Callable[[Embeddings], Tensor]:
            rows, last = slice(*ends[number : number + 2]), number == len(parts) - 1
            pulls = {name: _fitting(x.grad[rows], getattr(seen[number], name)) for name, x in leaves.items()}

            def pull(e: Embeddings) -> Tensor:
                pulled = sum((getattr(e, name) * grad).sum(dtype=scales.dtype) for name, grad in pulls.items())
                learned = last and self.model.objective.log_scales.requires_grad
                return pulled + (self.model.objective.log_scales * scales.grad).sum() if learned else pulled

            return pull

        return self._replay(run, parts, seed, share, quiet, counts, losses, pull_of)

    def _replay(
        self,
        run: Callable,
        parts: list[StudyBatch],
        seed: int,
        share: float,
        quiet: Callable,
        counts: dict[str, float],
        losses: dict[str, Tensor],
        pull_of: Callable[[int], Callable[[Embeddings], Tensor]],
    ) -> dict[str, Tensor]:
        """Backward passes part by part; the losses, with those of what is reconstructed."""
        losses = {name: loss.detach() for name, loss in losses.items()}
        for number, part in enumerate(parts):
            with ExitStack() as stack:
                if part is not parts[-1]:
                    stack.enter_context(quiet())
                replayed = run(part, seed, counts, pull_of(number))
                (share * replayed["loss"]).backward()
            for name in counts:
                found = replayed[name].detach()
                losses[name] = losses.get(name, 0) + found
                losses["loss"] = losses["loss"] + getattr(self.model.recipe, f"{name}_weight") * found
        return losses

    def _aligned(self, objective: Callable[[Embeddings], dict[str, Tensor]], e: Embeddings) -> dict[str, Tensor]:
        paired = e.paired()
        self._last = {"image": paired.image_global.detach(), "text": paired.text_global.detach()}
        return objective(e)

    def watch(self, step: int, steps: int) -> dict[str, float]:
        if not self.model.aligns:
            return {}
        everyone = gathered({kind: e.cpu() for kind, e in self._last.items()})
        last = {kind: torch.cat([found[kind] for found in everyone]) for kind in self._last}
        return self.alarm(last, watching=step > self.warmup * steps)

    def state(self) -> dict:
        return self.alarm.state()

    def load_state(self, state: dict) -> None:
        self.alarm.load_state(state)


class Fuse(Stage):
    """An Adaptor on the stored outputs of its towers.

    Args:
        dtype: that its products are in.
    """

    name = "align"

    def __init__(self, adaptor: Adaptor, dtype: torch.dtype, seed: int):
        super().__init__(seed)
        self.adaptor, self._dtype = adaptor, dtype

    def forward(self, batch: FeatureBatch, seed: int) -> dict[str, Tensor]:
        with torch.autocast(batch.image.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            return self.adaptor.losses(batch)


def _nothing(e: Embeddings) -> Tensor:
    """What takes the place of a loss between embeddings where there is none."""
    return torch.zeros((), device=e.image_global.device)


_FLOATS = ("image_global", "image_local", "text_global", "text_local")


def _joined(parts: list[Embeddings]) -> Embeddings:
    """The studies of all parts, one after the other; local embeddings are padded to the most."""

    def join(name: str) -> Tensor:
        found = [getattr(part, name) for part in parts]
        if name.endswith("global"):
            return torch.cat(found)
        longest = max(x.shape[1] for x in found)
        grown = (x.new_zeros(len(x), longest - x.shape[1], *x.shape[2:]) for x in found)
        return torch.cat([torch.cat(pair, 1) for pair in zip(found, grown, strict=True)])

    return Embeddings(**{f.name: join(f.name) for f in fields(Embeddings)})


def _with_leaves(e: Embeddings) -> tuple[Embeddings, dict[str, Tensor]]:
    leaves = {name: getattr(e, name).requires_grad_() for name in _FLOATS}
    return Embeddings(**leaves, image_mask=e.image_mask, text_mask=e.text_mask), leaves


def _fitting(grad: Tensor, like: Tensor) -> Tensor:
    """Without the padding that joining has added."""
    return grad if grad.ndim == 2 else grad[:, : like.shape[1]]


def retrieve(model: ClinVLA, loader: StudyLoader) -> dict[str, dict[str, float | None]]:
    """Retrieval among a loader's studies that have both a view and a report, both ways and from image to image, on
    whole images. Each process embeds its part; all get the scores.

    Where the towers' widths differ and nothing aligns them, there are scores from image to image alone.
    """
    model.eval()
    mine = []
    with torch.inference_mode():
        for batch in loader:
            e = model(batch.to(model.device))
            paired = e.image_mask.any(1) & e.text_mask.any(1)
            # As arrays: a tensor's row would be sent with all of the tensor.
            image, text = (normalize(x, dim=-1).float().cpu().numpy() for x in (e.image_global, e.text_global))
            mine += list(zip(image, text, batch.labels, paired.tolist(), strict=True))
    everyone = gathered(mine)  # a study in turn from each
    ordered = [share[i] for i in range(max(map(len, everyone))) for share in everyone if i < len(share)]
    kept = [study for study in ordered if study[3]]
    if not kept:
        raise DataError("none of the studies to evaluate on has both a view and a report.")
    image, text = (torch.from_numpy(np.stack([study[side] for study in kept])).to(model.device) for side in (0, 1))
    labels = [study[2] for study in kept]
    scores = {"image_to_image": retrieval_scores(image, image, labels, own=False)}
    if image.shape == text.shape:
        scores["text_to_image"] = retrieval_scores(text, image, labels)
        scores["image_to_text"] = retrieval_scores(image, text, labels)
    return scores


def compile_tower_blocks(vision: VisionTower | None, text: TextTower | None) -> None:
    """Compile the towers' blocks, each kind once for all depths, any number of views and any lengths of reports.

    For this process: sizes that happen to be equal in one batch are not taken for one, and a block may have 64 forms
    (with and without adapters, with and without gradients, for one row and for many), not 8.
    """
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if vision is not None:
        vision.run_block = torch.compile(vision_block, fullgraph=True, dynamic=True)
    if text is not None:
        text.run_block = torch.compile(text_block, fullgraph=True, dynamic=True)


def warm_up(stage: Align, batch: StudyBatch, trains_one: bool = False, evaluates_one: bool = False) -> float:
    """Run a batch once as training and once as evaluation does, so that all is compiled: the seconds it took.

    Args:
        batch: of at least two studies.
        trains_one, evaluates_one: whether a batch, or a part of one, of one study comes too: PyTorch compiles for a
            size of 1 apart.
    """
    start = time.perf_counter()
    one = _one_view(batch)
    stage.train()
    for seen in (batch, one) if trains_one else (batch,):
        stage.backward(stage, seen, 0, 1.0, ExitStack)
    stage.zero_grad(set_to_none=True)
    stage.eval()
    with torch.inference_mode():
        for seen in (batch, one) if evaluates_one else (batch,):
            stage.model(seen)
    return time.perf_counter() - start


def _one_view(batch: StudyBatch) -> StudyBatch:
    """One of its studies, one with a frontal where there is one, with a single view."""
    study = batch.parts(1)[int(batch.present[:, 0].int().argmax())]
    present = torch.zeros_like(study.present)
    present[0, int(study.present[0].int().argmax())] = True
    return replace(study, present=present)
