"""What one would write: a DataLoader with Pillow, and ClinVLA in timm's and transformers' own modules."""

import copy
import io
import json
import math
import random
import tarfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from bench.operations import caption_loop, plain_adapt, plain_contrastive, plain_invertible
from clinvla_fast import ClinVLA, restore
from clinvla_fast.data.shards import shard_paths
from clinvla_fast.data.tokenizer import tokenize_reports
from clinvla_fast.modeling.adapters import InvertibleAdapter, TransformerAdapt
from clinvla_fast.study import VIEWS


class PlainBatch(NamedTuple):
    """B studies; reports are padded to the longest."""

    images: Tensor  # uint8 [B, 4, H, W]
    present: Tensor  # bool [B, 4]
    words: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]
    labels: list[list[str]]

    @classmethod
    def of(cls, images: Tensor, present: Tensor, tokens: Tensor, lengths: Tensor, labels: list) -> "PlainBatch":
        words = pad_sequence(tokens.split(lengths.tolist()), batch_first=True)
        return cls(images, present, words, torch.arange(words.shape[1]) < lengths[:, None], labels)


class PlainStudies(Dataset):
    """Of a split: each file is read from its place in the tar file, and decoded by Pillow."""

    def __init__(self, root: Path, split: str, size: int, train: bool):
        self.size, self.train = size, train
        self.studies: list[dict[str, tuple[Path, int, int]]] = []
        for path in shard_paths(root, split):
            of_key: dict[str, dict] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, kind = member.name.partition(".")
                    of_key.setdefault(key, {})[kind] = path, member.offset_data, member.size
            self.studies += of_key.values()

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, dict]:
        files = self.studies[number]
        images = torch.zeros(len(VIEWS), self.size, self.size, dtype=torch.uint8)
        draws = [self.draw(), self.draw()]
        for slot, view in enumerate(VIEWS):
            if f"{view}.jpg" in files:
                images[slot] = self.image(self.read(*files[f"{view}.jpg"]), *draws[slot % 2])
        present = torch.tensor([f"{view}.jpg" in files for view in VIEWS])
        return images, present, json.loads(self.read(*files["json"]))

    @staticmethod
    def read(path: Path, offset: int, size: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def draw(self) -> tuple[tuple[float, ...], float, float]:
        size, angle, zoom = self.size, math.radians(random.uniform(-4, 4)), random.uniform(1, 1.1)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        x, y = (size / 2 + size * random.uniform(-0.03, 0.03) for _ in range(2))
        matrix = cos, sin, size / 2 - cos * x - sin * y, -sin, cos, size / 2 + sin * x - cos * y
        return matrix, random.uniform(0.9, 1.1), random.uniform(0.9, 1.1)

    def image(self, content: bytes, matrix: tuple[float, ...], brightness: float, contrast: float) -> Tensor:
        shape = self.size, self.size
        image = Image.open(io.BytesIO(content)).resize(shape, Image.Resampling.BILINEAR)
        if self.train:
            image = image.transform(shape, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            image = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(brightness)).enhance(contrast)
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(shape)


def plain_loader(
    root: Path, split: str, tokenizer: PreTrainedTokenizerFast, *, image_size: int, max_tokens: int, batch_size: int,
    train: bool = False,
) -> DataLoader:  # fmt: skip
    """Batches of a split, made by two worker processes."""

    def collate(studies: list[tuple[Tensor, Tensor, dict]]) -> PlainBatch:
        images, present, metas = zip(*studies, strict=True)
        words = tokenize_reports(tokenizer, [meta["report"] for meta in metas], max_tokens)
        return PlainBatch.of(torch.stack(images), torch.stack(present), *words, [meta["labels"] for meta in metas])

    return DataLoader(
        PlainStudies(root, split, image_size, train), batch_size, shuffle=train, drop_last=train, collate_fn=collate,
        num_workers=2, persistent_workers=train, multiprocessing_context="fork",
    )  # fmt: skip


def _end_of_layer(output: nn.Module, adapt: TransformerAdapt, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """What a BertOutput does, adapted."""
    return _adapted(adapt, output.dense(hidden_states), input_tensor, output.LayerNorm.weight, output.LayerNorm.bias)


def _adapted(adapt: TransformerAdapt, ffn: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
    return plain_adapt(ffn, residual, *(part.parts(ffn.dtype) for part in (adapt.language, adapt.task)), *norm)


def _inverted(adapter: InvertibleAdapter, x: Tensor) -> Tensor:
    return plain_invertible(x, adapter.f.parts(x.dtype), adapter.g.parts(x.dtype))


class PlainClinVLA(nn.Module):
    """A copy of a ClinVLA, its formulas written plainly: patches are chosen after all are embedded, reports padded, and
    the local loss loops over captions, as public code does."""

    def __init__(self, model: ClinVLA):
        super().__init__()
        self.model = restore(copy.deepcopy(model))
        text = self.model.text
        for layer, adapt in zip(text.bert.encoder.layer, text.adapts, strict=True):
            layer.output.forward = partial(_end_of_layer, layer.output, adapt)
        text.bert.embeddings.register_forward_hook(lambda module, told, out: _inverted(text.invertible, out))

    def encode_images(self, images: Tensor, present: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens of the n views that there are: [n, 1 + patches, width]."""
        vision, vit = self.model.vision, self.model.vision.vit
        mean, std = (x[:, None, None] for x in (vision.mean, vision.std))
        x = vit.patch_embed((images[present][:, None] / 255 - mean) / std) + vit.pos_embed[:, 1:]
        if kept is not None:
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        slots = (vision.time_embedding[:, None] + vision.view_embedding).flatten(0, 1)
        x = _inverted(vision.invertible, x + slots[present.nonzero()[:, 1]][:, None])
        for block, adapt in zip(vit.blocks, vision.adapts, strict=True):
            x = x + block.attn(block.norm1(x))
            x = _adapted(adapt, block.mlp(block.norm2(x)), x)
        return vit.norm(x)

    def encode_reports(self, batch: PlainBatch) -> Tensor:
        """Hidden states: [B, T, width]."""
        return self.model.text.bert(input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state

    def embed(self, batch: PlainBatch) -> tuple[Tensor, Tensor]:
        """Global embeddings of images and reports."""
        tokens = self.encode_images(batch.images, batch.present)
        return self._global_image(tokens, batch.present), self.model.text_global(self.encode_reports(batch)[:, 0])

    def loss(self, batch: PlainBatch, kept: Tensor | None) -> Tensor:
        """Of a batch whose studies all have a view and a report."""
        model, present = self.model, batch.present
        tokens, words = self.encode_images(batch.images, present, kept), self.encode_reports(batch)
        patches = model.image_local(tokens[:, 1:])
        local = patches.new_zeros(*present.shape, *patches.shape[1:])
        local[present] = patches
        seen = present[..., None].expand(*local.shape[:3]).flatten(1)
        columns, lengths = torch.arange(batch.words.shape[1]), batch.mask.sum(1, keepdim=True)
        read = (columns > 0) & (columns < lengths - 1)
        scale, *taus = model.objective.scales()
        found = plain_contrastive(self._global_image(tokens, present), model.text_global(words[:, 0]), scale)
        logits = caption_loop(local.flatten(1, 2), seen, model.text_local(words), read, *taus)
        own = torch.arange(len(logits))
        aligned = (cross_entropy(logits, own) + cross_entropy(logits.mT, own)) / 2
        return model.recipe.global_weight * found + model.recipe.local_weight * aligned

    def _global_image(self, tokens: Tensor, present: Tensor) -> Tensor:
        cls = tokens.new_zeros(*present.shape, tokens.shape[-1])
        cls[present] = tokens[:, 0]
        return self.model.image_global(cls.sum(1) / present.sum(1, keepdim=True))
