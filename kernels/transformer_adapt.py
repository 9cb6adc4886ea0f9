"""Transformer-Adapt (ClinVLA, section 3.2 and Figure 2c): the end of an adapted transformer block.

With r the output of the feed-forward network, x the residual stream that it is added to and, in a post-norm block,
N its LayerNorm (in a pre-norm block N is the identity):

    h   = N(r + x)
    LA  = U_l ReLU(D_l h) + r        language adapter
    TA  = U_t ReLU(D_t LA) + r       task adapter
    out = N(TA + x)

Without a language adapter the task adapter reads h; without a task adapter TA is LA; without both, out is h.
"""

from torch import Tensor
from torch.nn.functional import layer_norm

from .bottleneck import Bottleneck, bottleneck


def reference(
    ffn: Tensor,
    residual: Tensor,
    language: Bottleneck | None,
    task: Bottleneck | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        return x if norm_weight is None else layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)

    hidden = norm(ffn + residual)
    if language is None and task is None:
        return hidden
    for adapter in (language, task):
        if adapter is not None:
            hidden = bottleneck(hidden, adapter) + ffn
    return norm(hidden + residual)
