"""The kernels in Triton's interpreter, by parts: every form they are compiled in, against float64."""

import math
from collections.abc import Callable

import pytest
import torch

from jointfuse.losses.backends import panels, reference, tiles, triton
from jointfuse.losses.backends.tiles import Tile

pytestmark = [
    pytest.mark.required,
    pytest.mark.skipif(not tiles.INTERPRETED and torch.cuda.is_available(), reason="the kernels are compiled here"),
]
# Rows, columns, parts and descriptors of a tile: each shape in each way of reading the pool, each number of parts.
FORMS = [
    Tile(16, 32, 16, 4, 1, split=1, tma=False),
    Tile(16, 32, 16, 4, 1, split=4, tma=True),
    Tile(16, 16, 16, 4, 1, split=2, tma=True),
    Tile(32, 16, 16, 4, 1, split=1, tma=True),
    Tile(32, 16, 16, 4, 1, split=2, tma=False),
]
# Own rows among those of others: at the beginning, in the middle, at the end, all, one.
OWN = [(0, 40, 75), (17, 23, 75), (48, 27, 75), (0, 75, 75), (70, 1, 75), (3, 0, 75)]


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tile:
    """A tile that the kernels use, in panels and bands of a few tiles."""
    monkeypatch.setattr(tiles, "FOR_THE_INTERPRETER", [request.param])
    monkeypatch.setattr(panels, "HEIGHT", 32)
    monkeypatch.setattr(panels, "ROOM", 32)
    monkeypatch.setattr(panels, "PANEL_BYTES", 1)
    monkeypatch.setattr(triton, "BAND_BYTES", 1)
    monkeypatch.setattr(triton, "LEAST_BAND", 2)
    return request.param


def pool_of(keys: int, width: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(keys, width, generator=torch.Generator().manual_seed(keys + width))


def check(pool: torch.Tensor, start: int, n: int, tau: float, queue: int = 0) -> None:
    """Both functions of the backend, against `reference` in float64; the last `queue` keys are no anchors."""
    found, wanted = [], []
    for kernels, dtype, results in ((triton, torch.float32, found), (reference, torch.float64, wanted)):
        rows, temperature = pool.to(dtype), torch.tensor([tau], dtype=dtype)
        lse = reference.log_sum_exp(pool.double(), 0, len(pool), torch.tensor([tau], dtype=torch.float64))
        g = torch.linspace(0.1, 1.0, len(pool), dtype=dtype)
        if queue:
            lse[-queue:], g[-queue:] = torch.inf, 0
        results.append(kernels.log_sum_exp(rows, start, n, temperature))
        for learnt in (False, True):
            results += kernels.pull(rows, start, n, temperature, lse.to(dtype), g, learnt)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            # A float32 similarity of 1,000 has an error of 3e-5, and so has the logarithm of a probability.
            digits = 2e-5 + 1e-7 * float((pool.norm(dim=1).max() ** 2) / tau)
            slack = digits * float(theirs.abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(ours.double(), theirs, rtol=digits, atol=slack)


@pytest.mark.parametrize(("start", "n", "keys"), OWN)
def test_own_rows_anywhere_in_the_pool_meet_every_key_once(form: Tile, start: int, n: int, keys: int) -> None:
    check(pool_of(keys, 19), start, n, 2.0)


def test_keys_of_a_queue_are_no_anchors(form: Tile) -> None:
    check(pool_of(75, 8), 17, 23, 2.0, queue=20)


@pytest.mark.parametrize("tau", [1.0, 0.05, 0.005])
def test_one_exponential_serves_where_log_sum_exps_are_close_and_two_where_they_are_not(tau: float) -> None:
    # Rows of norms from 0 to 3: log-sum-exps from log(K) to 9 / tau = 1,800, 2,600 powers of two apart.
    pool = pool_of(64, 8)
    pool = torch.nn.functional.normalize(pool) * torch.linspace(0, 3, 64)[:, None]
    lse = reference.log_sum_exp(pool.double(), 0, 64, torch.tensor([tau], dtype=torch.float64)) / math.log(2)
    assert (lse.max() - lse.min() > triton.CLOSE) == (tau < 1)
    if tau == 0.005:
        assert lse.max() - lse.min() > 1000
    check(pool, 0, 64, tau)


def test_the_threshold_between_one_exponential_and_two_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tau = torch.nn.functional.normalize(pool_of(50, 8)), torch.tensor([0.03])
    lse = reference.log_sum_exp(pool, 0, 50, tau)
    g = torch.full((50,), 1 / 50)
    one, one_entropy = triton.pull(pool, 0, 50, tau, lse, g, True)
    monkeypatch.setattr(triton, "CLOSE", -1.0)
    two, two_entropy = triton.pull(pool, 0, 50, tau, lse, g, True)
    assert not torch.equal(one, two), "both ways are taken"
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))
    torch.testing.assert_close(one_entropy, two_entropy, rtol=1e-5, atol=1e-7)


def test_odd_widths_and_rows_that_begin_anywhere_are_made_fit_for_copies_by_the_tile() -> None:
    for pool in (torch.randn(6, 5), torch.randn(6, 3).half(), torch.randn(25)[1:].view(6, 4), torch.randn(6, 8)):
        aligned = triton._aligned(pool)
        assert aligned.data_ptr() % 16 == aligned.stride(0) * aligned.element_size() % 16 == 0
        assert torch.equal(aligned[:, : pool.shape[1]], pool)
        assert not aligned[:, pool.shape[1] :].any()
    check(torch.randn(65)[1:].view(16, 4), 3, 9, 1.0)


def test_a_tile_that_cannot_be_compiled_is_passed_over_and_memory_that_runs_out_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choices = tiles.tiles("coefficients", 2, 90)
    errors: dict[Tile, Exception] = {
        choices[0]: RuntimeError("PassManager::run failed"),
        choices[1]: tiles.triton.runtime.errors.OutOfResources(250_000, 232_448, "shared memory"),
        choices[2]: tiles.triton.runtime.errors.PTXASError("out of registers"),
    }

    def run(tile: Tile) -> None:
        if tile in errors:
            raise errors[tile]

    def timed(work: Callable[[], None], **_: int) -> float:
        work()
        return 1.0

    monkeypatch.setattr(tiles.triton.testing, "do_bench", timed)
    assert tiles._try("coefficients", choices, run) == choices[3]
    errors |= {tile: RuntimeError("no") for tile in choices[3:]}
    with pytest.raises(RuntimeError, match="no tile of kernel coefficients runs here"):
        tiles._try("coefficients", choices, run)
    errors[choices[0]] = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        tiles._try("coefficients", choices, run)


def test_tiles_are_chosen_anew_for_other_sizes_of_n_and_of_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "_capability", lambda: 90)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles, "_fastest", {})
    tried: list[int] = []
    monkeypatch.setattr(tiles, "_try", lambda kernel, choices, run: tried.append(1) or choices[len(tried) % 2])
    used = []
    for rows, keys in ((100, 1000), (101, 1001), (100, 70_000), (40_000, 70_000)):
        used.append(tiles.launch("coefficients", torch.empty(keys, 8), rows, lambda tile: tile))
    assert len(tried) == 3
    assert used[0] == used[1] != used[2]
    torch.use_deterministic_algorithms(True)
    try:
        tiles.launch("coefficients", torch.empty(9, 8), 9, lambda tile: tile)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(tried) == 3
