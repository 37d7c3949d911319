"""The loss's kernels compiled for GPUs that need not be here: what of a multiprocessor each takes, and what it runs."""

import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jointfuse.losses.backends import kernels
from jointfuse.losses.backends.tiles import INTERPRETED, Tile
from jointfuse.losses.backends.triton import CLOSE

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# What an instruction is called in machine code, and what it is.
INSTRUCTIONS = {
    "HGMMA": "products of the tensor cores, a warp group at a time (sm_90)",
    "HMMA": "products of the tensor cores, a warp at a time (sm_80)",
    "UTMALDG": "copies by the tile",
    "LDGSTS": "copies that pass the registers by",
    "MUFU.EX2": "exponentials",
    "LDL": "spilled registers read",
    "STL": "spilled registers written",
}
# Integers given to a kernel, as the compiler is told about them.
INTEGERS = {"aligned": "multiples of 16", "any": "nothing known", "one": "one own row: last_row = own_end = 1"}


@dataclass(frozen=True)
class Case:
    """One kernel in one form."""

    kernel: str
    dtype: str
    width: int
    tile: Tile
    capability: int
    integers: str = "aligned"


@dataclass(frozen=True)
class Compiled:
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes of a block
    instructions: dict[str, int]
    narrow: int  # products of indices in 32 bits: of rows and a width they overflow in large pools

    def blocks(self, warps: int, shared: int) -> int:
        """Blocks that fit on a multiprocessor of 65,536 registers and so much shared memory."""
        allotted = -(-self.registers // 8) * 8 * 32 * warps
        return min(65536 // allotted, (shared + 1024) // (self.shared + 1024))


def compile_all(cases: list[Case]) -> list[Compiled]:
    """Raises what the compiler raises. Several at a time."""
    assert not INTERPRETED, "TRITON_INTERPRET is set: nothing is compiled"
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compiled, cases))


def compiled(case: Case) -> Compiled:
    found = triton.compile(
        _source(case),
        target=GPUTarget("cuda", case.capability, 32),
        options={"num_warps": case.tile.warps, "num_stages": case.tile.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used is not None, usage
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in INSTRUCTIONS}
    narrow = len(re.findall(r"arith\.muli .*: tensor<.*xi32>", found.asm["ttir"]))
    return Compiled(int(used[1]), int(used[2]), found.metadata.shared, {n: c for n, c in counts.items() if c}, narrow)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _source(case: Case) -> ASTSource:
    kernel = kernels.log_sum_exp_kernel if case.kernel == "log_sum_exp" else kernels.coefficient_kernel
    names, tile, short = kernel.arg_names, case.tile, DTYPES[case.dtype]
    constants = {
        "D": case.width, "WITH_ENTROPY": case.kernel.endswith("entropy"), "CLOSE": CLOSE,
        "TMA": tile.tma, "SPLIT": tile.split, "BM": tile.BM, "BN": tile.BN, "BD": tile.BD,
    }  # fmt: skip
    if case.integers == "one":
        constants |= {"last_row": 1, "own_end": 1}
    pointers = dict.fromkeys(("parts", "mirrored", "tau", "entropies", "lse", "g"), "*fp32")
    pointers |= dict.fromkeys(("rows", "columns", "coefficients"), f"*{short}")
    if tile.tma:
        pointers |= {
            name: f"tensordesc<{short}[{n},{tile.BD}]>" for name, n in (("rows", tile.BM), ("columns", tile.BN))
        }
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    multiples = {name for name, kind in signature.items() if kind.startswith("*")} | {"stride", "onward_columns"}
    if case.integers == "aligned":
        multiples |= {name for name, kind in signature.items() if kind == "i32"}
    return ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(number,): [["tt.divisibility", 16]] for number, name in enumerate(names) if name in multiples},
    )
