import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from clinvla_fast import backend, ops
from clinvla_fast.backend import BackendUnavailable

with_kernel = SimpleNamespace(__name__="clinvla_fast.kernels.some_operation", reference=object(), triton=object())
without_kernel = SimpleNamespace(__name__="clinvla_fast.kernels.some_operation", reference=object())


@pytest.mark.parametrize(
    ("name", "on_gpu", "fused"),
    [
        ("auto", False, False),
        ("auto", True, True),
        ("reference", False, False),
        ("reference", True, False),
        ("triton", False, True),
        ("triton", True, True),
    ],
)
def test_choice(name, on_gpu, fused):
    with backend.use(name):
        assert backend.implementation(with_kernel, on_gpu) is getattr(with_kernel, "triton" if fused else "reference")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_auto_and_reference_need_no_kernel(on_gpu):
    for name in ("auto", "reference"):
        with backend.use(name):
            assert backend.implementation(without_kernel, on_gpu) is without_kernel.reference


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_explicit_choice_never_falls_back(on_gpu):
    with backend.use("triton"), pytest.raises(BackendUnavailable, match="some_operation has no Triton kernel"):
        backend.implementation(without_kernel, on_gpu)


def test_the_choice_reaches_the_operations():
    """An operation without a Triton kernel says so by name; one with a kernel is not this test's."""
    if hasattr(ops._contrastive, "triton"):
        pytest.skip("contrastive has a Triton kernel")
    x = torch.ones(2, 3)
    with backend.use("triton"), pytest.raises(BackendUnavailable, match="contrastive"):
        ops.contrastive(x, x, torch.tensor(1.0))
    with backend.use("reference"):
        assert ops.contrastive(x, x, torch.tensor(1.0)).isfinite()


def test_unknown_name():
    before = backend._current
    with pytest.raises(ValueError, match="'cuda': expected one of reference, triton, auto"), backend.use("cuda"):
        pass
    assert backend._current == before


def test_use_restores_the_choice_also_after_an_error():
    def chosen():
        return backend.implementation(with_kernel, on_gpu=True)

    with backend.use("auto"):
        with backend.use("reference"):
            with pytest.raises(KeyError), backend.use("triton"):
                raise KeyError
            assert chosen() is with_kernel.reference
        assert chosen() is with_kernel.triton


def _python(code, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "CLINVLA_BACKEND"}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_environment_variable(pytestconfig):
    # The module alone, by its path: importing all of clinvla_fast takes seconds.
    path = str(pytestconfig.rootpath / "clinvla_fast" / "backend.py")
    code = f"import runpy; print(runpy.run_path({path!r})['_current'])"
    assert _python(code).stdout.strip() == "auto"
    for name in backend.BACKENDS:
        assert _python(code, CLINVLA_BACKEND=name).stdout.strip() == name
    wrong = _python(code, CLINVLA_BACKEND="fast")
    assert wrong.returncode and "'fast': expected one of" in wrong.stderr


def test_environment_variable_through_the_package(pytestconfig):
    code = "import torch, clinvla_fast; x = torch.ones(2, 3); clinvla_fast.ops.contrastive(x, x, torch.tensor(1.0))"
    if hasattr(ops._contrastive, "triton"):
        pytest.skip("contrastive has a Triton kernel")
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CLINVLA_BACKEND": "triton"},
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert "BackendUnavailable: contrastive" in result.stderr
