"""What lies in the JSON of a corpus, checked as it is read. Entries that are not named here stay as they are.

corpus.json is a CorpusRecord, a sidecar a Sidecar, the JSON of a sample in a tar a Meta.
"""

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator, with_config
from typing_extensions import TypedDict

from jointfuse.data.index import FORMAT

LARGEST = 2**63 - 1


def _same(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A whole number where a fraction may stand stays one: digests are of what is on disk."""
    check(value)
    return value


def _readable(format: int) -> int:
    if format != FORMAT:
        raise ValueError(f"format {format}, this version reads format {FORMAT}")
    return format


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("one of the names is there twice")
    return names


def _plain(name: str) -> str:
    if name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(f"{name[:80]!r} leads outside its folder; do not trust this corpus")
    return name


def _tar(name: str) -> str:
    if not name.endswith(".tar"):
        raise ValueError(f"{name[:80]!r} is no name of a tar")
    return name


Number = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_same)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), WrapValidator(_same)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False), WrapValidator(_same)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
InIndex = Annotated[int, Field(ge=0, lt=2**32)]
Label = Annotated[int, Field(ge=0, lt=2**16)] | None
PlainName = Annotated[str, AfterValidator(_plain)]
TarName = Annotated[str, AfterValidator(_plain), AfterValidator(_tar)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

checked = with_config(ConfigDict(extra="allow", strict=True))


@checked
class ShardRecord(TypedDict):
    name: TarName
    samples: Count
    bytes: Count
    sha256: Digest


@checked
class Lacking(TypedDict):
    text: Count
    clip: Count
    both: Count


@checked
class SplitRecord(TypedDict):
    samples: Count
    dialogues: Count
    seconds: NotNegative
    lacking: Lacking
    label_counts: dict[str, Count]
    speakers: list[str]
    shards: list[ShardRecord]


@checked
class Mel(TypedDict):
    mean: Number
    deviation: Deviation


@checked
class CorpusRecord(TypedDict):
    """corpus.json. `mel` is null where there is no training split to take it from."""

    format: Annotated[int, AfterValidator(_readable)]
    name: str
    labels: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    speakers: Annotated[list[str], AfterValidator(_distinct)]
    mel: Mel | None
    splits: dict[PlainName, SplitRecord]
    synthetic: NotRequired[bool]
    speaker_independent: NotRequired[bool]
    description: NotRequired[str]
    source: NotRequired[str]
    licence: NotRequired[str]
    faults: NotRequired[list[dict[str, Any]]]


@checked
class SampleRecord(TypedDict):
    key: str
    offset: Count
    size: InIndex
    duration: Annotated[float, Field(ge=0, lt=2**32 / 1000, allow_inf_nan=False)]
    characters: InIndex
    label: Label
    emotion: str | None
    speaker: str
    dialogue: str
    turn: InIndex


@checked
class MelSums(TypedDict):
    count: Count
    sum: Number
    squares: NotNegative


def _inside(sidecar: "Sidecar") -> "Sidecar":
    for number, sample in enumerate(sidecar["samples"]):
        if sample["offset"] + sample["size"] > sidecar["bytes"]:
            end = sample["offset"] + sample["size"]
            raise ValueError(f"samples.{number}: it ends at byte {end} of a tar of {sidecar['bytes']}")
    return sidecar


@checked
class Sidecar(TypedDict):
    sha256: Digest
    bytes: Count
    samples: list[SampleRecord]
    source: NotRequired[str]
    mel: NotRequired[MelSums]
    faults: NotRequired[list[dict[str, Any]]]


CheckedSidecar = Annotated[Sidecar, AfterValidator(_inside)]


@checked
class Meta(TypedDict):
    """The JSON of a sample; times that are no numbers are a fault that verify.py names."""

    label: Label
    emotion: NotRequired[str | None]
    speaker: str
    dialogue: str
    turn: InIndex
    start: NotRequired[float | None]
    end: NotRequired[float | None]
