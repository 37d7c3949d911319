"""Where the tables and folders of MELD lie: in a folder, or in archives that are unpacked first."""

import os
from collections.abc import Sequence
from pathlib import Path

from jointfuse.data.corpora.unpack import is_archive, unpack
from jointfuse.errors import UserError
from jointfuse.files import write_text

TABLES = {split: f"{split}_sent_emo.csv" for split in ("train", "dev", "test")}
FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
DEEPEST, DEEPEST_UNPACKED = 3, 6  # folders below RAW, and below where archives are unpacked, that are looked through


def find_places(raw: Path, scratch: Path | None, text_only: bool, partial: bool) -> dict[str, Path]:
    """Name -> place of MELD's tables and folders, unpacked first if they must be.

    Args:
        partial: of those there are.

    Raises:
        UserError: one is missing, or there twice, or an archive cannot be unpacked.
    """
    wanted = [*TABLES.values(), *([] if text_only else FOLDERS.values())]
    if not raw.exists():
        raise UserError(f"{raw}: no such file or folder; give MELD.Raw.tar.gz or the folder MELD.Raw")
    places = _search(raw, wanted, DEEPEST) if raw.is_dir() else {}
    absent = [name for name in wanted if name not in places]
    archives = [raw] if raw.is_file() else sorted(path for path in raw.iterdir() if is_archive(path.name))
    archives = [path for path in archives if path.is_file() and is_archive(path.name)]
    if absent and archives:
        if scratch is None:
            raise UserError(f"{raw}: {absent[0]} is still in an archive; name a folder to unpack it into")
        endings = (".csv",) if text_only else (".csv", ".mp4")
        for archive in archives:
            _unpack_once(archive, scratch, endings)
        places = _search(scratch, wanted, DEEPEST_UNPACKED) | places
        absent = [name for name in wanted if name not in places]
    if not partial and absent:
        lacking = ", no ".join(absent if places else absent[:1])
        advice = "" if absent[0].endswith(".csv") else ", or --text-only"
        part = ", or --partial to build what is there" if any(table in places for table in TABLES.values()) else ""
        raise UserError(f"{raw}: holds no {lacking}; give MELD.Raw.tar.gz or the folder MELD.Raw{advice}{part}")
    return places


def _unpack_once(archive: Path, scratch: Path, endings: tuple[str, ...]) -> None:
    """Unless this very archive was unpacked before. What an unpacking of it left when it was killed stays."""
    stem, status = archive.name.split(".")[0], archive.stat()
    content = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {' '.join(endings)}\n"
    begun, done = (scratch / f"{stem}.{marker}" for marker in ("unpacking", "unpacked"))
    if _holds(done, content):
        return
    goes_on = _holds(begun, content)
    scratch.mkdir(parents=True, exist_ok=True)
    write_text(begun, content)
    unpack(archive, scratch / stem, endings, goes_on)
    write_text(done, content)
    begun.unlink()


def _holds(marker: Path, content: str) -> bool:
    return marker.is_file() and marker.read_bytes() == content.encode()


def _search(root: Path, wanted: Sequence[str], deepest: int) -> dict[str, Path]:
    """Name -> place of each of `wanted` under `root`, the one that is least deep."""
    places: dict[str, Path] = {}
    level = [root]
    for _ in range(deepest + 1):
        found: dict[str, Path] = {}
        below = []
        for folder in level:
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if entry.name in wanted and entry.is_dir() != entry.name.endswith(".csv"):
                    if entry.name in found and not _same_table(found[entry.name], Path(entry.path)):
                        raise UserError(
                            f"{root}: holds {found[entry.name]} and {entry.path}; give the folder of one of the two"
                        )
                    found.setdefault(entry.name, Path(entry.path))
                elif entry.is_dir() and not entry.name.startswith(".") and entry.name not in FOLDERS.values():
                    below.append(Path(entry.path))
        places = found | places
        level = below
        if all(name in places for name in wanted):
            break
    return places


def _same_table(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()
