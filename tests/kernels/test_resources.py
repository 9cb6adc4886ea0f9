"""Every kernel, as the launcher would start it, compiled for three architectures: it fits, does not spill, uses the
tensor cores, has no atomics, and takes no more than the committed table says.

After a change that is meant: `python tests/kernels/test_resources.py` writes the tables anew.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
OPERATIONS = sorted(path.stem for path in (FOLDER / "launches").glob("*.py"))
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}
"""The instruction that multiplies matrices on each architecture."""


def compiled(operation: str, capability: int) -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FOLDER / "compile_worker.py"), operation, str(capability)]
    result = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def table(operation: str) -> Path:
    return FOLDER / "launches" / f"{operation}.json"


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_resources(operation, capability):
    found = compiled(operation, capability)
    assert found
    for name, kernel in found.items():
        assert kernel["stack"] == 0 and not kernel.get("spill loads"), f"{name} spills: {kernel}"
        assert kernel["shared"] <= SHARED_LIMIT[capability], f"{name}: {kernel}"
        assert not kernel.get("atomics"), f"{name} sums in an order that is chance: {kernel}"
        if "matrix" in kernel:
            assert kernel.get(MATRIX[capability]), f"{name} multiplies without {MATRIX[capability]}: {kernel}"
    committed = json.loads(table(operation).read_text())
    if committed["triton"] != version("triton"):
        pytest.skip(f"the table is of triton {committed['triton']}: another compiler's registers do not compare")
    expected = committed[f"sm_{capability}"]
    assert found.keys() == expected.keys()
    for name, kernel in found.items():
        for what in ("registers", "shared", "instructions"):
            assert kernel[what] <= expected[name][what], f"{name} takes more {what}: {kernel}, was {expected[name]}"


def write(operation: str) -> None:
    found = {f"sm_{c}": compiled(operation, c) for c in SHARED_LIMIT}
    table(operation).write_text(json.dumps({"triton": version("triton")} | found, indent=1) + "\n")


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, sys.argv[1:] or OPERATIONS))
