"""The loss's kernels, compiled for a GPU that need not be here, and what they could reach there."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table

from jointfuse.bench import bound
from jointfuse.bench.ahead import DTYPES, INTEGERS, Case, Compiled, compile_all
from jointfuse.bench.result import file_safe, write_result
from jointfuse.errors import UserError
from jointfuse.losses.backends.tiles import INTERPRETED, KERNELS, tiles

WIDTHS = (768, 1536, 2048, 136)  # the last is what an odd one becomes: it fills no whole tile
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have
TENSOR_CORES = {80: "HMMA", 90: "HGMMA"}


def every_case(capability: int) -> list[Case]:
    """Every kernel x precision x tile x width x what is known of its integers."""
    return [
        Case(kernel, dtype, width, tile, capability, integers)
        for kernel in KERNELS
        for dtype in DTYPES
        for tile in tiles(kernel, 4 if dtype == "float32" else 2, capability)
        for width in WIDTHS
        for integers in INTEGERS
    ]


def chosen_cases(capability: int) -> list[Case]:
    """Every tile in bfloat16 and float32 at one width, in bfloat16 also where nothing is known of the integers; the
    first tile in everything else, one thing at a time."""
    found = []
    for case in every_case(capability):
        first = case.tile == tiles(case.kernel, 4 if case.dtype == "float32" else 2, capability)[0]
        usual_width, usual = case.width == 1536, case.integers == "aligned"
        if case.dtype == "bfloat16":
            chosen = (usual_width and (first or case.integers != "one")) or (usual and first)
        else:
            chosen = usual_width and usual and (first or case.dtype == "float32")
        if chosen:
            found.append(case)
    return found


def faults(case: Case, found: Compiled) -> list[str]:
    """What a kernel must not be; empty where all is well."""
    wrong = []
    if found.spilled:
        wrong.append(f"{found.spilled} bytes of registers spilled")
    if found.shared > SHARED[case.capability]:
        wrong.append(f"{found.shared} bytes of shared memory")
    if not found.instructions.get(TENSOR_CORES[case.capability]):
        wrong.append(f"no {TENSOR_CORES[case.capability]}")
    if case.tile.tma and not found.instructions.get("UTMALDG"):
        wrong.append("no copies by the tile")
    if found.narrow:
        wrong.append(f"{found.narrow} products of indices in 32 bits")
    return wrong


def benchmark_kernels(capability: int, everything: bool, out: Path | None, console: Console) -> dict[str, Any]:
    """Compile, print a table, write the result file. See `python -m jointfuse.bench kernels --help`.

    Raises:
        UserError: a compute capability that is not known, kernels that are interpreted.
    """
    if capability not in SHARED:
        raise UserError(f"--capability {capability}: choose one of {', '.join(map(str, SHARED))}")
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is set: unset it, and kernels are compiled")
    cases = every_case(capability) if everything else chosen_cases(capability)
    rows = []
    for case, found in zip(cases, compile_all(cases), strict=True):
        blocks = found.blocks(case.tile.warps, SHARED[capability])
        rows.append(asdict(case) | asdict(found) | {"blocks": blocks, "faults": faults(case, found)})
    console.print(_table(rows, capability))
    figures: dict[str, Any] = {"device": f"sm_{capability}, compiled for and not run on"}
    figures |= {"capability": capability, "triton": triton.__version__, "kernels": rows}
    if capability == 90:
        figures |= _prediction(console)
    out = out or Path("build/bench") / f"kernels-sm{capability}-{file_safe(f'triton {triton.__version__}')}.json"
    return write_result(f"kernels-sm{capability}", figures, out, console)


def _prediction(console: Console) -> dict[str, Any]:
    """Shares of the matmul rate on paper, of each form of the loss; printed too."""
    assumed = {name: value for name, value in vars(bound).items() if name.isupper() and isinstance(value, int | float)}
    shares = []
    table = Table(title="On paper, bfloat16: K = 65,536, D = 1,536; milliseconds", title_justify="left")
    for ranks in (1, 64):
        for form in bound.forms():
            found = bound.predicted(form, 65536, 1536, ranks)
            shares.append({"form": form.name, "ranks": ranks} | found)
            if not table.columns:
                for heading in ("ranks", "form", *found):
                    table.add_column(heading, justify="left" if heading == "form" else "right")
            times = [f"{1e3 * seconds:.1f}" for piece, seconds in found.items() if piece != "share"]
            table.add_row(str(ranks), form.name, *times, f"{100 * found['share']:.0f} %")
    console.print(table)
    return {"assumed": assumed, "predicted": shares}


def _table(rows: list[dict[str, Any]], capability: int) -> Table:
    table = Table(title=f"Kernels for sm_{capability}", title_justify="left")
    texts = ["kernel", "precision", "integers", "tile, warps, stages, parts"]
    for heading in (*texts, "D", "registers", "spilled", "shared KiB", "blocks", "faults"):
        table.add_column(heading, justify="left" if heading in texts else "right")
    for row in rows:
        tile = row["tile"]
        form = " ".join(str(tile[name]) for name in ("warps", "stages", "split"))
        table.add_row(
            *(row[key] for key in ("kernel", "dtype", "integers")),
            f"{tile['BM']} x {tile['BN']} x {tile['BD']}  {form}",
            *(str(row[key]) for key in ("width", "registers", "spilled")),
            f"{row['shared'] / 1024:.0f}",
            str(row["blocks"]),
            "; ".join(row["faults"]),
        )
    return table
