"""The operations at given shapes, forward and backward, and the formula of each as it would be written plainly."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, linear, logsigmoid, normalize, relu
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from clinvla_fast import ops
from clinvla_fast.kernels import contrastive, invertible_adapter, masked_patches, transformer_adapt

WIDTH, LOCAL, PATCHES, PATCH = 768, 128, 196, 16
TAUS = (4.0, 5.0, 10.0)


@dataclass
class Case:
    """An operation and its inputs; what it is compared with; and its fused operator, whose bytes are counted."""

    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    inputs: list
    compiled: Callable[..., Tensor] | None = None
    """`plain` by torch.compile, where that is not all of it at once."""
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = [x for x in tree_leaves(self.inputs) if isinstance(x, Tensor) and x.requires_grad]
        self.grad: Tensor | None = None

    def step(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The output and the gradients of it times something that is not all ones."""
        out = function(*self.inputs)
        if self.grad is None:
            self.grad = torch.randn_like(out)
        return out, *torch.autograd.grad(out, self.leaves, self.grad)


def shares(flops: int, moved: int, seconds: float, ceilings: dict[str, float]) -> dict[str, float]:
    """What is reached of a machine's ceilings."""
    return {
        "of_matrix_rate": flops / seconds / ceilings["flops_a_second"],
        "of_bandwidth": moved / seconds / ceilings["bytes_a_second"],
    }


class Make:
    """Cases on a device in a dtype."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, scale: float = 1.0, trained: bool = True) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype).requires_grad_(trained)

    def bottleneck(self, width: int, inner: int) -> ops.Bottleneck:
        down, up = self.normal(inner, width, scale=width**-0.5), self.normal(width, inner, scale=0.1 * inner**-0.5)
        return ops.Bottleneck(down, self.normal(inner, scale=0.02), up, self.normal(width, scale=0.02))

    def scalars(self, *values: float) -> list[Tensor]:
        return [torch.tensor(x, device=self.device, requires_grad=True) for x in values]

    def invertible(self, rows: int, inverse: bool = False) -> Case:
        inputs = [self.normal(rows, WIDTH), *(self.bottleneck(WIDTH // 2, WIDTH // 4) for _ in range(2)), inverse]
        return Case(ops.invertible_adapter, plain_invertible, invertible_adapter.triton, inputs)

    def adapt(self, rows: int, normed: bool) -> Case:
        norm = [self.normal(WIDTH), self.normal(WIDTH)] if normed else []
        adapters = self.bottleneck(WIDTH, 64), self.bottleneck(WIDTH, 64)
        inputs = [self.normal(rows, WIDTH), self.normal(rows, WIDTH), *adapters, *norm]
        return Case(ops.transformer_adapt, plain_adapt, transformer_adapt.triton, inputs)

    def embed(self, studies: int, trained: bool) -> Case:
        """Two views a study. A slot's embedding is trained even where the ViT is frozen."""
        of_vit = (WIDTH,), (1 + PATCHES, WIDTH), (WIDTH,)
        present = torch.ones(studies, 2, dtype=torch.bool, device=self.device)
        inputs = [
            torch.randint(0, 256, (studies, 2, 224, 224), dtype=torch.uint8, device=self.device),
            present,
            self.normal(WIDTH, 3, PATCH, PATCH, scale=1 / PATCH, trained=trained),
            *(self.normal(*shape, trained=trained) for shape in of_vit),
            self.normal(2, WIDTH),
            *(self.normal(3, trained=False).abs() + 0.2 for _ in range(2)),
            ops.draw_kept_patches(present, PATCHES, PATCHES // 4, seed=0)[0],
        ]

        def tokens(embed: Callable[..., masked_patches.PatchTokens]) -> Callable[..., Tensor]:
            return lambda *inputs: embed(*inputs).tokens

        return Case(tokens(ops.masked_patch_embed), plain_embed, tokens(masked_patches.triton), inputs)

    def align(self, studies: int) -> Case:
        """Two masked views' patches against reports of 128 words."""
        seen = torch.ones(studies, 2 * (PATCHES // 4), dtype=torch.bool, device=self.device)
        read = torch.ones(studies, 128, dtype=torch.bool, device=self.device)
        image, text = (self.normal(*mask.shape, LOCAL) for mask in (seen, read))
        inputs = [image, seen, text, read, *self.scalars(*TAUS)]
        if studies <= 256:
            return Case(ops.local_alignment, plain_align, fused_align, inputs)
        plain, compiled = (partial(in_turns, align) for align in (plain_align, torch.compile(plain_align)))
        return Case(ops.local_alignment, plain, fused_align, inputs, compiled)

    def contrast(self, pairs: int, sigmoid: bool) -> Case:
        inputs = [self.normal(pairs, LOCAL), self.normal(pairs, LOCAL), *self.scalars(1 / 0.07)]
        if sigmoid:
            inputs += self.scalars(-10.0)
            return Case(ops.sigmoid_contrastive, plain_sigmoid, contrastive.triton_sigmoid, inputs)
        return Case(ops.contrastive, plain_contrastive, contrastive.triton, inputs)


def plain_bottleneck(x: Tensor, p: ops.Bottleneck) -> Tensor:
    return linear(relu(linear(x, p.down_weight, p.down_bias)), p.up_weight, p.up_bias)


def plain_invertible(x: Tensor, f: ops.Bottleneck, g: ops.Bottleneck, inverse: bool = False) -> Tensor:
    first, second = x.chunk(2, -1)
    if inverse:
        second = second - plain_bottleneck(first, g)
        first = first - plain_bottleneck(second, f)
    else:
        first = first + plain_bottleneck(second, f)
        second = second + plain_bottleneck(first, g)
    return torch.cat([first, second], -1)


def plain_adapt(ffn: Tensor, residual: Tensor, language: ops.Bottleneck, task: ops.Bottleneck, *norm: Tensor) -> Tensor:
    def normed(x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], *norm, 1e-12) if norm else x

    hidden = ffn + plain_bottleneck(normed(ffn + residual), language)
    return normed(ffn + plain_bottleneck(hidden, task) + residual)


def plain_embed(images, present, weight, bias, position, cls, slot, mean, std, kept) -> Tensor:
    """Of views that are all there: the kept patches, normalised in three colours, through the projection."""
    patches = masked_patches.to_patches(images.flatten(0, 1), PATCH).flatten(1, 2).flatten(2)
    gray = patches.gather(1, kept[..., None].expand(-1, -1, PATCH**2)).to(weight.dtype)[:, :, None] / 255
    normal = (gray - mean[:, None]) / std[:, None]
    tokens = linear(normal.flatten(2), weight.flatten(1), bias) + position[1:][kept]
    tokens = torch.cat([(cls + position[0]).expand(len(kept), 1, -1), tokens], 1)
    return tokens + slot.repeat(len(images), 1)[:, None]


def plain_align(image, image_mask, text, text_mask, tau1, tau2, tau3) -> Tensor:
    """All pairs at once, in float32 as the result is."""
    image, text = image.float(), text.float()
    scores = torch.einsum("ind,jtd->ijnt", image, text).masked_fill(~text_mask[:, None], -torch.inf)
    attention = (tau1 * scores.softmax(-1)).masked_fill(~image_mask[:, None, :, None], -torch.inf).softmax(2)
    contexts = torch.einsum("ijnt,ind->ijtd", attention, image)
    similarity = torch.cosine_similarity(text, contexts, dim=-1)
    return tau3 * (tau2 * similarity).masked_fill(~text_mask, -torch.inf).logsumexp(-1)


def in_turns(align: Callable[..., Tensor], image, image_mask, text, text_mask, *taus) -> Tensor:
    """The same for 64 reports at a time, made again in the backward pass: all at once fits into no GPU's memory."""
    turns = zip(text.split(64), text_mask.split(64), strict=True)
    parts = [checkpoint(align, image, image_mask, *reports, *taus, use_reentrant=False) for reports in turns]
    return torch.cat(parts, 1)


def caption_loop(image, image_mask, text, text_mask, tau1, tau2, tau3) -> Tensor:
    """The same a caption at a time, with all images at once, as public code has it (GLoRIA, ALTA)."""
    columns = []
    for words, real in zip(text, text_mask, strict=True):
        words = words[real].expand(len(image), -1, -1)
        attention = torch.bmm(image, words.mT).softmax(-1)
        attention = (attention * tau1).masked_fill(~image_mask[..., None], -torch.inf).softmax(1)
        contexts = torch.bmm(attention.mT, image)
        similarity = torch.cosine_similarity(words, contexts, dim=-1)
        columns.append(torch.logsumexp(similarity * tau2, 1))
    return tau3 * torch.stack(columns, 1)


def fused_align(image, image_mask, text, text_mask, tau1, tau2, tau3) -> Tensor:
    return tau3 * torch.ops.clinvla_fast.local_alignment(image, image_mask, text, text_mask, tau1, tau2)


def plain_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * normalize(image, dim=-1) @ normalize(text, dim=-1).mT
    own = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.mT, own)) / 2


def plain_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * normalize(image, dim=-1) @ normalize(text, dim=-1).mT + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -logsigmoid(signs * logits).sum() / len(logits)
