import json
import random
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from clinvla_fast import ClinVLA, DataError, Recipe
from clinvla_fast.modeling.model import parameter_groups
from clinvla_fast.modeling.packing import Packing
from clinvla_fast.pretraining import Align, compile_tower_blocks, warm_up
from clinvla_fast.recipe import Optimization
from clinvla_fast.twins import restore

REPORTS = (
    "The lungs are clear. No pleural effusion or pneumothorax.",
    "Large right pleural effusion.",
    "The heart is normal. The lungs are clear. Left lower lobe pneumonia has improved.",
)


def _close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def _films(seed=0, size=128):
    generator = np.random.default_rng(seed)

    def film():
        return generator.integers(0, 256, (size, size), dtype=np.uint8)

    return [
        {"frontal": film()},
        {"frontal": film(), "lateral": film()},
        {"lateral": film()},
        {"frontal": film(), "lateral": film(), "prior_frontal": film(), "prior_lateral": film()},
        {"prior_frontal": film(), "frontal": film()},
    ]


# What is trained


def test_only_what_is_added_is_trained(tiny_model):
    every = {n for n, _ in tiny_model.named_parameters()}
    assert set(tiny_model.trainable()) == every
    assert not any(name.startswith(("vision.vit.", "text.bert.")) for name in every)
    assert {"vision.vit.pos_embed", "text.bert.embeddings.word_embeddings.weight"} <= set(tiny_model.state_dict())
    kinds = (
        "invertible",
        "adapts",
        "view_embedding",
        "time_embedding",
        "log_scales",
        *(f"{side}_{reach}" for side in ("image", "text") for reach in ("global", "local")),
    )
    for kind in kinds:
        assert any(kind in name for name in tiny_model.trainable()), kind


def test_a_step_moves_everything_but_the_towers(tiny_model, make_batch, shake):
    shake(tiny_model)  # new adapters hide their down-projections from the gradient
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    tiny_model.train()
    optimizer = torch.optim.AdamW(parameter_groups(tiny_model.trainable(), Optimization()))
    batch = make_batch([[1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1]], [9, 12, 5])
    tiny_model.objective(tiny_model(batch, mask_seed=0))["loss"].backward()
    optimizer.step()
    trained = tiny_model.trainable()
    for name, p in tiny_model.named_parameters():
        assert (p.grad is not None) == (name in trained), name
        assert torch.equal(p, before[name]) == (name not in trained), name


def test_frozen_towers_stay_in_evaluation_mode(tiny_model):
    tiny_model.train()
    assert not tiny_model.vision.vit.training and not tiny_model.text.bert.training
    assert tiny_model.training and tiny_model.image_global.training


@pytest.mark.parametrize("adapters", [("invertible", "language", "task"), ("task",), ()])
def test_parameter_groups_cover_every_trainable_once(tiny_towers, adapters):
    model = ClinVLA(**tiny_towers, recipe=Recipe(adapters=adapters))
    groups = parameter_groups(model.trainable(), Optimization(language_lr=1e-5, task_lr=3e-4, weight_decay=0.02))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate) == len(model.trainable())
    for name, p in model.trainable().items():
        of_language = ".language." in name or ".invertible." in name
        assert rate[id(p)] == (1e-5 if of_language else 3e-4), name
    assert all(group["weight_decay"] == 0.02 for group in groups)


# Files


@pytest.fixture
def saved(tiny_model, tiny_towers, tmp_path, shake):
    """A model saved beside its towers, and the folder."""
    folder = tmp_path / "run"
    towers = {kind: folder / "towers" / kind for kind in tiny_towers}
    for kind, source in tiny_towers.items():
        shutil.copytree(source, towers[kind])
    recipe = Recipe(
        width=24, bottleneck=20, adapters=("language", "invertible"), objective="cosine", scales=(9.0, 4.0, 5.0, 2.0)
    )
    model = ClinVLA(**towers, recipe=recipe)
    shake(model)
    model.save_pretrained(folder)
    return model, folder


def _check_same(model, other):
    assert other.recipe == model.recipe
    assert torch.equal(other.encode_images(_films()), model.encode_images(_films()))
    assert torch.equal(other.encode_reports(REPORTS), model.encode_reports(REPORTS))
    assert torch.equal(other.objective.log_scales, model.objective.log_scales)


def test_save_and_load(saved):
    model, folder = saved
    _check_same(model, ClinVLA.from_pretrained(folder))
    stored = (folder / "adapters.safetensors").stat().st_size
    assert stored < 1.2 * sum(4 * p.numel() for p in model.trainable().values()) + 20_000  # no tower in it


def test_a_folder_can_be_moved_with_its_towers(saved, tmp_path):
    model, folder = saved
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    folder.rename(moved)
    _check_same(model, ClinVLA.from_pretrained(moved))


def test_a_relative_folder_can_be_moved_too(saved, tmp_path, monkeypatch):
    model, folder = saved
    monkeypatch.chdir(tmp_path)
    again = ClinVLA("run/towers/vision", "run/towers/text", model.recipe)
    again.load_state_dict(model.state_dict())
    again.save_pretrained(folder)
    folder.rename(tmp_path / "moved")
    _check_same(model, ClinVLA.from_pretrained("moved"))


def test_towers_elsewhere_are_named(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "run")
    _check_same(tiny_model, ClinVLA.from_pretrained(tmp_path / "run"))


def test_damaged_weights(saved):
    weights = saved[1] / "adapters.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"\xff" * 200):
        weights.write_bytes(damaged)
        with pytest.raises(DataError, match=r"adapters\.safetensors"):
            ClinVLA.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "change", [{"width": 23}, {"bottleneck": 9}, {"adapters": ["language", "invertible", "task"]}, {"adapters": []}]
)
def test_weights_of_another_recipe(saved, change):
    path = saved[1] / "config.json"
    config = json.loads(path.read_text())
    config["recipe"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="does not fit the recipe and towers"):
        ClinVLA.from_pretrained(saved[1])


@pytest.mark.parametrize("missing", ["config.json", "adapters.safetensors"])
def test_a_folder_that_holds_no_model(saved, missing):
    (saved[1] / missing).unlink()
    with pytest.raises(DataError, match=r"holds no config\.json and adapters\.safetensors"):
        ClinVLA.from_pretrained(saved[1])


# Use


def test_files_and_arrays_give_the_same_embeddings(tiny_model, tmp_path, shake):
    shake(tiny_model)
    studies = _films()
    on_disk = []
    for i, study in enumerate(studies):
        paths = {view: tmp_path / f"{i}_{view}.png" for view in study}
        for view, path in paths.items():
            Image.fromarray(study[view]).save(path)
        on_disk.append(paths if i % 2 else {view: str(path) for view, path in paths.items()})
    embeddings = tiny_model.encode_images(studies)
    assert embeddings.shape == (5, 24)
    _close(embeddings.norm(dim=1), torch.ones(5))
    spread = (embeddings[:, None] - embeddings).norm(dim=-1)[~torch.eye(5, dtype=torch.bool)]
    assert spread.min() > 1e-3
    _close(tiny_model.encode_images(on_disk), embeddings)


@pytest.mark.parametrize("side", ["images", "reports"])
def test_results_do_not_depend_on_the_batch_size(tiny_model, shake, side):
    shake(tiny_model)
    encode, inputs = (
        (tiny_model.encode_images, _films()) if side == "images" else (tiny_model.encode_reports, [*REPORTS, "Clear."])
    )
    expected = encode(inputs)
    for size in (1, 2, 3):
        _close(encode(inputs, batch_size=size), expected)
    order = torch.arange(len(inputs) - 1, -1, -1)
    _close(encode([inputs[i] for i in order]), expected[order])


def test_nothing_to_encode(tiny_model):
    assert tiny_model.encode_images([]).shape == (0, 24)
    assert tiny_model.encode_reports([]).shape == (0, 24)


def test_arrays_of_another_size_are_resized(tiny_model):
    film = np.full((200, 90), 77, np.uint8)
    small = np.full((128, 128), 77, np.uint8)
    _close(tiny_model.encode_images([{"frontal": film}]), tiny_model.encode_images([{"frontal": small}]))


@pytest.mark.parametrize("study", [{}, {"front": np.zeros((8, 8), np.uint8)}])
def test_a_study_without_a_view_or_with_an_unknown_one(tiny_model, study):
    with pytest.raises(DataError, match=r"study 3 has views .* one or more of frontal, lateral, prior_frontal"):
        tiny_model.encode_images([*_films()[:3], study], batch_size=2)


@pytest.mark.parametrize(
    "pixels",
    [np.full((9, 9), 300, np.uint16), np.full((9, 9), 0.5), np.zeros((9, 9, 3), np.uint8), np.zeros((0, 9), np.uint8)],
)
def test_pixels_of_another_kind(tiny_model, pixels):
    """16-bit values would wrap around and floats be cut to 0 or 1: a wrong embedding, and no word about it."""
    with pytest.raises(DataError, match=r"study 1.*lateral.*uint8 \[H, W\]"):
        tiny_model.encode_images([_films()[0], {"lateral": pixels}])


def test_a_file_that_cannot_be_read(tiny_model, tmp_path):
    (tmp_path / "film.png").write_bytes(b"not a film")
    with pytest.raises(DataError, match=r"film\.png"):
        tiny_model.encode_images([{"frontal": tmp_path / "film.png"}])


def test_reports_are_cleaned_and_cut(tiny_model, shake):
    shake(tiny_model)
    plain = tiny_model.encode_reports(["The lungs are clear."])
    _close(tiny_model.encode_reports(["INDICATION: Cough.\nFINDINGS: The lungs are clear."]), plain)
    long = "The lungs are clear. " * 60
    assert tiny_model.encode_reports([long, ""]).isfinite().all()
    assert not torch.allclose(tiny_model.encode_reports([REPORTS[1]]), plain, atol=1e-3)


# Training


@torch.no_grad()
def test_embeddings_of_a_batch(tiny_model, make_batch, shake):
    """Global: the mean of the present views' CLS, and a report's CLS. Local: patches, and words but CLS and SEP."""
    shake(tiny_model)
    batch = make_batch([[1, 0, 1, 1], [0, 1, 0, 0]], [7, 4])
    e = tiny_model(batch)
    tokens = tiny_model.vision(batch.images, batch.present)
    _close(e.image_global[0], tiny_model.image_global(tokens[:3, 0].mean(0)))
    _close(e.image_global[1], tiny_model.image_global(tokens[3, 0]))
    patches = tiny_model.image_local(tokens[:, 1:])
    _close(e.image_local[0][e.image_mask[0]], patches[:3].flatten(0, 1))
    _close(e.image_local[1][e.image_mask[1]], patches[3])
    hidden = tiny_model.text(batch.tokens, Packing.of(batch.lengths, "cpu"))
    _close(e.text_global, tiny_model.text_global(hidden[[0, 7]]))
    _close(e.text_local[0][e.text_mask[0]], tiny_model.text_local(hidden[1:6]))
    _close(e.text_local[1][e.text_mask[1]], tiny_model.text_local(hidden[8:10]))


@torch.no_grad()
def test_masking_keeps_a_quarter_and_follows_the_seed(tiny_model, make_batch):
    batch = make_batch([[1, 1], [1, 0]], [5, 6])
    masked = tiny_model(batch, mask_seed=3)
    assert masked.image_mask.sum(1).tolist() == [2 * 16, 16]
    assert tiny_model(batch).image_mask.sum(1).tolist() == [2 * 64, 64]
    assert torch.equal(tiny_model(batch, mask_seed=3).image_global, masked.image_global)
    assert not torch.equal(tiny_model(batch, mask_seed=4).image_global, masked.image_global)


@pytest.mark.parametrize("mask_seed", [None, 0])
def test_a_study_without_a_view(tiny_model, make_batch, shake, mask_seed):
    shake(tiny_model.double())  # in float32 the towers' rounding depends on how many reports run together
    batch = make_batch([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], [6, 8, 5])
    e = tiny_model(batch, mask_seed)
    assert not e.image_global[1].any() and not e.image_mask[1].any()
    losses = tiny_model.objective(e)
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in tiny_model.trainable().values())
    two = replace(batch, images=batch.images[[0, 2]], present=batch.present[[0, 2]], lengths=batch.lengths[[0, 2]])
    two = replace(two, tokens=torch.cat([batch.tokens[:6], batch.tokens[-5:]]))
    if mask_seed is None:
        _close(tiny_model.objective(tiny_model(two))["loss"], losses["loss"])


def test_a_batch_without_any_view(tiny_model, make_batch):
    batch = make_batch([[0, 0], [0, 0]], [6, 8])
    for mask_seed in (None, 0):
        e = tiny_model(batch, mask_seed)
        assert e.image_global.shape == (2, 24) and e.image_mask.shape[0] == 2 and not e.image_mask.any()
        loss = tiny_model.objective(e)["loss"]
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or not p.grad.any() for p in tiny_model.trainable().values())
        tiny_model.zero_grad(set_to_none=True)


def test_an_empty_report(tiny_model, make_batch):
    """CLS and SEP alone: no words to align."""
    e = tiny_model(make_batch([[1], [1]], [2, 6]))
    assert e.text_mask.sum(1).tolist() == [0, 4]
    assert e.text_global.isfinite().all()


@torch.no_grad()
def test_standardised_heads(tiny_model, make_batch):
    batch = make_batch([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]], [9, 12, 5, 7])
    tiny_model.standardise_heads(batch)
    tokens, rows = tiny_model.vision(batch.images, batch.present), batch.present.nonzero()[:, 0]
    hidden = tiny_model.text(batch.tokens, Packing.of(batch.lengths, "cpu"))
    features = {
        "image_global": torch.stack([tokens[rows == i, 0].mean(0) for i in range(4)]),
        "image_local": tokens[:, 1:].flatten(0, 1),
        "text_global": hidden[[0, 9, 21, 26]],
        "text_local": hidden,
    }
    for name, x in features.items():
        out = getattr(tiny_model, name)[0](x)
        _close(out.mean(0), torch.zeros(24), atol=1e-4)
        _close(out.var(0), torch.ones(24), atol=1e-3)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("fast", [False, True])
def test_compiled_blocks(tiny_model, make_batch, shake, fast):
    """The same results, and nothing compiled anew for batches and lengths that were not seen before."""
    shake(tiny_model)
    shapes = [
        ([[1, 0], [1, 1]], [9, 4]),
        ([[1, 1], [1, 1], [0, 1]], [12, 5, 7]),
        ([[1, 0]] * 5, [3, 4, 21, 8, 6]),
        ([[0, 1]] * 3 + [[1, 1]], [31, 2, 2, 9]),
    ]
    batches = [make_batch(*shape) for shape in shapes]
    expected = []
    for batch in batches:
        e = tiny_model(batch, mask_seed=1)
        tiny_model.objective(e)["loss"].backward()
        expected.append((e, {name: p.grad.clone() for name, p in tiny_model.trainable().items()}))
        tiny_model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    if not fast:
        restore(tiny_model)
    compile_tower_blocks(tiny_model.vision, tiny_model.text)
    for i, (batch, (right, gradients)) in enumerate(zip(batches, expected, strict=True)):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            e = tiny_model(batch, mask_seed=1)
            tiny_model.objective(e)["loss"].backward()
        for name in ("image_global", "image_local", "text_global", "text_local"):
            _close(getattr(e, name), getattr(right, name), atol=1e-4)
        for name, p in tiny_model.trainable().items():
            torch.testing.assert_close(
                p.grad, gradients[name], rtol=1e-3, atol=1e-3 * gradients[name].abs().max().item()
            )
        tiny_model.zero_grad(set_to_none=True)


def test_sizes_that_are_equal_by_chance_and_all_forms_of_a_block(tiny_towers, make_batch, monkeypatch):
    """As many studies as words, in parts, of blocks of which one has adapters. What is compiled for is the same with
    another backend than Inductor, and sooner found."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = ClinVLA(**tiny_towers, recipe=Recipe(width=24, bottleneck=20, adapter_blocks=(1,)))
    torch._dynamo.reset()
    compile_tower_blocks(model.vision, model.text)
    stage = Align(model, Optimization(chunk=8, batch_size=17), 0, print)
    warm_up(stage, make_batch([[1, 1]] * 17, [17] * 17), trains_one=True, evaluates_one=True)
    later = [make_batch([[1, 0]] * studies, [length] * studies) for studies, length in ((17, 5), (16, 16), (33, 8))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in later:
            stage.train()
            stage.backward(stage, batch, 1, 1.0, ExitStack)
            stage.eval()
            with torch.inference_mode():
                model(batch)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_nothing_is_compiled_anew_over_an_epoch(tiny_model, make_batch, shake):
    """After the warm-up, whatever views and lengths come, in training and evaluation, up to a last batch of one."""
    draw = random.Random(0)

    def batch(studies):
        present = [[draw.random() < share for share in (0.9, 0.8, 0.3, 0.3)] for _ in range(studies)]
        return make_batch(present, [draw.randint(2, 128) for _ in range(studies)], seed=studies)

    shake(tiny_model)
    torch._dynamo.reset()
    compile_tower_blocks(tiny_model.vision, tiny_model.text)
    warm_up(Align(tiny_model, Optimization(), 0, print), batch(12), trains_one=True, evaluates_one=True)
    lone = [make_batch([present], [9]) for present in ([1, 0], [1, 1], [0, 1])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        tiny_model.train()
        for step in range(24):
            tiny_model.objective(tiny_model(batch(12), mask_seed=step))["loss"].backward()
        for last in (batch(5), *lone):
            tiny_model.objective(tiny_model(last, mask_seed=step))["loss"].backward()
        tiny_model.eval()
        with torch.inference_mode():
            for seen in (batch(12), batch(12), batch(12), batch(2), *lone):
                tiny_model(seen)
