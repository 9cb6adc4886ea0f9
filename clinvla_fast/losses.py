"""Losses under the names and arguments that other training code calls: a script changes its import line, no more.

    ClipLoss, SigLipLoss      open_clip's (CLIP, Radford et al. 2021; SigLIP, Zhai et al. 2023, equation 1)
    local_loss, global_loss   GLoRIA's (Huang et al. 2021); and what its model calls beside them, attention_fn and
                              cosine_similarity

The losses are `ops.contrastive`, `ops.sigmoid_contrastive` and `ops.local_alignment`: of a large batch neither all
logits nor the attention of all words in all images are held.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import ops
from .distributed import gather_rows

_EPS = 1e-8  # GLoRIA's least product of lengths: only of rows that have none


def _scalar(name: str, value: Tensor | float, beside: Tensor) -> Tensor:
    """A number, or a tensor of one, as the operations take it."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.promote_types(beside.dtype, torch.float32), device=beside.device)
    if value.numel() != 1:
        raise ValueError(f"{name} is {list(value.shape)}: expected one number.")
    return value.reshape(())


def _one_dtype(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Autocast may leave two sides in different dtypes, and the losses replaced multiply them all the same."""
    if one.dtype != other.dtype and torch.is_autocast_enabled(one.device.type):
        dtype = torch.promote_types(one.dtype, other.dtype)
        return one.to(dtype), other.to(dtype)
    return one, other


# open_clip -----------------------------------------------------------------------------------------------------------


def _check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features and text_features are {list(image_features.shape)} and {list(text_features.shape)}: "
            "expected [B, D] both, a row a pair."
        )


class _Sharded(nn.Module):
    """A loss of pairs that `world_size` ranks share, rank r the r-th part, all parts of one size."""

    def __init__(self, rank: int, world_size: int):
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} and world_size {world_size}: expected a rank from 0 to world_size - 1.")
        self.rank, self.world_size = rank, world_size

    def _gathered(self, x: Tensor) -> Tensor:
        if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
            raise ValueError(
                f"rank and world_size are {self.rank} and {self.world_size}: expected {dist.get_rank()} and "
                f"{dist.get_world_size()}, as of the default process group."
            )
        return gather_rows(x, [len(x)] * self.world_size)


class ClipLoss(_Sharded):
    """open_clip's ClipLoss: the symmetric InfoNCE of matched pairs (CLIP, figure 3).

    Features are normalised here again. Of normalised ones, as open_clip gives them, the loss is the same, and so are
    the gradients of all that lies before their normalisation.

    Over several ranks the flags mean what they mean to open_clip. Only with `gather_with_grad` is the mean of the
    ranks' gradients, as DDP has it, that of one process with the whole batch; `local_loss` gives the same with less
    work. open_clip's default, neither, leaves out what a row's gradient gets from other ranks.

    Args:
        local_loss: a rank scores its own rows against all; False: all rows against all, on each rank.
        gather_with_grad: gradients reach the rows of other ranks.
        cache_labels: nothing to do here, there are no labels.
        rank, world_size: of the default process group of torch.distributed; all ranks have batches of one size.
        use_horovod: False.

    Raises:
        ValueError: for Horovod, or a rank that is not one of world_size.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__(rank, world_size)
        if use_horovod:
            raise ValueError("use_horovod is True: expected False, ranks are those of torch.distributed.")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this rank's pairs.

        Args:
            image_features, text_features: [B, D] of one floating dtype (under autocast of any), as below.
            logit_scale: 1/temperature, one number.
            logit_bias: one number, added to all logits. A softmax does not see it: its gradient is zero.

        Returns:
            A scalar in float32, float64 for float64 features; {"contrastive_loss": it} with output_dict.

        Raises:
            ValueError: if shapes, dtypes or devices do not fit together, or rank and world_size are not the group's.
        """
        _check_pairs(image_features, text_features)
        image_features, text_features = _one_dtype(image_features, text_features)
        scale = _scalar("logit_scale", logit_scale, image_features)
        if self.world_size == 1:
            loss = ops.contrastive(image_features, text_features, scale)
        else:
            images, texts = self._everyone(image_features), self._everyone(text_features)
            if self.local_loss:
                own = {"offset": self.rank * len(image_features), "symmetric": False}
                loss = ops.contrastive(image_features, texts, scale, **own)
                loss = (loss + ops.contrastive(text_features, images, scale, **own)) / 2
            else:
                loss = ops.contrastive(images, texts, scale)
        if logit_bias is not None:  # DDP wants a gradient for every parameter
            loss = loss + 0 * _scalar("logit_bias", logit_bias, image_features)
        return {"contrastive_loss": loss} if output_dict else loss

    def _everyone(self, x: Tensor) -> Tensor:
        if self.gather_with_grad:
            return self._gathered(x)
        others = self._gathered(x.detach())
        if self.local_loss:
            return others
        start = self.rank * len(x)
        return torch.cat([others[:start], x, others[start + len(x) :]])


class SigLipLoss(_Sharded):
    """open_clip's SigLipLoss: the sigmoid loss of all pairs (SigLIP, equation 1).

    Features are normalised here again, as in `ClipLoss`. The mean over ranks, and of their gradients, is that of one
    process with the whole batch.

    Args:
        cache_labels: nothing to do here, there are no labels.
        rank, world_size: of the default process group of torch.distributed; all ranks have batches of one size.
        dist_impl: open_clip's ways of passing texts round, "bidir", "shift", "reduce" or "gather": they differ in
            nothing but time. Here texts are gathered whatever it says.

    Raises:
        ValueError: for another dist_impl, or a rank that is not one of world_size.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ):  # fmt: skip
        super().__init__(rank, world_size)
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl is {dist_impl!r}: expected bidir, shift, reduce or gather.")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of this rank's images with all texts; arguments, returns and raises as of `ClipLoss`."""
        _check_pairs(image_features, text_features)
        image_features, text_features = _one_dtype(image_features, text_features)
        scale = _scalar("logit_scale", logit_scale, image_features)
        bias = _scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        texts = text_features if self.world_size == 1 else self._gathered(text_features)
        loss = ops.sigmoid_contrastive(image_features, texts, scale, bias, self.rank * len(image_features))
        return {"contrastive_loss": loss} if output_dict else loss


# GLoRIA --------------------------------------------------------------------------------------------------------------


def global_loss(
    cnn_code: Tensor, rnn_code: Tensor, eps: float = _EPS, temp3: Tensor | float = 10.0
) -> tuple[Tensor, Tensor]:
    """GLoRIA's global loss: cross-entropies of temp3 * cosine of all images and reports of a batch.

    Args:
        cnn_code, rnn_code: global embeddings of images and reports, [B, D] of one floating dtype.
        eps: GLoRIA divides by no product of lengths below it. Here a cosine is a cosine, and that of a row of zeros
            is 0 with gradient 0: eps may be what makes no other difference, at most 1e-8.
        temp3: scale of the logits, one number.

    Returns:
        Of each image among the reports, and of each report among the images: scalars in float32 (float64 for float64).

    Raises:
        ValueError: if shapes or dtypes do not fit together, or eps is larger.
    """
    if cnn_code.ndim != 2 or cnn_code.shape != rnn_code.shape:
        raise ValueError(
            f"cnn_code and rnn_code are {list(cnn_code.shape)} and {list(rnn_code.shape)}: expected [B, D] both."
        )
    if not 0 <= eps <= _EPS:
        raise ValueError(f"eps is {eps}: expected 0 to {_EPS}, a cosine is not damped here.")
    cnn_code, rnn_code = _one_dtype(cnn_code, rnn_code)
    scale = _scalar("temp3", temp3, cnn_code)
    to_report = ops.contrastive(cnn_code, rnn_code, scale, symmetric=False)
    return to_report, ops.contrastive(rnn_code, cnn_code, scale, symmetric=False)


def local_loss(
    img_features: Tensor,
    words_emb: Tensor,
    cap_lens: Sequence[int] | Tensor,
    temp1: Tensor | float = 4.0,
    temp2: Tensor | float = 5.0,
    temp3: Tensor | float = 10.0,
    agg: str = "sum",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """GLoRIA's local loss: cross-entropies of the scores of all images with all reports of a batch.

    The score of image i and report j is temp3 * log sum_t exp(temp2 * cos(word t, what the image shows of it)); see
    kernels/local_alignment.py. GLoRIA's cosine divides by no product of lengths below 1e-8: of features of no length.

    Args:
        img_features: features of image regions, [B, D, H, W].
        words_emb: features of words, [B, D, T], in img_features' dtype.
        cap_lens: how many words of each report count, its first ones and none skipped, from 1 to T.
        temp1, temp2, temp3: of the attention, of the words' cosines and of the scores, one number each.
        agg: "sum" over a report's words, or "mean": log T_j less of report j's score, before temp3.

    Returns:
        The loss of each image among the reports, that of each report among the images, scalars in float32 (float64 for
        float64); and B maps [1, cap_lens[i], H, W] of what each word of report i attends to in image i.

    Raises:
        ValueError: if shapes, dtypes or lengths do not fit together, or agg is something else.
    """
    fits = img_features.ndim == 4 and words_emb.ndim == 3 and img_features.shape[:2] == words_emb.shape[:2]
    if not fits:
        raise ValueError(
            f"img_features and words_emb are {list(img_features.shape)} and {list(words_emb.shape)}: expected "
            "[B, D, H, W] and [B, D, T]."
        )
    if agg not in ("sum", "mean"):
        raise ValueError(f"agg is {agg!r}: expected sum or mean.")
    lengths = torch.as_tensor(cap_lens).tolist()
    most = words_emb.shape[2]
    if len(lengths) != len(words_emb) or not all(0 < n <= most for n in lengths):
        raise ValueError(f"cap_lens is {lengths}: expected {len(words_emb)} lengths from 1 to {most}.")

    image, text = _one_dtype(img_features.flatten(2).mT, words_emb.mT)
    words = torch.tensor(lengths, device=text.device)
    text_mask = torch.arange(most, device=text.device) < words[:, None]
    text = text.masked_fill(~text_mask[..., None], 0)  # may be anything there
    image_mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    named = {"temp1": temp1, "temp2": temp2, "temp3": temp3}
    taus = [_scalar(name, value, image) for name, value in named.items()]
    logits = ops.local_alignment(image, image_mask, text, text_mask, *taus)
    if agg == "mean":
        logits = logits - taus[2] * words.to(logits.dtype).log()

    own = torch.arange(len(image), device=image.device)
    attention = ops.word_attention(image, image_mask, text, text_mask, taus[0]).mT.unflatten(2, img_features.shape[2:])
    maps = [attention[None, i, :n] for i, n in enumerate(lengths)]
    return cross_entropy(logits, own), cross_entropy(logits.mT, own), maps


def attention_fn(query: Tensor, context: Tensor, temp1: Tensor | float) -> tuple[Tensor, Tensor]:
    """GLoRIA's attention of words to the regions of their own image.

    Args:
        query: features of words, [B, D, T].
        context: features of image regions, [B, D, H, W], in query's dtype.
        temp1: of the attention, one number.

    Returns:
        What each word attends to, [B, D, T], and its attention, [B, T, H, W], in query's dtype.

    Raises:
        ValueError: if shapes do not fit together.
    """
    if context.ndim != 4 or query.ndim != 3 or context.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"query and context are {list(query.shape)} and {list(context.shape)}: expected [B, D, T] and [B, D, H, W]."
        )
    image, words = _one_dtype(context.flatten(2).mT, query.mT)
    regions, counted = (torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) for x in (image, words))
    attention = ops.word_attention(image, regions, words, counted, temp1).to(query.dtype)
    return image.mT @ attention, attention.mT.unflatten(2, context.shape[2:])


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = _EPS) -> Tensor:
    """GLoRIA's cosine along one dimension, of tensors that broadcast: no product of lengths counts as less than eps.

    Returns:
        Without that dimension, nor any other of size 1.
    """
    lengths = x1.norm(dim=dim) * x2.norm(dim=dim)
    return ((x1 * x2).sum(dim) / lengths.clamp(min=eps)).squeeze()
