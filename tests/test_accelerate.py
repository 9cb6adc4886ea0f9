"""Models of timm and transformers, and ours, before and after: the same parameters, results and files."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CamembertConfig,
    CamembertModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    MegatronBertConfig,
    MegatronBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)  # fmt: skip

from clinvla_fast.twins import FastAttention, FastBertIntermediate, FastMlp, accelerate, restore

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 99}

DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 3, "hidden_dim": 96, "vocab_size": 99}


def _vit(**kwargs):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **kwargs)


class Both(nn.Module):
    """Someone's two-tower model."""

    def __init__(self):
        super().__init__()
        self.image, self.text = _vit(), BertModel(BertConfig(**SIZES))

    def forward(self, pixels, words):
        return self.image(pixels).sum() * self.text(**words).last_hidden_state.square().mean()


def _pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _words(padded=True):
    words = torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None] if padded else torch.ones(3, 7, dtype=torch.bool)
    return {"input_ids": words, "attention_mask": mask.long()}


CASES = {
    "vit": (_vit, lambda model: model(_pixels())),
    "vit with qk norm": (lambda: _vit(qk_norm=True, init_values=0.1), lambda model: model(_pixels())),
    "vit with dropout": (lambda: _vit(attn_drop_rate=0.3, proj_drop_rate=0.2), lambda model: model(_pixels())),
    "bert": (lambda: BertModel(BertConfig(**SIZES)), lambda model: model(**_words())[0]),
    "bert, nothing padded": (lambda: BertModel(BertConfig(**SIZES)), lambda model: model(**_words(False))[0]),
    "bert with a head": (lambda: BertForMaskedLM(BertConfig(**SIZES)), lambda model: model(**_words())[0]),
    "roberta": (lambda: RobertaModel(RobertaConfig(**SIZES)), lambda model: model(**_words())[0]),
    "xlm-roberta": (lambda: XLMRobertaModel(XLMRobertaConfig(**SIZES)), lambda model: model(**_words())[0]),
    "electra": (lambda: ElectraModel(ElectraConfig(**SIZES, embedding_size=48)), lambda model: model(**_words())[0]),
    "camembert": (lambda: CamembertModel(CamembertConfig(**SIZES)), lambda model: model(**_words())[0]),
    "distilbert": (lambda: DistilBertModel(DistilBertConfig(**DISTIL)), lambda model: model(**_words())[0]),
    "albert": (lambda: AlbertModel(AlbertConfig(**SIZES, embedding_size=24)), lambda model: model(**_words())[0]),
    "megatron-bert": (lambda: MegatronBertModel(MegatronBertConfig(**SIZES)), lambda model: model(**_words())[0]),
    "both": (Both, lambda model: model(_pixels(), _words())),
}


@pytest.fixture(params=CASES)
def case(request):
    make, run = CASES[request.param]
    torch.manual_seed(0)
    return make(), run


def _results(model, run, seed=0):
    torch.manual_seed(seed)
    out = run(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
    return {"out": out.detach()} | {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def _close(actual, expected, limit=1e-5):
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        scale = max(1.0, right.abs().max().item())
        torch.testing.assert_close(actual[name], right, rtol=limit, atol=limit * scale, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_results_gradients_and_names_stay(case, training):
    model, run = case
    model.train(training)
    expected, keys = _results(model, run), list(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    assert accelerate(model) is model
    assert [type(m) for m in model.modules()] != classes
    assert list(model.state_dict()) == keys and {n: id(p) for n, p in model.named_parameters()} == parameters
    _close(_results(model, run), expected)
    assert accelerate(model) is model  # twice is once
    restore(model)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    actual = _results(model, run)
    assert all(torch.equal(actual[name], right) for name, right in expected.items())


def test_bfloat16(case):
    model, run = case
    model.eval()
    if isinstance(model, Both):
        pytest.skip("its parts are cases")
    with torch.no_grad():
        truth = run(copy.deepcopy(model)).double()
        model.bfloat16()
        run16 = (lambda m: m(_pixels().bfloat16())) if isinstance(model, timm.models.VisionTransformer) else run
        usual = (run16(model).double() - truth).norm() / truth.norm()
        error = (run16(accelerate(model)).double() - truth).norm() / truth.norm()
    assert error <= 1.5 * usual + 1e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(case, copied):
    model, run = case
    model.eval()
    expected = _results(model, run)
    other = copied(accelerate(model))
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    _close(_results(other, run), expected)
    restore(other)
    _close(_results(other, run), expected)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))


@pytest.mark.parametrize("compiled_first", [False, True])
def test_compiled(compiled_first):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = _vit().eval()
    expected = _results(model, CASES["vit"][1])
    if compiled_first:
        compiled = torch.compile(model)
        compiled(_pixels())  # before anything is swapped
        accelerate(compiled)
    else:
        compiled = torch.compile(accelerate(model), fullgraph=True)
    _close(_results(compiled, CASES["vit"][1]), {n if n == "out" else f"_orig_mod.{n}": x for n, x in expected.items()})
    assert any(isinstance(m, FastMlp) for m in compiled.modules())


def test_moved_and_frozen():
    model = accelerate(_vit()).requires_grad_(False).eval()
    with torch.no_grad():
        before = model(_pixels())
        torch.testing.assert_close(model.to(torch.float64)(_pixels().double()).float(), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.to(torch.float32)(_pixels()), before, rtol=1e-4, atol=1e-5)
    pixels = _pixels().requires_grad_()
    model(pixels).sum().backward()
    expected = pixels.grad
    pixels.grad = None
    restore(model)(pixels).sum().backward()
    torch.testing.assert_close(pixels.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", [2, 3])
def test_distributed(tmp_path, processes):
    """Wrapped before and after: each rank has the gradients of the whole batch."""
    worker = Path(__file__).with_name("accelerate_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*launch, worker, tmp_path], check=True, capture_output=True, timeout=300)
    expected = torch.load(tmp_path / "plain.pt", weights_only=True)
    for path in tmp_path.glob("*-*.pt"):
        _close(torch.load(path, weights_only=True), expected)
    assert len(list(tmp_path.glob("*-*.pt"))) == 2 * processes


def test_what_listens_to_a_layer_is_still_called():
    torch.manual_seed(0)
    model, heard = _vit().eval(), []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, inputs, out: heard.append(out.shape))
    expected = _results(model, CASES["vit"][1])
    accelerate(model)
    assert not isinstance(model.blocks[0].mlp, FastMlp) and isinstance(model.blocks[1].mlp, FastMlp)
    _close(_results(model, CASES["vit"][1]), expected)
    assert len(heard) == 2


def test_other_classes_are_left_alone():
    class Mine(timm.layers.Attention):
        def forward(self, x, **kwargs):
            return super().forward(x, **kwargs) + 1

    torch.manual_seed(0)
    model = _vit().eval()
    model.blocks[1].attn.__class__ = Mine
    expected = _results(model, CASES["vit"][1])
    accelerate(model)
    assert type(model.blocks[0].attn) is FastAttention and type(model.blocks[1].attn) is Mine
    _close(_results(model, CASES["vit"][1]), expected)


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("vit", "blocks.0.mlp.fc1"),
        ("vit", "blocks.0.mlp.act"),
        ("bert", "encoder.layer.0.intermediate.dense"),
        ("bert", "encoder.layer.0.intermediate.intermediate_act_fn"),
        ("distilbert", "transformer.layer.0.ffn.lin1"),
        ("distilbert", "transformer.layer.0.ffn.activation"),
    ],
)
def test_hooks_put_on_afterwards_are_called(case, part, kind):
    torch.manual_seed(0)
    make, run = CASES[case]
    model, heard = make().eval(), []
    expected = _results(model, run)
    accelerate(model)
    getattr(model.get_submodule(part), kind)(lambda *_: heard.append(part))
    _close(_results(model, run), expected)
    assert heard == [part]


def _patch(model, part):
    layer = model.get_submodule(part)
    before = layer.forward
    layer.forward = lambda x: before(x) + 1


def _exchange(model, part):
    owner, _, name = part.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.Tanh())


CHANGES = [
    (_patch, "vit", "blocks.0.mlp.fc1"),
    (_patch, "vit", "blocks.0.mlp.act"),
    (_patch, "vit", "blocks.1.attn.qkv"),
    (_patch, "bert", "encoder.layer.0.intermediate.dense"),
    (_patch, "distilbert", "transformer.layer.0.ffn.lin1"),
    (_exchange, "vit", "blocks.0.mlp.act"),
    (_exchange, "bert", "encoder.layer.0.intermediate.intermediate_act_fn"),
    (_exchange, "distilbert", "transformer.layer.0.ffn.activation"),
]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("change", "case", "part"), CHANGES)
def test_what_others_change_is_heeded(change, case, part, first):
    """A forward put into a layer, as some write LoRA; another part in the place of the one that was there."""
    make, run = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    fast = copy.deepcopy(model)
    change(model, part)
    if not first:
        accelerate(fast)
    change(fast, part)
    if first:
        accelerate(fast)
    with torch.no_grad():
        torch.testing.assert_close(run(fast), run(model), rtol=1e-5, atol=1e-5)


def test_another_scale_of_attention_and_second_gradients():
    torch.manual_seed(0)
    model, run = _vit().eval(), CASES["vit"][1]
    fast = accelerate(copy.deepcopy(model))
    for vit in (model, fast):
        for block in vit.blocks:
            block.attn.scale, block.attn.fused_attn = 1.0, False
    _close(_results(fast, run), _results(model, run))

    def penalty(vit):
        pixels = _pixels().requires_grad_()
        (gradient,) = torch.autograd.grad(vit(pixels).sum(), pixels, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), vit.blocks[0].mlp.fc1.weight)[0]

    torch.testing.assert_close(penalty(fast), penalty(model), rtol=1e-3, atol=1e-4)


def test_hooks_of_all_modules_hear_every_layer():
    model = _vit().eval()
    for _ in range(2):
        heard = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_, heard=heard: heard.append(type(m)))
        model(_pixels())
        handle.remove()
        layers = [kind for kind in heard if issubclass(kind, nn.Linear | nn.GELU)]
        assert len(layers) == 11
        accelerate(model)


def test_attention_that_is_told_to_be_causal():
    torch.manual_seed(0)
    model, words = BertModel(BertConfig(**SIZES)).eval(), _words(False)
    try:
        expected = model(**words, is_causal=True)[0]
    except TypeError:
        pytest.skip("this version of transformers takes no is_causal")
    torch.testing.assert_close(accelerate(model)(**words, is_causal=True)[0], expected, rtol=1e-5, atol=1e-5)


def test_an_attention_chosen_since_stays():
    model = BertForMaskedLM(BertConfig(**SIZES))
    if not model._can_set_attn_implementation():
        pytest.skip("this version of transformers keeps the attention that it has chosen")
    accelerate(model).set_attn_implementation("eager")
    assert restore(model).config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    restore(accelerate(model).bert)
    assert model.bert.config._attn_implementation == "sdpa"


def test_attention_maps_of_a_vit_can_be_listened_to():
    torch.manual_seed(0)
    model, maps = accelerate(_vit().eval()), []
    model.blocks[1].attn.fused_attn = False  # as timm's users have it write its maps
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda module, inputs, out: maps.append(out))
    model(_pixels())
    assert maps[0].shape == (3, 3, 17, 17)


def test_the_attention_that_a_bert_had_comes_back():
    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False)
    before = model.config._attn_implementation
    accelerate(model)
    assert restore(model).config._attn_implementation == before


def test_attention_maps_of_an_eager_bert_stay():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, attn_implementation="eager")).eval()
    expected = model(**_words(), output_attentions=True).attentions
    accelerate(model)
    assert isinstance(model.encoder.layer[0].intermediate, FastBertIntermediate)
    torch.testing.assert_close(model(**_words(), output_attentions=True).attentions, expected)


def test_a_bert_of_another_name():
    """As microsoft/BiomedVLP's, whose configuration is a class of their own."""

    class CXRBertConfig(BertConfig):
        model_type = "cxr-bert"

    class CXRBertModel(BertForMaskedLM):
        config_class = CXRBertConfig

    torch.manual_seed(0)
    model, run = CXRBertModel(CXRBertConfig(**SIZES)).eval(), CASES["bert"][1]
    expected = _results(model, run)
    accelerate(model)
    assert isinstance(model.bert.encoder.layer[0].intermediate, FastBertIntermediate)
    _close(_results(model, run), expected)


def test_nothing_to_accelerate():
    with pytest.raises(ValueError, match=r"Sequential has nothing to accelerate: supported are timm's Vision"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="NoneType has nothing to accelerate"):
        accelerate(None)


def test_says_what_was_swapped(capsys):
    accelerate(_vit())
    line = capsys.readouterr().out
    assert "2 Attention" in line and "2 Mlp" in line


def test_ours(tiny_model, make_batch, shake):
    shake(tiny_model)
    batch = make_batch([[1, 0], [1, 1]], [9, 4])

    def results(model=tiny_model):
        assert model is tiny_model
        tiny_model.zero_grad(set_to_none=True)
        tiny_model.objective(tiny_model(batch, mask_seed=1))["loss"].backward()
        return {name: p.grad.clone() for name, p in tiny_model.trainable().items()}

    fast = results()  # as every ClinVLA is
    expected = results(restore(tiny_model))
    _close(fast, expected, 1e-4)
    again = results(accelerate(tiny_model))
    assert all(torch.equal(x, fast[name]) for name, x in again.items())
