"""The kernels compiled for GPUs that are not here: they fit, spill nothing, and use the tensor cores.

SOAK_KERNELS=1 compiles every kernel x precision x tile x width x what is known of its integers.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from distributed import run_program

from jointfuse.bench import ahead, kernels
from jointfuse.bench.bound import forms, predicted
from jointfuse.losses.backends.tiles import KERNELS, Tile, tiles

pytestmark = pytest.mark.required
EVERYTHING = bool(os.environ.get("SOAK_KERNELS"))
RESULTS = Path(kernels.__file__).parent / "results"


@pytest.fixture(scope="module", params=[80, 90])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `bench kernels` finds for a compute capability, in a process that does not interpret kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "jointfuse.bench", "kernels", "--capability", str(request.param)]
    command += ["--out", str(folder / "table.json"), *(["--everything"] if EVERYTHING else [])]
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    ended = run_program(command, environment=environment, limit=7200 if EVERYTHING else 550)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads((folder / "table.json").read_text())


@pytest.mark.timeout(7200 if EVERYTHING else 600)
def test_every_kernel_fits_spills_nothing_and_uses_the_tensor_cores(table: dict[str, Any]) -> None:
    wrong = {str([row[key] for key in ("kernel", "dtype", "width", "integers", "tile")]): row["faults"]
             for row in table["kernels"] if row["faults"]}  # fmt: skip
    assert not wrong
    capability = table["capability"]
    compiled = {(row["kernel"], row["dtype"], Tile(**row["tile"])) for row in table["kernels"]}
    for kernel in KERNELS:
        for dtype, itemsize in (("bfloat16", 2), ("float32", 4)):
            assert {(kernel, dtype, tile) for tile in tiles(kernel, itemsize, capability)} <= compiled
        assert (kernel, "float16", tiles(kernel, 2, capability)[0]) in compiled
    for key, values in (("width", kernels.WIDTHS), ("integers", ahead.INTEGERS)):
        assert {row[key] for row in table["kernels"]} == set(values)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_published_table_is_that_of_the_tiles_in_use(capability: int) -> None:
    (path,) = RESULTS.glob(f"kernels-sm{capability}-*.json")
    rows = json.loads(path.read_text())["kernels"]
    keys = ("kernel", "dtype", "width", "tile", "capability", "integers")
    assert [{key: row[key] for key in keys} for row in rows] == [
        asdict(case) for case in kernels.chosen_cases(capability)
    ]
    assert not any(row["faults"] for row in rows)


def test_what_a_kernel_must_not_be_is_said() -> None:
    case = ahead.Case("coefficients", "bfloat16", 1536, tiles("coefficients", 2, 90)[0], 90)
    fine = {"HGMMA": 4, "UTMALDG": 6}
    assert kernels.faults(case, ahead.Compiled(200, 0, 100_000, fine, 0)) == []
    assert kernels.faults(case, ahead.Compiled(255, 692, 240_000, {"HMMA": 64}, 2)) == [
        "692 bytes of registers spilled",
        "240000 bytes of shared memory",
        "no HGMMA",
        "no copies by the tile",
        "2 products of indices in 32 bits",
    ]


def test_own_pairs_once_reach_the_goal_on_paper_and_a_plainer_form_does_not() -> None:
    plain, *_, used = (predicted(form, 65536, 1536)["share"] for form in forms())
    assert plain < 0.8 < used
    # Where other ranks hold most of the pool little is symmetric: no form promises more than the matrix product's rate.
    assert all(0 < predicted(form, 65536, 1536, ranks=64)["share"] < 1 for form in forms())


def test_kernels_that_are_interpreted_and_gpus_that_are_not_known_are_refused() -> None:
    for options, environment, message in (
        (["--capability", "70"], {"TRITON_INTERPRET": "0"}, "--capability 70: choose one of 80, 90"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ):
        ended = run_program([sys.executable, "-m", "jointfuse.bench", "kernels", *options], environment=environment)
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: {message}")
