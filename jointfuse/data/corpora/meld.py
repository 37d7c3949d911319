"""MELD (Poria et al., ACL 2019) as its authors distribute it: three CSVs, and a folder of MP4s a split.

What is wrong with it is looked for in every row, file and clip, treated as `meld_faults.yaml` says, and named.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from jointfuse.data.corpora.cells import csv_rows, seconds_of
from jointfuse.data.corpora.meld_places import FOLDERS, TABLES, find_places
from jointfuse.data.corpora.text import LOST, repair
from jointfuse.data.media import read_media
from jointfuse.data.parallel import preload
from jointfuse.data.rows import CorpusSpec, Fault, FaultyClip, ObservedClip, Row
from jointfuse.data.sound import Damaged, EmptyAudio, MediaError, NoAudioTrack, Undecodable
from jointfuse.errors import UserError

LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
# split -> utterances of each label, 9989, 1109 and 2610 in all
PUBLISHED: dict[str, dict[str, int]] = {
    split: dict(zip(LABELS, counts, strict=True))
    for split, counts in {
        "train": (1109, 271, 268, 1743, 4710, 683, 1205),
        "dev": (153, 22, 40, 163, 470, 111, 150),
        "test": (345, 68, 50, 402, 1256, 208, 281),
    }.items()
}
COLUMNS = (
    "Utterance",
    "Speaker",
    "Emotion",
    "Sentiment",
    "Dialogue_ID",
    "Utterance_ID",
    "Season",
    "Episode",
    "StartTime",
    "EndTime",
)
CLIP_NAME = re.compile(r"(dia\d+_utt\d+)\.mp4")
TOLERANCE = 0.5  # seconds by which clip and row may differ before it is told
MINUTES = 60.0  # seconds; no utterance lasts as long: the longest whose row is right has 41
SPLIT_LEFT_OUT = "the split is left out"
MOST_MISSING = 0.2  # of a split's clips; beyond it, a folder is not whole rather than faulty


@dataclass(frozen=True)
class Clip:
    """Where an utterance's sound lies, and what is known of it."""

    root: Path
    file: str  # folder and name, in `root`
    seconds: float | None  # by its row; None: the row has no duration
    known: frozenset[str]  # kinds of faults


def meld_corpus(
    raw: Path,
    name: str = "meld",
    text_only: bool = False,
    scratch: Path | None = None,
    published: Mapping[str, Mapping[str, int]] = PUBLISHED,
    partial: bool = False,
) -> CorpusSpec:
    """List MELD's dialogues, and what is wrong with its tables and folders.

    Args:
        raw: the folder MELD.Raw, its archive MELD.Raw.tar.gz, or a folder of the archives train, dev and test.tar.gz.
        text_only: leave the clips out; `raw` then needs to hold no more than the CSVs.
        scratch: folder to unpack archives into; what it holds already is not unpacked again.
        published: split -> label -> utterances, which the tables must come to.
        partial: list what is there; tables, folders and clips that are not, and counts that differ, are faults.

    Raises:
        UserError: `raw` is not MELD, or of another release, or not whole; or an archive cannot be unpacked.
    """
    places = find_places(raw, scratch, text_only, partial)
    if not text_only:
        preload(__name__, "av", "scipy.signal")  # what read_clips will need, while we read the tables
    tables = {split: _Table(split, places[TABLES[split]]) for split in PUBLISHED if TABLES[split] in places}
    faults = [
        Fault(split, TABLES[split], "no such table", SPLIT_LEFT_OUT) for split in PUBLISHED if split not in tables
    ]
    faults += _differing_counts(tables, published, partial)
    faults += [fault for table in tables.values() for fault in table.faults]
    tables = {split: table for split, table in tables.items() if table.rows}
    if not tables:
        raise UserError(f"{raw}: no table of MELD has a row; take the CSVs of MELD.Raw")
    if not text_only:
        faults += _add_clips(tables, places, partial)
    return CorpusSpec(
        name=name,
        labels=LABELS,
        splits={split: table.dialogues() for split, table in tables.items()},
        rows={split: table.account for split, table in tables.items()},
        render=read_clips,
        source="MELD.Raw, https://affective-meld.github.io",
        licence="GPL-3.0 by MELD's repository; text and sound are excerpts of the television series Friends",
        description="MELD: dialogues of several speakers out of the television series Friends, with an emotion an "
        "utterance"
        + (", without the sound." if text_only else ".")
        + (" Of what was there of the release: `faults` names what was not." if partial else ""),
        faults=faults,
    )


def _add_clips(tables: Mapping[str, "_Table"], places: Mapping[str, Path], partial: bool) -> list[Fault]:
    """Give every row its clip; the faults of folders, clips and other files. A folder may lack in a part of MELD."""
    faults, lacking = [], {}
    folders = {split: places[FOLDERS[split]] for split in tables if FOLDERS[split] in places}
    for split, table in tables.items():
        if split in folders:
            found, lacking[split] = table.add_clips(folders[split], partial)
            faults += found
        else:
            fault = f"no such folder: {len(table.rows)} utterances have no clip"
            faults.append(Fault(split, FOLDERS[split], fault, "kept without clips"))
    for split, folder in folders.items():
        others = {clip: other for other, clips in lacking.items() if other != split for clip in clips}
        faults += _strays(tables[split], folder, others)
    return faults


# ------------------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class _Known:
    kinds: dict[str, dict[str, str]]  # kind -> {"fault", "done"}
    known: dict[tuple[str, str], frozenset[str]]  # (split, clip) -> kinds
    strays: list[dict[str, str]]


@cache
def _known() -> _Known:
    content = yaml.safe_load(Path(__file__).with_name("meld_faults.yaml").read_text(encoding="utf-8"))
    known: dict[tuple[str, str], frozenset[str]] = {}
    for entry in content["known"]:
        place = entry["split"], entry["clip"]
        known[place] = known.get(place, frozenset()) | {entry["kind"]}
    return _Known(content["kinds"], known, content["strays"])


def _words(kind: str, known: frozenset[str], detail: str = "") -> tuple[str, str]:
    """`fault` and `done` of a fault of this kind, with whether it is news."""
    said = _known().kinds[kind]
    news = "known" if kind in known else "new"
    return f"{said['fault']}{': ' if detail else ''}{detail} ({news})", said["done"]


# ------------------------------------------------------------------------------------------------------------- tables


class _Table:
    """One split's rows, as they are to be built, and what is wrong with them."""

    def __init__(self, split: str, path: Path) -> None:
        self.split, self.path = split, path
        self.rows: dict[str, Row] = {}  # clip -> row, such as dia0_utt3
        self.faults: list[Fault] = []
        self.account = Counter[str]()  # rows: all that were read, those that are no utterance
        self._origins: dict[str, str] = {}
        self._broken = {"encoding": [0, 0], "lost": [0, 0]}  # characters, rows
        for origin, cells in csv_rows(path, _text(path)):
            self.account["read"] += 1
            self._add(origin, cells)
        for kind, (characters, rows) in self._broken.items():
            if characters:
                self._fault(kind, f"{characters} in {rows} rows")

    def _add(self, origin: str, cells: dict[str, str]) -> None:
        absent = [column for column in COLUMNS if column not in cells]
        if absent:
            raise UserError(
                f"{self.path}: no column {absent[0]!r}, so this is no CSV of MELD; take the one of MELD.Raw"
            )
        # Mended before they are stripped: Python takes U+0085, a misread ellipsis, for a space.
        text, speaker = self._mended(cells["Utterance"], cells["Speaker"])
        cells = {column: cell.strip() for column, cell in cells.items()}
        place = origin.removeprefix(f"{self.path} ")
        dialogue, turn, season, episode = (
            _whole(cells[column], column, origin) for column in ("Dialogue_ID", "Utterance_ID", "Season", "Episode")
        )
        clip = f"dia{dialogue}_utt{turn}"
        if cells["Emotion"] not in LABELS:
            raise UserError(f"{origin}: emotion {cells['Emotion']!r} is none of MELD's; take the CSV of MELD.Raw")
        start, end = (seconds_of(cells[column], origin) for column in ("StartTime", "EndTime"))
        if start is None or end is None:
            raise UserError(f"{origin}: no StartTime or no EndTime; take the CSV of MELD.Raw")
        if clip in self.rows:
            self.account["rows given twice"] += 1
            self._fault("row-twice", f"{clip}, {self._origins[clip]} and {place}", clip)
            return
        self._origins[clip] = place
        self.rows[clip] = Row(
            dialogue=f"{self.split}_dia{dialogue}",
            turn=turn,
            speaker=speaker,
            label=LABELS.index(cells["Emotion"]),
            text=text,
            clip=None,
            identity="",
            origin=origin,
            start=start,
            end=end,
            extra={"sentiment": cells["Sentiment"], "season": season, "episode": episode},
        )
        if end <= start:
            self._fault("no-duration", f"{cells['StartTime']} to {cells['EndTime']}, {place}", clip)
        elif end - start > MINUTES:
            self._fault("row-minutes", f"{end - start:.1f} s, {place}", clip)

    def _mended(self, *cells: str) -> list[str]:
        """Cells of one row, mended and stripped."""
        texts, mended = zip(*map(repair, cells), strict=True)
        for kind, characters in (("encoding", sum(mended)), ("lost", sum(text.count(LOST) for text in texts))):
            self._broken[kind][0] += characters
            self._broken[kind][1] += characters > 0
        return [text.strip() for text in texts]

    def _fault(self, kind: str, detail: str, clip: str | None = None) -> None:
        words = _words(kind, self.known(clip or ""), detail)
        utterance = (self.rows[clip].dialogue, self.rows[clip].turn) if clip else None
        self.faults.append(Fault(self.split, self.path.name, *words, utterance=utterance))

    def known(self, clip: str) -> frozenset[str]:
        """The kinds of faults that are known of a clip."""
        return _known().known.get((self.split, clip), frozenset())

    def counts(self) -> Counter[str]:
        """Utterances by label."""
        return Counter(LABELS[row.label] for row in self.rows.values() if row.label is not None)

    def dialogues(self) -> list[list[Row]]:
        """The rows by dialogue, in the table's order."""
        dialogues: dict[str, list[Row]] = {}
        for row in self.rows.values():
            dialogues.setdefault(row.dialogue, []).append(row)
        return list(dialogues.values())

    def add_clips(self, folder: Path, partial: bool) -> tuple[list[Fault], set[str]]:
        """Give every row the clip of its name in `folder`; the faults, and the clips that are not there."""
        files = {entry.name for entry in os.scandir(folder) if entry.is_file()}
        faults, lacking = [], set()
        for clip, row in self.rows.items():
            file, known = f"{FOLDERS[self.split]}/{clip}.mp4", self.known(clip)
            if f"{clip}.mp4" not in files:
                lacking.add(clip)
                faults.append(Fault(self.split, file, *_words("missing", known), utterance=(row.dialogue, row.turn)))
                continue
            assert row.start is not None
            assert row.end is not None
            seconds = row.end - row.start if row.end > row.start else None
            sound = Clip(folder.parent, file, seconds, known)
            self.rows[clip] = replace(row, clip=sound, identity=file, file=folder.parent / file)
        if len(lacking) > MOST_MISSING * len(self.rows) and not partial:
            raise UserError(
                f"{folder}: {len(lacking)} of the {len(self.rows)} clips that {self.path.name} lists are missing; "
                "unpack the archive again, or give --text-only, or --partial to build what is there"
            )
        return faults, lacking


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in data:
            raise UserError(f"{path}: not UTF-8 text; take the CSV of MELD.Raw") from None
        return data.decode("latin-1")  # of which `repair` makes what Windows-1252 meant


def _whole(cell: str, column: str, origin: str) -> int:
    if not (cell.isascii() and cell.isdigit() and len(cell) <= 9):
        raise UserError(f"{origin}: {column} {cell!r} is not a whole number; take the CSV of MELD.Raw")
    return int(cell)


def _differing_counts(
    tables: Mapping[str, _Table], published: Mapping[str, Mapping[str, int]], partial: bool
) -> list[Fault]:
    """Of a part of MELD: counts beside the published, where they differ. Of a whole one, UserError."""
    differing = []
    for split, table in tables.items():
        found, expected = table.counts(), published[split]
        if found != Counter(expected):
            labels = [f"{found[one]} {one} for {expected[one]}" for one in LABELS if found[one] != expected[one]]
            counts = f"{found.total()} utterances, MELD has {sum(expected.values())} ({', '.join(labels)})"
            differing.append(Fault(split, table.path.name, counts, "built as they are" if found else SPLIT_LEFT_OUT))
    if differing and not partial:
        lines = "; ".join(f"{tables[fault.split].path}: {fault.fault}" for fault in differing)
        raise UserError(
            f"{lines}: another release, or edited; take the CSVs of MELD.Raw, or build what is there with --partial"
        )
    return differing


def _strays(table: _Table, folder: Path, lacking_elsewhere: Mapping[str, str]) -> list[Fault]:
    """The files in a split's folder that are for none of its rows. `lacking_elsewhere`: clip -> split it is not in."""
    groups: dict[str, list[str]] = {}
    faults = []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_file()):
        match = CLIP_NAME.fullmatch(name)
        pattern = next((one["pattern"] for one in _known().strays if fnmatchcase(name, one["pattern"])), None)
        if match and match[1] in table.rows:
            continue
        if pattern is not None:
            groups.setdefault(pattern, []).append(name)
        elif match and match[1] in lacking_elsewhere:
            words = _words("wrong-split", frozenset(), lacking_elsewhere[match[1]])
            faults.append(Fault(table.split, f"{folder.name}/{name}", *words))
        else:
            faults.append(Fault(table.split, f"{folder.name}/{name}", *_words("stray", frozenset())))
    for stray in _known().strays:
        names = groups.get(stray["pattern"], [])
        if names:
            fault = f"{stray['fault']}: {len(names)}, the first {names[0]} (known)"
            faults.append(Fault(table.split, f"{folder.name}/{stray['pattern']}", fault, "left out"))
    return faults


# -------------------------------------------------------------------------------------------------------------- clips


def read_clips(rows: Sequence[Row]) -> Iterator[np.ndarray | ObservedClip | FaultyClip | None]:
    """Each row's sound, (S,) float32 at 16 kHz, checked against the row's times; None where it has no clip."""
    kinds: dict[type[MediaError], str] = {
        Undecodable: "undecodable",
        NoAudioTrack: "silent",
        EmptyAudio: "empty",
        Damaged: "damaged",
    }
    for row in rows:
        clip: Clip | None = row.clip
        if clip is None:
            yield None
            continue
        try:
            sound = read_media(clip.root / clip.file)
        except MediaError as error:
            yield FaultyClip(None, clip.file, *_words(kinds[type(error)], clip.known, str(error)))
            continue
        seconds, observed = sound.seconds, tuple(sound.observed())
        said = "no time" if clip.seconds is None else f"{clip.seconds:.2f} s"
        detail = f"{seconds:.2f} s, its row says {said}"
        if seconds > MINUTES:
            yield FaultyClip(None, clip.file, *_words("minutes", clip.known, detail))
        elif clip.seconds is not None and abs(seconds - clip.seconds) > TOLERANCE:
            yield FaultyClip(sound.waveform, clip.file, *_words("differs", clip.known, detail), observed=observed)
        else:
            yield ObservedClip(sound.waveform, observed) if observed else sound.waveform
