"""What the loss could reach on an H100, from numbers of its data sheet and of what its kernels do: no measurement.

Operations are counted as the dense form has them, 6 K^2 D: a form that computes each pair once may exceed 100 %.
"""

from dataclasses import dataclass

from jointfuse.losses.backends.panels import panels, up
from jointfuse.losses.backends.tiles import Tile, tiles

CLOCK = 1.755e9
PROCESSORS = 132
MATMUL = 800e12  # operations a second in half precision that the largest products reach; 989e12 on the data sheet
VENDOR = 0.9  # of MATMUL, in the products of panels with the pool
CACHE = 7.0e12  # bytes a second from the second-level cache
MEMORY = 3.35e12  # bytes a second
EXPONENTIALS = 16  # a clock and multiprocessor
LANES = 128  # other instructions a clock and multiprocessor
# Instructions for a pair beside the products, as counted in the machine code, and exponentials.
LOG_SUM_EXP = {"instructions": 8, "exponentials": 1}
LOG_SUM_EXP_MIRRORED = {"instructions": 13, "exponentials": 2}
COEFFICIENTS = {"instructions": 16, "exponentials": 2}
COEFFICIENTS_OF_ONE = {"instructions": 6, "exponentials": 1}
ELEMENTWISE = 120  # bytes read and written for each number of the pool: norms, positives, gradient
BESIDE_MATMUL = 0.85  # of the shorter of two blocks' work on one multiprocessor, hidden behind the longer's


@dataclass(frozen=True)
class Form:
    """How loss and gradient of own rows are computed."""

    name: str
    symmetric: bool  # own pairs once
    one_exponential: bool  # for both coefficients of a pair
    log_sum_exp: Tile
    coefficients: Tile
    elementwise: int = ELEMENTWISE


PLAIN_TILE = Tile(128, 128, 64, 8, 3)
EVERY_PAIR = Form(
    "every pair, 128 x 128, two exponentials, float32 class sums", False, False, PLAIN_TILE, PLAIN_TILE, 290
)


def forms() -> list[Form]:
    """The plain form first; the one that is used last; between them, one change at a time."""
    lse, coefficients = (
        max(tiles(kernel, 2, 90), key=lambda tile: tile.BM * tile.BN) for kernel in ("log_sum_exp", "coefficients")
    )
    return [
        EVERY_PAIR,
        Form("every pair, 128 x 256 through descriptors", False, False, lse, coefficients),
        Form("... one exponential", False, True, lse, coefficients),
        Form("... own pairs once", True, True, lse, coefficients),
    ]


def predicted(form: Form, keys: int, width: int, ranks: int = 1) -> dict[str, float]:
    """Seconds of each piece on one of `ranks` ranks with as many rows each, and the share of MATMUL in the whole."""
    n = keys // ranks
    every_pair = n * keys
    pairs = every_pair - n * n / 2 if form.symmetric else every_pair
    sums = LOG_SUM_EXP_MIRRORED if form.symmetric and ranks == 1 else LOG_SUM_EXP
    pieces = {
        "log-sum-exps": pairs * _a_pair(form.log_sum_exp, width, **sums),
        "coefficients": pairs
        * max(
            _a_pair(form.coefficients, width, **(COEFFICIENTS_OF_ONE if form.one_exponential else COEFFICIENTS)),
            2 / MEMORY,
        ),
        "products of panels": _products(form, n, keys, width),
        "element by element": (form.elementwise * n * width + 8 * keys * width) / MEMORY,
    }
    total = sum(pieces.values())
    return pieces | {"whole": total, "share": 6 * every_pair * width / MATMUL / total}


def _a_pair(tile: Tile, width: int, instructions: int, exponentials: int) -> float:
    """Seconds for a similarity and what is made of it, all multiprocessors at work."""
    pairs = tile.BM * tile.BN
    products = 2 * pairs * width / MATMUL
    operands = 2 * (tile.BM + tile.BN) * width / CACHE
    beside = pairs * max(instructions / LANES, exponentials / EXPONENTIALS) / (CLOCK * PROCESSORS)
    longer, shorter = sorted((max(products, operands), beside), reverse=True)
    hidden = BESIDE_MATMUL if tile.warps == 4 else 0.0  # two blocks on a multiprocessor
    return (longer + (1 - hidden) * shorter) / pairs


def _products(form: Form, n: int, keys: int, width: int) -> float:
    """Coefficients, 2 bytes each, are read again for each 256 columns of the pool that are multiplied at once, mostly
    from the second-level cache; from memory once."""
    total = 2 * n * keys * width / (VENDOR * MATMUL)
    if form.symmetric:
        # What rows after a panel get is added to float32 sums in memory.
        parts = panels(0, n, keys, width, 2, PROCESSORS)
        added = sum(8 * (n - panel.last) * width for panel in parts)
        idle = sum(_idle(panel.last - panel.first, width) * (panel.last - panel.first) for panel in parts) / n
        return max(total * (1 + idle / 2), (added + 4 * n * keys) / MEMORY)
    return max(total * (1 + _idle(min(n, 2048), width)), 2 * n * keys / MEMORY)


def _idle(rows: int, width: int) -> float:
    """How much longer a product of so many rows takes for multiprocessors that find no tile of its last round. One of
    few tiles is cut along the keys."""
    blocks = -(-rows // 128) * -(-width // 256)
    cuts = range(1, 9) if blocks <= PROCESSORS / 2 else [1]
    return min(up(blocks * cut, PROCESSORS) / (blocks * cut) for cut in cuts) - 1
