"""Archives of a corpus, archives within them included, unpacked file by file."""

import errno
import lzma
import sys
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from jointfuse.errors import UserError

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".tar.bz2", ".tar.xz")


def is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES) and not PurePosixPath(name).name.startswith(".")


def unpack(archive: Path, folder: Path, endings: tuple[str, ...], goes_on: bool = False) -> None:
    """Unpack the files with these endings into `folder`, each under its own path in the archive.

    An archive in the archive is read where it is, its files going into a folder of its name. Links and devices are
    never made, and no name leads out of `folder`.

    Args:
        goes_on: what is in `folder` was left by an unpacking of this archive that was interrupted.

    Raises:
        UserError: the archive is damaged, holds a name that leads out of `folder`, or the disk is full.
    """
    try:
        with archive.open("rb") as file:
            _unpack(file, archive.name, folder, endings, goes_on)
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: {error}; do not trust this archive") from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{archive}: damaged or incomplete ({error}); download it again") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{folder}: {error.strerror}; make room and run the same command again") from error
        if error.errno is None:  # gzip and bz2, of what they cannot read
            raise UserError(f"{archive}: damaged or incomplete ({error}); download it again") from error
        raise


def _unpack(archive: IO[bytes], name: str, folder: Path, endings: tuple[str, ...], goes_on: bool) -> None:
    print(f"unpacking {name} into {folder}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    # As a stream: gigabytes of an archive in an archive are never written down, nor read twice.
    with tarfile.open(fileobj=archive, mode="r|*") as tar:
        for member in tar:
            if not member.isreg():
                continue
            member = tarfile.data_filter(member, str(folder))
            target = folder / member.name
            if is_archive(member.name):
                inner = tar.extractfile(member)
                assert inner is not None
                _unpack(inner, member.name, target.with_name(target.name.split(".")[0]), endings, goes_on)
            elif member.name.lower().endswith(endings) and not (
                goes_on and target.is_file() and target.stat().st_size == member.size
            ):
                tar.extract(member, folder, filter="data")
