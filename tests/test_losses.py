"""The losses of other projects: each against its published formula, written out here in float64."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, softplus
from torch.utils._pytree import tree_leaves

from clinvla_fast.losses import ClipLoss, SigLipLoss, attention_fn, cosine_similarity, global_loss, local_loss

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])

# The formulas -------------------------------------------------------------------------------------------------------


def clip(image, text, scale):
    z = scale * normalize(image, dim=1) @ normalize(text, dim=1).T
    return -(z.log_softmax(1) + z.log_softmax(0)).diagonal().mean() / 2


def clip_of_rows(image, text, images, texts, rows, scale):
    """A rank's own rows against all."""
    image, text, images, texts = (normalize(x, dim=1) for x in (image, text, images, texts))
    to_text, to_image = (scale * image @ texts.T).log_softmax(1), (scale * text @ images.T).log_softmax(1)
    return -(to_text[:, rows] + to_image[:, rows]).diagonal().mean() / 2


def siglip(image, text, scale, bias):
    z = scale * normalize(image, dim=1) @ normalize(text, dim=1).T + bias
    y = 2 * torch.eye(len(z), dtype=z.dtype) - 1
    return softplus(-y * z).sum() / len(z)


def gloria_global(image, text, scale):
    z = scale * torch.cosine_similarity(image[:, None], text[None], dim=2)
    own = torch.arange(len(z))
    return cross_entropy(z, own), cross_entropy(z.T, own)


def gloria_local(image, text, lengths, temp1, temp2, temp3, agg):
    """Of image i, v [HW, D], and report j, e [T, D], one pair at a time."""
    scores = torch.empty(len(image), len(text), dtype=image.dtype)
    maps = []
    for j, n in enumerate(lengths):
        e = text[j, :, :n].T
        for i in range(len(image)):
            v = image[i].flatten(1).T
            attention = (temp1 * (v @ e.T).softmax(1)).softmax(0).T
            matches = temp2 * torch.cosine_similarity(e, attention @ v, dim=1)
            scores[i, j] = temp3 * getattr(matches.exp(), agg)().log()
            if i == j:
                maps.append(attention.view(1, n, *image.shape[2:]))
    own = torch.arange(len(image))
    return cross_entropy(scores, own), cross_entropy(scores.T, own), maps


# Comparing ----------------------------------------------------------------------------------------------------------


def features(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def assert_same(ours, theirs, inputs, dtype):
    """Outputs, and gradients of a weighted sum of them, of two functions of the same numbers, the second in float64."""
    found, expected = [], []
    for function, to, out in ((ours, dtype, found), (theirs, torch.float64, expected)):
        leaves = [x.to(dtype).to(to, copy=True).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        weights = features(*(o.shape for o in outputs), seed=2)
        sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)).backward()
        out += [*outputs, *(x.grad for x in leaves)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE[dtype] * max(1, b.abs().max())


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_clip(dtype, bias):
    inputs = [*features((6, 5), (6, 5)), torch.tensor(2.5), torch.tensor(0.5)]

    def ours(image, text, scale, b):
        loss = ClipLoss()(normalize(image, dim=1), normalize(text, dim=1), scale, b if bias else None)
        return [loss + 0 * b]

    assert_same(ours, lambda image, text, scale, b: [clip(image, text, scale) + 0 * b], inputs, dtype)


@DTYPES
def test_siglip(dtype):
    inputs = [*features((6, 5), (6, 5)), torch.tensor(2.5), torch.tensor(-1.5)]

    def ours(image, text, scale, bias):
        return [SigLipLoss()(normalize(image, dim=1), normalize(text, dim=1), scale, bias)]

    assert_same(ours, lambda *x: [siglip(*x)], inputs, dtype)


def test_scales_and_biases_of_every_kind():
    image, text = features((4, 3), (4, 3))
    one = clip(image, text, 10.0)
    for scale in (10, 10.0, torch.tensor(10.0), torch.tensor([10.0])):
        torch.testing.assert_close(ClipLoss()(image, text, scale), one)
        torch.testing.assert_close(ClipLoss()(image, text, scale, logit_bias=torch.tensor([-3.0])), one)
        torch.testing.assert_close(SigLipLoss()(image, text, scale, None), siglip(image, text, 10.0, 0.0))


def test_sides_of_different_dtypes_under_autocast():
    """As of a tower that ends in a product and one that ends in a norm."""
    image, text = features((4, 3), (4, 3), dtype=torch.float32)
    regions, words = features((4, 3, 2, 2), (4, 3, 5), dtype=torch.float32)
    calls = [
        (ClipLoss(), image, text, 10.0),
        (SigLipLoss(), image, text, 10.0, None),
        (global_loss, image, text),
        (local_loss, regions, words, [5, 1, 3, 2]),
        (attention_fn, words, regions, 4.0),
    ]
    for loss, one, other, *more in calls:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(one.bfloat16(), other, *more)
        expected = loss(one.bfloat16().float(), other, *more)
        for actual, right in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            torch.testing.assert_close(actual.float(), right, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="expected one"):
        ClipLoss()(image.bfloat16(), text, 10.0)


@pytest.mark.parametrize("behind", [1e30, torch.inf, torch.nan])
def test_what_lies_behind_a_report_is_never_read(behind):
    image, text = features((3, 4, 2, 2), (3, 4, 6))

    def gradients(text):
        leaves = [image.clone().requires_grad_(), text.requires_grad_()]
        first, second, _ = local_loss(*leaves, [6, 2, 3])
        return torch.autograd.grad(first + second, leaves)

    expected = gradients(text.clone())
    text[1, :, 2:] = text[2, :, 3:] = behind
    for actual, right in zip(gradients(text), expected, strict=True):
        torch.testing.assert_close(actual, right)


def test_output_dict():
    image, text = features((4, 3), (4, 3))
    for loss, arguments in ((ClipLoss(), ()), (SigLipLoss(), (-1.0,))):
        told = loss(image, text, 10.0, *arguments, output_dict=True)
        assert told == {"contrastive_loss": loss(image, text, 10.0, *arguments)}


@DTYPES
def test_gloria_global(dtype):
    inputs = [*features((6, 5), (6, 5)), torch.tensor(4.0)]
    assert_same(lambda i, t, scale: global_loss(i, t, temp3=scale), gloria_global, inputs, dtype)


@DTYPES
@pytest.mark.parametrize("agg", ["sum", "mean"])
@pytest.mark.parametrize("lengths", [[7, 1, 3, 5], torch.tensor([2, 7, 7, 4])], ids=["list", "tensor"])
def test_gloria_local(dtype, agg, lengths):
    inputs = [*features((4, 6, 2, 3), (4, 6, 7)), *(torch.tensor(t) for t in (4.0, 5.0, 2.0))]

    def flat(loss0, loss1, maps):
        return [loss0, loss1, *maps]

    assert_same(
        lambda i, t, *temps: flat(*local_loss(i, t, lengths, *temps, agg=agg)),
        lambda i, t, *temps: flat(*gloria_local(i, t, lengths, *temps, agg)),
        inputs,
        dtype,
    )


def test_gloria_attention():
    generator = torch.Generator().manual_seed(0)
    words, regions = (torch.randn(2, 6, *n, generator=generator, dtype=torch.float64) for n in ((5,), (3, 4)))
    found, attention = attention_fn(words, regions, 4.0)
    assert found.shape == (2, 6, 5) and attention.shape == (2, 5, 3, 4)
    shares = torch.einsum("bdt,bdhw->bthw", words, regions).softmax(1)  # of each region, among the words
    expected = (4.0 * shares).flatten(2).softmax(2).view_as(shares)
    torch.testing.assert_close(attention, expected)
    torch.testing.assert_close(found, torch.einsum("bthw,bdhw->bdt", expected, regions))
    with pytest.raises(ValueError, match=r"expected \[B, D, T\] and \[B, D, H, W\]"):
        attention_fn(words, words, 4.0)


def test_gloria_cosine():
    one, other = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cosine_similarity(one, other), torch.cosine_similarity(one, other, dim=1))
    torch.testing.assert_close(cosine_similarity(one, other, dim=-1), torch.cosine_similarity(one, other, dim=-1))
    assert cosine_similarity(torch.full((1, 2), 1e-6), torch.full((1, 2), 1e-6), eps=1e-8).item() == pytest.approx(2e-4)
    assert cosine_similarity(one[:1, :, :1], other[:1, :, :1]).shape == ()  # as GLoRIA squeezes it


def test_gloria_local_by_default():
    image, text = features((3, 4, 2, 2), (3, 4, 5))
    found = local_loss(img_features=image, words_emb=text, cap_lens=[5, 2, 4])
    torch.testing.assert_close(found, gloria_local(image, text, [5, 2, 4], 4.0, 5.0, 10.0, "sum"))


# Several ranks ------------------------------------------------------------------------------------------------------

WIDTH, TOGETHER, RANKS = 5, 6, 2
CLIP_FLAGS = [(local, reaching) for local in (False, True) for reaching in (False, True)]


class Pairs(torch.nn.Module):
    """Two towers of one layer, a scale and a bias, with the same weights in every process."""

    def __init__(self):
        super().__init__()
        image, text = features((4, WIDTH), (3, WIDTH), seed=1)
        self.image, self.text = torch.nn.Parameter(image), torch.nn.Parameter(text)
        self.scale, self.bias = (torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (2.5, -1.5))

    def forward(self, images, texts):
        towers = (normalize(x @ w, dim=1) for x, w in ((images, self.image), (texts, self.text)))
        return *towers, self.scale * 1, self.bias * 1

    def gradients(self, loss):
        return [loss.detach(), *torch.autograd.grad(loss, list(self.parameters()))]


def run_rank(rank: int, folder: str) -> None:
    """What one process of several does: each kind of loss on its part of the batch, and DDP's gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS)
    part = slice(rank * TOGETHER // RANKS, (rank + 1) * TOGETHER // RANKS)
    inputs = [x[part] for x in features((TOGETHER, 4), (TOGETHER, 3))]
    losses = {
        f"clip {local} {reaching}": ClipLoss(local, reaching, False, rank, RANKS) for local, reaching in CLIP_FLAGS
    }
    losses |= {"siglip": SigLipLoss(rank=rank, world_size=RANKS)}
    found = {}
    for name, loss in losses.items():
        model = torch.nn.parallel.DistributedDataParallel(Pairs())
        value = loss(*model(*inputs))
        value.backward()
        found[name] = [value.detach(), *(p.grad for p in model.parameters())]
    try:
        ClipLoss(rank=0, world_size=RANKS + 1)(*Pairs()(*inputs))
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    started = [subprocess.Popen([sys.executable, "-P", __file__, str(rank), str(folder)]) for rank in range(RANKS)]
    try:
        assert [process.wait(timeout=120) for process in started] == [0] * RANKS
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["clip False True", "clip True True", "siglip"])
def test_ranks_together_are_one_process(ranks, name):
    model = Pairs()
    image, text, scale, bias = model(*features((TOGETHER, 4), (TOGETHER, 3)))
    whole = siglip(image, text, scale, bias) if name == "siglip" else clip(image, text, scale) + 0 * bias
    value, *gradients = model.gradients(whole)
    torch.testing.assert_close(sum(r[name][0] for r in ranks) / RANKS, value, rtol=0, atol=1e-10)
    for rank in ranks:
        torch.testing.assert_close(rank[name][1:], gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("local", [False, True])
def test_without_gather_with_grad_other_ranks_rows_are_constants(ranks, local):
    total = None
    for rank in range(RANKS):
        model = Pairs()
        image, text, scale, bias = model(*features((TOGETHER, 4), (TOGETHER, 3)))
        rows = torch.arange(TOGETHER)[rank * TOGETHER // RANKS : (rank + 1) * TOGETHER // RANKS]
        if local:
            loss = clip_of_rows(image[rows], text[rows], image.detach(), text.detach(), rows, scale)
        else:
            own = torch.isin(torch.arange(TOGETHER), rows)[:, None]
            loss = clip(*(torch.where(own, x, x.detach()) for x in (image, text)), scale)
        value, *gradients = model.gradients(loss + 0 * bias)
        torch.testing.assert_close(ranks[rank][f"clip {local} False"][0], value, rtol=0, atol=1e-10)
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    for rank in ranks:
        found = rank[f"clip {local} False"][1:]
        torch.testing.assert_close(found, [g / RANKS for g in total], rtol=0, atol=1e-10)


def test_ranks_that_the_group_does_not_have(ranks):
    assert ranks[1]["error"] == "rank and world_size are 0 and 3: expected 1 and 2, as of the default process group."


# Bad input ----------------------------------------------------------------------------------------------------------

PAIR = torch.ones(4, 3)
PATCHES, WORDS = torch.ones(2, 3, 2, 2), torch.ones(2, 3, 5)
MISTAKES = {
    r"use_horovod is True": lambda: ClipLoss(use_horovod=True),
    r"rank is 2 and world_size 2": lambda: ClipLoss(rank=2, world_size=2),
    r"dist_impl is 'ring'": lambda: SigLipLoss(dist_impl="ring"),
    r"\[4, 3\] and \[5, 3\]: expected \[B, D\] both": lambda: ClipLoss()(PAIR, torch.ones(5, 3), 10.0),
    r"logit_scale is \[2\]: expected one number": lambda: ClipLoss()(PAIR, PAIR, torch.ones(2)),
    r"logit_bias is \[3\]: expected one number": lambda: SigLipLoss()(PAIR, PAIR, 10.0, torch.ones(3)),
    r"expected one floating dtype": lambda: ClipLoss()(PAIR, PAIR.double(), 10.0),
    r"cnn_code and rnn_code are \[1, 4, 3\]": lambda: global_loss(PAIR[None], PAIR[None]),
    r"eps is 0.1: expected 0 to 1e-08": lambda: global_loss(PAIR, PAIR, eps=0.1),
    r"\[2, 3, 4\] and \[2, 3, 5\]: expected \[B, D, H, W\]": lambda: local_loss(PATCHES.flatten(2), WORDS, [5, 5]),
    r"cap_lens is \[5\]: expected 2 lengths from 1 to 5": lambda: local_loss(PATCHES, WORDS, [5]),
    r"cap_lens is \[0, 6\]": lambda: local_loss(PATCHES, WORDS, torch.tensor([0, 6])),
    r"agg is 'max': expected sum or mean": lambda: local_loss(PATCHES, WORDS, [5, 5], agg="max"),
    r"temp2 is \[2\]: expected one number": lambda: local_loss(PATCHES, WORDS, [5, 5], temp2=torch.ones(2)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message]()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
