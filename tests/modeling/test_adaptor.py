import copy
import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from clinvla_fast.data.features import FeatureBatch, FeatureLoader, encode_features, write_features
from clinvla_fast.data.loader import StudyLoader
from clinvla_fast.data.phantom.dataset import write_phantoms
from clinvla_fast.errors import DataError
from clinvla_fast.modeling.adaptor import Adaptor, AdaptorModel, retrieve_features
from clinvla_fast.modeling.encoders import load_image_encoder, load_text_encoder
from clinvla_fast.study import VIEWS

IMAGE, TEXT, WIDTH, HEADS = 6, 10, 8, 2
LEAKING = "paired (leaks the match)"


def new_adaptor(seed: int = 0, **sizes) -> Adaptor:
    torch.manual_seed(seed)
    adaptor = Adaptor(IMAGE, TEXT, **({"width": WIDTH, "heads": HEADS, "hidden": 12} | sizes)).double()
    for p in adaptor.parameters():  # biases and norms as well
        torch.nn.init.normal_(p, std=0.5)
    return adaptor


def features(image: list[int], text: list[int], seed: int = 0, poison: float = 0.0) -> FeatureBatch:
    """Studies of so many image tokens and words."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for side, lengths, width in (("image", image, IMAGE), ("text", text, TEXT)):
        rows = [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in lengths]
        grid = torch.full((len(rows), max(lengths), width), poison, dtype=torch.float64)
        for i, row in enumerate(rows):
            grid[i, : len(row)] = row
        tensors |= {side: grid, f"{side}_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]}
    labels = tuple(("edema",) if i % 2 else () for i in range(len(image)))
    return FeatureBatch(**tensors, labels=labels, ids=tuple(f"s{i}" for i in range(len(image))))


# Plain: one study, no padding


def _norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def _read(w: dict[str, Tensor], side: str, tokens: Tensor) -> Tensor:
    return _norm(tokens) @ w[f"{side}_in.weight"].T + w[f"{side}_in.bias"]


def _embedding(w: dict[str, Tensor], asking: Tensor, asked: Tensor) -> Tensor:
    """One study's, from its tokens [n, width] and those that they attend to [m, width]."""
    (q, k, v), (bq, bk, bv) = w["qkv.weight"].chunk(3), w["qkv.bias"].chunk(3)
    q, k, v = asking @ q.T + bq, asked @ k.T + bk, asked @ v.T + bv
    found = []
    for head in range(HEADS):
        at = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        weights = torch.exp(q[:, at] @ k[:, at].T / math.sqrt(WIDTH / HEADS))
        found.append(weights / weights.sum(1, keepdim=True) @ v[:, at])
    x = asking + torch.cat(found, 1) @ w["out.weight"].T + w["out.bias"]
    x = _norm(x, w["norm1.weight"], w["norm1.bias"])
    inner = x @ w["ffn.0.weight"].T + w["ffn.0.bias"]
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    x = _norm(x + inner @ w["ffn.2.weight"].T + w["ffn.2.bias"], w["norm2.weight"], w["norm2.bias"])
    return x.mean(0)


def _plain(adaptor: Adaptor, batch: FeatureBatch, paired: bool) -> tuple[Tensor, Tensor]:
    w = dict(adaptor.named_parameters())
    found = []
    for i in range(len(batch)):
        image = _read(w, "image", batch.image[i][batch.image_mask[i]])
        text = _read(w, "text", batch.text[i][batch.text_mask[i]])
        asked = (text, image) if paired else (image, text)
        found.append([_embedding(w, image, asked[0]), _embedding(w, text, asked[1])])
    return tuple(torch.stack(side) for side in zip(*found, strict=True))


def _plain_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * normalize(image, dim=-1) @ normalize(text, dim=-1).T
    own = torch.arange(len(logits))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


@pytest.mark.parametrize("way", ["paired", "separate"])
def test_against_a_plain_transcription(way):
    adaptor, batch = new_adaptor(), features([3, 7, 1], [2, 1, 5])
    for ours, plain in zip(getattr(adaptor, way)(batch), _plain(adaptor, batch, way == "paired"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)


def test_losses_against_a_plain_transcription():
    adaptor, batch = new_adaptor(), features([3, 7, 0, 1, 4], [2, 1, 5, 4, 0])
    with torch.no_grad():
        adaptor.log_scales.copy_(torch.tensor([1.5, 9.0]))  # the second beyond its cap
    both = batch.paired()
    assert both.ids == ("s0", "s1", "s3")
    scales = adaptor.log_scales.exp().clamp(max=100)
    paired, separate = (
        _plain_loss(*_plain(adaptor, both, way), s) for way, s in zip((True, False), scales, strict=True)
    )
    ours = adaptor.losses(batch)
    for name, expected in (("paired", paired), ("separate", separate), ("loss", (paired + separate) / 2)):
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(loss, adaptor.parameters()) for loss in (ours["loss"], (paired + separate) / 2)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class _Loss(torch.nn.Module):
    def __init__(self, adaptor: Adaptor):
        super().__init__()
        self.adaptor = adaptor

    def forward(self, batch: FeatureBatch) -> Tensor:
        return self.adaptor.losses(batch)["loss"]


def test_gradients():
    module, batch = _Loss(new_adaptor()), features([2, 3], [1, 2])
    with torch.no_grad():
        module.adaptor.log_scales.fill_(0.5)
    names, values = zip(*module.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (batch,))

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e9])
def test_padding_changes_nothing(poison):
    adaptor = new_adaptor()
    sizes = [3, 7, 0, 1], [2, 0, 5, 4]
    clean, poisoned = features(*sizes), features(*sizes, poison=poison)
    for way in ("paired", "separate"):
        for a, b in zip(getattr(adaptor, way)(clean), getattr(adaptor, way)(poisoned), strict=True):
            assert torch.equal(a, b) and a.isfinite().all()
    assert torch.equal(adaptor.losses(clean)["loss"], adaptor.losses(poisoned)["loss"])
    adaptor.losses(poisoned)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in adaptor.parameters())


def test_a_missing_modality():
    adaptor, batch = new_adaptor(), features([3, 0], [0, 4])
    for way in (adaptor.paired, adaptor.separate):
        image, text = way(batch)
        assert not image[1].any() and not text[0].any() and image[0].any() and text[1].any()
    for blind in (batch, features([0, 0], [3, 2]), features([3, 2], [0, 0])):
        losses = adaptor.losses(blind)
        losses["loss"].backward()
        assert all(not loss for loss in losses.values()) and all(not p.grad.any() for p in adaptor.parameters())
        assert all(x.isfinite().all() for way in (adaptor.paired, adaptor.separate) for x in way(blind))


def test_all_of_it_is_trained():
    adaptor = new_adaptor()
    adaptor.losses(features([3, 2, 5], [2, 4, 1]))["loss"].backward()
    assert all(p.requires_grad and p.grad.any() for p in adaptor.parameters())


def test_only_the_paired_path_sees_the_other_modality():
    adaptor, batch, other = new_adaptor(), features([3, 5], [4, 2]), features([6, 2], [3, 5], seed=1)
    swapped = replace(batch, text=other.text, text_mask=other.text_mask)
    assert torch.equal(adaptor.separate(batch)[0], adaptor.separate(swapped)[0])
    assert (adaptor.paired(batch)[0] - adaptor.paired(swapped)[0]).abs().amax(1).min() > 1e-3


def test_the_paired_path_leaks_the_match():
    """Images and reports that have nothing to do with each other: new ones in every step, and others to evaluate."""
    torch.manual_seed(0)
    adaptor = Adaptor(IMAGE, TEXT, width=32, heads=4, hidden=64)
    optimizer = torch.optim.AdamW(adaptor.parameters(), lr=3e-3)
    for step in range(150):
        optimizer.zero_grad()
        adaptor.losses(features([4] * 16, [4] * 16, seed=step))["loss"].backward()
        optimizer.step()
    scores = retrieve_features(adaptor, [features([4] * 16, [4] * 16, seed=10**6 + i) for i in range(4)])
    assert scores[LEAKING]["recall@1"] > 0.9 and scores[LEAKING]["recall@1_chance"] == 1 / 64
    assert all(scores[way]["recall@10"] < 0.35 for way in ("text_to_image", "image_to_text"))  # by chance 0.16


def test_half_precision():
    adaptor, batch = new_adaptor().float(), features([3, 7, 2], [2, 1, 5])
    halves = replace(batch, image=batch.image.bfloat16(), text=batch.text.bfloat16())
    exact = adaptor.losses(batch)["loss"]
    torch.testing.assert_close(adaptor.losses(halves)["loss"], exact, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adaptor.losses(halves)["loss"].float(), exact, rtol=0.2, atol=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adaptor") / "data"
    write_phantoms(out, patients=25, seed=0, size=64)
    return out


@pytest.fixture(scope="module")
def encoders(tiny_towers):
    return load_image_encoder(tiny_towers["vision"]), load_text_encoder(tiny_towers["text"])


@pytest.fixture(scope="module")
def studies(data, encoders) -> StudyLoader:
    return StudyLoader(data, "train", encoders[1].tokenizer, image_size=128, max_tokens=24, batch_size=8)


@pytest.fixture(scope="module")
def cache(studies, encoders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adaptor") / "cache"
    write_features(studies, *encoders, out)
    return out


class TestOnStudies:
    @pytest.fixture
    def adaptor(self, tiny_towers) -> Adaptor:
        torch.manual_seed(0)
        names = {"image_encoder": tiny_towers["vision"], "text_encoder": tiny_towers["text"]}
        return Adaptor(128, 128, width=16, heads=2, hidden=32, **names)

    def test_cached_and_new_features_give_the_same(self, adaptor, cache, studies, encoders):
        for cached, batch in zip(FeatureLoader(cache, 8), studies, strict=True):
            direct = adaptor.losses(encode_features(batch, *encoders))
            for name, loss in adaptor.losses(cached).items():
                torch.testing.assert_close(loss, direct[name], rtol=1e-3, atol=1e-3)

    def test_as_a_model(self, adaptor, cache, studies, encoders):
        """Embeddings are those of cached tokens, whichever way studies come in."""
        model = AdaptorModel(adaptor, *encoders)
        for cached, batch in zip(FeatureLoader(cache, 8), studies, strict=True):
            found = model(batch)
            for ours, one in zip((found.image_global, found.text_global), adaptor.separate(cached), strict=True):
                torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.image_mask, cached.image_mask) and found.image_local.shape[2] == 0
            assert torch.equal(found.text_mask, cached.text_mask) and found.text_local.shape[2] == 0
            expected = [x[mask].mean(0) for x, mask in zip(cached.image.float(), cached.image_mask, strict=True)]
            torch.testing.assert_close(model.image_features(batch), torch.stack(expected), rtol=1e-2, atol=1e-2)
        views = [
            {VIEWS[v]: batch.images[i, v].numpy() for v in batch.present[i].nonzero()[:, 0]} for i in range(len(batch))
        ]
        torch.testing.assert_close(model.encode_images(views), normalize(found.image_global, dim=-1))
        assert model.encode_reports(["The heart is enlarged."]).shape == (1, 16)

    def test_other_encoders_than_its_own(self, adaptor, tiny_towers, tmp_path):
        Adaptor(64, 128, width=16, heads=2, hidden=32, **adaptor.encoders).save(tmp_path)
        with pytest.raises(DataError, match="gives tokens of 128 numbers, its Adaptor reads 64"):
            AdaptorModel.load(tmp_path)

    def test_retrieval(self, adaptor, cache, studies, encoders):
        cached = retrieve_features(adaptor, FeatureLoader(cache, 8))
        assert list(cached) == ["text_to_image", "image_to_text", LEAKING]
        assert list(cached[LEAKING]) == ["recall@1", "recall@1_chance"]
        assert all(0 <= score <= 1 for found in cached.values() for score in found.values())
        new = retrieve_features(adaptor, (encode_features(batch, *encoders) for batch in studies))
        assert new["text_to_image"]["recall@10_chance"] == cached["text_to_image"]["recall@10_chance"]
        with pytest.raises(DataError, match="no study has both a view and a word"):
            retrieve_features(adaptor, [features([0, 2], [3, 0])])

    @pytest.mark.parametrize("stop_at", [2, 6])
    def test_an_interrupted_training_goes_on_exactly(self, cache, adaptor, stop_at):
        def train(steps: int, state: dict | None = None) -> dict:
            module = copy.deepcopy(adaptor)
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
            if state:
                module.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
            loader = FeatureLoader(cache, 4, True, seed=3, checkpoint=state and state["loader"])
            batches = (batch for _ in range(3) for batch in loader)
            for batch in islice(batches, steps):
                optimizer.zero_grad()
                module.losses(batch)["loss"].backward()
                optimizer.step()
            return {"model": module.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.checkpoint()}

        whole, resumed = train(9), train(9 - stop_at, train(stop_at))
        assert whole["loader"] == resumed["loader"]
        assert all(torch.equal(resumed["model"][name], x) for name, x in whole["model"].items())


class TestFiles:
    def test_saved_and_loaded(self, tmp_path):
        names = {"image_encoder": "vit_base_patch16_224.mae", "text_encoder": tmp_path / "run" / "text"}
        adaptor = new_adaptor(**names, max_tokens=99).float()
        (tmp_path / "run" / "text").mkdir(parents=True)
        adaptor.save(tmp_path / "run")
        assert json.loads((tmp_path / "run" / "config.json").read_text())["text_encoder"] == "text"
        (tmp_path / "run").rename(tmp_path / "moved")
        loaded = Adaptor.load(tmp_path / "moved")
        assert loaded.encoders == {
            "image_encoder": "vit_base_patch16_224.mae", "text_encoder": str(tmp_path / "moved" / "text")
        }  # fmt: skip
        assert loaded.max_tokens == 99
        batch = features([3, 2], [2, 4])
        for a, b in zip(adaptor.separate(batch), loaded.separate(batch), strict=True):
            assert torch.equal(a, b)

    def test_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"holds no config\.json and adaptor\.safetensors"):
            Adaptor.load(tmp_path)
        new_adaptor().save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"width": 16}))
        with pytest.raises(DataError, match="the Adaptor is damaged"):
            Adaptor.load(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "adaptor.safetensors").write_bytes(b"no tensors")
        with pytest.raises(DataError, match="the Adaptor is damaged"):
            Adaptor.load(tmp_path)
