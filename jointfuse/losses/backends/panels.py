"""How the coefficients of a rank's own rows are cut into panels: arithmetic alone, for pools of any size."""

from dataclasses import dataclass

PANEL_BYTES = 384 * 2**20  # of coefficients held at once
HEIGHT = 128  # panels have a multiple of so many rows, a multiple of every tile's
ROOM = 256  # ... and of so many columns
PRODUCT_TILE = (128, 256)  # of the vendor's matrix product, as far as is known


@dataclass(frozen=True)
class Panel:
    """Coefficients of own rows first to last. Its columns are those from `first` on and then, from `onward` on, those
    before the rank's own rows: the rest of its pairs are in earlier panels, whose columns these rows are."""

    first: int
    last: int
    start: int  # the rank's first own row
    keys: int

    @property
    def onward(self) -> int:
        return up(self.keys - self.first, ROOM)

    @property
    def stride(self) -> int:
        return self.onward + up(self.start, ROOM)

    @property
    def numbers(self) -> int:
        """Room for whole tiles."""
        return up(self.last - self.first, HEIGHT) * self.stride

    def tiles(self, width: int) -> int:
        """Tiles beside each other that cover the columns."""
        return -(-(self.keys - self.first) // width) + -(-self.start // width)


def up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def panels(start: int, n: int, keys: int, width: int, itemsize: int, processors: int) -> list[Panel]:
    """Those of the own rows start to start + n. Columns get fewer from panel to panel, so rows get more."""
    found, first, end = [], start, start + n
    while first < end:
        stride = Panel(first, end, start, keys).stride
        rows = _rows(PANEL_BYTES // (stride * itemsize * HEIGHT), end - first, width, processors)
        found.append(Panel(first, min(first + rows, end), start, keys))
        first = found[-1].last
    return found


def _rows(most: int, wanted: int, width: int, processors: int) -> int:
    """Rows of a panel for which `most` blocks of HEIGHT rows have room.

    Of the numbers that fit, the one whose product with the pool leaves the fewest multiprocessors idle.
    """
    most = max(1, most)
    if most * HEIGHT >= wanted:
        return wanted

    def busy(blocks: int) -> float:
        programs = -(-blocks * HEIGHT // PRODUCT_TILE[0]) * -(-width // PRODUCT_TILE[1])
        return programs / up(programs, processors)

    return HEIGHT * max(range(max(1, most // 2), most + 1), key=lambda blocks: (busy(blocks), blocks))
