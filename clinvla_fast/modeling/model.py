"""ClinVLA: two frozen towers, the adapters in them, and heads into a shared space."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import normalize

from .. import ops
from ..data.radiographs import read_radiograph
from ..data.reports import clean_report
from ..data.tokenizer import tokenize_reports
from ..errors import DataError
from ..objectives import Alignment
from ..recipe import Recipe
from ..run import replacing
from ..study import VIEWS, Embeddings, StudyBatch
from ..twins import swap
from .frozen import freeze
from .packing import Packing
from .towers import load_text, load_vision

_WEIGHTS = "adapters.safetensors"


class ProjectionHead(nn.Sequential):
    """Linear, GELU, LayerNorm, Linear: [..., width] to [..., shared]."""

    def __init__(self, width: int, shared: int):
        super().__init__(nn.Linear(width, shared), nn.GELU(), nn.LayerNorm(shared), nn.Linear(shared, shared))

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of its own weights, whatever the tower computes in."""
        return super().forward(x.to(self[0].weight.dtype))

    @torch.no_grad()
    def standardise(self, x: Tensor) -> None:
        """Scale and shift a new head's first layer so that features like x [n, width] leave it with mean 0 and
        variance 1 (Salimans and Kingma 2016). A frozen tower's CLS tokens differ little from study to study; without
        this, a head maps all of them to nearly one point and the first epochs go into pulling them apart."""
        first = self[0]
        out = first(x.to(first.weight.dtype))
        scale = out.std(0).clamp(min=1e-6).reciprocal()
        first.bias.copy_((first.bias - out.mean(0)) * scale)
        first.weight.mul_(scale[:, None])


class ClinVLA(nn.Module, PyTorchModelHubMixin, library_name="clinvla-fast", license="apache-2.0"):
    """ClinVLA (Hao et al. 2025, section 3), its towers frozen and fast, its adapters new.

    `clinvla_fast.restore(model)` gives the reference: timm's and transformers' modules as they are.

    Args:
        vision: an image tower: see `load_vision`.
        text: a report tower: see `load_text`.
        recipe: which adapters, of which size; the shared width; the objective.
        dtype: what the towers are stored and compute in; None: as they were saved. All that is trained, and what comes
            out, is float32 (but local embeddings, which are the many, are in dtype).

    Raises:
        TowerUnavailable: if a tower's weights cannot be had.
    """

    def __init__(self, vision: str, text: str, recipe: Recipe | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.recipe = recipe or Recipe()
        self.tower_names = {"vision": str(vision), "text": str(text)}
        self.vision = load_vision(str(vision))
        self.text, self.tokenizer = load_text(str(text))
        for tower in (self.vision.vit, self.text.bert):
            freeze(tower, dtype)
            swap(tower)
        self.vision.add_adapters(self.recipe)
        self.text.add_adapters(self.recipe)
        shared = self.recipe.width
        self.image_global, self.image_local = (ProjectionHead(self.vision.width, shared) for _ in range(2))
        self.text_global, self.text_local = (ProjectionHead(self.text.width, shared) for _ in range(2))
        self.objective = Alignment(self.recipe)
        self.eval()

    def train(self, mode: bool = True) -> "ClinVLA":
        """Frozen towers stay in evaluation mode: their dropout is not ours to use."""
        super().train(mode)
        self.vision.vit.eval()
        self.text.bert.eval()
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that is learned here, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def standardise_heads(self, batch: StudyBatch) -> None:
        """Fit the scale of new heads to the towers' features of one batch of at least two studies, all with a view."""
        tokens, packing = self.vision(batch.images, batch.present), Packing.of(batch.lengths, batch.tokens.device)
        hidden = self.text(batch.tokens, packing)
        self.image_global.standardise(self._mean_cls(tokens, batch.present))
        self.image_local.standardise(tokens[:, 1:].flatten(0, 1))
        self.text_global.standardise(hidden[packing.first])
        self.text_local.standardise(hidden)

    def forward(self, batch: StudyBatch, mask_seed: int | None = None) -> Embeddings:
        """Embeddings of a batch; with a seed, from the share of patches that the recipe keeps, drawn by it."""
        kept = None
        if mask_seed is not None:
            patches = self.vision.patches
            kept, _ = ops.draw_kept_patches(batch.present, patches, round(self.recipe.keep * patches), mask_seed)
        image_global, image_local, image_mask = self.embed_images(batch.images, batch.present, kept)
        text_global, text_local, text_mask = self.embed_reports(batch.tokens, batch.lengths)
        return Embeddings(image_global, image_local, image_mask, text_global, text_local, text_mask)

    def embed_images(
        self, images: Tensor, present: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The image side of Embeddings. Global: the mean of the present views' CLS; local: all their patches.

        Args: as VisionTower.
        """
        tokens = self.vision(images, present, kept)
        views = present.sum(1)
        pooled = self.image_global(self._mean_cls(tokens, present)) * (views > 0)[:, None]
        packing = Packing.of(views.cpu(), images.device)
        local = packing.pad(self.image_local(tokens[:, 1:]).to(tokens.dtype)).flatten(1, 2)
        return pooled, local, packing.mask.repeat_interleave(tokens.shape[1] - 1, 1)

    def image_features(self, batch: StudyBatch) -> Tensor:
        """What the image heads see of a study, whole views and CLS alone: [B, width]."""
        return self._mean_cls(self.vision(batch.images, batch.present), batch.present)

    def text_features(self, batch: StudyBatch) -> Tensor:
        """What the report heads see of a study, CLS alone: [B, width]."""
        packing = Packing.of(batch.lengths, batch.tokens.device)
        return self.text(batch.tokens, packing)[packing.first]

    @staticmethod
    def _mean_cls(tokens: Tensor, present: Tensor) -> Tensor:
        """Mean CLS token of each study's views: [B, width], zero without a view."""
        cls = tokens[:, 0].to(torch.promote_types(tokens.dtype, torch.float32))
        sums = cls.new_zeros(len(present), cls.shape[-1]).index_add(0, present.nonzero()[:, 0], cls)
        return sums / present.sum(1).clamp(min=1)[:, None]

    def embed_reports(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The report side of Embeddings. Global: CLS; local: every word piece but CLS and SEP.

        Args: as StudyBatch.
        """
        packing = Packing.of(lengths, tokens.device)
        hidden = self.text(tokens, packing)
        columns = torch.arange(packing.mask.shape[1], device=tokens.device)
        words = (columns > 0) & (columns < (lengths.to(tokens.device) - 1)[:, None])
        local = packing.pad(self.text_local(hidden).to(hidden.dtype))
        return self.text_global(hidden[packing.first]), local, words

    # Use

    @torch.inference_mode()
    def encode_images(self, studies: Sequence[Mapping[str, str | Path | np.ndarray]], batch_size: int = 32) -> Tensor:
        """Global embeddings of studies, L2-normalised.

        Args:
            studies: each maps names of VIEWS ("frontal", "lateral", "prior_frontal", "prior_lateral") to a file
                (PNG, JPEG or DICOM) or to pixels, uint8 [H, W]. Any view may be missing, but not all.

        Returns:
            [len(studies), D] on the model's device.

        Raises:
            DataError: if a study has no view, or a name that is none of VIEWS, or a file cannot be read, or pixels are
                no uint8 [H, W].
        """
        size = self.vision.image_size
        parts = [torch.empty(0, self.recipe.width, device=self.device)]
        for start in range(0, len(studies), batch_size):
            chunk = studies[start : start + batch_size]
            images = np.zeros((len(chunk), len(VIEWS), size, size), np.uint8)
            present = np.zeros((len(chunk), len(VIEWS)), bool)
            for row, study in enumerate(chunk):
                if not study or set(study) - set(VIEWS):
                    known = ", ".join(VIEWS)
                    raise DataError(f"study {start + row} has views {sorted(study)}: expected one or more of {known}.")
                for view, image in study.items():
                    column = VIEWS.index(view)
                    pixels = image if isinstance(image, np.ndarray) else read_radiograph(image, size)
                    if pixels.dtype != np.uint8 or pixels.ndim != 2 or not pixels.size:
                        got = f"{pixels.dtype} {list(pixels.shape)}"
                        raise DataError(f"study {start + row}: {view} is {got}: expected pixels, uint8 [H, W].")
                    images[row, column] = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
                    present[row, column] = True
            moved = (torch.from_numpy(x).to(self.device) for x in (images, present))
            parts.append(normalize(self.embed_images(*moved)[0], dim=-1))
        return torch.cat(parts)

    @torch.inference_mode()
    def encode_reports(self, reports: Sequence[str], batch_size: int = 64) -> Tensor:
        """Global embeddings of reports or shorter descriptions, L2-normalised: [len(reports), D].

        They are cleaned as in `training.prepare` (abbreviations, hedges, sections) and cut to whole sentences.
        """
        parts = [torch.empty(0, self.recipe.width, device=self.device)]
        for start in range(0, len(reports), batch_size):
            cleaned = [clean_report(report) for report in reports[start : start + batch_size]]
            tokens, lengths = tokenize_reports(self.tokenizer, cleaned, self.max_tokens)
            parts.append(normalize(self.embed_reports(tokens.to(self.device), lengths)[0], dim=-1))
        return torch.cat(parts)

    @property
    def device(self) -> torch.device:
        return self.objective.log_scales.device

    @property
    def max_tokens(self) -> int:
        return min(self.recipe.max_tokens, self.text.max_tokens)

    # Files: the adapters alone, with the towers named

    def _save_pretrained(self, save_directory: Path) -> None:
        folder, names = save_directory.resolve(), dict(self.tower_names)
        for kind, name in names.items():
            if Path(name).exists():  # a path, then, and not a name on a hub
                path = Path(name).resolve()
                names[kind] = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        config = {**names, "recipe": asdict(self.recipe)}
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = save({name: p.detach().cpu().contiguous() for name, p in self.trainable().items()})
        with replacing(save_directory / _WEIGHTS) as partial:
            partial.write_bytes(weights)

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **init
    ) -> "ClinVLA":
        folder = Path(model_id)
        if not folder.is_dir():
            options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download}
            folder = Path(snapshot_download(model_id, local_files_only=local_files_only, token=token, **options))
        if "vision" not in init or "text" not in init or not (folder / _WEIGHTS).is_file():
            raise DataError(f"{folder} holds no config.json and {_WEIGHTS}: pass a folder that a ClinVLA was saved in.")
        for kind in ("vision", "text"):
            if (folder / init[kind]).exists():
                init[kind] = str(folder / init[kind])
        if "recipe" in init:
            lists = {name: tuple(x) for name, x in vars(init["recipe"]).items() if isinstance(x, list)}
            init["recipe"] = replace(init["recipe"], **lists)  # JSON knows no tuples
        model = cls(**init)
        try:
            weights = load_file(folder / _WEIGHTS)
        except SafetensorError as error:
            raise DataError(f"{folder / _WEIGHTS} is damaged ({error}): copy or train the model again.") from None
        expected = {name: p.shape for name, p in model.trainable().items()}
        if {name: p.shape for name, p in weights.items()} != expected:
            odd = sorted(set(weights) ^ set(expected)) or [n for n in expected if weights[n].shape != expected[n]]
            raise DataError(f"{folder / _WEIGHTS} does not fit the recipe and towers in config.json: see {odd[0]}.")
        model.load_state_dict(weights, strict=False)
        return model


def parameter_groups(model: ClinVLA) -> list[dict]:
    """The paper's groups for AdamW (Table 1). Invertible adapters belong to a language, as in MAD-X, and go with the
    language adapters; heads, embeddings and scales go with the task adapters."""
    recipe = model.recipe
    language = {n: p for n, p in model.trainable().items() if ".language." in n or ".invertible." in n}
    task = [p for n, p in model.trainable().items() if n not in language]
    rates = ((list(language.values()), recipe.language_lr), (task, recipe.task_lr))
    return [{"params": params, "lr": lr, "weight_decay": recipe.weight_decay} for params, lr in rates if params]
