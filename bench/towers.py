"""Towers of the published size, seeded: those of timm and transformers as people run them, and ours; what is encoded,
and a pretraining step of each.

Encoding: two whole views and a report of real length; the plain way normalises pixels and pads reports to 128 words.
Pretraining step: frozen towers, adapters, kept patches and real lengths, against training both towers end to end,
embedding every patch (then keeping a quarter, or all of them) and padding. In bfloat16 the plain way is autocast.
"""

import copy
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from clinvla_fast import Recipe, ops
from clinvla_fast.modeling.frozen import freeze
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.modeling.text import TextTower
from clinvla_fast.modeling.vision import VisionTower
from clinvla_fast.twins import accelerate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS, PADDED, PATCHES = 2, 128, 196
LENGTHS = (36, 54, 70, 97)  # word pieces of Open-i's 3,955 reports, cleaned: a mean of 64


@dataclass
class Batch:
    images: Tensor
    present: Tensor
    words: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, studies: int, device: str = "cpu") -> "Batch":
        """Random pixels and words; reports of real lengths."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (studies, VIEWS, 224, 224), generator=generator, dtype=torch.uint8)
        words = torch.randint(1000, 20000, (studies, PADDED), generator=generator)
        present = torch.ones(studies, VIEWS, dtype=torch.bool, device=device)
        lengths = torch.tensor((LENGTHS * studies)[:studies])
        return cls(images.to(device), present, words.to(device), lengths)

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


def plain_towers() -> nn.ModuleDict:
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="token")
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return nn.ModuleDict({"vit": vit, "bert": BertModel(config, add_pooling_layer=False)})


def our_towers(plain: nn.ModuleDict, dtype: torch.dtype, adapters: bool) -> nn.ModuleDict:
    towers = copy.deepcopy(plain)
    vision, text = VisionTower(towers["vit"], MEAN, STD), TextTower(towers["bert"])
    for tower, frozen in ((vision, vision.vit), (text, text.bert)):
        freeze(frozen, dtype)
        if adapters:
            tower.add_adapters(Recipe())
    return accelerate(nn.ModuleDict({"vision": vision, "text": text}))


def plain_encoding(towers: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Tensor]:
    words = towers["bert"](input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state
    return towers["vit"].forward_features(batch.pixels), words


def our_encoding(towers: nn.ModuleDict, batch: Batch, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    packing = Packing.of(batch.lengths, batch.words.device)
    return towers["vision"](batch.images, batch.present, kept), towers["text"](batch.words[batch.mask], packing)


def plain_step(towers: nn.ModuleDict, batch: Batch, kept: Tensor | None) -> None:
    vit = towers["vit"]
    x = vit.patch_embed(batch.pixels) + vit.pos_embed[:, 1:]
    if kept is not None:
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    words = towers["bert"](input_ids=batch.words, attention_mask=batch.mask.long()).last_hidden_state
    finish(towers, vit.norm(vit.blocks(x))[:, 0], words[:, 0])


def our_step(towers: nn.ModuleDict, batch: Batch, kept: Tensor) -> None:
    image, words = our_encoding(towers, batch, kept)
    finish(towers, image[:, 0], words[batch.lengths.cumsum(0) - batch.lengths])


def finish(towers: nn.ModuleDict, image: Tensor, text: Tensor) -> None:
    """A contrastive loss, its gradients and AdamW; the same for all."""
    image = normalize(image.float().unflatten(0, (-1, VIEWS)).mean(1), dim=-1)
    ops.contrastive(image, normalize(text.float(), dim=-1), torch.tensor(10.0, device=image.device)).backward()
    parameters = [p for p in towers.parameters() if p.grad is not None]
    torch.optim.AdamW(parameters, lr=1e-6).step()
    towers.zero_grad(set_to_none=True)
