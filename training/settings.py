"""What the main job can be told: typed, with defaults from a method and a preset, a file, and the command line."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from clinvla_fast.data.cache import CacheName
from clinvla_fast.errors import DataError
from clinvla_fast.methods import METHODS, MethodName
from clinvla_fast.presets import PRESETS, Precision, PresetName, TowerTraining
from clinvla_fast.recipe import Optimization, Recipe

RUNS = Path("runs")
_flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Pretrain:
    """Settings of the main job. Those of the method have its values as defaults, fitted to the preset."""

    recipe: Annotated[Recipe, _flat]
    optimization: Annotated[Optimization, _flat]
    towers: TowerTraining
    method: MethodName = "clinvla"
    """Frozen towers with adapters: clinvla, alta. Frozen towers, their outputs computed once: adaptor. From scratch by
    reconstruction: mrm. End to end: gloria, convirt."""
    preset: PresetName = "tiny"
    """tiny: small towers, made here. base: ViT-B/16 (MAE) and BioBERT, from their hubs, or those given below."""
    data: Path | None = None
    """A folder written by training.prepare. Default: phantoms, made in the run's folder."""
    out: Path | None = None
    """The run's folder. Default: the next free number under runs/."""
    config: Path | None = None
    """Settings to start from: a run.json, or a JSON file of the same form with those that differ from a method's."""
    resume: bool = False
    """Go on with the run in --out (default: the newest under runs/), with the settings it was started with."""
    dry_run: bool = False
    """Print sizes, FLOPs, and what memory and time the whole job would take, measured in a few steps; train nothing."""
    vision_tower: str | None = None
    """A timm ViT: its name, a folder that timm saved, or a file of ViT weights. Overrides the preset's."""
    text_tower: str | None = None
    """A Hugging Face BERT: its name, its folder, or a file of BERT weights. Overrides the preset's."""
    unfreeze: bool = False
    """Train all of the towers too, end to end, to compare with frozen ones."""
    precision: Precision = "auto"
    """What the towers compute in. auto: bfloat16 where the machine has matrix instructions for it. What is trained is
    float32."""
    fp8: bool = False
    """Frozen linear layers in FP8, where a GPU has it: as many as leave a tower's features close to bfloat16's."""
    attention: Literal["auto", "xformers", "varlen", "sdpa"] = "auto"
    """Which library attends. auto: what CLINVLA_ATTENTION says; without it, xformers on a GPU, sdpa on a CPU."""
    cache: CacheName = "auto"
    """Where decoded training images are kept after the first pass: gpu memory, ram, or disk (a file in the run's folder
    that goes with the process). auto: the first of them of whose free space they take at most half. Results are the
    same with any."""
    compile: bool = False
    """Compile the towers' blocks: slower to start, faster to run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    wandb: str | None = None
    """A project on Weights & Biases to send the curves to, beside TensorBoard."""
    features: Path | None = None
    """Adaptor: where the towers' outputs are kept, for this run and others. Default: in the run's folder."""
    seed: int = 0
    """The same seed, settings and machine give the same numbers."""
    patients: int = 1200
    """Phantoms to make, where --data is not given."""


# What may change when a run goes on: where and how fast it runs, not what it computes.
_FREE = {"out", "resume", "config", "dry_run", "cache", "compile", "device", "wandb", "attention", "features"}


def parse(args: Sequence[str] | None) -> Pretrain:
    """Settings from a command line.

    Raises:
        DataError: if a name, a file or a value is not one that there is.
        SystemExit: for --help, and for flags that there are not.
    """
    args = sys.argv[1:] if args is None else list(args)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("method", "preset", "config", "out"):
        first.add_argument(f"--{name}")
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args([arg.replace("_", "-", 1) if arg == "--dry_run" else arg for arg in args])
    if known.resume:
        run = _to_resume(known.out)
        default = replace(load(run), out=run.parent, resume=True)
    elif known.config:
        default = replace(load(Path(known.config)), out=None, resume=False, dry_run=False)
    else:
        default = fitted(_name("method", known.method, MethodName), _name("preset", known.preset, PresetName))
    fixed = {"method": default.method, "preset": default.preset} if known.resume or known.config else {}
    for name, value in fixed.items():
        if getattr(known, name) not in (None, value):
            raise DataError(f"--{name} is {getattr(known, name)!r}, the settings to start from have {value!r}.")
    with _registry:
        try:
            settings = tyro.cli(
                Pretrain, prog="python -m training.pretrain", description=_ABOUT, args=args, default=default
            )
        except ValueError as error:  # of a recipe
            raise DataError(str(error)) from None
    if known.resume:
        _same(default, settings)
    return _checked(settings)


_ABOUT = """Pretrain: align radiographs and reports.

Without --data it makes phantoms first; with the tiny preset it also makes the towers. On several GPUs:
torchrun --nproc-per-node N -m training.pretrain …"""


def fitted(method: MethodName, preset: PresetName) -> Pretrain:
    """A method's settings, at a preset's size."""
    size = PRESETS[preset]
    fit = size.fit(method, METHODS[method])
    return Pretrain(fit.recipe, fit.optimization, size.towers, method, preset, precision=size.precision)


def _name(kind: str, given: str | None, names: Any) -> Any:
    known = get_args(names)
    if given is None:
        return known[0]
    if given not in known:
        raise DataError(f"--{kind} is {given!r}: expected one of {', '.join(known)}{_meant(given, known)}.")
    return given


def _meant(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _to_resume(out: str | None) -> Path:
    folder = Path(out) if out else max(RUNS.glob("*/run.json"), default=RUNS / "none", key=os.path.getmtime).parent
    if not (folder / "run.json").is_file():
        raise DataError(f"{folder} holds no run to resume (no run.json): start one without --resume.")
    return folder / "run.json"


def load(path: Path) -> Pretrain:
    """The settings in a run.json, or in a file of its form that leaves out what is as its method and preset have it.

    Raises:
        DataError: if the file cannot be read, or holds a name or value that there is not.
    """
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no JSON file that can be read ({type(error).__name__}).") from None
    stored = stored.get("settings", stored) if isinstance(stored, dict) else stored
    if not isinstance(stored, dict):
        raise DataError(f"{path} holds a {type(stored).__name__}: expected settings by name.")
    names = (stored.get("method"), MethodName), (stored.get("preset"), PresetName)
    try:
        base = fitted(
            *(_name(kind, given, known) for kind, (given, known) in zip(("method", "preset"), names, strict=True))
        )
        return TypeAdapter(Pretrain).validate_python(_merged(asdict(base), stored, Pretrain, ""))
    except ValidationError as error:
        wrong = error.errors()[0]
        if wrong["type"] == "value_error":  # of a recipe, which says all
            raise DataError(f"{path}: {wrong['ctx']['error']}") from None
        where = ".".join(map(str, wrong["loc"]))
        raise DataError(f"{path}: {where} is {wrong['input']!r}: {wrong['msg']}.") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _merged(base: dict, changes: dict, of: type, above: str) -> dict:
    """`base` with what differs from it."""
    known = {f.name: get_type_hints(of)[f.name] for f in fields(of)}
    for name, value in changes.items():
        if name not in known:
            raise DataError(f"there is no setting {above}{name}{_meant(name, list(known))}.")
        if is_dataclass(known[name]) and isinstance(value, dict):
            value = _merged(base[name], value, known[name], f"{above}{name}.")
        base = base | {name: value}
    return base


def store(settings: Pretrain) -> dict:
    """As JSON: every value."""
    return json.loads(TypeAdapter(Pretrain).dump_json(settings))


def _same(saved: Pretrain, given: Pretrain) -> None:
    for part in (saved, saved.recipe, saved.optimization, saved.towers):
        other = given if part is saved else getattr(given, _PART[type(part)])
        for f in fields(part):
            if f.name in _FREE or is_dataclass(getattr(part, f.name)):
                continue
            if getattr(part, f.name) != getattr(other, f.name):
                flag = f.name.replace("_", "-")
                raise DataError(f"--{flag} cannot change when a run goes on: it was {getattr(part, f.name)!r}.")


_PART = {Recipe: "recipe", Optimization: "optimization", TowerTraining: "towers"}


def _checked(settings: Pretrain) -> Pretrain:
    """With what follows from other settings.

    Raises:
        DataError: for values that cannot be.
    """
    if settings.recipe.fusion:
        asked = {"chunk": settings.optimization.chunk, "unfreeze": settings.unfreeze, "fp8": settings.fp8}
        asked["stop-on-collapse"] = settings.optimization.stop_on_collapse
        plain = PRESETS[settings.preset].fit(settings.method, METHODS[settings.method]).recipe
        for f in fields(Recipe):
            if f.name not in ("width", "max_tokens") and getattr(settings.recipe, f.name) != getattr(plain, f.name):
                asked[f.name.replace("_", "-")] = True
        for name in (name for name, value in asked.items() if value):
            raise DataError(
                f"--{name} has no meaning for a method whose towers' outputs are computed once: leave it out."
            )
    elif settings.features is not None:
        raise DataError("--features keeps towers' outputs for --method adaptor: leave it out.")
    if settings.unfreeze and "towers" not in settings.recipe.trained:
        trained = (*settings.recipe.trained, "towers")
        settings = replace(settings, recipe=replace(settings.recipe, trained=trained))
    for part, names in (
        (settings, ("patients",)),
        (settings.optimization, ("epochs", "batch_size", "accumulate", "chunk", "patience", "skip_limit")),
        (settings.optimization, ("schedule_epochs",)),
        (settings.towers, ("epochs", "batch_size")),
    ):
        for name in names:
            value = getattr(part, name)
            if value is not None and value < 1:
                flag = ("towers." if part is settings.towers else "") + name.replace("_", "-")
                raise DataError(f"--{flag} is {value}: expected at least 1.")
    optimization = settings.optimization
    if optimization.schedule_epochs is not None and optimization.schedule_epochs < optimization.epochs:
        schedule = optimization.schedule_epochs
        raise DataError(f"--schedule-epochs is {schedule}: expected no less than --epochs, {optimization.epochs}.")
    for name, fits, expected in (
        ("clip", optimization.clip > 0, "above 0"),
        ("warmup", 0 <= optimization.warmup <= 1, "a share, 0 to 1"),
        ("betas", all(0 <= beta < 1 for beta in optimization.betas), "both at least 0, and below 1"),
        *((rate, getattr(optimization, rate) >= 0, "0 or more") for rate in ("language_lr", "task_lr", "tower_lr")),
        ("weight_decay", optimization.weight_decay >= 0, "0 or more"),
    ):
        if not fits:
            raise DataError(f"--{name.replace('_', '-')} is {getattr(optimization, name)}: expected {expected}.")
    if not 0 < settings.towers.keep < 1:
        raise DataError(f"--towers.keep is {settings.towers.keep}: expected a share, above 0 and below 1.")
    if not 0 <= settings.optimization.ema < 1:
        raise DataError(f"--ema is {settings.optimization.ema}: expected at least 0, and below 1.")
    return settings


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _block_numbers(found: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """--adapter-blocks 2,5,8-11."""
    if found.type != (tuple[int, ...] | None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="8-11|2,5,8-11",
        instance_from_str=lambda given: None if given == ["None"] else _blocks(given[0]),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["None" if value is None else ",".join(map(str, value))],
    )


def _blocks(text: str) -> tuple[int, ...]:
    """The numbers in "2,5,8-11", ascending."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last] if dash else [first]
        named = all(end.isdecimal() and len(end) < 4 for end in ends)  # no tower has a thousand blocks
        if not named or int(ends[0]) > int(ends[-1]):
            raise DataError(f"--adapter-blocks is {text!r}: expected numbers and ranges, as 8-11 or 2,5,8-11.")
        found.update(range(int(ends[0]), int(ends[-1]) + 1))
    return tuple(sorted(found))
