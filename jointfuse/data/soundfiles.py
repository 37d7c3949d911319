"""Sound files of any format: libsndfile reads what it knows, FFmpeg the rest."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from jointfuse.data.media import cut_off, has_sound, read_media
from jointfuse.data.mel import INT16
from jointfuse.data.sound import FULL_SCALE, Damaged, EmptyAudio, Sound, Undecodable, reason, to_sound

BLOCK = 2**24  # samples that are read at once: a header may promise more than there is memory
MALFORMED = 3  # libsndfile's code for a file of a format it knows that is not as it should be
UNTOLD = 2**48  # frames: what libsndfile says of a file that does not tell its length is beyond
SHORT = 0.1  # seconds that may be missing of what a header promises
LOUDEST_SAMPLE = {  # by coding, where it is not that of 16 bits
    "PCM_S8": 127 / 128,
    "PCM_U8": 127 / 128,
    "ULAW": 32124 / INT16,
    "ALAW": 32256 / INT16,
}
FLOATS = ("FLOAT", "DOUBLE")
OGG_PAGE = 27 + 255 + 255 * 255  # bytes, at most
PROMISING = ("WAV", "WAVEX", "W64", "RF64", "AIFF", "AU")
# In libsndfile's notes on a file: bytes of sound that its header promises, and those that are there.
PROMISED = re.compile(r"^\s*(?:data|SSND|Data [Ss]ize)\s*: (\d+)(?: \(should be (\d+)\))?$", re.MULTILINE)


def hear(path: Path) -> Sound:
    """The sound of a file, whatever its format.

    Raises:
        Undecodable, NoAudioTrack, EmptyAudio, Damaged: all of them MediaError.
        OSError: the file is not there or may not be read.
    """
    with path.open("rb") as opened:  # by its descriptor: of some names soundfile guesses the format
        try:
            with soundfile.SoundFile(opened.fileno(), closefd=False) as file:
                if _known_length(file):
                    _check_end(file, opened)
                    return _read(file, opened)
        except soundfile.LibsndfileError as error:
            if error.code == MALFORMED:
                raise Undecodable(reason(error)) from error
    return read_media(path)


def header_fault(path: Path) -> str | None:
    """Why a sound file cannot be used, as far as its header says; None if it says nothing against it."""
    with path.open("rb") as opened:
        try:
            with soundfile.SoundFile(opened.fileno(), closefd=False) as file:
                if not _known_length(file):
                    return None
                if file.frames == 0:
                    return "0 samples"
                _check_end(file, opened)
                return None
        except soundfile.LibsndfileError as error:
            known = error.code == MALFORMED
        except Damaged as error:
            return str(error)
    return "no sound that can be read" if known or not has_sound(path) else None


def _known_length(file: soundfile.SoundFile) -> bool:
    """Of an MP3, libsndfile may only estimate the length, and then reads no further."""
    return file.format != "MP3" and file.frames < UNTOLD


def _read(file: soundfile.SoundFile, opened: BinaryIO) -> Sound:
    """Its sound. Raises MediaError."""
    promised = file.frames / file.samplerate
    block = BLOCK // file.channels
    parts, frames = [], 0
    try:
        while frames < file.frames:
            parts.append(file.read(block, dtype="float32", always_2d=True))
            frames += len(parts[-1])
            if len(parts[-1]) < block:
                break
    except soundfile.SoundFileError as error:
        raise Damaged(cut_off(promised, _seconds_that_decode(opened))) from error
    if not frames:
        raise EmptyAudio("0 samples")
    if frames < file.frames - SHORT * file.samplerate:
        raise Damaged(cut_off(promised, frames / file.samplerate))
    samples = parts[0] if len(parts) == 1 else np.concatenate(parts)
    full_scale = LOUDEST_SAMPLE.get(file.subtype, FULL_SCALE)
    return to_sound(samples, file.samplerate, full_scale, beyond=file.subtype in FLOATS)


def _seconds_that_decode(opened: BinaryIO) -> float:
    """Of a file that does not decode to its end: libsndfile gives nothing of a read that fails."""
    os.lseek(opened.fileno(), 0, os.SEEK_SET)
    frames, rate = 0, 1
    with suppress(soundfile.SoundFileError), soundfile.SoundFile(opened.fileno(), closefd=False) as file:
        rate = file.samplerate
        while part := len(file.read(rate // 100)):
            frames += part
    return frames / rate


def _check_end(file: soundfile.SoundFile, opened: BinaryIO) -> None:
    """Refuse a file that ends before its header says, or within a page. Raises Damaged.

    What is written into a pipe has a length of nearly 2 or 4 GiB in its header, which promises nothing.
    """
    seconds = file.frames / file.samplerate
    if file.format == "OGG" and _ends_within_page(opened):
        raise Damaged(f"is cut off: after {seconds:.2f} s it ends within a page")
    for told, there in PROMISED.findall(file.extra_info) if file.format in PROMISING else ():
        promised, present = int(told), int(there or os.fstat(opened.fileno()).st_size)
        unknown = any(limit - 2**16 <= promised <= limit for limit in (2**31, 2**32))
        if promised > present > 0 and not unknown and seconds * (promised / present - 1) > SHORT:
            raise Damaged(cut_off(seconds * promised / present, seconds))


def _ends_within_page(opened: BinaryIO) -> bool:
    """Does an Ogg file end before its last page does?"""
    size = os.fstat(opened.fileno()).st_size
    end = os.pread(opened.fileno(), OGG_PAGE, max(0, size - OGG_PAGE))  # where libsndfile reads on stays as it is
    page = end[end.rfind(b"OggS") :]
    lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
    return page[:4] == b"OggS" and (not lengths or len(page) < 27 + len(lengths) + sum(lengths))
