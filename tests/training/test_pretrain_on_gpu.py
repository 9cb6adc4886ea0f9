"""The main job on a GPU: every method ends, goes on after a stop, and embeds as the same model on the CPU does."""

import json
from typing import get_args

import pytest
import torch

from clinvla_fast import ClinVLA
from clinvla_fast.methods import METHODS, MethodName
from training.pretrain import main

REPORTS = ["Large right pleural effusion.", "The lungs are clear."]

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_method(finished_run, tmp_path, method, precision):
    out = tmp_path / "run"
    towers = ["--vision-tower", str(finished_run / "towers/vision"), "--text-tower", str(finished_run / "towers/text")]
    data = ["--data", str(finished_run / "data"), "--epochs", "2", "--batch-size", "16"]
    main(["--method", method, "--precision", precision, "--device", "cuda", "--out", str(out), *data, *towers])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["skipped"] == 0
    if not METHODS[method].recipe.fusion:
        models = [ClinVLA.from_pretrained(out).to(device) for device in ("cpu", "cuda")]
        embedded = [model.encode_reports(REPORTS).cpu() for model in models]
        torch.testing.assert_close(*embedded, rtol=0, atol=2e-3)
