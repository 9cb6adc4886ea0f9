"""Fast twins for models that people already have: swapped in place, and back.

A twin is a subclass with a faster `forward`, and `accelerate` changes a module's class to it: parameters, buffers, keys
of the state_dict, hooks and references stay what they were, and so does what copying, pickling, `.to()`, DDP and
torch.compile make of them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator

import timm.layers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import (
    AlbertPreTrainedModel,
    AttentionInterface,
    AttentionMaskInterface,
    BertPreTrainedModel,
    CamembertPreTrainedModel,
    DistilBertPreTrainedModel,
    ElectraPreTrainedModel,
    MegatronBertPreTrainedModel,
    PreTrainedModel,
    RobertaPreTrainedModel,
    XLMRobertaPreTrainedModel,
)
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.bert.modeling_bert import BertIntermediate
from transformers.models.camembert.modeling_camembert import CamembertIntermediate
from transformers.models.distilbert.modeling_distilbert import FFN as DistilBertFFN
from transformers.models.electra.modeling_electra import ElectraIntermediate
from transformers.models.megatron_bert.modeling_megatron_bert import MegatronBertIntermediate
from transformers.models.roberta.modeling_roberta import RobertaIntermediate
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaIntermediate

from .kernels import onednn
from .modeling.attention import attention

_ATTENTION = "clinvla_fast"  # our name among transformers' attention functions
_BEFORE = "_attention_before_clinvla_fast"
_BERTS = (
    AlbertPreTrainedModel,
    BertPreTrainedModel,
    CamembertPreTrainedModel,
    DistilBertPreTrainedModel,
    ElectraPreTrainedModel,
    MegatronBertPreTrainedModel,
    RobertaPreTrainedModel,
    XLMRobertaPreTrainedModel,
)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(part: nn.Module | Callable) -> bool:
    """Whether something listens to a module, or has put a forward of its own into it."""
    if not isinstance(part, nn.Module):
        return False
    return "forward" in part.__dict__ or any(getattr(part, name) for name in _HOOKS) or _has_any_global_hook()


def plain(layer: nn.Module) -> bool:
    """Whether a layer is a Linear whose forward nothing else listens to."""
    return type(layer) in (nn.Linear, FastLinear) and not hooked(layer)


def exact_gelu(activation: Callable) -> bool:
    """Whether an activation is GELU by the error function, and nothing listens to it."""
    module = type(activation) in (nn.GELU, timm.layers.GELU)
    exact = module and getattr(activation, "approximate", "none") == "none"
    exact = exact or activation is nn.functional.gelu or type(activation) is GELUActivation
    return exact and not hooked(activation)


class FastLinear(nn.Linear):
    """torch.nn.Linear through oneDNN on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return onednn.linear(x, self.weight, self.bias)


# What a twin replaces is looked at in each call: people exchange parts, and listen to them, later too.


def _through_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    return onednn.linear(x, layer.weight, layer.bias, gelu=True)


class FastMlp(timm.layers.Mlp):
    """timm's Mlp, its GELU applied as the first layer is written."""

    def forward(self, x: Tensor) -> Tensor:
        if not _mlp_fits(self):
            return super().forward(x)
        x = self.norm(self.drop1(_through_gelu(self.fc1, x)))
        return self.drop2(self.fc2(x))


def _mlp_fits(mlp: timm.layers.Mlp) -> bool:
    return plain(mlp.fc1) and exact_gelu(mlp.act)


class FastAttention(timm.layers.Attention):
    """timm's Attention through the attention function of our towers."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        more = any(a is not None and a is not False for a in (*args, *kwargs.values()))
        if more or (self.training and self.attn_drop.p) or not _attention_fits(self):
            return super().forward(x, *args, **kwargs)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        x = attention(self.q_norm(query), self.k_norm(key), value).flatten(2)
        return self.proj_drop(self.proj(self.norm(x)))


def _attention_fits(attention: timm.layers.Attention) -> bool:
    """Those who switch fused_attn off want the maps, or second gradients, which no fused attention has."""
    usual = getattr(attention, "gate", None) is None and attention.head_dim**-0.5 == attention.scale
    return usual and attention.fused_attn and not hooked(attention.attn_drop)


class _FastIntermediate:
    """The first half of a BERT's feed-forward network, its GELU applied as it is written."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _intermediate_fits(self):
            return super().forward(hidden_states)
        return _through_gelu(self.dense, hidden_states)


def _intermediate_fits(half: nn.Module) -> bool:
    return plain(half.dense) and exact_gelu(half.intermediate_act_fn)


class FastBertIntermediate(_FastIntermediate, BertIntermediate): ...


class FastRobertaIntermediate(_FastIntermediate, RobertaIntermediate): ...


class FastXLMRobertaIntermediate(_FastIntermediate, XLMRobertaIntermediate): ...


class FastElectraIntermediate(_FastIntermediate, ElectraIntermediate): ...


class FastCamembertIntermediate(_FastIntermediate, CamembertIntermediate): ...


class FastMegatronBertIntermediate(_FastIntermediate, MegatronBertIntermediate): ...


class FastDistilBertFFN(DistilBertFFN):
    """DistilBERT's feed-forward network, its GELU applied as the first layer is written."""

    def ff_chunk(self, input: Tensor) -> Tensor:
        if not _distilled_fits(self):
            return super().ff_chunk(input)
        return self.dropout(self.lin2(_through_gelu(self.lin1, input)))


def _distilled_fits(ffn: DistilBertFFN) -> bool:
    return plain(ffn.lin1) and exact_gelu(ffn.activation)


# What each class is changed to, and which of its instances can be.
_TWINS: dict[type[nn.Module], tuple[type[nn.Module], Callable[[nn.Module], bool]]] = {
    nn.Linear: (FastLinear, lambda layer: True),
    timm.layers.Mlp: (FastMlp, _mlp_fits),
    timm.layers.Attention: (FastAttention, _attention_fits),
    DistilBertFFN: (FastDistilBertFFN, _distilled_fits),
    **{
        base: (twin, _intermediate_fits)
        for twin in (
            FastBertIntermediate,
            FastRobertaIntermediate,
            FastXLMRobertaIntermediate,
            FastElectraIntermediate,
            FastCamembertIntermediate,
            FastMegatronBertIntermediate,
        )
        for base in [twin.__mro__[2]]
    },
}
_ORIGINALS = {twin: base for base, (twin, _) in _TWINS.items()}


def _know_adapters() -> None:
    """Add the twins of AdapterHub's modules, which a model can only have where they were imported."""
    if "adapters.methods.modeling" in sys.modules:
        from .twins_adapterhub import TWINS

        _TWINS.update(TWINS)
        _ORIGINALS.update((twin, base) for base, (twin, _) in TWINS.items())


def _fast_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: [B, heads, M, d] to [B, M, heads, d]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    whole = attention_mask is None and not dropout and not causal and query.shape == key.shape
    if whole and scaling in (None, query.shape[-1] ** -0.5):
        return attention(*(x.transpose(1, 2) for x in (query, key, value))), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)


AttentionInterface.register(_ATTENTION, _fast_attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _supported(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts of a model that have twins inside."""
    if isinstance(model, (VisionTransformer, *_BERTS)):
        yield model
    elif isinstance(model, nn.Module):
        for child in model.children():
            yield from _supported(child)


def swap(model: nn.Module) -> Counter[str]:
    """Change what can be changed to its fast twin; how many of each kind."""
    _know_adapters()
    swapped: Counter[str] = Counter()
    for part in _supported(model):
        # The BERTs of transformers 4 choose their attention when they are made, and keep it.
        settable = isinstance(part, PreTrainedModel) and part._can_set_attn_implementation()
        # Eager attention is asked for by those who want its maps, which no other returns.
        if settable and part.config._attn_implementation not in ("eager", _ATTENTION):
            setattr(part, _BEFORE, part.config._attn_implementation)
            part.set_attn_implementation(_ATTENTION)
            swapped["attention of " + type(part).__name__] += 1
        for module in part.modules():
            twin, fits = _TWINS.get(type(module), (None, None))
            if twin is not None and fits(module):
                swapped[type(module).__name__] += 1
                module.__class__ = twin
            elif type(module) in _ORIGINALS:
                swapped["already fast"] += 1
    return swapped


def accelerate(model: nn.Module) -> nn.Module:
    """Swap the slow parts of a model for fast twins, in place, and print what was swapped.

    Supported, alone or in a larger model, compiled or not, frozen or trained: timm's VisionTransformer, BERT-family
    models of transformers, AdapterHub's adapters in them too, and ClinVLA. Outputs and gradients are equal up to
    rounding, `state_dict` key for key; hooks are called, whenever they are put on. A model of transformers that was
    told `attn_implementation="eager"` keeps its attention, and so its attention maps; so does timm's with `fused_attn`
    off. Tools that know layers by their very class (dynamic quantisation, torch.fx, torch.jit.script) want `restore`
    first.

    Returns:
        The model itself.

    Raises:
        ValueError: if there is nothing in it to accelerate.
    """
    swapped = swap(model)
    if not swapped:
        raise ValueError(
            f"{type(model).__name__} has nothing to accelerate: supported are timm's VisionTransformer, transformers' "
            "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ALBERT, ELECTRA and Megatron-BERT, AdapterHub's "
            "adapters in these, and ClinVLA, alone or inside a larger model."
        )
    print(f"accelerated {type(model).__name__}: " + ", ".join(f"{n} {name}" for name, n in swapped.items()))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every module of the model, or of a copy of it, is again of the class that it was."""
    _know_adapters()
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == _ATTENTION:
            module.set_attn_implementation(getattr(module, _BEFORE, "sdpa"))  # remembered by the outermost part alone
        module.__dict__.pop(_BEFORE, None)
    return model
