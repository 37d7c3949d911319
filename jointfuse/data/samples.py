"""A sample in a tar: KEY.flac, KEY.json and KEY.txt, written from an utterance and parsed into one.

Nothing is unpickled, and no name inside a tar is used as a path.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from jointfuse.data.index import UNLABELLED
from jointfuse.data.mel import SAMPLE_RATE, MelSums
from jointfuse.data.records import Meta
from jointfuse.data.sound import reason
from jointfuse.files import parse_json, replacing


@dataclass(frozen=True)
class Utterance:
    """One turn of a dialogue.

    `waveform` is (S,) int16 at 16 kHz, or None without a clip; `text` is empty without a text; `label` is UNLABELLED
    without a label; `meta` is the sample's whole JSON member.
    """

    key: str
    text: str
    waveform: np.ndarray | None
    label: int
    speaker: str
    dialogue: str
    turn: int
    meta: dict[str, Any]


class _HashingFile:
    """A binary file that hashes what passes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)


_BLANK = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 156)  # in a header


def _header(name: str, size: int) -> bytes:
    """The tar header of a file of mode 644, without time and owner.

    tarfile's own bytes; made by it they take longer than hashing and writing what follows them.
    """
    if not name.isascii() or len(name) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    header = bytearray(_BLANK)
    header[_NAME] = name.encode().ljust(100, b"\0")
    header[_SIZE] = b"%011o" % size
    header[_CHECKSUM] = b"        "  # as which it counts in its own sum
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


def write_tar(path: Path, utterances: Iterable[Utterance], mel: MelSums | None = None) -> dict[str, Any]:
    """Write one tar and return its sidecar: {"sha256", "bytes", "samples": [...]}.

    The bytes depend on the utterances alone: members are sorted, times, owners and modes fixed. `mel` is
    given every clip of a labelled utterance.
    """
    samples = []
    with replacing(path) as file:
        tar = _HashingFile(file)
        for utterance in utterances:
            offset = tar.bytes
            members = {
                "txt": utterance.text.encode(),
                "json": json.dumps(utterance.meta, ensure_ascii=False, sort_keys=True).encode(),
            }
            duration = 0.0
            if utterance.waveform is not None:
                flac = io.BytesIO()
                soundfile.write(flac, utterance.waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                members["flac"] = flac.getvalue()
                duration = len(utterance.waveform) / SAMPLE_RATE
                if mel is not None and utterance.label != UNLABELLED:
                    mel.add(utterance.waveform)
            written = []
            for extension, content in sorted(members.items()):
                padding = bytes(-len(content) % tarfile.BLOCKSIZE)
                written += [_header(f"{utterance.key}.{extension}", len(content)), content, padding]
            tar.write(b"".join(written))
            samples.append(
                {
                    "key": utterance.key,
                    "offset": offset,
                    "size": tar.bytes - offset,
                    "duration": duration,
                    "characters": len(utterance.text),
                    "label": None if utterance.label == UNLABELLED else utterance.label,
                    "emotion": utterance.meta["emotion"],
                    "speaker": utterance.speaker,
                    "dialogue": utterance.dialogue,
                    "turn": utterance.turn,
                }
            )
        tar.write(bytes(2 * tarfile.BLOCKSIZE))
        tar.write(bytes(-tar.bytes % tarfile.RECORDSIZE))
    return {"sha256": tar.hash.hexdigest(), "bytes": tar.bytes, "samples": samples}


def decode_flac(data: bytes) -> np.ndarray:
    """FLAC bytes to (S,) int16. Raises ValueError unless they are a 16 kHz mono clip that is not empty."""
    try:
        waveform, rate = soundfile.read(io.BytesIO(data), dtype="int16")
    except soundfile.SoundFileError as error:
        raise ValueError(f"its audio does not decode ({reason(error)})") from error
    except MemoryError as error:
        raise ValueError("its audio does not decode (its header promises more than fits into memory)") from error
    if rate != SAMPLE_RATE or waveform.ndim != 1:
        raise ValueError(f"its audio is not {SAMPLE_RATE} Hz mono")
    if waveform.size == 0:
        raise ValueError("its audio is empty")
    return waveform


def members_of(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and {extension: content} of one sample's bytes. Raises ValueError."""
    keys, members = set(), {}
    try:
        for name, content in _plain_files(data) or _files(data):
            key, _, extension = name.partition(".")
            keys.add(key)
            members[extension] = content
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"not a piece of a tar: {error}") from error
    if len(keys) != 1:
        raise ValueError(f"its bytes hold {len(keys)} samples instead of one")
    return keys.pop(), members


def _plain_files(data: bytes) -> list[tuple[str, bytes]] | None:
    """(name, content) of each member, without the many things that tarfile looks after; None where that takes tarfile:
    a header that is not plain POSIX ustar, a name outside ASCII or of over 100 bytes."""
    files, begin = [], 0
    while begin < len(data):
        header = data[begin : begin + tarfile.BLOCKSIZE]
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = int(header[124:135], 8)
        except ValueError:
            return None
        begin += tarfile.BLOCKSIZE
        end = begin + size
        if len(header) < tarfile.BLOCKSIZE or header[156:157] != tarfile.REGTYPE or header[345] or end > len(data):
            return None
        files.append((name, data[begin:end]))
        begin = end + -size % tarfile.BLOCKSIZE
    return files


def _files(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                raise tarfile.ReadError(f"{member.name!r} is not a file")
            yield member.name, content.read()


def parse_utterance(data: bytes, audio: bool = True) -> Utterance:
    """One sample's bytes, tar headers included, decoded. Raises ValueError saying what is wrong with them."""
    key, members = members_of(data)
    clip = members.get("flac") if audio else None
    for needed in ("json", "txt"):
        if needed not in members:
            raise ValueError(f"'{needed}' is missing")
    try:
        meta = parse_json(members["json"], Meta)
    except ValueError as error:
        raise ValueError(f"its JSON is not as it should be: {error}") from error
    return Utterance(
        key=key,
        text=members["txt"].decode(),
        waveform=None if clip is None else decode_flac(clip),
        label=UNLABELLED if meta["label"] is None else meta["label"],
        speaker=meta["speaker"],
        dialogue=meta["dialogue"],
        turn=meta["turn"],
        meta=dict(meta),
    )
