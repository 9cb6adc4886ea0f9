"""Compile the kernels of one operation for one architecture, without a GPU, and print what each of them takes.

    python tests/kernels/compile_worker.py invertible_adapter 90

Every call in launches/<operation>.py goes through the real launcher; only the start of the kernel is left out.
Prints JSON: {launch/kernel: {registers, stack, shared, instructions, matrix, <instruction>: count}}; `stack` holds
spills, `matrix` says that the source multiplies matrices.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = {"HGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05", "LDL": "spill loads", "STL": "spill stores"}
COUNTED |= dict.fromkeys(("RED", "REDG", "ATOM", "ATOMG"), "atomics")
"""SASS instructions that are told apart: matrix products of sm_90, sm_80 and sm_100, local memory, and additions in
memory whose order is chance."""


class Target:
    """In place of a CUDA driver: a card that compiles and cannot run."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            return subprocess.check_output([_BIN / "cuobjdump", what, file.name], text=True)

        usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", dump("--dump-resource-usage")))
        opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", dump("--dump-sass")))
    counted = Counter()
    for opcode, name in COUNTED.items():
        counted[name] += opcodes[opcode]
    return {"registers": int(usage["REG"]), "stack": int(usage["STACK"]), "instructions": opcodes.total()} | +counted


def compile_launches(operation: str, capability: int) -> dict[str, dict[str, int]]:
    driver.set_active(Target(capability))
    torch.cuda.get_device_capability = lambda *_: divmod(capability, 10)
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **meta):
        compiled.append(run(self, *args, grid=grid, warmup=True, **meta))

    JITFunction.run = compile_only
    path = Path(__file__).parent / "launches" / f"{operation}.py"
    spec = importlib.util.spec_from_file_location(operation, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = {}
    for name, call in module.launches():
        compiled.clear()
        call()
        for kernel in {kernel.asm["cubin"]: kernel for kernel in compiled}.values():
            found = resources(kernel.asm["cubin"]) | {"shared": kernel.metadata.shared}
            if "tt.dot" in kernel.asm["ttir"]:
                found["matrix"] = True
            earlier = table.get(f"{name}/{kernel.metadata.name}", {})  # compiled for other values of an argument
            table[f"{name}/{kernel.metadata.name}"] = {k: max(found[k], earlier.get(k, 0)) for k in found}
    return table


if __name__ == "__main__":
    print(json.dumps(compile_launches(sys.argv[1], int(sys.argv[2]))))
