"""Where similarities are computed: three ways to the same numbers, each a module with the two functions below.

Shapes: n own rows, K rows of the pool (own rows are pool[start : start + n]), D width.
s_ij = pool_i . pool_j / tau, a row's similarity to itself left out; p_ij = exp(s_ij - lse_i).

    log_sum_exp(pool, start, n, tau)                 -> (n,)                  lse_i = logsumexp_j s_ij
    pull(pool, start, n, tau, lse, g, with_entropy)  -> (n, D), () or None    sum_j (g_i p_ij + g_j p_ji) pool_j,
                                                                              -sum_ij g_i p_ij log p_ij

pool is (K, D), tau (1,), lse and g (K,) for every row of the pool; float32 accumulation (float64 where the pool is
float64), and float32 results for half-precision pools. A pool of one row has lse = -inf.
"""

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType

import torch

log = logging.getLogger("jointfuse")
NAMES = ("auto", "reference", "tiled", "triton")
SMALLEST_FOR_TRITON = 512  # rows of the pool; below, starting kernels costs more than they do


def backend(name: str, device: torch.device, dtype: torch.dtype, rows: int) -> ModuleType:
    """The module of a backend by name; `auto` chooses for a pool of `rows` rows and says which, once.

    Raises:
        ValueError: an unknown name, or a backend that cannot work here.
    """
    if name not in NAMES:
        raise ValueError(f"backend '{name}': choose one of {', '.join(NAMES)}")
    if name == "auto":
        kernels = device.type == "cuda" and dtype != torch.float64 and rows >= SMALLEST_FOR_TRITON
        name = "triton" if kernels and _triton_works() else "tiled"
        _say(name, device.type)
    if name == "triton" and not _triton_installed():
        raise ValueError("backend 'triton' needs the package triton; 'tiled' works without it")
    chosen = importlib.import_module(f"{__name__}.{name}")
    if name == "triton":
        chosen.check(device, dtype)
    return chosen


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _triton_works() -> bool:
    """Whether kernels can be built and started here: Triton wants a C compiler and Python's header files for that."""
    if not _triton_installed():
        return False
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:  # whatever a compiler or a driver says
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning("contrastive loss: Triton cannot build kernels here (%s): slower without", reason)
        return False
    return True


@cache
def _say(name: str, device: str) -> None:
    log.info("contrastive loss: backend %s on %s", name, device)
