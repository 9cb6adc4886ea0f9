import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from clinvla_fast import backend, ops
from clinvla_fast.backend import BackendUnavailable

operation = SimpleNamespace(
    __name__="clinvla_fast.kernels.some_operation",
    reference=object(), triton=object(), reference_other=object(), triton_other=object(),
)  # fmt: skip
CPU, GPU = (
    SimpleNamespace(is_cuda=on_gpu, dtype=torch.float32, device=torch.device("cpu")) for on_gpu in (False, True)
)


@pytest.mark.parametrize(
    ("name", "tensor", "fused"),
    [
        ("auto", CPU, False),
        ("auto", GPU, True),
        ("reference", CPU, False),
        ("reference", GPU, False),
        ("triton", GPU, True),
    ],
)
def test_choice(name, tensor, fused):
    with backend.use(name):
        for form in ("", "other"):
            chosen = ("triton" if fused else "reference") + (f"_{form}" if form else "")
            assert backend.implementation(operation, tensor, form) is getattr(operation, chosen)


def test_auto_asks_the_operation_what_its_kernels_take():
    double = SimpleNamespace(is_cuda=True, dtype=torch.float64, device=torch.device("cuda"))
    assert backend.implementation(operation, double) is operation.reference
    for supported in (True, False):
        choosy = SimpleNamespace(**vars(operation), supports=lambda tensor, answer=supported: answer)
        chosen = choosy.triton if supported else choosy.reference
        assert backend.implementation(choosy, GPU) is chosen
        with backend.use("triton"):
            assert backend.implementation(choosy, GPU) is choosy.triton  # which says itself what it does not take


def test_a_gpu_too_old_for_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(backend, "_new_enough", backend._new_enough.__wrapped__)
    assert backend.implementation(operation, GPU) is operation.reference
    with backend.use("triton"), pytest.raises(BackendUnavailable, match=r"compute capability 8\.0"):
        backend.implementation(operation, GPU)


def test_an_explicit_choice_never_falls_back(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    x = torch.ones(2, 3)
    with backend.use("triton"), pytest.raises(BackendUnavailable, match=r"contrastive runs on a GPU .* are on cpu"):
        ops.contrastive(x, x, torch.tensor(1.0))
    with backend.use("reference"):
        assert ops.contrastive(x, x, torch.tensor(1.0)).isfinite()


def test_the_interpreter_runs_kernels_on_a_cpu(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with backend.use("triton"):
        assert backend.implementation(operation, CPU) is operation.triton


def test_unknown_name():
    before = backend._choice.current
    with pytest.raises(ValueError, match="'cuda': expected one of reference, triton, auto"), backend.use("cuda"):
        pass
    assert backend._choice.current == before


def test_use_restores_the_choice_also_after_an_error():
    def chosen():
        return backend.implementation(operation, GPU)

    with backend.use("auto"):
        with backend.use("reference"):
            with pytest.raises(KeyError), backend.use("triton"):
                raise KeyError
            assert chosen() is operation.reference
        assert chosen() is operation.triton


def _python(code, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("CLINVLA_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_environment_variable():
    code = "import torch, clinvla_fast; x = torch.ones(2, 3); clinvla_fast.ops.contrastive(x, x, torch.tensor(1.0))"
    assert not _python(code, CLINVLA_BACKEND="reference").returncode
    assert not _python(code).returncode
    unavailable = _python(code, CLINVLA_BACKEND="triton")
    assert "BackendUnavailable: the Triton kernel of contrastive" in unavailable.stderr
    wrong = _python(code, CLINVLA_BACKEND="fast")
    assert wrong.returncode and "'fast': expected one of" in wrong.stderr
