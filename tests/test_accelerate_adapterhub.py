"""AdapterHub's adapters in a BERT, before and after: the same parameters, results and files."""

import copy

import pytest
import torch

adapters = pytest.importorskip("adapters", exc_type=ImportError)
from adapters.methods.lora import LoRALinearTorch  # noqa: E402
from adapters.methods.modeling import Adapter, NICECouplingBlock  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

from clinvla_fast.twins import accelerate, restore  # noqa: E402
from clinvla_fast.twins_adapterhub import FastAdapter, FastLoRALinear, FastNICECouplingBlock  # noqa: E402

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 99}
TAKEN = {  # settings, and how many adapters and couplings are swapped
    "pfeiffer": (adapters.SeqBnConfig(), 2, 0),
    "mad-x": (adapters.SeqBnInvConfig(), 2, 1),
    "mad-x with gelu": (adapters.SeqBnInvConfig(non_linearity="gelu"), 2, 0),
    "houlsby": (adapters.DoubleSeqBnConfig(scaling=0.5, dropout=0.2), 4, 0),
    "original norm after": (adapters.SeqBnConfig(original_ln_before=False, non_linearity="leakyrelu"), 2, 0),
    "residual after norm": (adapters.SeqBnConfig(residual_before_ln=False, scaling="learned"), 2, 0),
    "scaled by channel": (adapters.SeqBnConfig(scaling="channel", non_linearity="gelu"), 2, 0),
}
LEFT = {
    "norm before": adapters.SeqBnConfig(ln_before=True),
    "norm after": adapters.SeqBnConfig(ln_after=True),
    "gate": adapters.SeqBnConfig(use_gating=True),
    "parallel": adapters.ParBnConfig(),
    "hypercomplex": adapters.CompacterPlusPlusConfig(phm_dim=2, reduction_factor=4),
}


def _model(config, **more):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, **more)).eval()
    adapters.init(model)
    model.add_adapter("one", config=config)
    model.train_adapter("one")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


def _words():
    words = torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    return {"input_ids": words, "attention_mask": mask.long()}


def _results(model):
    """The output, and the gradients of what is trained."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(**_words()).last_hidden_state
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def _assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def _count(model, kind):
    return sum(type(m) is kind for m in model.modules())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", TAKEN)
def test_results_keys_and_the_way_back(case, training):
    config, swapped_adapters, couplings = TAKEN[case]
    model = _model(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
    before = _results(model)
    keys = {name: x.data_ptr() for name, x in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    accelerate(model)
    assert (_count(model, FastAdapter), _count(model, Adapter)) == (swapped_adapters, 0)
    assert _count(model, FastNICECouplingBlock) == couplings
    _assert_same(_results(model), before)
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == keys

    twin = copy.deepcopy(model)
    assert _count(twin, FastAdapter) == swapped_adapters
    _assert_same(_results(twin), before)
    restore(twin)
    restore(model)
    for back in (twin, model):
        assert [type(m) for m in back.modules()] == classes
        torch.testing.assert_close(_results(back), before, rtol=0, atol=0)


LINEAR = {
    "no lora": adapters.SeqBnConfig(),
    "lora": adapters.LoRAConfig(r=4, alpha=2, intermediate_lora=True),
    "gated": adapters.LoRAConfig(r=4, use_gating=True),
    "ia3": adapters.IA3Config(),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_layers_with_lora_and_without(case):
    model = _model(LINEAR[case])
    layers, before, plain = _count(model, LoRALinearTorch), _results(model), copy.deepcopy(model)
    accelerate(model)
    assert layers and (_count(model, FastLoRALinear), _count(model, LoRALinearTorch)) == (layers, 0)
    _assert_same(_results(model), before)
    if case == "lora":
        for merged in (plain, model):
            merged.merge_adapter("one")
        torch.testing.assert_close(*(merged(**_words()).last_hidden_state for merged in (model, plain)))
    restore(model)
    assert _count(model, LoRALinearTorch) == layers


@pytest.mark.parametrize("case", LEFT)
def test_other_adapters_are_left_alone(case):
    model = _model(LEFT[case])
    before = _results(model)
    accelerate(model)
    assert _count(model, FastAdapter) == _count(model, FastNICECouplingBlock) == 0
    _assert_same(_results(model), before)


@pytest.mark.parametrize("part", ["adapter_down", "adapter_up", "non_linearity"])
def test_an_adapter_that_someone_listens_to_is_left_alone(part):
    model = _model(adapters.SeqBnConfig())
    adapter = model.encoder.layer[0].output.adapters["one"]
    heard = []
    getattr(adapter, part).register_forward_hook(lambda *_: heard.append(part))
    accelerate(model)
    _results(model)
    assert _count(model, FastAdapter) == 1 and heard == [part]


@pytest.mark.parametrize("part", ["encoder.layer.0.output.adapters.one.adapter_down.0", "invertible_adapters.one.F.0"])
def test_hooks_put_on_afterwards_are_called(part):
    model, heard = _model(adapters.SeqBnInvConfig()), []
    expected = _results(model)
    accelerate(model).get_submodule(part).register_forward_hook(lambda *_: heard.append(part))
    for actual, right in zip(_results(model), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    assert heard == [part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapter_alone(dtype):
    config = adapters.SeqBnConfig(non_linearity="gelu", scaling=2.0)
    torch.manual_seed(0)
    module = Adapter("one", 12, 5, config).to(dtype)
    x, residual = torch.randn(2, 3, 4, 12, dtype=dtype)
    expected = module(x, residual_input=residual)
    module.__class__ = FastAdapter
    torch.testing.assert_close(module(x, residual_input=residual), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_coupling_alone_and_its_inverse(autocast):
    torch.manual_seed(0)
    module = NICECouplingBlock([[12]], reduction_factor=2)
    x = torch.randn(3, 4, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = module(x), module(x, rev=True)
        module.__class__ = FastNICECouplingBlock
        found = module(x), module(x, rev=True)
    torch.testing.assert_close(found, expected)
    if not autocast:
        torch.testing.assert_close(module(found[0], rev=True), x)


def test_fusion_reads_what_an_adapter_adds():
    model = _model(adapters.SeqBnConfig())
    model.add_adapter("two", config=adapters.SeqBnConfig())
    model.add_adapter_fusion(["one", "two"], set_active=True)
    model.eval()
    with torch.no_grad():
        before = model(**_words()).last_hidden_state
        accelerate(model)
        torch.testing.assert_close(model(**_words()).last_hidden_state, before)
    assert _count(model, FastAdapter) == 4


def test_adapters_added_later_wait_for_the_next_call(capsys):
    model = accelerate(_model(adapters.SeqBnConfig()))
    model.add_adapter("two", config=adapters.SeqBnInvConfig())
    assert _count(model, Adapter) == 2
    accelerate(model)
    assert _count(model, FastAdapter) == 4 and _count(model, FastNICECouplingBlock) == 1
    assert "2 Adapter" in capsys.readouterr().out


def test_saved_adapters_are_read_by_a_model_as_it_was(tmp_path):
    model = _model(adapters.SeqBnInvConfig())
    before = _results(model)[0]
    accelerate(model).save_adapter(str(tmp_path), "one")
    torch.manual_seed(0)
    other = BertModel(BertConfig(**SIZES)).eval()
    adapters.init(other)
    other.set_active_adapters(other.load_adapter(str(tmp_path)))
    torch.testing.assert_close(other(**_words()).last_hidden_state, before)
