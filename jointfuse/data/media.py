"""Sound out of media files: any container and codec FFmpeg knows."""

from pathlib import Path
from typing import Any

from jointfuse.data.sound import Damaged, EmptyAudio, NoAudioTrack, Sound, Undecodable, to_sound

SHORT = 0.5  # seconds by which a track may end before its container says so
XING_FLAG_FRAMES = 1


def read_media(path: Path) -> Sound:
    """The first audio track of a media file.

    One packet that does not decode condemns the whole file: with it left out, the rest would move in time.

    Raises:
        Undecodable, NoAudioTrack, EmptyAudio, Damaged: all of them MediaError.
        OSError: the file is not there or may not be read.
    """
    import av  # a tenth of a second, and corpora of text alone never need it

    if path.stat().st_size == 0:
        raise EmptyAudio("an empty file")
    rates = set()
    joined = av.AudioFifo()  # an array a frame takes longer to join than to decode
    try:
        with _opened(path) as container:
            promised = _promised(container, path)
            planes = av.AudioResampler(format="fltp")
            for frame in container.decode(container.streams.audio[0]):
                rates.add(frame.sample_rate)
                for part in planes.resample(frame):
                    part.pts = None  # some files' times leave gaps, which the fifo would refuse
                    joined.write(part)
    except av.FFmpegError as error:
        raise Undecodable(error.strerror or type(error).__name__) from error
    except (NoAudioTrack, Damaged):
        raise
    except ValueError as error:  # the resampler, of a frame unlike the first
        raise Undecodable("its rate or channels change within the track") from error
    heard = joined.read()
    if heard is None:
        raise EmptyAudio("no samples")
    rate = rates.pop()
    samples = heard.to_ndarray()  # (channels, S)
    seconds = samples.shape[1] / rate
    if promised is not None and seconds < promised - SHORT:
        raise Damaged(cut_off(promised, seconds))
    return to_sound(samples.T, rate)


def has_sound(path: Path) -> bool:
    """Does FFmpeg find an audio track in the file? Nothing is decoded."""
    import av

    try:
        with _opened(path):
            return True
    except (av.FFmpegError, NoAudioTrack):
        return False


def cut_off(promised: float, present: float) -> str:
    """What is said of a file that ends before its header says, in seconds."""
    return f"is cut off or damaged: its header promises {promised:.2f} s, {present:.2f} s can be read"


def _opened(path: Path) -> Any:
    """The container, with an audio track. Raises NoAudioTrack or FFmpegError."""
    import av

    # With the protocol named, no name of a file is taken for an address.
    container = av.open(f"file:{path}", metadata_errors="ignore")
    if not container.streams.audio:
        container.close()
        raise NoAudioTrack("no audio track")
    return container


def _promised(container: Any, path: Path) -> float | None:
    """The seconds that the file's header says, where it does: of others FFmpeg makes an estimate from the file's size.

    An MP4 that was cut off ends within a packet, which does not decode.
    """
    if container.format.name == "mp3":
        frames = _xing_frames(path)
        codec = container.streams.audio[0].codec_context
        return None if frames is None else frames * (1152 if codec.sample_rate >= 32_000 else 576) / codec.sample_rate
    if container.format.name == "matroska,webm" and len(container.streams) == 1 and container.duration is not None:
        return float(container.duration - max(0, container.start_time or 0)) / 1e6
    return None


def _xing_frames(path: Path) -> int | None:
    """The number of frames that the first frame of an MP3 file tells, if it tells one."""
    with path.open("rb") as file:
        head = file.read(10)
        tag = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(head[6:]))) if head[:3] == b"ID3" else 0
        file.seek(tag)
        first = file.read(2048)
    for name in (b"Xing", b"Info"):
        place = first.find(name)
        if place >= 0 and int.from_bytes(first[place + 4 : place + 8], "big") & XING_FLAG_FRAMES:
            return int.from_bytes(first[place + 8 : place + 12], "big")
    return None
