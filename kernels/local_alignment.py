"""Local alignment (the local loss of GLoRIA and ALTA; ClinVLA's L_local): every image scored against every report.

For image i with patch features C [N, D] and report j with word features W [T, D]:

    S    = C W^T                              [N, T], not normalised
    A    = softmax_n(tau1 * softmax_t(S))     over the words, then over the patches
    c_t  = sum_n A[n, t] C[n]                 what the image shows of word t
    s    = log sum_t exp(tau2 * cos(W[t], c_t))
    logit(i, j) = tau3 * s(i, j)

Two identities save work: cos does not see the length of c_t, so A needs no denominator; and W[t] . c_t is the sum over
n of A[n, t] S[n, t], so the products of S serve twice.

Reference: images and reports of about one length, in blocks small enough for a CPU's cache and cut to the longest of
each; a block is recomputed in the backward pass. Little padding is computed, and what is held does not grow with the
batch.

Kernels: a program holds a tile of a report's words and streams an image's patches past it, as attention streams keys
past queries; S exists a tile at a time. The softmax over the words lies inside a tile (when there are more words than
a tile holds, its log-sum-exp is found first), the one over the patches is carried along. The backward pass needs the
scores s and nothing else: it rebuilds the contexts, and from d c_t

    d S = P * (d P - sum_t P * d P),   P = softmax_t(S),   d P = tau1 * E * (C d c^T),   E = exp(tau1 P - max_n)
    d C = E d c + d S W,   d W = d S^T C + d cos_t / d W

with no term for A's denominator, which cos does not see either. A program adds to sums that are its own, and the sums
of all programs are added up afterwards: no atomics, the same bits every time.

Rounding: two chained softmaxes amplify it, so all is held to fp32 limits, bf16 features too. Their products are exact
in fp32; where the other operand is computed (E, d c, d S), it goes through the tensor cores in two bf16 terms. fp32
features (and fp16, summed as such) go through in three tf32 products. An operand as wide as the features does not fit
the registers then, so the products over the width are cut along it, and contexts wait in memory between two of them.
"""

import math
from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from triton import cdiv, jit, next_power_of_2

from .launch import INTERPRETED, launch, summed_in
from .onednn import bmm, matmul, over_rows
from .traffic import nbytes, register_byte_formula

_BLOCK_ELEMENTS = 1 << 19  # of a block's S: what a CPU's cache holds
_DENSE_ELEMENTS = 1 << 17  # of all pairs' S: up to here, calls cost more than what they compute
_KEPT_ELEMENTS = 1 << 24  # up to here, the backward pass has what the forward pass made
_PADDED = 1.25  # the longest of a block is at most so many times its shortest
_MASKED = -1e30  # S of a word that is none: its share is 0, and it times 0 is 0
_WIDEST, _DTYPES = 128, (torch.bfloat16, torch.float16, torch.float32)
_CHUNK = tl.constexpr(32)  # of the width, where all of it does not fit the registers
_LOG2_E = math.log2(math.e)


def _real(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and gradients: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor) -> None:
    """Raise ValueError unless features and masks fit each other."""
    if image.ndim != 3 or text.ndim != 3 or image.shape[-1] != text.shape[-1]:
        raise ValueError(
            f"image and text are {tuple(image.shape)} and {tuple(text.shape)}, {image.shape[-1]} and {text.shape[-1]} "
            "wide: expected [I, N, D] and [J, T, D]."
        )
    for name, mask, features in (("image_mask", image_mask, image), ("text_mask", text_mask, text)):
        if mask.shape != features.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"{name} is {tuple(mask.shape)}: expected {tuple(features.shape[:2])} of bool, got {mask.dtype}."
            )
    if image.dtype != text.dtype:
        raise ValueError(f"image is {image.dtype} and text {text.dtype}: expected one dtype.")


def word_attention(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor | float) -> Tensor:
    """A of matched pairs, patches [..., N, D] and words [..., T, D]: [..., N, T] in float32 (float64 of float64), as
    its two softmaxes amplify rounding; each word's weights sum to 1."""
    image, text = (x.to(_real(x.dtype)) for x in (image, text))
    scores = (image @ text.mT).masked_fill(~text_mask.unsqueeze(-2), -torch.inf)
    weights = tau1 * scores.softmax(-1)
    return weights.masked_fill(~image_mask.unsqueeze(-1), -torch.inf).softmax(-2)


def word_contexts(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor | float) -> Tensor:
    """c_t of matched pairs: [..., T, D], in the dtype of the attention."""
    attention = word_attention(image, image_mask, text, text_mask, tau1)
    return attention.mT @ image.to(attention.dtype)


def _contexts_of(
    image: Tensor, image_mask: Tensor | None, text: Tensor, text_mask: Tensor | None, columns: Tensor, tau1: Tensor
) -> tuple[Tensor, ...]:
    """Of images [I, N, D] and reports [J, T, D], whose words are also the columns [D, JT]: S, P and E [I, N, J, T]; c_t
    times A's denominator, transposed [I, D, JT], and its square length [I, JT]; its cosine with W[t] and 1 / |W||c|
    [I, J, T]."""
    words = text.flatten(0, 1)
    masked = None if text_mask is None else torch.where(text_mask, 0.0, _MASKED).to(text.dtype).flatten()
    products = matmul(image.flatten(0, 1), words.mT, masked).view(*image.shape[:2], *text.shape[:2])
    share = products.softmax(-1)
    weights = share * (tau1 * _LOG2_E)  # exp2 is three times as fast as exp
    if image_mask is not None:
        weights.masked_fill_(~image_mask[..., None, None], -torch.inf)
    weights.sub_(weights.amax(1, keepdim=True)).exp2_()
    context = bmm(image.mT, weights.flatten(2))
    size = context.square().sum(1)
    length = (size * columns.square().sum(0)).sqrt_().view(len(image), *text.shape[:2])
    inverse = torch.where(length > 0, 1 / length, 0)
    cosine = (context * columns).sum(1).view_as(inverse).mul_(inverse)
    return products, share, weights, context, size, cosine, inverse


def _block_gradients(
    grad: Tensor, score: Tensor, parts: tuple[Tensor, ...], image: Tensor, text: Tensor, text_mask: Tensor | None,
    tau1: Tensor, tau2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d image, d text less `beside` times text, `beside` [J, T], d tau1 and d tau2 of the sum of grad * s, both [I, J];
    from what `_contexts_of` found."""
    products, share, weights, context, size, cosine, inverse = parts
    words, patches = text.flatten(0, 1), image.flatten(0, 1)
    chosen = torch.exp(tau2 * cosine - score[..., None]).mul_(grad[..., None])
    if text_mask is not None:
        chosen.masked_fill_(~text_mask, 0)
    along = tau2 * chosen * inverse
    across = (tau2 * chosen * cosine).flatten(1)
    beside = (across.sum(0) / words.square().sum(-1)).nan_to_num_(0, 0, 0)
    beyond = across.neg_().div_(size).nan_to_num_(0, 0, 0)
    d_context = context * beyond[:, None]  # less its part along W[t], which goes with S
    toward = bmm(image, d_context).view_as(products).addcmul_(products, along[:, None])
    toward.mul_(weights)  # d log E
    by_tau1 = torch.dot(toward.flatten(), share.flatten())
    d_products = torch._softmax_backward_data(toward, share, -1, share.dtype).mul_(tau1)
    d_products.addcmul_(weights, along[:, None])
    d_products = d_products.flatten(0, 1).flatten(1)
    d_image = bmm(weights.flatten(2), d_context.mT).add_(matmul(d_products, words).view_as(image))
    d_text = over_rows(d_products, patches).view_as(text)
    return d_image, d_text, beside.view_as(text[..., 0]), by_tau1, (chosen * cosine).sum()


class _ByLength:
    """Images or reports [B, L, D] sorted by length; `rows` are those they had, all where they were in order."""

    def __init__(self, features: Tensor, mask: Tensor) -> None:
        lengths, order = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).sort(stable=True)
        self.lengths = lengths.tolist()
        self.rows = slice(None) if order.equal(torch.arange(len(mask), device=mask.device)) else order
        self.features, self.mask = features[self.rows], mask[self.rows]
        self.filled = (self.mask.sum(1) == lengths).tolist()

    def groups(self, most: int) -> Iterator[tuple[tuple[slice, slice], tuple[Tensor, Tensor | None]]]:
        """One to `most` of nearly the same length: their rows and slots among the sorted; features, and their mask,
        None where every slot is filled."""
        start, last = 0, len(self.lengths)
        most = cdiv(last, cdiv(last, most) or 1)  # of about one size
        for end in range(1, last + 1):
            if end in (last, start + most) or self.lengths[end] > _PADDED * self.lengths[start]:
                here = slice(start, end), slice(self.lengths[end - 1])
                filled = self.lengths[start] == self.lengths[end - 1] and all(self.filled[start:end])
                yield here, (self.features[here], None if filled else self.mask[here])
                start = end

    def restored(self, x: Tensor) -> Tensor:
        """The rows of a sorted tensor where they were before."""
        return x if isinstance(self.rows, slice) else torch.empty_like(x).index_copy_(0, self.rows, x)


def _blocks(images: _ByLength, reports: _ByLength) -> Iterator[tuple]:
    """Every image with every report once, in blocks with few elements of S: where images and reports lie, and what
    `_contexts_of` takes."""
    pairs = max(1, _BLOCK_ELEMENTS // max(1, images.mask.shape[1] * reports.mask.shape[1]))
    for j, text in reports.groups(pairs):
        columns = text[0].flatten(0, 1).mT.contiguous()
        for i, image in images.groups(pairs // len(text[0])):
            yield i, j, (*image, *text, columns)


def _scores_and_parts(
    images: _ByLength, reports: _ByLength, tau1: Tensor, tau2: Tensor, kept: list[tuple[Tensor, ...]] | None = None
) -> Tensor:
    """s [I, J]; what `_contexts_of` finds in each block is added to `kept`."""
    scores = images.features.new_empty(len(images.features), len(reports.features))
    for i, j, block in _blocks(images, reports):
        parts = _contexts_of(*block, tau1)
        logits, real = parts[5] * tau2, block[3]
        scores[i[0], j[0]] = (logits if real is None else logits.masked_fill_(~real, -torch.inf)).logsumexp(-1)
        if kept is not None:
            kept.append(parts)
    return reports.restored(images.restored(scores).mT).mT.contiguous()


def _gradients_from(
    images: _ByLength, reports: _ByLength, kept: list[tuple[Tensor, ...]], grad: Tensor, scores: Tensor, tau1: Tensor,
    tau2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """d image, d text, d tau1 and d tau2, each block from what was kept of it, or made again."""
    grad, scores = (x[images.rows][:, reports.rows] for x in (grad, scores))
    d_image, d_text = torch.zeros_like(images.features), torch.zeros_like(reports.features)
    d_length = torch.zeros_like(reports.features[..., 0])
    d_tau1, d_tau2 = torch.zeros_like(tau1), torch.zeros_like(tau2)
    for number, (i, j, block) in enumerate(_blocks(images, reports)):
        parts = kept[number] if kept else _contexts_of(*block, tau1)
        pairs = i[0], j[0]
        by_image, by_text, beside, by_tau1, by_tau2 = _block_gradients(
            grad[pairs], scores[pairs], parts, block[0], *block[2:4], tau1, tau2
        )
        d_image[i] += by_image
        d_text[j] += by_text
        d_length[j] += beside
        d_tau1 += by_tau1
        d_tau2 += by_tau2
    d_text.addcmul_(d_length[..., None], reports.features, value=-1)
    return images.restored(d_image), reports.restored(d_text), d_tau1, d_tau2


def _blocked(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor, tau2: Tensor) -> Tensor:
    return _scores_and_parts(_ByLength(image, image_mask), _ByLength(text, text_mask), tau1, tau2)


def _blocked_backward(
    grad: Tensor,
    scores: Tensor,
    image: Tensor,
    image_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau1: Tensor,
    tau2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients_from(_ByLength(image, image_mask), _ByLength(text, text_mask), [], grad, scores, tau1, tau2)


class _Kept(torch.autograd.Function):
    """The blocks of a small batch, which its backward pass need not compute again."""

    @staticmethod
    def forward(ctx, image, image_mask, text, text_mask, tau1, tau2):
        ctx.kept = _ByLength(image, image_mask), _ByLength(text, text_mask), []
        scores = _scores_and_parts(*ctx.kept[:2], tau1, tau2, ctx.kept[2])
        ctx.save_for_backward(scores, tau1, tau2)
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_image, d_text, d_tau1, d_tau2 = _gradients_from(*ctx.kept, grad, *ctx.saved_tensors)
        return d_image, None, d_text, None, d_tau1, d_tau2


def _save(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs)


def _gradients_by(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """What autograd asks of an operator whose gradients are in the dtype of its scores."""

    def gradients(ctx, grad):
        scores, image, image_mask, text, text_mask, tau1, tau2 = ctx.saved_tensors
        d_image, d_text, d_tau1, d_tau2 = backward(grad, scores, image, image_mask, text, text_mask, tau1, tau2)
        return d_image.to(image.dtype), None, d_text.to(text.dtype), None, d_tau1, d_tau2

    return gradients


_blocked_op = torch.library.custom_op("clinvla_fast::local_alignment_blocked", _blocked, mutates_args=())
_blocked_backward_op = torch.library.custom_op(
    "clinvla_fast::local_alignment_blocked_backward", _blocked_backward, mutates_args=()
)
_blocked_op.register_autograd(_gradients_by(_blocked_backward_op), setup_context=_save)


@_blocked_op.register_fake
def _(image, image_mask, text, text_mask, tau1, tau2):
    return image.new_empty(len(image), len(text))


@_blocked_backward_op.register_fake
def _(grad, scores, image, image_mask, text, text_mask, tau1, tau2):
    return tuple(torch.empty_like(x) for x in (image, text, tau1, tau2))


def _dense(image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor, tau2: Tensor) -> Tensor:
    """s, and all that is needed for it at once: quickest where that is little."""
    words, pairs = text.flatten(0, 1), (len(image), *text_mask.shape)
    products = (image.flatten(0, 1) @ words.mT).unflatten(0, image_mask.shape).unflatten(-1, text_mask.shape)
    share = products.masked_fill(~text_mask, _MASKED).softmax(-1)
    attention = (tau1 * share).masked_fill(~image_mask[..., None, None], _MASKED).softmax(1)
    context = attention.flatten(2).mT @ image
    length = context.norm(dim=-1) * words.norm(dim=-1)
    cosine = torch.linalg.vecdot(words, context) / torch.where(length > 0, length, torch.inf)
    return (tau2 * cosine).view(pairs).masked_fill(~text_mask, -torch.inf).logsumexp(-1)


def reference(
    image: Tensor,
    image_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau1: Tensor,
    tau2: Tensor,
    tau3: Tensor,
) -> Tensor:
    image, text, tau1, tau2, tau3 = (x.to(_real(image.dtype)) for x in (image, text, tau1, tau2, tau3))
    elements = len(image) * len(text) * image.shape[1] * text.shape[1]
    scores = _Kept.apply if elements <= _KEPT_ELEMENTS and not torch.compiler.is_compiling() else _blocked_op
    if elements <= _DENSE_ELEMENTS:
        scores = _dense
    return tau3 * scores(image, image_mask, text, text_mask, tau1, tau2)


# Triton. Names: words are the rows of a tile, patches its columns.


@jit
def _split(x, ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr):
    """x as a sum of two operands of a matrix product; the second is 0 where the first is exact."""
    high = x.to(ROUNDED)
    return high.to(MULTIPLIED), (x - high.to(x.dtype)).to(ROUNDED).to(MULTIPLIED)


@jit
def _multiply(a, b, total, ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr):
    """total + a b, where only b is exact in the operands' type."""
    high, low = _split(a, ROUNDED, MULTIPLIED)
    total = tl.dot(high, b, total, input_precision="tf32x3", out_dtype=total.dtype)
    if total.dtype != ROUNDED:
        total = tl.dot(low, b, total, input_precision="tf32x3", out_dtype=total.dtype)
    return total


@jit
def _add_product(a, b, total):
    """total + a^T b for operands of a matrix product."""
    return tl.dot(tl.trans(a), b, total, input_precision="tf32x3", out_dtype=total.dtype)


@jit
def _tile(base, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Addresses of a whole tile among whole tiles."""
    return base + index * (ROWS * COLUMNS) + (tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@jit
def _load(features, mask, row, start, length, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, MULTIPLIED: tl.constexpr):
    """Features [ROWS, WIDTH] of one image or report from `start` on, zero where there are none; and which are real."""
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    real = tl.load(mask + row * length + rows, mask=rows < length, other=0) != 0
    address = features + row * length * width + (rows[:, None] * width + columns[None, :])
    found = tl.load(address, mask=real[:, None] & (columns < width)[None, :], other=0.0)
    return found.to(MULTIPLIED), real


@jit
def _by_chunks(
    a, a_rows, a_real, a_width, b, b_rows, b_real, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """a b^T of rows in memory, some of their width at a time."""
    total = tl.zeros((ROWS, COLUMNS), SUMMED)
    for start in range(0, width, _CHUNK):
        column = start + tl.arange(0, _CHUNK)
        inside = (column < width)[None, :]
        x = tl.load(a + a_rows[:, None] * a_width + column[None, :], mask=a_real[:, None] & inside, other=0.0)
        y = tl.load(b + b_rows[:, None] * width + column[None, :], mask=b_real[:, None] & inside, other=0.0)
        total = tl.dot(x.to(SUMMED), tl.trans(y.to(SUMMED)), total, input_precision="tf32x3", out_dtype=SUMMED)
    return total


@jit
def _products(
    w, real_word, c, real_patch, text, t, image, start, width, WORDS: tl.constexpr, PATCHES: tl.constexpr,
    ROUNDED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """S of a tile of the words of one report, from t on, and of the patches of one image, from `start` on."""
    if ROUNDED != SUMMED:
        return tl.dot(w, tl.trans(c), out_dtype=SUMMED)
    else:
        word, patch = t + tl.arange(0, WORDS), start + tl.arange(0, PATCHES)
        return _by_chunks(text, word, real_word, width, image, patch, real_patch, width, WORDS, PATCHES, SUMMED)


@jit
def _lengths(w, SUMMED: tl.constexpr):
    w = w.to(SUMMED)
    return tl.sqrt(tl.sum(w * w, 1))


@jit
def _over_words(products, real_word, normaliser, ONE_TILE: tl.constexpr):
    """Each patch's softmax over the words of [words, patches]; where they are several tiles, from its log-sum-exp."""
    products = tl.where(real_word[:, None], products, float("-inf"))
    if ONE_TILE:
        share = tl.exp(products - tl.max(products, 0)[None, :])
        share = share / tl.sum(share, 0)[None, :]
    else:
        share = tl.exp(products - normaliser[None, :])
    return share


@jit
def _normalise(
    normalisers, image, image_mask, text, text_mask, i, j, patches, words, width,
    PATCHES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """Store each patch's log-sum-exp over all words: [patches]."""
    for start in range(0, patches, PATCHES):
        c, real_patch = _load(image, image_mask, i, start, patches, width, PATCHES, WIDTH, MULTIPLIED)
        top = tl.full((PATCHES,), float("-inf"), SUMMED)
        total = tl.zeros((PATCHES,), SUMMED)
        for t in range(0, words, WORDS):
            w, real_word = _load(text, text_mask, j, t, words, width, WORDS, WIDTH, MULTIPLIED)
            products = _products(
                w, real_word, c, real_patch, text + j * words * width, t, image + i * patches * width, start, width,
                WORDS, PATCHES, ROUNDED, SUMMED,
            )  # fmt: skip
            products = tl.where(real_word[:, None], products, float("-inf"))
            higher = tl.maximum(top, tl.max(products, 0))
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # no real word yet
            total = total * tl.exp(top - finite) + tl.sum(tl.exp(products - finite[None, :]), 0)
            top = higher
        n = start + tl.arange(0, PATCHES)
        tl.store(normalisers + n, top + tl.log(total), mask=n < patches)
    tl.debug_barrier()  # read again by other threads of the program


@jit
def _contexts(
    w, length, real_word, normalisers, text, j, t, image, image_mask, i, tau1, patches, words, width,
    PATCHES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
    ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Of a tile of words in one image: c_t times A's denominator, its cosine with W[t], 1 / |W||c|, |c|, max_n."""
    top = tl.full((WORDS,), float("-inf"), SUMMED)
    along = tl.zeros((WORDS,), SUMMED)
    context = tl.zeros((WORDS, WIDTH), SUMMED)
    for start in range(0, patches, PATCHES):
        c, real_patch = _load(image, image_mask, i, start, patches, width, PATCHES, WIDTH, MULTIPLIED)
        products = _products(
            w, real_word, c, real_patch, text + j * words * width, t, image + i * patches * width, start, width,
            WORDS, PATCHES, ROUNDED, SUMMED,
        )  # fmt: skip
        normaliser = _normaliser(normalisers, start, patches, PATCHES, ONE_TILE)
        share = _over_words(products, real_word, normaliser, ONE_TILE)
        logits = tl.where(real_patch[None, :], tau1 * share, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # no real patch yet
        weights = tl.exp(logits - finite[:, None])
        fade = tl.exp(top - finite)
        context = _multiply(weights, c, context * fade[:, None], ROUNDED, MULTIPLIED)
        along = along * fade + tl.sum(weights * products, 1)
        top = higher
    size = tl.sqrt(tl.sum(context * context, 1))
    inverse = tl.where(length * size > 0, 1 / (length * size), 0.0)
    return context, along * inverse, inverse, size, top


@jit
def _normaliser(normalisers, start, patches, PATCHES: tl.constexpr, ONE_TILE: tl.constexpr):
    n = start + tl.arange(0, PATCHES)
    if ONE_TILE:
        return n  # not needed
    else:
        return tl.load(normalisers + n, mask=n < patches, other=0.0)


@jit
def _forward(
    image, image_mask, text, text_mask, tau1, tau2, scores, normalisers, images, reports, patches, words, width,
    IMAGES: tl.constexpr, PATCHES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
    ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """s of one report in IMAGES images; a tile of its words stays while the images pass."""
    tau1, tau2 = tl.load(tau1), tl.load(tau2)
    j = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * IMAGES
    last = tl.minimum(first + IMAGES, images)
    normalisers += (first * reports + j * IMAGES) * patches
    if not ONE_TILE:
        for i in range(first, last):
            _normalise(
                normalisers + (i - first) * patches, image, image_mask, text, text_mask, i, j, patches, words, width,
                PATCHES, WORDS, WIDTH, ROUNDED, MULTIPLIED, SUMMED,
            )  # fmt: skip
    for t in range(0, words, WORDS):
        w, real_word = _load(text, text_mask, j, t, words, width, WORDS, WIDTH, MULTIPLIED)
        length = _lengths(w, SUMMED)
        for i in range(first, last):
            _, cosine, _, _, _ = _contexts(
                w, length, real_word, normalisers + (i - first) * patches, text, j, t, image, image_mask, i, tau1,
                patches, words, width, PATCHES, WORDS, WIDTH, ONE_TILE, ROUNDED, MULTIPLIED, SUMMED,
            )  # fmt: skip
            logits = tl.where(real_word, tau2 * cosine, float("-inf"))
            top = tl.max(logits[None, :], 1)  # of a matrix: Triton 3.6 fails to reduce this vector for sm_100
            score = scores + i * reports + j + tl.arange(0, 1)
            if not ONE_TILE:
                earlier = tl.load(score, mask=t > 0, other=float("-inf"))
                top = tl.maximum(top, earlier)
            finite = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(tl.exp(logits - finite)[None, :], 1)
            if not ONE_TILE:
                total += tl.exp(earlier - finite)
            tl.store(score, finite + tl.log(total))
            if not ONE_TILE:
                tl.debug_barrier()


@jit
def _context_gradients(cosine, inverse, size, real_word, tau2, score):
    """d s by c_t is along * W[t] - across * c_t; by tau2, each word's part of it.

    By W[t], through the cosine, it is along * c_t - tau2 * by_tau2 / |W[t]|^2 * W[t].
    """
    share = tl.where(real_word, tl.exp(tau2 * cosine - score), 0.0)
    by_tau2 = share * cosine
    across = tl.where(size > 0, tau2 * by_tau2 / (size * size), 0.0)
    return tau2 * share * inverse, across, by_tau2


@jit
def _patch_gradients(
    w, real_word, c, real_patch, high, low, contexts, along, across, top, tau1, normaliser, text, t, image, start,
    width, PATCHES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
    ROUNDED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """For a tile of words and patches: P, E, and d s by log E. The contexts come as operands of a product."""
    products = _products(w, real_word, c, real_patch, text, t, image, start, width, WORDS, PATCHES, ROUNDED, SUMMED)
    share = _over_words(products, real_word, normaliser, ONE_TILE)
    weights = tl.where(real_patch[None, :], tl.exp(tau1 * share - top[:, None]), 0.0)
    if ROUNDED != SUMMED:
        shown = tl.dot(high, tl.trans(c), out_dtype=SUMMED)
        shown = tl.dot(low, tl.trans(c), shown, out_dtype=SUMMED)
    else:
        patch = start + tl.arange(0, PATCHES)
        shown = _by_chunks(
            contexts, tl.arange(0, WORDS), real_word, WIDTH, image, patch, real_patch, width, WORDS, PATCHES, SUMMED
        )
    return share, weights, weights * (along[:, None] * products - across[:, None] * shown)


@jit
def _keep(contexts, context, WORDS: tl.constexpr, WIDTH: tl.constexpr):
    """Store a tile of contexts for all threads of the program."""
    tl.debug_barrier()  # all have read the one before
    tl.store(_tile(contexts, 0, WORDS, WIDTH), context)
    tl.debug_barrier()


@jit
def _add_by_chunks(
    here, a, b, b_rows, b_real, b_width, width, ROW: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """Add a b to a tile in memory, whose steps from row to row and from column to column are given, by chunks of b."""
    tl.debug_barrier()  # all have added what was added before
    # Not hoisted: the three terms of a would be held in registers.
    for start in tl.range(0, width, _CHUNK, disable_licm=True):
        column = start + tl.arange(0, _CHUNK)
        inside = (column < width)[None, :]
        x = tl.load(b + b_rows[:, None] * b_width + column[None, :], mask=b_real[:, None] & inside, other=0.0)
        tile = here + tl.arange(0, ROWS)[:, None] * ROW + column[None, :] * COLUMN
        total = tl.load(tile, mask=inside, other=0.0)
        tl.store(tile, _multiply(a, x.to(SUMMED), total, SUMMED, SUMMED), mask=inside)


@jit
def _window(first_image, first_report, images, patches, IMAGES: tl.constexpr):
    """The part of a window of pairs that a program has: its report, its images, its number among all programs."""
    block, column = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = first_image + block * IMAGES
    return first_report + column, first, tl.minimum(first + IMAGES, images), column * tl.num_programs(0) + block


@jit
def _normalisers(
    image, image_mask, text, text_mask, normalisers, first_image, first_report, images, patches, words, width,
    IMAGES: tl.constexpr, PATCHES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
    ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Each patch's log-sum-exp over all words, for a window of pairs: [programs, IMAGES, N]."""
    j, first, last, program = _window(first_image, first_report, images, patches, IMAGES)
    for i in range(first, last):
        _normalise(
            normalisers + (program * IMAGES + i - first) * patches, image, image_mask, text, text_mask, i, j, patches,
            words, width, PATCHES, WORDS, WIDTH, ROUNDED, MULTIPLIED, SUMMED,
        )  # fmt: skip


@jit
def _inners(
    image, image_mask, text, text_mask, tau1, tau2, scores, normalisers, inners, contexts, first_image, first_report, t,
    images, reports, patches, words, width,
    IMAGES: tl.constexpr, PATCHES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
    ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """sum_t P d log E, what the backward pass of a softmax over words takes off, one tile of words after the other."""
    tau1, tau2 = tl.load(tau1), tl.load(tau2)
    j, first, last, program = _window(first_image, first_report, images, patches, IMAGES)
    contexts += program * WORDS * WIDTH
    w, real_word = _load(text, text_mask, j, t, words, width, WORDS, WIDTH, MULTIPLIED)
    length = _lengths(w, SUMMED)
    for i in range(first, last):
        slot = (program * IMAGES + i - first) * patches
        context, cosine, inverse, size, top = _contexts(
            w, length, real_word, normalisers + slot, text, j, t, image, image_mask, i, tau1, patches, words, width,
            PATCHES, WORDS, WIDTH, ONE_TILE, ROUNDED, MULTIPLIED, SUMMED,
        )  # fmt: skip
        score = tl.load(scores + i * reports + j)
        along, across, _by_tau2 = _context_gradients(cosine, inverse, size, real_word, tau2, score)
        high, low = _split(context, ROUNDED, MULTIPLIED)
        if ROUNDED == SUMMED:
            _keep(contexts, context, WORDS, WIDTH)
        for start in range(0, patches, PATCHES):
            n = start + tl.arange(0, PATCHES)
            c, real_patch = _load(image, image_mask, i, start, patches, width, PATCHES, WIDTH, MULTIPLIED)
            share, _weights, d_logits = _patch_gradients(
                w, real_word, c, real_patch, high, low, contexts, along, across, top, tau1,
                _normaliser(normalisers + slot, start, patches, PATCHES, ONE_TILE), text + j * words * width, t,
                image + i * patches * width, start, width, PATCHES, WORDS, WIDTH, ONE_TILE, ROUNDED, SUMMED,
            )  # fmt: skip
            inner = tl.load(inners + slot + n, mask=n < patches, other=0.0)
            tl.store(inners + slot + n, inner + tl.sum(share * d_logits, 0), mask=n < patches)


@jit
def _backward(
    image, image_mask, text, text_mask, tau1, tau2, scores, grad, normalisers, inners,
    d_image, d_text, d_tau1, d_tau2, contexts, first_image, first_report, t, images, reports, patches, words, width,
    IMAGES: tl.constexpr, PATCHES: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, ONE_TILE: tl.constexpr,
    ROUNDED: tl.constexpr, MULTIPLIED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Gradients of IMAGES images and a tile of one report's words.

    In whole tiles: d_image [programs, IMAGES, tiles, WIDTH, PATCHES], d_text [blocks, J, tiles, WORDS, WIDTH] but for
    what goes through the words' lengths, d_tau1 [programs, PATCHES] and d_tau2 [blocks, J, tiles, WORDS], parts of a
    sum. All are added to.
    """
    tau1, tau2 = tl.load(tau1), tl.load(tau2)
    j, first, last, program = _window(first_image, first_report, images, patches, IMAGES)
    contexts += program * WORDS * WIDTH
    w, real_word = _load(text, text_mask, j, t, words, width, WORDS, WIDTH, MULTIPLIED)
    length = _lengths(w, SUMMED)
    tile = (tl.program_id(0).to(tl.int64) * reports + j) * tl.cdiv(words, WORDS) + t // WORDS
    d_words = tl.zeros((WORDS, WIDTH), SUMMED)
    of_words = tl.zeros((WORDS,), SUMMED)
    of_patches = tl.zeros((PATCHES,), SUMMED)
    for i in tl.range(first, last, disable_licm=True):
        slot = program * IMAGES + i - first
        context, cosine, inverse, size, top = _contexts(
            w, length, real_word, normalisers + slot * patches, text, j, t, image, image_mask, i, tau1, patches, words,
            width, PATCHES, WORDS, WIDTH, ONE_TILE, ROUNDED, MULTIPLIED, SUMMED,
        )  # fmt: skip
        score, g = tl.load(scores + i * reports + j), tl.load(grad + i * reports + j)
        along, across, by_tau2 = _context_gradients(cosine, inverse, size, real_word, tau2, score)
        along, across = g * along, g * across
        of_words += g * by_tau2
        largest = tl.where(tau1 != 0, top / tau1, 0.0)
        high, low = _split(context, ROUNDED, MULTIPLIED)
        if ROUNDED == SUMMED:
            here = _tile(d_text, tile, WORDS, WIDTH)
            tl.debug_barrier()  # all have added what was added before
            tl.store(here, tl.load(here) + along[:, None] * context)
            _keep(contexts, context, WORDS, WIDTH)
        else:
            d_words += along[:, None] * context
        # Runs once. Left operands of a product stay in registers unless they are a loop's arguments: as such they go to
        # shared memory, and nothing spills. Nor are invariants hoisted, which would hold registers throughout.
        for _once in tl.range(0, tl.minimum(patches, 1), disable_licm=True):
            for start in tl.range(0, patches, PATCHES, num_stages=1, disable_licm=True):
                c, real_patch = _load(image, image_mask, i, start, patches, width, PATCHES, WIDTH, MULTIPLIED)
                share, weights, d_logits = _patch_gradients(
                    w, real_word, c, real_patch, high, low, contexts, along, across, top, tau1,
                    _normaliser(normalisers + slot * patches, start, patches, PATCHES, ONE_TILE),
                    text + j * words * width, t, image + i * patches * width, start, width,
                    PATCHES, WORDS, WIDTH, ONE_TILE, ROUNDED, SUMMED,
                )  # fmt: skip
                # sum_n d log E is 0, so any constant may be taken off P: off near its maximum, less cancels
                of_patches += tl.sum((share - largest[:, None]) * d_logits, 0)
                if ONE_TILE:
                    inner = tl.sum(share * d_logits, 0)
                else:
                    inner = g * _normaliser(inners + slot * patches, start, patches, PATCHES, ONE_TILE)
                d_products = tau1 * share * (d_logits - inner[None, :])
                by_word, by_context = d_products + along[:, None] * weights, -across[:, None] * weights
                number = slot * tl.cdiv(patches, PATCHES) + start // PATCHES
                if ROUNDED == SUMMED:
                    patch, word = start + tl.arange(0, PATCHES), t + tl.arange(0, WORDS)
                    d_tile, w_tile = d_image + number * WIDTH * PATCHES, d_text + tile * WORDS * WIDTH
                    _add_by_chunks(
                        w_tile, d_products, image + i * patches * width, patch, real_patch, width, width, WIDTH, 1,
                        WORDS, SUMMED,
                    )  # fmt: skip
                    _add_by_chunks(
                        d_tile, tl.trans(by_word), text + j * words * width, word, real_word, width, width, 1, PATCHES,
                        PATCHES, SUMMED,
                    )  # fmt: skip
                    _add_by_chunks(
                        d_tile, tl.trans(by_context), contexts, word - t, real_word, WIDTH, width, 1, PATCHES,
                        PATCHES, SUMMED,
                    )  # fmt: skip
                else:
                    d_words = _multiply(d_products, c, d_words, ROUNDED, MULTIPLIED)
                    here = _tile(d_image, number, WIDTH, PATCHES)
                    d_patches = tl.load(here)
                    by_word, by_word_low = _split(by_word, ROUNDED, MULTIPLIED)
                    by_context, by_context_low = _split(by_context, ROUNDED, MULTIPLIED)
                    d_patches = _add_product(w, by_word, d_patches)
                    d_patches = _add_product(high, by_context, d_patches)
                    d_patches = _add_product(w, by_word_low, d_patches)
                    d_patches = _add_product(high, by_context_low, d_patches)
                    d_patches = _add_product(low, by_context, d_patches)
                    tl.store(here, d_patches)
            if ROUNDED != SUMMED:
                high, low = tl.zeros_like(high), tl.zeros_like(low)
    if ROUNDED != SUMMED:
        here = _tile(d_text, tile, WORDS, WIDTH)
        tl.store(here, tl.load(here) + d_words)
    here = d_tau2 + tile * WORDS + tl.arange(0, WORDS)
    tl.store(here, tl.load(here) + of_words)
    here = d_tau1 + program * PATCHES + tl.arange(0, PATCHES)
    tl.store(here, tl.load(here) + of_patches)


_IMAGES_FORWARD, _PROGRAMS = 8, 4096  # images that pass a tile of words; programs that fill any GPU
_IMAGES_BACKWARD, _BLOCKS, _REPORTS = 8, 4, 64  # a window of pairs: images a program, programs a way and the other


_TILES = {  # of bfloat16, by major compute capability: words, patches, warps, forward and backward
    8: ((128, 16, 8), (16, 16, 8)),
    9: ((128, 64, 8), (128, 32, 8)),
    10: ((128, 64, 8), (64, 32, 8)),
}
_FULL = {8: (32, 16, 8), 9: (64, 16, 8), 10: (64, 16, 8)}  # of float32, and of float16, which is multiplied as such


def _config(device: torch.device, dtype: torch.dtype, words: int, width: int, backward: bool) -> dict:
    """The largest tiles that spill no registers, found by compiling; the interpreter takes those of sm_90."""
    major = torch.cuda.get_device_capability(device)[0] if not INTERPRETED else 9
    split = dtype == torch.bfloat16
    if split or INTERPRETED:
        (rows, patches, warps), stages = _TILES[min(major, 10)][backward], 2
        if major == 9 and words <= 64:  # the rows of one warpgroup
            rows, warps = 64, 4
        if major == 9 and backward and not 64 < words <= rows:
            patches, stages = 16, 2 if words <= rows else 1
    else:
        (rows, patches, warps), stages = _FULL[min(major, 10)], 1
    return {
        "PATCHES": patches,
        "WORDS": rows,
        "WIDTH": next_power_of_2(max(width, 16)),
        "ONE_TILE": words <= rows,
        "ROUNDED": tl.bfloat16 if split else summed_in(dtype),
        "MULTIPLIED": tl.bfloat16 if split and not INTERPRETED else summed_in(dtype),
        "SUMMED": summed_in(dtype),
        "num_warps": warps,
        "num_stages": stages,
        "maxnreg": 255,  # said, or some spill so that more programs fit at once
    }


@torch.library.custom_op("clinvla_fast::local_alignment", mutates_args=())
def _scores_op(
    image: Tensor, image_mask: Tensor, text: Tensor, text_mask: Tensor, tau1: Tensor, tau2: Tensor
) -> Tensor:
    """s [I, J] of image [I, N, D] and text [J, T, D], both bfloat16, float16, float32 or float64."""
    (images, patches, width), (reports, words, _) = image.shape, text.shape
    scores = torch.empty(images, reports, dtype=_real(image.dtype), device=image.device)
    config = _config(image.device, image.dtype, words, width, backward=False)
    image, image_mask, text, text_mask = (x.contiguous() for x in (image, image_mask, text, text_mask))
    blocks, normalisers = cdiv(images, _IMAGES_FORWARD), scores.new_empty(0)
    if not config["ONE_TILE"]:  # a window of images at a time, or what is kept for every patch and report grows
        blocks = min(blocks, cdiv(_PROGRAMS, max(1, reports)))
        normalisers = scores.new_empty(blocks * _IMAGES_FORWARD * reports * patches)
    window = max(1, blocks) * _IMAGES_FORWARD
    for first in range(0, images, window):
        those = slice(first, first + window)
        some = len(image[those])
        launch(
            _forward, (reports, cdiv(some, _IMAGES_FORWARD)), image[those], image_mask[those], text, text_mask,
            tau1, tau2, scores[those], normalisers, some, reports, patches, words, width,
            IMAGES=_IMAGES_FORWARD, **config,
        )  # fmt: skip
    return scores


@_scores_op.register_fake
def _(image, image_mask, text, text_mask, tau1, tau2):
    return image.new_empty(len(image), len(text), dtype=_real(image.dtype))


@torch.library.custom_op("clinvla_fast::local_alignment_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    scores: Tensor,
    image: Tensor,
    image_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau1: Tensor,
    tau2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of image, text, tau1 and tau2 in the dtype of the scores, whatever that of the features.

    The pairs are taken a window at a time, so that the partial sums (of a window's images, and of all reports for each
    of its blocks) stay small.
    """
    (images, patches, width), (reports, words, _) = image.shape, text.shape
    image, image_mask, text, text_mask = (x.contiguous() for x in (image, image_mask, text, text_mask))
    grad = grad.contiguous()
    real = {"dtype": scores.dtype, "device": image.device}
    config = _config(image.device, image.dtype, words, width, backward=True)
    each = max(1, min(_IMAGES_BACKWARD, cdiv(images, _BLOCKS)))
    blocks, columns = max(1, min(_BLOCKS, cdiv(images, each))), max(1, min(_REPORTS, reports))
    tile, tiles = (config["WIDTH"], config["PATCHES"]), cdiv(patches, config["PATCHES"])
    d_image = torch.empty(images, patches, width, **real)
    d_text = torch.zeros(blocks, reports, cdiv(words, config["WORDS"]) * config["WORDS"], config["WIDTH"], **real)
    d_tau1 = torch.zeros(columns, blocks, config["PATCHES"], **real)
    d_tau2 = torch.zeros(d_text.shape[:3], **real)
    window = torch.empty(columns, blocks * each, tiles, *tile, **real)
    one_tile = config["ONE_TILE"]
    normalisers, inners = torch.empty(2, 0 if one_tile else columns * blocks * each * patches, **real)
    pair = image, image_mask, text, text_mask
    contexts, of_inners = torch.empty(0, **real), config
    if config["ROUNDED"] == config["SUMMED"]:
        contexts = torch.empty(columns * blocks, config["WORDS"], config["WIDTH"], **real)
        of_inners = config | {"PATCHES": config["WORDS"] // 2}  # no sums of words and patches to hold: room for more
    for first_image in range(0, images, blocks * each):
        window.zero_()
        for first_report in range(0, reports, columns):
            grid = blocks, min(columns, reports - first_report)
            first, sizes = (first_image, first_report), (images, reports, patches, words, width)
            if not one_tile:
                launch(_normalisers, grid, *pair, normalisers, *first, images, *sizes[2:], IMAGES=each, **config)
                inners.zero_()
                for t in range(0, words, config["WORDS"]):
                    launch(
                        _inners, grid, *pair, tau1, tau2, scores, normalisers, inners, contexts, *first, t, *sizes,
                        IMAGES=each, **of_inners,
                    )  # fmt: skip
            for t in range(0, words, config["WORDS"]):
                launch(
                    _backward, grid, *pair, tau1, tau2, scores, grad, normalisers, inners, window, d_text, d_tau1,
                    d_tau2, contexts, *first, t, *sizes, IMAGES=each, **config,
                )  # fmt: skip
        here = d_image[first_image : first_image + blocks * each]
        here.copy_(window[:, : len(here)].sum(0).mT.flatten(1, 2)[:, :patches, :width])
    d_tau2 = d_tau2.sum(0)[:, :words]
    beside = tau2 * d_tau2 / text.to(scores.dtype).square().sum(-1)
    d_text = d_text.sum(0)[:, :words, :width] - beside.nan_to_num(0, 0, 0)[..., None] * text
    return d_image, d_text, d_tau1.sum(), d_tau2.sum()


@_backward_op.register_fake
def _(grad, scores, image, image_mask, text, text_mask, tau1, tau2):
    return scores.new_empty(image.shape), scores.new_empty(text.shape), scores.new_empty(()), scores.new_empty(())


_scores_op.register_autograd(_gradients_by(_backward_op), setup_context=_save)


def supports(image: Tensor) -> bool:
    """Whether the kernels take such features."""
    return image.shape[-1] <= _WIDEST and (image.dtype in _DTYPES or INTERPRETED)


def triton(
    image: Tensor,
    image_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau1: Tensor,
    tau2: Tensor,
    tau3: Tensor,
) -> Tensor:
    if not supports(image):
        raise ValueError(
            f"features are {image.shape[-1]} wide and {image.dtype}: the Triton kernels take bfloat16, float16 and "
            f"float32 up to {_WIDEST} wide (where they are interpreted, any dtype); use the reference."
        )
    if spare := -image.shape[-1] % 16:  # tiles of other widths need more registers than there are
        image, text = (nn.functional.pad(features, (0, spare)) for features in (image, text))
    tau1, tau2, tau3 = (t.to(_real(image.dtype)) for t in (tau1, tau2, tau3))
    return tau3 * _scores_op(image, image_mask, text, text_mask, tau1, tau2)


@register_flop_formula([torch.ops.clinvla_fast.local_alignment, torch.ops.clinvla_fast.local_alignment_blocked])
def _forward_flops(image, image_mask, text, text_mask, tau1, tau2, out_shape=None, **_) -> int:
    """S and the contexts."""
    (images, patches, width), (reports, words, _) = image, text
    return 2 * 2 * images * reports * patches * words * width


@register_flop_formula(
    [torch.ops.clinvla_fast.local_alignment_backward, torch.ops.clinvla_fast.local_alignment_blocked_backward]
)
def _backward_flops(grad, scores, image, image_mask, text, text_mask, tau1, tau2, out_shape=None, **_) -> int:
    """Both again, and two for each of their gradients."""
    return 3 * _forward_flops(image, image_mask, text, text_mask, tau1, tau2)


def _bytes(*inputs, out) -> int:
    return nbytes(inputs, out)


for _operator in ("", "_backward", "_blocked", "_blocked_backward"):
    register_byte_formula(getattr(torch.ops.clinvla_fast, f"local_alignment{_operator}"))(_bytes)
