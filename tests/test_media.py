"""Sound out of media files."""

from pathlib import Path

import av
import numpy as np
import pytest
from meld_fixture import write_mp4

from jointfuse.data.media import read_media
from jointfuse.data.sound import EmptyAudio, NoAudioTrack, Undecodable, to_sound


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 2), (48_000, 1), (22_050, 2)])
def test_the_sound_of_a_film_is_heard_as_it_was_recorded(tmp_path: Path, rate: int, channels: int) -> None:
    time = np.arange(24_000) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * 440 * time)
    write_mp4(tmp_path / "a.mp4", wave, rate, channels)
    heard = read_media(tmp_path / "a.mp4").waveform
    assert heard.dtype == np.float32
    assert len(heard) == pytest.approx(24_000, abs=1100)
    assert np.abs(heard[2000:22_000] - wave[2000:22_000]).mean() < 0.03
    assert np.array_equal(heard, read_media(tmp_path / "a.mp4").waveform)


@pytest.mark.parametrize(("codec", "suffix"), [("aac", "mp4"), ("pcm_s16le", "mov"), ("flac", "flac")])
def test_the_sound_of_a_film_is_that_of_its_frames_one_after_the_other_whatever_their_times(
    tmp_path: Path, codec: str, suffix: str
) -> None:
    path = tmp_path / f"gap.{suffix}"
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, (2, 48_000))
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=16_000, layout="stereo")
        kind = track.codec_context.format.name
        for number, part in enumerate(np.split(noise, 3, axis=1)):
            planar = part.astype(np.float32) if kind == "fltp" else (part.T * 32767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(planar, kind, "stereo")
            frame.sample_rate, frame.pts = 16_000, 20_000 * number  # a gap of a quarter of a second
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    stereo = np.concatenate(frames, axis=1)
    if kind != "fltp":
        stereo = (stereo.reshape(-1, 2).T / 32768).astype(np.float32)
    assert np.array_equal(read_media(path).waveform, to_sound(stereo.T, 16_000).waveform)


def test_a_file_without_sound_says_which_kind_it_is(tmp_path: Path) -> None:
    write_mp4(tmp_path / "silent.mp4", None)
    write_mp4(tmp_path / "short.mp4", np.zeros(1))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello " * 200)
    whole = np.sin(np.arange(32_000) / 9)
    write_mp4(tmp_path / "damaged.mp4", whole)
    data = bytearray((tmp_path / "damaged.mp4").read_bytes())
    data[1500 : len(data) - 4000] = np.random.default_rng(0).bytes(len(data) - 5500)
    (tmp_path / "damaged.mp4").write_bytes(data)
    kinds = {"silent": NoAudioTrack, "empty": EmptyAudio, "text": Undecodable, "damaged": Undecodable}
    for name, kind in kinds.items():
        with pytest.raises(kind) as caught:
            read_media(tmp_path / f"{name}.mp4")
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(EmptyAudio):
        read_media(tmp_path / "short.mp4")
    with pytest.raises(FileNotFoundError):
        read_media(tmp_path / "nowhere.mp4")
