"""The image tower: a timm VisionTransformer with adapters in it, fed with the kept patches of present views."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .. import ops
from ..recipe import Recipe
from ..study import VIEWS
from .adapters import InvertibleAdapter, TransformerAdapt, add_adapters
from .checkpoints import KeyReport, take_adapters


def vision_block(block: nn.Module, adapt: TransformerAdapt, x: Tensor) -> Tensor:
    """A pre-norm timm block, adapted: tokens [n, 1 + k, H] to the same."""
    x = adapt.attend(block.drop_path1(block.ls1(block.attn(block.norm1(x)))), x)
    source = block.norm2(x)
    ffn = block.drop_path2(block.ls2(block.mlp(source)))
    return adapt(ffn, x, source)


class VisionTower(nn.Module):
    """A timm ViT that encodes each present view of a study on its own.

    Each view slot has a learned embedding: one for its projection (frontal, lateral) plus one for its time (current,
    prior). They start at zero, as adapters do.

    Args:
        vit: with a class token, absolute positions and one final norm, as timm's vit_*_patch16_224 have them.
        mean, std: of the pixels in 0..1 that the ViT expects, one a channel.

    Raises:
        ValueError: if the ViT is built otherwise.
    """

    key_report: KeyReport | None = None
    """What became of every key of the file that it was read from; None where a library has read it."""

    def __init__(self, vit: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        if vit.cls_token is None or vit.num_prefix_tokens != 1 or vit.pos_embed is None or vit.no_embed_class:
            raise ValueError("expected a ViT with a class token, no registers and absolute positions for every token.")
        if isinstance(vit.norm, nn.Identity) or not isinstance(vit.norm_pre, nn.Identity):
            raise ValueError("expected a ViT with one norm after its last block: pass global_pool='token'.")
        self.vit = vit
        self.adapts = nn.ModuleList(TransformerAdapt(vit.embed_dim) for _ in vit.blocks)
        self.run_block = vision_block  # or its compiled twin
        self.invertible: InvertibleAdapter | None = None
        self.found_adapters: dict[str, tuple[str, Tensor]] = {}  # in its file: see `alta_adapters`
        self.view_embedding = nn.Parameter(torch.zeros(2, vit.embed_dim))
        self.time_embedding = nn.Parameter(torch.zeros(2, vit.embed_dim))
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def add_adapters(self, recipe: Recipe) -> None:
        self.invertible = add_adapters(self.adapts, recipe, self.width)
        take_adapters(self, recipe)
        if recipe.adapter_blocks is not None and min(recipe.adapter_blocks) > 0:
            self.view_embedding.requires_grad_(False)
            self.time_embedding.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.vit.embed_dim

    @property
    def patches(self) -> int:
        """Patches of an unmasked view."""
        return self.vit.patch_embed.num_patches

    @property
    def patch_size(self) -> int:
        return self.vit.patch_embed.patch_size[0]

    @property
    def image_size(self) -> int:
        return self.vit.patch_embed.img_size[0]

    def forward(self, images: Tensor, present: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """Tokens of every present view, after the last norm.

        Args:
            images: uint8 [B, V, H, W], V up to 4 in the order of StudyBatch.
            present: bool [B, V], n of them True; None: all.
            kept: int64 [n, k] patches that each present view keeps; None keeps all.

        Returns:
            [n, 1 + k, width], CLS first, views in row-major order of `present`.

        Raises:
            ValueError: if the images are not V x image_size x image_size.
        """
        if images.shape[1] > len(VIEWS) or images.shape[2:] != (self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"images are {tuple(images.shape)}: expected [B, up to {len(VIEWS)}, {size}, {size}].")
        vit = self.vit
        slots = (self.time_embedding[:, None] + self.view_embedding).flatten(0, 1)[: images.shape[1]]
        weights = vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, vit.pos_embed[0], vit.cls_token[0, 0]
        others = (x.to(weights[0].dtype) for x in (slots, self.mean, self.std))
        x = ops.masked_patch_embed(images, present, *weights, *others, kept).tokens
        if self.invertible is not None:
            x = self.invertible(x)
        for block, adapt in zip(vit.blocks, self.adapts, strict=True):
            x = self.run_block(block, adapt, x)
        return vit.norm(x)
