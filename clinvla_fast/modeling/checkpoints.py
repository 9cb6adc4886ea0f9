"""Checkpoints from outside: their names are put into ours by a table, and every one of their keys is accounted for."""

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from timm.layers import LayerNorm, resample_abs_pos_embed
from torch import Tensor, nn

from ..errors import DataError
from ..recipe import Recipe

Kind = Literal["vision", "text"]

# A tower is found by a weight that every layout has; what stands before that name is the tower's prefix in the file:
# none, "module.", "visual.trunk.", "teacher.backbone.", "bert_encoder.model.bert.", ...
_ANCHORS = {
    "vision": ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"),
    "text": ("embeddings.word_embeddings.weight",),
}
_TOWER = {"vision": "image tower", "text": "report tower"}

# Wrappers that put their own name into those of the weights below them.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Of several towers, what to take: a teacher, or an average of the weights.
_AVERAGED = re.compile(r"(^|[._])(teacher|target|ema)([._]|$)")

# Behind the prefix: timm's names for a ViT, transformers' for a BERT. All that fit are applied, from above.
_RENAMES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "vision": (
        (r"^embeddings\.cls_token$", "cls_token"),  # from here on: transformers' ViT, ViTMAE, DeiT and Dinov2
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(?:encoder\.)?layers?\.(?=\d)", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(?:(?:attention\.)?([qkv])(?:uery|ey|alue)|([qkv])_proj)\.", r".attn.\1\2."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        (r"^blocks\.\d+\.(?=\d)", "blocks."),  # DINOv2 in chunks, whose blocks are counted through
        (r"^fc_norm\.", "norm."),  # MAE fine-tuned, and timm's global_pool="avg": see _FC_NORM
    ),
    "text": (
        (r"\.gamma$", ".weight"),  # BERTs converted from TensorFlow: a LayerNorm's names
        (r"\.beta$", ".bias"),
    ),
}
_PART = re.compile(r"(?<=\.attn\.)[qkv](?=\.)")  # timm has one projection where transformers has three
_FC_NORM = "fc_norm of a model that was tuned on the mean of its patches: here the norm of every token"

# ALTA's adapters and the embeddings of its views: behind the prefix, their names in a tower with its recipe.
_ALTA: tuple[tuple[str, str], ...] = (
    (r"^(?:blocks|encoder\.layer)\.(\d+)\.attn_adapter\.", r"adapts.\1.attention."),
    (r"^(?:blocks|encoder\.layer)\.(\d+)\.mlp_adapter\.", r"adapts.\1.mlp."),
    (r"^(adapts\..+)\.D_fc1\.", r"\1.down."),
    (r"^(adapts\..+)\.D_fc2\.", r"\1.up."),
    (r"^temporal_embedding$", "time_embedding"),
    (r"^view_embedding$", "view_embedding"),
)
_OF_ALTA = re.compile(r"adapts\.|(time|view)_embedding$")

# What is in no tower, and why. The first that fits.
_REFUSALS = (
    (r"(^|\.)(attn|mlp)_adapter\.", "ALTA's adapter: the recipe has none there"),
    (r"(^|\.)(view|temporal)_embedding$", "ALTA's view embedding: the recipe is another"),
    (r"(^|\.)missing_token$", "ALTA's patches of a missing view: here its CLS token is learned"),
    (r"(^|\.)(optimizer|optimizer_states|optim|scaler|lr_schedulers?)\.", "optimizer"),
    (r"(^|\.)(cls\.(predictions|seq_relationship)|lm_head)\.", "head of masked words"),
    (r"(^|\.)(decoder|decoder_\w+|mask_token)(\.|$)", "decoder of masked autoencoding"),
    (r"(^|\.)((cls_|local_)?projection_head|visual\.head|text\.proj|text_projection)\.", "projection head"),
    (r"(^|\.)((dino_|ibot_)?head\.(mlp|last_layer)|bert_mlp|bert_embed)\.", "projection head"),
    (r"(^|\.)logit_\w+$", "scale of a loss"),
    (r"(^|\.)(head|classifier)\.", "classifier"),
    (r"(^|\.)pooler\.", "pooler"),
    (r"(^|\.)embeddings\.(position_ids|token_type_ids)$", "constant"),
)

# A weight of the tower proper that its module lacks would change what the tower computes: never left out in silence.
_TRUNK = {
    "vision": re.compile(
        r"(cls_token|dist_token|reg_token|register_tokens|pos_embed|rel_pos_bias|embeddings\.|encoder\.layer\.)"
        r"|(patch_embed|norm_pre|ln_pre|blocks|layers|norm|fc_norm|layernorm)\."
    ),
    "text": re.compile(r"(embeddings|encoder)\."),
}
_NO_PLACE = "no place for it in this tower"
_HARMLESS = re.compile(r"pooler\.|embeddings\.(position_ids|token_type_ids)$")  # to miss

# timm's widths whose heads are not 64 wide.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclass(frozen=True)
class KeyReport:
    """What became of every key of a file. Each is in one of loaded, renamed and refused.

    loaded: names that fitted as they were.
    renamed: their name -> ours.
    changed: our name -> what was done to the values.
    refused: their name -> why.
    missing: ours that nothing gave a value.
    """

    loaded: tuple[str, ...]
    renamed: dict[str, str]
    changed: dict[str, str]
    refused: dict[str, str]
    missing: tuple[str, ...]

    def summary(self) -> str:
        """A few lines for a person: counts, and the first names of each group."""
        lines = [f"{len(self.loaded)} weights loaded under their own names, {len(self.renamed)} renamed"]
        groups = {"renamed": [f"{theirs} -> {ours}" for theirs, ours in self.renamed.items()]}
        for title, table in (("changed", self.changed), ("refused", self.refused)):
            for name, reason in table.items():
                groups.setdefault(f"{title} ({reason})", []).append(name)
        groups["missing"] = list(self.missing)
        return "\n".join(lines + [f"  {title}: {_some(names)}" for title, names in groups.items() if names])


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, or of what torch.save wrote. No code in the file is run.

    The state dict, which is the part with the most tensors (of several as large, a teacher's or an average's), keeps
    its names; other tensors of the file are named by the way to them, as "optimizer.state.0.exp_avg".

    Raises:
        DataError: if the file cannot be read, is damaged, needs code to be read or holds no tensor.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's files have their options beside them
                found = torch.load(path, weights_only=True, map_location="cpu")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # a damaged file fails wherever the reader happens to be
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise DataError(
                f"{path} holds Python objects beside its weights ({code[1]}): they could run code, so it is not read. "
                "Where you trust it, save its state_dict alone, as .safetensors."
            ) from error
        raise DataError(f"{path} is damaged or no file of weights: get it again, and compare its size.") from error
    groups: dict[tuple[str, ...], dict[str, Tensor]] = {}
    _collect(found, (), groups)
    if not groups:
        raise DataError(f"{path} holds no tensor: expected a state_dict.")

    def rank(way: tuple[str, ...]) -> tuple[int, bool]:
        return len(groups[way]), bool(_AVERAGED.search(".".join(way)))

    weights = groups.pop(max(groups, key=rank))
    return {".".join((*way, name)): x for way, group in groups.items() for name, x in group.items()} | weights


def _collect(node: object, way: tuple[str, ...], groups: dict[tuple[str, ...], dict[str, Tensor]]) -> None:
    """Group the tensors below a node by the way to what holds them."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for name, value in items:
        if isinstance(value, Tensor):
            groups.setdefault(way, {})[str(name)] = value
        else:
            _collect(value, (*way, str(name)), groups)


def _prefixes(names: Iterable[str], kind: Kind) -> list[str]:
    """Where towers of a kind stand in a file; first the one to take: a teacher, else what is named most shortly."""
    found = [n.removesuffix(a) for n in names for a in _ANCHORS[kind] if n == a or n.endswith(f".{a}")]
    return sorted(found, key=lambda prefix: (not _AVERAGED.search(prefix), len(prefix)))


def _rename(weights: Mapping[str, Tensor], kind: Kind) -> dict[str, str]:
    """Their keys -> our names, of all that stands behind the tower's prefix, whether there is such a name or not."""
    bare = {key: _WRAPPERS.sub("", key) for key in weights}
    names = {}
    for prefix in _prefixes(bare.values(), kind)[:1]:
        for key, name in bare.items():
            if name.startswith(prefix):
                names[key] = name.removeprefix(prefix)
                for pattern, replacement in _RENAMES[kind]:
                    names[key] = re.sub(pattern, replacement, names[key])
    return names


def _reason(key: str, ours: str, kind: Kind, prefixes: dict[Kind, list[str]]) -> str:
    """Why a key that our tower has no name for is refused."""
    name = _WRAPPERS.sub("", key)
    for pattern, reason in _REFUSALS:
        if re.search(pattern, name):
            return reason
    if _TRUNK[kind].match(ours):
        return _NO_PLACE
    for other in ("vision", "text"):
        for prefix in prefixes[other]:
            if name.startswith(prefix) and _TRUNK[other].match(name.removeprefix(prefix)):
                return f"of {'another' if other == kind else 'the'} {_TOWER[other]}"
    return "unknown"


def _take(name: str, parts: dict[str, Tensor], shape: torch.Size) -> tuple[Tensor | None, str | None]:
    """A value for one of our names, and what was done to it; or None, and why not."""
    values = [parts[part] for part in ("", *"qkv") if part in parts]
    if "" not in parts and (len(parts) < 3 or len({x.shape for x in values}) > 1 or not values[0].dim()):
        return None, "query, key and value do not make one projection"
    if dtypes := [x.dtype for x in values if not x.is_floating_point()]:
        return None, f"{dtypes[0]}, expected floating-point numbers"
    if not all(x.isfinite().all() for x in values):
        return None, "not finite"
    value, note = (values[0], None) if "" in parts else (torch.cat(values), "query, key and value joined")
    if value.shape == shape:
        return value, note
    if name == "patch_embed.proj.weight" and value.dim() == 4 and value[:, :1].shape == (shape[0], 1, *shape[2:]):
        if value.shape[1] == 3 and shape[1] == 1:
            return value.sum(1, keepdim=True), "RGB patch projection summed to gray"
        if value.shape[1] == 1 and shape[1] == 3:
            return value.expand(shape) / 3, "gray patch projection spread over RGB"
    if name == "pos_embed" and value.dim() == 3 and value.shape[::2] == shape[::2]:
        old, new = math.isqrt(max(value.shape[1] - 1, 0)), math.isqrt(shape[1] - 1)
        if (old**2 + 1, new**2 + 1) == (value.shape[1], shape[1]) and old:
            value = resample_abs_pos_embed(value.float(), [new, new], [old, old])
            return value, f"position embedding resampled {old}x{old} -> {new}x{new}"
    return None, f"shape {list(value.shape)}, expected {list(shape)}"


def match_keys(module: nn.Module, weights: Mapping[str, Tensor], kind: Kind) -> tuple[dict[str, Tensor], KeyReport]:
    """Find a place in a tower for every key of a file, or say why it has none. Changes nothing, refuses no file.

    Args:
        module: a timm VisionTransformer or a transformers BertModel.
        weights: of a file: see `read_weights`.
        kind: "vision" or "text".

    Returns:
        What `module.load_state_dict` can take, and the report.
    """
    own, names = module.state_dict(), _rename(weights, kind)
    prefixes = {k: _prefixes((_WRAPPERS.sub("", key) for key in weights), k) for k in ("vision", "text")}
    refused: dict[str, str] = {}
    sources: dict[str, dict[str, str]] = {}  # ours -> "", or "q", "k" and "v" of timm's one projection -> theirs
    # Of two for one place, the one that already has its name: norm rather than fc_norm.
    for key in sorted(weights, key=lambda key: not f".{key}".endswith(f".{names.get(key)}")):
        name = names.get(key, "")
        ours, part = _PART.sub("qkv", name), "".join(_PART.findall(name))
        if ours not in own:
            refused[key] = _reason(key, name, kind, prefixes)
        elif part in sources.get(ours, {}) or (ours in sources and "" in (part, *sources[ours])):
            refused[key] = f"a second value of {ours}"
        else:
            sources.setdefault(ours, {})[part] = key
    state, loaded, renamed, changed = {}, [], {}, {}
    for ours, parts in sources.items():
        keys = [parts[part] for part in ("", *"qkv") if part in parts]
        value, note = _take(ours, {part: weights[key] for part, key in parts.items()}, own[ours].shape)
        if value is None:
            refused |= dict.fromkeys(keys, note)
            continue
        state[ours] = value
        loaded += [key for key in keys if key == ours]
        renamed |= {key: ours for key in keys if key != ours}
        note = note or (_FC_NORM if "fc_norm." in keys[0] else None)
        changed |= {ours: note} if note else {}
    missing = tuple(name for name in own if name not in state)
    return state, KeyReport(tuple(loaded), renamed, changed, refused, missing)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], kind: Kind) -> KeyReport:
    """Load a file's weights into a tower, whatever layout they are in.

    Args: as `match_keys`.

    Returns:
        What became of every key.

    Raises:
        DataError: if a weight of the tower gets no value, or the file has one that the tower cannot do without but has
            no place for. Nothing is loaded then.
    """
    state, report = match_keys(module, weights, kind)
    if not state:
        raise _nothing_fits(weights, kind)
    if strange := [key for key, reason in report.refused.items() if reason == _NO_PLACE]:
        raise DataError(f"no place in a plain {type(module).__name__} for {_some(strange)}: another architecture.")
    if missing := [name for name in report.missing if not _HARMLESS.match(name)]:
        places = {key: _PART.sub("qkv", name) for key, name in _rename(weights, kind).items()}
        why = [f"{key}: {reason}" for key, reason in report.refused.items() if places.get(key) in missing]
        raise DataError(f"no value for {_some(missing)}" + (f" (refused: {_some(why)})" if why else "") + ".")
    module.load_state_dict(state, strict=False)
    return report


def alta_adapters(weights: Mapping[str, Tensor], kind: Kind) -> dict[str, tuple[str, Tensor]]:
    """What a file has of ALTA's adapters and embeddings of views: by our names, each with its own name there.

    Args: as `match_keys`.
    """
    found = {}
    for key, ours in _rename(weights, kind).items():
        for pattern, replacement in _ALTA:
            ours = re.sub(pattern, replacement, ours)
        if _OF_ALTA.match(ours):
            found[ours] = key, weights[key].squeeze(0) if ours.endswith("embedding") else weights[key]
    return found


@torch.no_grad()
def take_adapters(tower: nn.Module, recipe: Recipe) -> None:
    """Start a tower's new adapters from those of ALTA in its file (`found_adapters`), where the recipe has the same:
    the block then computes what theirs does. `key_report` says which. An adapter is taken whole; one that lacks a value
    or has one that is not finite or of another shape stays refused, as do those that the recipe has no place for."""
    found, tower.found_adapters = tower.found_adapters, {}
    if not found or not {"attention", "mlp"} <= set(recipe.adapters):
        return
    parts: dict[str, dict[str, nn.Parameter]] = {}  # of each adapter, or embedding, of ours
    for name, p in tower.named_parameters():
        parts.setdefault(re.sub(r"\.(down|up)\.\w+$", "", name), {})[name] = p
    renamed, refused = dict(tower.key_report.renamed), dict(tower.key_report.refused)
    for own in parts.values():
        there = [name for name in own if name in found]
        taken = {name: _take(name, {"": found[name][1]}, own[name].shape) for name in there}
        notes = [f"{found[name][0]}: {note}" for name, (value, note) in taken.items() if value is None]
        if notes or len(there) < len(own):
            refused |= {found[name][0]: notes[0] if notes else "a part of an adapter" for name in there}
            continue
        for name, (value, _) in taken.items():
            own[name].copy_(value)
            renamed[found[name][0]] = name
            del refused[found[name][0]]
    tower.key_report = replace(tower.key_report, renamed=renamed, refused=refused)


def _nothing_fits(weights: Mapping[str, Tensor], kind: Kind) -> DataError:
    return DataError(
        f"nothing in it is of the {_TOWER[kind]}: its first names are {_some(weights)}; "
        f"expected {' or '.join(_ANCHORS[kind])} among them, whatever stands before."
    )


def _by_name(weights: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """What options are read from: tensors by our names, before anything is joined or fitted."""
    found = {ours: weights[key] for key, ours in _rename(weights, kind).items()}
    if not found:
        raise _nothing_fits(weights, kind)
    return found


def _shape(found: Mapping[str, Tensor], name: str, dims: int) -> list[int]:
    if name not in found or found[name].dim() != dims:
        has = f"has {list(found[name].shape)}" if name in found else "is not there"
        raise DataError(f"{name} {has}: expected {dims} dimensions, to see the tower's size.")
    return list(found[name].shape)


def _depth(found: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(number[1]) for name in found if (number := re.match(pattern, name)))


def _of_width(config: Mapping, width: int) -> Mapping:
    """A config.json that lies beside a file may be another model's."""
    return config if width in (config.get("hidden_size"), config.get("num_features")) else {}


def _heads(width: int, config: Mapping) -> int:
    heads = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads") or _HEADS.get(width)
    if heads is None and width % 64 == 0:
        heads = width // 64
    if heads is None or width % heads:
        raise DataError(f"how many heads share its width of {width} cannot be told: put its config.json beside it.")
    return heads


def vit_options(weights: Mapping[str, Tensor], config: Mapping) -> dict:
    """What makes a timm VisionTransformer of a file's size.

    Args:
        weights: of a file: see `read_weights`.
        config: timm's or transformers' config.json, or nothing: it says what weights do not, as how many heads there
            are. One of another width is not heeded.

    Raises:
        DataError: if the weights are of no ViT, or of one whose size they do not tell.
    """
    found = _by_name(weights, "vision")
    width, channels, *patch = _shape(found, "patch_embed.proj.weight", 4)
    config = _of_width(config, width)
    tokens, hidden = _shape(found, "pos_embed", 3)[1], _shape(found, "blocks.0.mlp.fc1.weight", 2)[0]
    grid = math.isqrt(tokens - 1)
    if grid**2 + 1 != tokens or patch[0] != patch[1]:
        raise DataError(
            f"{tokens} positions of patches of {patch[0]}x{patch[1]}: expected a square of square patches, and a CLS."
        )
    # transformers' ViT, ViTMAE and DeiT divide by another epsilon than timm, MAE and both Dinov2.
    eps = 1e-12 if any(".layernorm_before." in key for key in weights) else 1e-6
    return {
        "img_size": grid * patch[0],
        "patch_size": patch[0],
        "in_chans": channels,
        "embed_dim": width,
        "depth": _depth(found, r"blocks\.(\d+)\."),
        "num_heads": _heads(width, config),
        "mlp_ratio": hidden / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in found or "blocks.0.attn.q.bias" in found,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in found else None,
        "norm_layer": partial(LayerNorm, eps=config.get("layer_norm_eps", eps)),
        "num_classes": 0,
    }


def bert_options(weights: Mapping[str, Tensor], config: Mapping) -> dict:
    """What makes a transformers BertConfig of a file's size.

    Args: as `vit_options`.

    Raises:
        DataError: if the weights are of no BERT, or of one whose size they do not tell.
    """
    found = _by_name(weights, "text")
    words, width = _shape(found, "embeddings.word_embeddings.weight", 2)
    config = _of_width(config, width)
    hidden = _shape(found, "encoder.layer.0.intermediate.dense.weight", 2)[0]
    positions = _shape(found, "embeddings.position_embeddings.weight", 2)[0]
    types = _shape(found, "embeddings.token_type_embeddings.weight", 2)[0]
    # RoBERTa has BERT's names, but counts positions from 2 and has one type of token.
    if any("roberta" in key for key in weights) or (types == 1 and positions % 8 == 2):
        raise DataError(f"it is a RoBERTa ({positions} positions, of which 2 are for padding): expected a BERT.")
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": _depth(found, r"encoder\.layer\.(\d+)\."),
        "num_attention_heads": _heads(width, config),
        "intermediate_size": hidden,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "hidden_act": config.get("hidden_act", "gelu"),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-12),
    }
