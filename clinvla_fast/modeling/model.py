"""ClinVLA: two frozen towers, the adapters in them, and heads into a shared space."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from .. import ops
from ..errors import DataError
from ..objectives import Alignment
from ..recipe import Optimization, Recipe
from ..run import replacing
from ..study import VIEWS, Embeddings, StudyBatch
from ..twins import swap
from .encoding import Encoding
from .frozen import freeze, run_in
from .masked_modeling import ImageDecoder, WordHead, draw_masked_words, masked_words, patch_errors
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


class ClinVLA(nn.Module, Encoding, PyTorchModelHubMixin, library_name="clinvla-fast", license="apache-2.0"):
    """Two towers in a shared space, as a recipe has them: by default ClinVLA (Hao et al. 2025, section 3), its towers
    frozen and fast, its adapters new.

    `clinvla_fast.restore(model)` gives the reference: timm's and transformers' modules as they are.

    Args:
        vision: an image tower: see `load_vision`.
        text: a report tower: see `load_text`.
        recipe: which adapters, of which size; what else is trained; the shared width; the losses.
        dtype: what the towers compute in, and are stored in where they are frozen; None: as they were saved. All that
            is trained, and what comes out, is float32 (but local embeddings, which are the many, are in dtype).

    Raises:
        TowerUnavailable: if a tower's weights cannot be had.
        ValueError: if the recipe does not fit the towers.
    """

    def __init__(self, vision: str, text: str, recipe: Recipe | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.recipe, self.dtype = recipe or Recipe(), dtype
        self.tower_names = {"vision": str(vision), "text": str(text)}
        self.vision = load_vision(str(vision))
        self.text, self.tokenizer = load_text(str(text))
        for tower in (self.vision.vit, self.text.bert):
            freeze(tower, dtype, self.recipe.trained)
            swap(tower)
        self.vision.add_adapters(self.recipe)
        self.text.add_adapters(self.recipe)
        self._freeze_below(self.recipe)
        self._add_heads(self.recipe)
        self._add_decoders(self.recipe)
        self.eval()

    def _freeze_below(self, recipe: Recipe) -> None:
        """What lies below the lowest block with adapters, so that no backward pass goes there."""
        lowest = min(recipe.adapter_blocks or (0,))
        if lowest and "towers" not in recipe.trained:
            vit, bert = self.vision.vit, self.text.bert
            for part in (*vit.blocks[:lowest], vit.patch_embed, bert.embeddings, *bert.encoder.layer[:lowest]):
                part.requires_grad_(False)
            vit.cls_token.requires_grad_(False)

    def _add_heads(self, recipe: Recipe) -> None:
        """A head for each embedding that has a loss: the others would never be trained."""
        self.image_global = self.image_local = self.text_global = self.text_local = None
        if recipe.global_weight:
            self.image_global = ProjectionHead(self.vision.width, recipe.width)
        if recipe.local_weight:
            self.image_local = ProjectionHead(self.vision.width, recipe.width)
        if recipe.global_weight:
            self.text_global = ProjectionHead(self.text.width, recipe.width)
        if recipe.local_weight:
            self.text_local = ProjectionHead(self.text.width, recipe.width)
        self.objective = Alignment(recipe)
        self.missing = nn.Parameter(torch.zeros(len(VIEWS), self.vision.width)) if recipe.missing_views else None
        if self.missing is not None and not recipe.global_weight:
            self.missing.requires_grad_(False)

    def _add_decoders(self, recipe: Recipe) -> None:
        self.decoder = self.word_head = self.image_to_words = None
        if recipe.image_weight:
            vision, pixels = self.vision, (self.vision.patch_size * recipe.target_scale) ** 2
            self.decoder = ImageDecoder(vision.width, vision.patches, pixels, recipe.decoder_blocks, vision.width)
            for part in (self.decoder.blocks, self.decoder.norm):
                part.requires_grad_(recipe.train_decoder)
        if recipe.word_weight:
            self.word_head = WordHead(self.text.width, self.text.word_embeddings.num_embeddings)
            if recipe.image_in_words != "none":
                self.image_to_words = nn.Linear(self.vision.width, self.text.width)

    def train(self, mode: bool = True) -> "ClinVLA":
        """Towers stay in evaluation mode: their dropout is not ours to use."""
        super().train(mode)
        self.vision.vit.eval()
        self.text.bert.eval()
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that is learned here, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DistributedDataParallel asks for this name: it would send every frozen weight before each forward pass."""
        return [name for name, _ in self.named_buffers(remove_duplicate=False)]

    @torch.no_grad()
    def standardise_heads(self, batch: StudyBatch) -> None:
        """Fit the scale of new heads to the towers' features of one batch of at least two studies, all with a view."""
        images, present = self._seen(batch.images, batch.present)
        packing = Packing.of(batch.lengths, batch.tokens.device)
        tokens, hidden = self._image_tokens(images, present, None), self._words(batch.tokens, packing)
        if self.image_global is not None:
            self.image_global.standardise(self._mean_cls(tokens, present))
            self.text_global.standardise(hidden[packing.first])
        if self.image_local is not None:
            self.image_local.standardise(tokens[:, 1:].flatten(0, 1))
            self.text_local.standardise(hidden)

    def forward(self, batch: StudyBatch, mask_seed: int | None = None) -> Embeddings:
        """Embeddings of a batch; with a seed, from the share of patches that the recipe keeps, drawn by it."""
        images, present = self._seen(batch.images, batch.present)
        tokens = self._image_tokens(images, present, self._draw(present, mask_seed))
        return Embeddings(*self._image_side(tokens, present), *self.embed_reports(batch.tokens, batch.lengths))

    def train_on(self, batch: StudyBatch, seed: int, reconstruct: bool = True) -> tuple[Embeddings, dict[str, Tensor]]:
        """Masked embeddings of a batch or a part of one, and the losses of what the recipe has reconstructed: sums over
        as many patches or words as `reconstructed` says.

        Args:
            seed: of all that is drawn, for each study by its row in the whole batch.
            reconstruct: False leaves the losses out.
        """
        images, present = self._seen(batch.images, batch.present)
        kept = self._draw(present, seed, batch.row)
        tokens = self._image_tokens(images, present, kept)
        losses = {}
        if reconstruct and self.decoder is not None:
            losses["image"] = self._image_error(batch.images, present, tokens, kept)
        if reconstruct and self.word_head is not None:
            losses["word"] = self._word_error(batch, present, tokens, seed)
        if self.aligns:
            text = self.embed_reports(batch.tokens, batch.lengths)
        else:  # no loss asks for them
            none = tokens.new_zeros(len(present), 0)
            text = none, none[:, None], torch.zeros_like(present[:, :1])
        return Embeddings(*self._image_side(tokens, present), *text), losses

    def reconstructed(self, batch: StudyBatch) -> dict[str, int]:
        """How many patches and words of a batch are reconstructed, each where the recipe weighs them."""
        found, patches = {}, self.vision.patches
        if self.decoder is not None:
            found["image"] = int(batch.present[:, 0].sum()) * (patches - round(self.recipe.keep * patches))
        if self.word_head is not None:
            found["word"] = sum(masked_words(n, self.recipe.masked_words) for n in batch.lengths.tolist())
        return found

    def _seen(self, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Images at the tower's size, and the views that the recipe looks at."""
        size = self.vision.image_size
        if images.shape[-1] == size * self.recipe.target_scale != size:
            images = avg_pool2d(images.float(), self.recipe.target_scale).round().to(images.dtype)
        looked_at = torch.tensor([view in self.recipe.views for view in VIEWS], device=present.device)
        return images, present & looked_at[: present.shape[1]]

    def _draw(self, present: Tensor, seed: int | None, row: int = 0) -> Tensor | None:
        """The patches that present views keep; None for all. What is drawn depends on the row: those before it are
        taken for studies without views."""
        if seed is None or self.recipe.keep == 1:
            return None
        patches = self.vision.patches
        present = torch.cat([present.new_zeros(row, present.shape[1]), present])
        return ops.draw_kept_patches(present, patches, round(self.recipe.keep * patches), seed)[0]

    def _image_tokens(self, images: Tensor, present: Tensor, kept: Tensor | None) -> Tensor:
        return run_in(self.dtype, self.vision, "vit", images, present, kept)

    def _words(self, tokens: Tensor, packing: Packing, added: Tensor | None = None) -> Tensor:
        return run_in(self.dtype, self.text, "bert", tokens, packing, added)

    def _image_error(self, images: Tensor, present: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
        """Of the current frontal views, as ALTA has it; of masked patches (MAE, He et al. 2022)."""
        frontal = present.nonzero()[:, 1] == 0
        tokens, kept, views = tokens[frontal], kept[frontal], images[present[:, 0], 0]
        if self.vision.invertible is not None:
            tokens = self.vision.invertible.inverse(tokens)
        return patch_errors(self.decoder(tokens, kept), views, kept, views.shape[-1] // self._grid)

    @property
    def _grid(self) -> int:
        return self.vision.image_size // self.vision.patch_size

    def _word_error(self, batch: StudyBatch, present: Tensor, tokens: Tensor, seed: int) -> Tensor:
        """Cross-entropies of masked words (BERT), which see the image where the recipe says so (ALTA, MRM)."""
        masked = draw_masked_words(batch.lengths, self.recipe.masked_words, seed, batch.row).to(batch.tokens.device)
        packing, added = Packing.of(batch.lengths, batch.tokens.device), None
        if self.image_to_words is not None:
            mean = self._mean_cls if self.recipe.image_in_words == "cls" else self._mean_patches
            added = self.image_to_words(mean(tokens, present))
        hidden = self._words(batch.tokens.index_fill(0, masked, self.tokenizer.mask_token_id), packing, added)[masked]
        if self.text.invertible is not None:
            hidden = self.text.invertible.inverse(hidden)
        weight = self.text.word_embeddings.weight.to(self.word_head.bias.dtype)
        logits = self.word_head(hidden.to(weight.dtype), weight)
        return cross_entropy(logits, batch.tokens[masked], reduction="sum")

    def embed_images(
        self, images: Tensor, present: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The image side of Embeddings. Global: from the mean of the present views' CLS; local: all their patches.

        Args: as VisionTower.
        """
        images, present = self._seen(images, present)
        return self._image_side(self._image_tokens(images, present, kept), present)

    def _image_side(self, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views = present.sum(1)
        packing = Packing.of(views.cpu(), tokens.device)
        mask = packing.mask.repeat_interleave(tokens.shape[1] - 1, 1)
        if self.image_local is None:
            local = tokens.new_zeros(*mask.shape, 0)
        else:
            local = packing.pad(self.image_local(tokens[:, 1:]).to(tokens.dtype)).flatten(1, 2)
        if self.image_global is not None:
            pooled = self.image_global(self._mean_cls(tokens, present))
        else:
            pooled = self._mean_patches(tokens, present) if self.image_local is None else _masked_mean(local, mask)
        return pooled * (views > 0)[:, None], local, mask

    def image_features(self, batch: StudyBatch) -> Tensor:
        """What the image heads see of a study, whole views and CLS alone: [B, width]."""
        images, present = self._seen(batch.images, batch.present)
        return self._mean_cls(self._image_tokens(images, present, None), present)

    def patch_features(self, batch: StudyBatch) -> Tensor:
        """Patch tokens of the n current frontal views, whole, row by row of patches: [n, patches, width]."""
        images, present = self._seen(batch.images[:, :1], batch.present[:, :1])
        return self._image_tokens(images, present, None)[:, 1:]

    def text_features(self, batch: StudyBatch) -> Tensor:
        """What the report heads see of a study, CLS alone: [B, width]."""
        packing = Packing.of(batch.lengths, batch.tokens.device)
        return self._words(batch.tokens, packing)[packing.first]

    def _mean_cls(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Mean CLS token of each study's views: [B, width], zero without a view. A recipe may have a learned token for
        each missing view of those it looks at."""
        if self.missing is None:
            return _mean_of_views(tokens[:, 0], present)
        sums = _mean_of_views(tokens[:, 0], present) * present.sum(1)[:, None]
        columns = [column for column, view in enumerate(VIEWS) if view in self.recipe.views]
        absent = ~pad(present, (0, len(VIEWS) - present.shape[1]))[:, columns]
        return (sums + absent.to(sums.dtype) @ self.missing[columns]) / len(columns)

    @staticmethod
    def _mean_patches(tokens: Tensor, present: Tensor) -> Tensor:
        """Mean patch token of each study's views: [B, width], zero without a view."""
        return _mean_of_views(_wide(tokens[:, 1:]).mean(1), present)

    def embed_reports(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The report side of Embeddings. Global: CLS; local: every word piece but CLS and SEP.

        Args: as StudyBatch.
        """
        packing = Packing.of(lengths, tokens.device)
        hidden = self._words(tokens, packing)
        columns = torch.arange(packing.mask.shape[1], device=tokens.device)
        words = (columns > 0) & (columns < (lengths.to(tokens.device) - 1)[:, None])
        cls = hidden[packing.first]
        if self.text_local is None:
            local = hidden.new_zeros(*words.shape, 0)
        else:
            local = packing.pad(self.text_local(hidden).to(hidden.dtype))
        if self.text_global is not None:
            return self.text_global(cls), local, words
        return _wide(cls) if self.text_local is None else _masked_mean(local, words), local, words

    @property
    def device(self) -> torch.device:
        return self.objective.log_scales.device

    @property
    def training_size(self) -> int:
        """Side of the images that training needs: finer than the tower's where finer ones are reconstructed."""
        return self.vision.image_size * (self.recipe.target_scale if self.decoder is not None else 1)

    @property
    def aligns(self) -> bool:
        """Whether the recipe has a loss between images and reports."""
        return bool(self.recipe.global_weight or self.recipe.local_weight)

    @property
    def width(self) -> int:
        """Of the embeddings: the shared space's, or, where a recipe aligns nothing, the image tower's own."""
        return self.recipe.width if self.aligns else self.vision.width

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
        weights = save({name: p.detach().cpu().contiguous() for name, p in self.named_parameters()})
        with replacing(save_directory / _WEIGHTS) as partial:
            partial.write_bytes(weights)

    @classmethod
    def _from_pretrained(
        cls, *, model_id, revision, cache_dir, force_download, local_files_only, token, **init
    ) -> "ClinVLA":
        # huggingface_hub before 1.0, which transformers 4 needs, hands over two more.
        older = {name: init.pop(name) for name in ("proxies", "resume_download") if name in init}
        folder = Path(model_id)
        if not folder.is_dir():
            options = {"revision": revision, "cache_dir": cache_dir, "force_download": force_download, **older}
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
        known = {name: p.shape for name, p in model.named_parameters()}
        odd = sorted(weights.keys() ^ known.keys())
        odd += [name for name in weights if name in known and weights[name].shape != known[name]]
        if odd:
            raise DataError(f"{folder / _WEIGHTS} does not fit the recipe and towers in config.json: see {odd[0]}.")
        model.load_state_dict(weights, strict=False)
        return model


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_of_views(x: Tensor, present: Tensor) -> Tensor:
    """Means over a study's views, of which x [n, width] has one row each: [B, width]."""
    x = _wide(x)
    sums = x.new_zeros(len(present), x.shape[-1]).index_add(0, present.nonzero()[:, 0], x)
    return sums / present.sum(1).clamp(min=1)[:, None]


def _masked_mean(local: Tensor, mask: Tensor) -> Tensor:
    """Mean of the rows [B, n, D] that count: where no global loss is trained, what stands for the whole."""
    return _wide(local).masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1).clamp(min=1)[:, None]


def parameter_groups(trained: Mapping[str, nn.Parameter], optimization: Optimization) -> list[dict]:
    """The paper's groups for AdamW (Table 1). Invertible adapters belong to a language, as in MAD-X, and go with the
    language adapters; heads, embeddings and scales go with the task adapters; what is trained of the towers has a rate
    of its own."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in trained.items():
        if ".language." in name or ".invertible." in name:
            lr = optimization.language_lr
        else:
            lr = optimization.tower_lr if name.startswith(("vision.vit.", "text.bert.")) else optimization.task_lr
        decay = optimization.weight_decay if p.ndim > 1 or optimization.decay_vectors else 0.0
        groups.setdefault((lr, decay), []).append(p)
    return [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]
