"""The history of a run: the rows of its metrics.jsonl."""

from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from jointfuse.errors import UserError
from jointfuse.files import parse_json, read_text

Figure = float | None


@with_config(ConfigDict(extra="allow"))
class MetricsRow(TypedDict):
    """What a page draws; a line of the log holds more."""

    kind: str
    step: Annotated[int, Field(ge=0, le=2**63 - 1)]
    loss: NotRequired[Figure]
    loss_erc: NotRequired[Figure]
    loss_icl: NotRequired[Figure]
    accuracy: NotRequired[Figure]
    weighted_f1: NotRequired[Figure]
    macro_f1: NotRequired[Figure]
    best: NotRequired[Figure]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of RUN/metrics.jsonl, [] where there is none; a last line cut off by a kill is left out.

    Raises:
        UserError: another line is damaged.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    way_out = "delete that line, or the file, to go on without"
    *lines, last = read_text(path, way_out).split("\n")
    rows = []
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            rows.append(dict(parse_json(line, MetricsRow)))
        except ValueError as error:
            if line is last:
                break
            raise UserError(f"{path}: line {number} is damaged ({error}); {way_out}") from error
    return rows
