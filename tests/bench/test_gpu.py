"""The one command for a GPU: what it runs can be collected without what it does not need, and running, deadlines and
summaries work, with tests that any machine can run."""

import json
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu

WITHOUT = """
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys(("nvidia.dali", "tyro", "xformers")))
import pytest
from bench.gpu import plans_for_a_gpu
plans, without = plans_for_a_gpu(Path(sys.argv[1]), quick=False)
print(*(name for name, why in without.items() if "not installed" in why), sep="\\n")
sys.exit(pytest.main(["--collect-only", "-q", *plans[0].arguments, *plans[1].arguments]))
"""


def test_everything_is_collected_without_dali_tyro_and_xformers(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.stored.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for needing in gpu.NEEDS:
        assert needing in done.stdout.splitlines() and f"{needing}::" not in done.stdout
    for part in ("tests/kernels/test_contrastive.py", "bench/test_kernels_on_gpu.py", "bench/test_waterfall.py"):
        assert f"{part}::" in done.stdout


def test_a_run_on_any_machine(tmp_path):
    plans = [
        gpu.Plan("correctness", ["tests/test_backend.py"]),
        gpu.Plan("benchmarks", ["bench/test_local_alignment.py::test_speed[2 studies]"]),
    ]
    parts = list(gpu.run_all(plans, tmp_path))
    found = gpu.summary(parts, {"compute-sanitizer": "not on the PATH"}, on_gpu=False)
    gpu.write(tmp_path, found)
    assert parts[0].passed and not parts[0].failed
    (ratios,) = parts[1].ratios.values()
    assert ratios["than the loop"][0] > 0
    assert json.loads((tmp_path / "summary.json").read_text())["commit"]
    text = (tmp_path / "summary.md").read_text()
    assert f"| correctness | {len(parts[0].passed)} | 0 |" in text and "than the loop" in text
    assert "left out: compute-sanitizer: not on the PATH" in text
    assert (tmp_path / "correctness.xml").is_file() and (tmp_path / "benchmarks.txt").is_file()


def test_nothing_is_timed_after_wrong_results(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_it():\n    assert 1 + 1 == 3\ndef test_other():\n    pass\n")
    plans = [gpu.Plan("correctness", [str(wrong)]), gpu.Plan("benchmarks", [str(wrong)])]
    parts = list(gpu.run_all(plans, tmp_path))
    assert len(parts[0].failed) == len(parts[0].passed) == 1
    assert parts[1].left_out == {"benchmarks": "correctness failed"}
    assert "FAILED" in gpu.written(gpu.summary(parts, {}, on_gpu=False))


def test_what_there_is_no_time_for_is_named(tmp_path):
    part = gpu.run(gpu.Plan("late", ["tests/test_backend.py"]), tmp_path, until=time.time())
    assert not part.passed and not part.failed and set(part.left_out.values()) == {gpu.NO_TIME}
    (skipped,) = gpu.run_all([gpu.Plan("too late", [])], tmp_path, seconds=gpu.GRACE - 1)
    assert skipped.left_out == {"too late": gpu.NO_TIME}


def test_what_cannot_be_collected_fails(tmp_path):
    broken = tmp_path / "test_broken.py"
    broken.write_text("import a_module_that_there_is_not\n")
    part = gpu.run(gpu.Plan("broken", [str(broken)]), tmp_path, until=time.time() + 60)
    assert part.failed == {"broken": "exit code 2: see broken.txt"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=gpu.stored.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "bench.gpu needs a CUDA device and PyTorch sees none: see torch.cuda.is_available().\n"


def test_the_commit_of_a_copy_without_history(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.stored, "ROOT", tmp_path)
    assert gpu.stored.commit.__wrapped__() == "unknown"
    monkeypatch.setenv("CLINVLA_COMMIT", "1234abc")
    assert gpu.stored.commit.__wrapped__() == "1234abc"
