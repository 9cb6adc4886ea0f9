"""Settings from methods, files and the command line: what comes out, and what is said of what cannot be."""

import json
from dataclasses import replace
from typing import get_args

import pytest

from clinvla_fast.errors import DataError
from clinvla_fast.methods import METHODS, MethodName
from clinvla_fast.presets import PRESETS, PresetName
from training.settings import load, parse, store


@pytest.mark.parametrize("preset", get_args(PresetName))
@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_method_at_a_size(method, preset):
    settings = parse(["--method", method, "--preset", preset])
    fitted = PRESETS[preset].fit(method, METHODS[method])
    assert (settings.recipe, settings.optimization) == (fitted.recipe, fitted.optimization)


def test_the_command_line_overrides_any_value():
    recipe = "--method alta --adapter-blocks 0,2-3 --views frontal lateral --no-missing-views --scales 1 2 3 4"
    rest = "--epochs 7 --towers.epochs 2 --betas 0.8 0.9 --chunk 5"
    settings = parse(f"{recipe} {rest}".split())
    assert settings.recipe.adapter_blocks == (0, 2, 3) and settings.recipe.views == ("frontal", "lateral")
    assert settings.recipe.missing_views is False and settings.recipe.scales == (1, 2, 3, 4)
    assert (settings.optimization.epochs, settings.towers.epochs) == (7, 2)
    assert settings.optimization.betas == (0.8, 0.9) and settings.optimization.chunk == 5
    assert settings.recipe.adapters == ("attention", "mlp")  # the rest is ALTA's


def test_unfreeze_trains_the_towers():
    assert parse(["--unfreeze"]).recipe.trained == ("towers",)
    assert parse(["--method", "alta", "--unfreeze"]).recipe.trained == ("norms", "tokens", "towers")


def test_what_is_stored_comes_back(tmp_path):
    settings = parse(["--method", "gloria", "--adapter-blocks", "1-2", "--out", "somewhere"])
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"settings": store(settings), "manifest_sha256": None}))
    assert load(path) == settings
    again = parse(["--config", str(path), "--width", "32"])
    assert again.recipe == replace(settings.recipe, width=32) and again.out is None and again.method == "gloria"


def test_a_file_of_what_differs(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"method": "alta", "optimization": {"epochs": 3}, "recipe": {"views": ["frontal"]}}))
    settings = parse(["--config", str(path)])
    alta = PRESETS["tiny"].fit("alta", METHODS["alta"])
    assert settings.recipe == replace(alta.recipe, views=("frontal",))
    assert settings.optimization == replace(alta.optimization, epochs=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"recipe": {"botleneck": 3}}, "there is no setting recipe.botleneck; did you mean bottleneck?"),
        ({"optimisation": {}}, "there is no setting optimisation; did you mean optimization?"),
        ({"recipe": {"keep": 3}}, "keep is 3.0: expected a share above 0, at most 1"),
        ({"recipe": {"adapter_blocks": []}}, "adapter_blocks is empty: expected at least one, or null for every block"),
        ({"recipe": {"views": ["side"]}}, "recipe.views.0 is 'side'"),
        ({"recipe": 3}, "recipe is 3"),
        ({"optimization": {"epochs": "many"}}, "optimization.epochs is 'many'"),
        ({"method": "altaa"}, "expected one of clinvla, alta, adaptor, mrm, gloria, convirt; did you mean alta?"),
        ([1], "holds a list: expected settings by name"),
        ("{", "no JSON file that can be read"),
    ],
)
def test_a_file_that_cannot_be(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content if content == "{" else json.dumps(content))
    with pytest.raises(DataError) as caught:
        parse(["--config", str(path)])
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "glorai"], "--method is 'glorai': expected one of .*; did you mean gloria?"),
        (["--preset", "huge"], "--preset is 'huge': expected one of tiny, base"),
        (["--epochs", "0"], "--epochs is 0: expected at least 1"),
        (["--towers.epochs", "0"], "--towers.epochs is 0: expected at least 1"),
        (["--chunk", "-1"], "--chunk is -1"),
        (["--ema", "1"], "--ema is 1.0: expected at least 0, and below 1"),
        (["--views"], "views is empty"),
        (["--global-weight", "0", "--local-weight", "0"], "all weights of losses are 0"),
        (["--image-weight", "1", "--keep", "1"], "reconstructs masked patches, and keep is 1"),
        (
            ["--method", "adaptor", "--chunk", "8"],
            "--chunk has no meaning for a method whose towers' outputs are computed",
        ),
        (["--adapters", "mlp", "task"], "adapters are mlp, task: mlp takes the place of language and task"),
        (["--epochs", "9", "--schedule-epochs", "8"], "--schedule-epochs is 8: expected no less than --epochs, 9"),
        (["--features", "somewhere"], "--features keeps towers' outputs for --method adaptor: leave it out"),
        (["--adapter-blocks", "3-1"], "expected numbers and ranges, as 8-11 or 2,5,8-11"),
        (["--adapter-blocks", "0-99999999"], "expected numbers and ranges, as 8-11 or 2,5,8-11"),
    ],
)
def test_values_that_cannot_be(arguments, message):
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        parse(arguments)


def test_a_typo_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--botleneck", "3"])
    assert stopped.value.code == 2
    assert "--bottleneck" in capsys.readouterr().err


def test_a_config_of_another_method(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"method": "alta"}))
    with pytest.raises(DataError, match="--method is 'mrm', the settings to start from have 'alta'"):
        parse(["--config", str(path), "--method", "mrm"])


def test_the_newest_run_goes_on_where_it_lies_now(tmp_path, monkeypatch):
    for name, moved in (("001", "001"), ("002", "copied")):
        (tmp_path / "runs" / moved).mkdir(parents=True)
        stored = store(parse(["--out", f"runs/{name}"]))
        (tmp_path / "runs" / moved / "run.json").write_text(json.dumps({"settings": stored}))
    monkeypatch.chdir(tmp_path)
    assert str(parse(["--resume"]).out) == "runs/copied"


def test_a_run_goes_on_with_its_own_settings(tmp_path):
    settings = parse(["--epochs", "3", "--out", str(tmp_path), "--compile", "--device", "cpu"])
    (tmp_path / "run.json").write_text(json.dumps({"settings": store(settings)}))
    resumed = parse(["--resume", "--out", str(tmp_path), "--cache", "ram"])
    assert resumed == replace(settings, resume=True, cache="ram")
    with pytest.raises(DataError, match="--epochs cannot change when a run goes on: it was 3"):
        parse(["--resume", "--out", str(tmp_path), "--epochs", "4"])
