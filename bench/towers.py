"""Towers of the published size, seeded: those of timm and transformers as people run them, and ours; what is encoded,
and a pretraining step of each.

Encoding: two views and a report of real length; the plain way normalises pixels, embeds every patch and pads reports to
128 words. Pretraining step: frozen towers, adapters, kept patches and real lengths, against training both towers end to
end, embedding every patch (then keeping a quarter, or all of them) and padding. In bfloat16 the plain way is autocast.
"""

import copy
from dataclasses import dataclass
from functools import cache

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from bench.operations import plain_bottleneck
from clinvla_fast import Recipe, ops
from clinvla_fast.modeling.adapters import Bottleneck
from clinvla_fast.modeling.frozen import freeze, run_in
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.vision import VisionTower
from clinvla_fast.recipe import Trained
from clinvla_fast.twins import accelerate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS, PADDED, PATCHES = 2, 128, 196
LENGTHS = (36, 54, 70, 97)  # word pieces of Open-i's 3,955 reports, cleaned: a mean of 64


@dataclass
class Batch:
    """Studies; `tokens` are the words without padding, as a loader gives them to ours, and `packing` where they lie."""

    images: Tensor
    present: Tensor
    words: Tensor
    lengths: Tensor
    tokens: Tensor | None = None
    packing: Packing | None = None

    @classmethod
    def of(cls, studies: int, device: str = "cpu", lengths: tuple[int, ...] = LENGTHS) -> "Batch":
        """Random pixels and words; reports of these lengths in turn, of their mean where studies are fewer."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (studies, VIEWS, 224, 224), generator=generator, dtype=torch.uint8)
        drawn = torch.randint(1000, 20000, (studies, PADDED), generator=generator).to(device)
        present = torch.ones(studies, VIEWS, dtype=torch.bool, device=device)
        if studies < len(lengths):
            lengths = (sum(lengths) // len(lengths),)
        batch = cls(images.to(device), present, drawn, torch.tensor((lengths * studies)[:studies]))
        batch.tokens, batch.packing = drawn[batch.mask], Packing.of(batch.lengths, device)
        return batch

    @property
    def mask(self) -> Tensor:
        return (torch.arange(PADDED) < self.lengths[:, None]).to(self.words.device)

    @property
    def pixels(self) -> Tensor:
        mean, std = (torch.tensor(x, device=self.images.device).view(1, 3, 1, 1) for x in (MEAN, STD))
        return (self.images.flatten(0, 1)[:, None] / 255 - mean) / std

    def kept(self) -> Tensor:
        """A quarter of the patches of each view."""
        return ops.draw_kept_patches(self.present, PATCHES, PATCHES // 4, seed=0)[0]


def plain_towers(vit: str = "vit_base_patch16_224", width: int = 768, depth: int = 12) -> nn.ModuleDict:
    """A ViT, and a BERT of the same width and depth."""
    return copy.deepcopy(_drawn(vit, width, depth))


@cache
def _drawn(vit: str, width: int, depth: int) -> nn.ModuleDict:
    """Weights, which take seconds to draw."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
    config = BertConfig(**sizes, intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    image = timm.create_model(vit, depth=depth, num_classes=0, global_pool="token")
    return nn.ModuleDict({"vit": image, "bert": BertModel(config, add_pooling_layer=False)})


def our_towers(
    plain: nn.ModuleDict, dtype: torch.dtype, adapters: bool, trained: tuple[Trained, ...] = ()
) -> nn.ModuleDict:
    """Of a copy of the plain ones' weights, frozen but for what is `trained`."""
    towers, device = copy.deepcopy(plain), next(plain.parameters()).device
    vision, text = VisionTower(towers["vit"], MEAN, STD), TextTower(towers["bert"])
    for tower, frozen in ((vision, vision.vit), (text, text.bert)):
        freeze(frozen, dtype, trained)
        if adapters:
            tower.add_adapters(Recipe())
    return accelerate(nn.ModuleDict({"vision": vision, "text": text}).to(device))


class _Adapted(nn.Module):
    """A layer with two adapters behind it, one after the other."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer, self.adapters = layer, nn.ModuleList(Bottleneck(width, Recipe().bottleneck) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for adapter in self.adapters:
            x = x + plain_bottleneck(x, adapter.parts(x.dtype))
        return x


def with_plain_adapters(plain: nn.ModuleDict) -> nn.ModuleDict:
    """A frozen copy with adapters in plain PyTorch behind the feed-forward network of every block."""
    towers = copy.deepcopy(plain).requires_grad_(False)
    for block in towers["vit"].blocks:
        block.mlp = _Adapted(block.mlp, towers["vit"].embed_dim)
    for layer in towers["bert"].encoder.layer:
        layer.output.dense = _Adapted(layer.output.dense, towers["vit"].embed_dim)
    return towers.to(next(plain.parameters()).device)


def compiled(plain: nn.ModuleDict) -> nn.ModuleDict:
    """A copy that torch.compile compiles, block by block."""
    towers = copy.deepcopy(plain)
    for block in (*towers["vit"].blocks, *towers["bert"].encoder.layer):
        block.compile()
    return towers


def plain_images(vit: VisionTransformer, pixels: Tensor, kept: Tensor | None) -> Tensor:
    """Tokens of every view, of which all patches are embedded and those are kept that are asked for."""
    if kept is None:
        return vit.forward_features(pixels)
    x = vit.patch_embed(pixels) + vit.pos_embed[:, 1:]
    x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    return vit.norm(vit.blocks(x))


def plain_encoding(towers: nn.ModuleDict, batch: Batch, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    words = towers["bert"](input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state
    pixels = batch.pixels.to(towers["vit"].patch_embed.proj.weight.dtype)
    return plain_images(towers["vit"], pixels, kept), words


def our_encoding(
    towers: nn.ModuleDict, batch: Batch, kept: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """dtype: for towers whose weights are trained in float32 and compute in another."""
    image = run_in(dtype, towers["vision"], "vit", batch.images, batch.present, kept)
    return image, run_in(dtype, towers["text"], "bert", batch.tokens, batch.packing)


def plain_step(towers: nn.ModuleDict, batch: Batch, kept: Tensor | None) -> None:
    image, words = plain_encoding(towers, batch, kept)
    finish(towers, image[:, 0], words[:, 0])


def our_step(towers: nn.ModuleDict, batch: Batch, kept: Tensor, dtype: torch.dtype | None = None) -> None:
    image, words = our_encoding(towers, batch, kept, dtype)
    finish(towers, image[:, 0], words[batch.packing.first])


def finish(towers: nn.ModuleDict, image: Tensor, text: Tensor) -> None:
    """A contrastive loss, its gradients and AdamW; the same for all."""
    image = normalize(image.float().unflatten(0, (-1, VIEWS)).mean(1), dim=-1)
    ops.contrastive(image, normalize(text.float(), dim=-1), torch.tensor(10.0, device=image.device)).backward()
    parameters = [p for p in towers.parameters() if p.grad is not None]
    torch.optim.AdamW(parameters, lr=1e-6).step()
    towers.zero_grad(set_to_none=True)
