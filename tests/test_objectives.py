import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from clinvla_fast import Embeddings, Recipe
from clinvla_fast.objectives import Alignment, collapse

INITIAL = 1 / 0.07


def _embeddings(studies=5, patches=7, words=6, width=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image_mask = torch.arange(patches) < torch.tensor([7, 3, 1, 5, 7])[:studies, None]
    text_mask = torch.arange(words) < torch.tensor([1, 6, 4, 2, 3])[:studies, None]
    features = normal(studies, width), normal(studies, patches, width), normal(studies, width)
    image_global, image_local, text_global = features
    return Embeddings(image_global, image_local, image_mask, text_global, normal(studies, words, width), text_mask)


def _context(c, w, tau1):
    return (tau1 * (c @ w.T).softmax(1)).softmax(0).T @ c


def _contrastive_by_hand(e, scales):
    scale, tau1, tau2, tau3 = scales
    n = len(e.image_global)
    z, s = torch.empty(2, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            z[i, j] = scale * cosine_similarity(e.image_global[i], e.text_global[j], dim=0)
            c, w = e.image_local[i][e.image_mask[i]], e.text_local[j][e.text_mask[j]]
            s[i, j] = tau3 * (tau2 * cosine_similarity(w, _context(c, w, tau1), dim=1)).exp().sum().log()
    own = torch.arange(n)
    return tuple(((cross_entropy(x, own) + cross_entropy(x.T, own)) / 2).item() for x in (z, s))


def _cosine_by_hand(e, tau1):
    n = len(e.image_global)
    whole = sum(1 - cosine_similarity(e.image_global[i], e.text_global[i], dim=0) for i in range(n)) / n
    parts = 0
    for i in range(n):
        c, w = e.image_local[i][e.image_mask[i]], e.text_local[i][e.text_mask[i]]
        parts += (1 - cosine_similarity(w, _context(c, w, tau1), dim=1)).mean() / n
    return whole.item(), parts.item()


def _check(losses, by_hand, weight):
    whole, local = by_hand
    assert losses["global"].item() == pytest.approx(whole, rel=1e-6)
    assert losses["local"].item() == pytest.approx(local, rel=1e-6)
    assert losses["loss"].item() == pytest.approx(whole + weight * local, rel=1e-6)


def test_contrastive():
    e = _embeddings()
    _check(Alignment(Recipe())(e), _contrastive_by_hand(e, [INITIAL] * 4), 0.8)


def test_contrastive_scales_have_their_places():
    e, scales = _embeddings(), (9.0, 4.0, 5.0, 10.0)
    _check(Alignment(Recipe(local_weight=0.3, scales=scales))(e), _contrastive_by_hand(e, scales), 0.3)


def test_cosine():
    e = _embeddings()
    _check(Alignment(Recipe(objective="cosine"))(e), _cosine_by_hand(e, INITIAL), 0.8)


def test_cosine_is_zero_for_a_constant_embedding():
    """What the paper prints has no negatives: this is why the other form is the default."""
    ones = {n: torch.ones_like(x) for n, x in vars(_embeddings()).items() if n.endswith(("global", "local"))}
    constant = replace(_embeddings(), **ones)
    assert Alignment(Recipe(objective="cosine"))(constant)["loss"].item() == pytest.approx(0, abs=1e-6)
    assert Alignment(Recipe())(constant)["global"].item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("form", ["contrastive", "cosine"])
def test_pairs_without_a_view_or_a_word_are_left_out(form):
    e, objective = _embeddings(), Alignment(Recipe(objective=form))
    e.image_mask[1] = False
    e.text_mask[3] = False
    kept = Embeddings(**{name: x[[0, 2, 4]] for name, x in vars(e).items()})
    for name, value in objective(kept).items():
        assert objective(e)[name].item() == pytest.approx(value.item(), rel=1e-9)


@pytest.mark.parametrize("form", ["contrastive", "cosine"])
def test_gradients_stay_finite_beside_pairs_left_out(form):
    e, objective = _embeddings(), Alignment(Recipe(objective=form))
    e.image_mask[1] = False
    e.text_mask[3] = False
    e.image_global[1] = 0
    leaves = {n: x.clone().requires_grad_() for n, x in vars(e).items() if x.is_floating_point()}
    objective(replace(e, **leaves))["loss"].backward()
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all() and leaf.grad.any()
    for leaf, row in (("image_global", 1), ("image_local", 1), ("text_global", 3), ("text_local", 3)):
        assert not leaves[leaf].grad[row].any()
    assert objective.log_scales.grad.isfinite().all()


@pytest.mark.parametrize("form", ["contrastive", "cosine"])
@pytest.mark.parametrize("missing", ["image_mask", "text_mask"])
def test_no_pair_at_all(form, missing):
    e, objective = _embeddings(), Alignment(Recipe(objective=form))
    getattr(e, missing)[:] = False
    leaf = e.image_global.requires_grad_()
    losses = objective(e)
    assert [losses[name].item() for name in ("loss", "global", "local")] == [0, 0, 0]
    losses["loss"].backward()
    assert not leaf.grad.any() and not objective.log_scales.grad.any()


def test_one_pair_has_nothing_to_tell_apart():
    e = _embeddings(studies=1)
    losses = Alignment(Recipe())(e)
    assert losses["loss"].item() == pytest.approx(0, abs=1e-6)


def test_scales_start_at_their_value_and_stop_at_100():
    objective = Alignment(Recipe())
    torch.testing.assert_close(objective.scales(), torch.full((4,), INITIAL))
    nn.init.constant_(objective.log_scales, 5.0)  # exp(5) is 148
    assert objective.scales().tolist() == [100.0] * 4


# Collapse


def _points(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_spread_embeddings_are_no_collapse():
    measured = collapse(_points(500, 16))
    assert measured.variance == pytest.approx(1, abs=0.02)
    assert 15 < measured.rank <= 16
    assert not measured.alarming


def test_one_point_is_a_collapse():
    measured = collapse(torch.ones(50, 16))
    assert measured.variance == pytest.approx(0, abs=1e-12) and measured.alarming
    assert collapse(torch.ones(50, 16) + 0.01 * _points(50, 16)).alarming


def test_a_line_is_a_collapse():
    """Half of the studies here, half there: the variance is large, the rank gives it away."""
    measured = collapse(_points(50, 1) * _points(16))
    assert measured.variance > 0.5 and measured.rank == pytest.approx(1, abs=1e-3)
    assert measured.alarming


def test_effective_rank_of_equal_directions():
    axes = torch.eye(5).repeat(4, 1)
    assert collapse(torch.cat([axes, -axes])).rank == pytest.approx(5, abs=1e-6)


def test_lengths_do_not_matter():
    points = _points(20, 6)
    scaled = points * torch.arange(1, 21)[:, None]
    assert collapse(scaled).variance == pytest.approx(collapse(points).variance)
    assert collapse(scaled).rank == pytest.approx(collapse(points).rank)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_to_compare(rows):
    with pytest.raises(ValueError, match=f"at least 2 embeddings.*{rows}, 8"):
        collapse(torch.ones(rows, 8))
