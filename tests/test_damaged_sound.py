"""Sound files that are damaged, that cancel out, that clip, or that libsndfile does not read."""

import re
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import yaml
from corpus_helpers import build_here, run_tool, tone, write_clip, write_table

from jointfuse.data.clips import load_clip, read_clips, read_sound_clips
from jointfuse.data.corpora.descriptions import read_description
from jointfuse.data.corpora.files import files_corpus, unusable
from jointfuse.data.corpora.meld import Clip
from jointfuse.data.corpora.meld import read_clips as read_meld_clips
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.rows import FaultyClip, Row
from jointfuse.data.samples import decode_flac
from jointfuse.data.shards import Corpus
from jointfuse.data.sound import CANCELLED, CLIPPED, Damaged, MediaError, Undecodable, to_sound
from jointfuse.data.soundfiles import hear
from jointfuse.data.verify import verify
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
VOICE = (0.3 * np.sin(np.arange(48_000) / 9) * np.sin(np.arange(48_000) / 2000) ** 2).astype(np.float32)  # 3 s
# Of each codec FFmpeg can write here: file name, encoder, rate, bits a second.
MEDIA = [
    ("a.m4a", "aac", 16_000, 64_000),
    ("a.mp4", "aac", 44_100, 64_000),
    ("a.aac", "aac", 16_000, 64_000),
    ("a.webm", "libopus", 48_000, 64_000),
    ("a.mka", "flac", 16_000, None),
    ("a.wma", "wmav2", 44_100, 64_000),
    ("a.amr", "libopencore_amrnb", 8_000, 12_200),
    ("a.mp3", "libmp3lame", 16_000, 64_000),
    ("a.caf", "alac", 16_000, None),
]


def encode(
    path: Path, codec: str, rate: int, bits: int | None = None, sound: np.ndarray = VOICE, **options: str
) -> None:
    """`sound` (S,) float at 16 kHz as FFmpeg writes it, a second at a time; options are the muxer's and the codec's."""
    with av.open(str(path), "w", options=options) as container:
        track = container.add_stream(codec, rate=rate, layout="mono", options=options)
        if bits:
            track.bit_rate = bits
        to_codec = av.AudioResampler(track.codec_context.format.name, "mono", rate)
        for second in range(0, len(sound), 16_000):
            frame = av.AudioFrame.from_ndarray(sound[None, second : second + 16_000].astype(np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, second, Fraction(1, 16_000)
            for part in to_codec.resample(frame):
                container.mux(track.encode(part))
        for part in to_codec.resample(None):
            container.mux(track.encode(part))
        container.mux(track.encode(None))


def cut(path: Path, share: float = 0.25) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


# ------------------------------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.au", "a.w64", "a.rf64", "a.flac", "a.mp3"])
def test_a_file_that_was_cut_off_is_refused_with_the_seconds_promised_and_present(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, VOICE, 16_000)
    assert hear(tmp_path / name).seconds == pytest.approx(3, abs=0.1)
    assert unusable(cut(tmp_path / name, 0.5)) is None or name not in ("a.flac", "a.mp3")
    with pytest.raises(
        Damaged, match=r"is cut off or damaged: its header promises (3\.[01]|2\.9).* s, 1\.\d\d s can be"
    ):
        hear(tmp_path / name)


@pytest.mark.parametrize(("container", "codec"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("CAF", "PCM_16")])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_file_that_was_cut_off_without_a_length_in_its_header_is_refused_all_the_same(
    tmp_path: Path, container: str, codec: str, share: float
) -> None:
    path = tmp_path / "a.any"
    soundfile.write(path, np.tile(VOICE, 5), 16_000, format=container, subtype=codec)
    assert hear(path).seconds == pytest.approx(15, abs=0.1)
    with pytest.raises((Damaged, Undecodable), match=r"is cut off: after .* s it ends within a page|malformed"):
        hear(cut(path, share))


@pytest.mark.parametrize(("name", "codec", "rate", "bits"), MEDIA)
def test_what_libsndfile_does_not_read_goes_through_ffmpeg_and_is_refused_where_it_was_cut_off(
    tmp_path: Path, name: str, codec: str, rate: int, bits: int | None
) -> None:
    path = tmp_path / name
    encode(path, codec, rate, bits)
    assert unusable(path) is None
    waveform = load_clip(path)
    assert len(waveform) == pytest.approx(48_000, abs=1700)
    # Codecs move the sound by some milliseconds: the spectrum stays.
    assert np.argmax(np.abs(np.fft.rfft(waveform[:16_000]))) == pytest.approx(16_000 / 9 / 2 / np.pi, abs=3)
    with pytest.raises(MediaError):
        hear(cut(path, 0.6))


def test_frames_that_are_missing_are_counted_in_what_can_be_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", VOICE, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    frames = [match.start() for match in re.finditer(b"\xff\xf8", data)]
    (tmp_path / "a.flac").write_bytes(data[: frames[5]])  # of 4096 samples each
    with pytest.raises(Damaged, match=r"header promises 3\.00 s, 1\.2\d s can be read"):
        hear(tmp_path / "a.flac")
    soundfile.write(tmp_path / "a.ogg", np.tile(VOICE, 20), 16_000)
    data = (tmp_path / "a.ogg").read_bytes()
    pages = [match.start() for match in re.finditer(b"OggS", data)]
    (tmp_path / "a.ogg").write_bytes(data[: pages[4]] + data[pages[8] :])
    with pytest.raises(Damaged, match=r"header promises 60\.00 s, \d\d\.\d\d s can be read"):
        hear(tmp_path / "a.ogg")


def test_a_flac_with_a_tag_in_front_or_without_a_length_is_heard(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", VOICE, 16_000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    (tmp_path / "tag.flac").write_bytes(b"ID3\x04\0\0\0\0\x01\0TIT2" + bytes(124) + data)
    data[21] &= 0xF0  # the samples in all, 36 bits
    data[22:26] = bytes(4)
    (tmp_path / "stream.flac").write_bytes(data)
    for name in ("tag", "stream"):
        assert np.array_equal(load_clip(tmp_path / f"{name}.flac"), load_clip(tmp_path / "a.flac"))
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4  # 68 thousand million samples
    (tmp_path / "stream.flac").write_bytes(data)
    with pytest.raises(Damaged, match="header promises 4294967"):
        hear(tmp_path / "stream.flac")


def test_a_stream_of_unknown_length_is_no_cut_off_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", VOICE, 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    place = data.index(b"data") + 4
    for length in (0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 2 * len(VOICE) + 2):
        data[place : place + 4] = struct.pack("<I", length)
        (tmp_path / "a.wav").write_bytes(data)
        assert len(load_clip(tmp_path / "a.wav")) == len(VOICE)


def test_an_mp3_of_changing_bit_rate_without_a_length_is_heard_to_its_end(tmp_path: Path) -> None:
    loud = np.random.default_rng(0).uniform(-0.4, 0.4, 64_000)
    sound = np.concatenate([VOICE, loud, np.zeros(80_000)])
    encode(tmp_path / "a.mp3", "libmp3lame", 16_000, None, sound, write_xing="0", flags="+qscale", global_quality="472")
    assert soundfile.info(tmp_path / "a.mp3").frames != pytest.approx(len(sound), rel=0.2)  # an estimate
    assert len(load_clip(tmp_path / "a.mp3")) == pytest.approx(len(sound), abs=2500)


def test_an_mp3_whose_header_promises_millions_of_samples_is_refused(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp3", "libmp3lame", 16_000, 64_000, VOICE[:2000])
    data = bytearray((tmp_path / "a.mp3").read_bytes())
    place = max(data.find(b"Xing"), data.find(b"Info")) + 8
    data[place : place + 4] = struct.pack(">I", 15_400_000 // 576)
    (tmp_path / "a.mp3").write_bytes(data)
    with pytest.raises(Damaged, match=r"header promises 962\.\d\d s, 0\.\d\d s can be read"):
        hear(tmp_path / "a.mp3")


def test_one_sample_far_beyond_all_others_is_refused_and_a_loud_recording_scaled(tmp_path: Path) -> None:
    spike = VOICE.copy()
    spike[1000] = 500.0
    soundfile.write(tmp_path / "spike.wav", spike, 16_000, subtype="FLOAT")
    with pytest.raises(Damaged, match=r"has a peak of 500 where nearly all of its samples are below 0\.3"):
        load_clip(tmp_path / "spike.wav")
    for gain in (3.0, 10.0, 32768.0):
        soundfile.write(tmp_path / "loud.wav", gain * VOICE, 16_000, subtype="FLOAT")
        sound = hear(tmp_path / "loud.wav")
        expected = gain * VOICE / max(1, np.abs(gain * VOICE).max())
        np.testing.assert_allclose(sound.waveform, expected, atol=1e-6)
        assert not list(sound.observed())


# ------------------------------------------------------------------------------------------------------------ observed


def test_channels_that_cancel_each_other_are_not_silence_but_one_of_them(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([VOICE, -VOICE], axis=1), 16_000, subtype="FLOAT")
    sound = hear(tmp_path / "a.wav")
    assert np.array_equal(sound.waveform, VOICE)
    assert list(sound.observed()) == [(CANCELLED, "channel 1 is taken alone")]
    nearly = to_sound(np.stack([0.8 * VOICE, -VOICE, 0 * VOICE], axis=1), 16_000)
    assert np.array_equal(nearly.waveform, -VOICE)
    assert list(nearly.observed()) == [(CANCELLED, "channel 2 is taken alone")]
    random = np.random.default_rng(0).uniform(-0.5, 0.5, (16_000, 8)).astype(np.float32)
    for channels in (random, random[:, :2], np.stack([VOICE, 0 * VOICE], axis=1), np.zeros((9, 2), np.float32)):
        assert not list(to_sound(channels, 16_000).observed())
        np.testing.assert_allclose(to_sound(channels, 16_000).waveform, channels.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "ULAW", "FLOAT"])
def test_clipping_is_observed_where_it_was_recorded_before_channels_and_rate_are_changed(
    tmp_path: Path, subtype: str
) -> None:
    loud = np.clip(8 * VOICE, -1, 1)
    stereo = np.stack([loud, 0.1 * loud], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, 44_100, subtype=subtype)
    sound = hear(tmp_path / "a.wav")
    assert np.abs(sound.waveform).max() < 0.8
    ((kind, found),) = sound.observed()
    assert kind == CLIPPED
    assert float(found.partition("%")[0]) == pytest.approx(100 * (np.abs(loud) >= 0.999).mean(), abs=1.5)
    # A part is clipped where it is, not where its recording is.
    quiet = to_sound(np.concatenate([loud, VOICE])[:, None], 16_000)
    assert list(quiet.observed(0, 3))
    assert not list(quiet.observed(3.01, 6))


def test_what_a_build_observes_verify_lists_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"text {n}", "label": "xy"[n % 2], "audio": f"{n}.wav"} for n in range(4)]
    for number, row in enumerate(rows):
        write_clip(tmp_path / row["audio"], 0.3, pitch=200 + 40 * number)
    soundfile.write(tmp_path / "1.wav", np.clip(np.repeat(VOICE[:, None], 2, axis=1) * [6, 0.1], -1, 1), 44_100)
    soundfile.write(tmp_path / "2.wav", np.stack([VOICE, -VOICE], axis=1), 44_100)
    soundfile.write(tmp_path / "3.wav", np.clip(8 * VOICE, -1, 1), 16_000)  # both see it
    table, out = write_table(tmp_path / "train.csv", rows), tmp_path / "out"
    options = ("--train", table, "--out", out, "--workers", 1)
    status, printed, err = run_tool("build_shards", "table", *options, capsys=capsys)
    assert status == 0, err
    assert f"observed: {CLIPPED}: 2" in printed
    assert f"observed: {CANCELLED}: 1" in printed
    assert Corpus.open(out).info["observed"] == {CANCELLED: 1, CLIPPED: 2}
    report = verify(out, workers=1)
    assert not report.faults
    assert report.observations.counts == {CANCELLED: 1, CLIPPED: 2}
    assert "sample train_000002_000: channel 1 is taken alone" in report.observations.lines[CANCELLED][0]


# ---------------------------------------------------------------------------------------------------- in each builder


def test_a_table_names_the_row_of_a_damaged_clip_and_is_not_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": "a", "label": label, "audio": f"{label}.wav"} for label in "xy"]
    soundfile.write(tmp_path / "x.wav", VOICE, 16_000)
    shutil.copy(tmp_path / "x.wav", tmp_path / "y.wav")
    cut(tmp_path / "y.wav")
    options = ("--train", write_table(tmp_path / "train.csv", rows), "--out", tmp_path / "out", "--workers", 1)
    status, _, err = run_tool("build_shards", "table", *options, capsys=capsys)
    assert status == 2
    said = f"clip {tmp_path}/y.wav is cut off or damaged: its header promises 3.00 s, 0.75 s can be read; replace it"
    assert f"train.csv row 3: {said}" in err
    assert not (tmp_path / "out").exists()


def test_a_table_takes_any_format(tmp_path: Path) -> None:
    rows = []
    for number, (name, codec, rate, bits) in enumerate(MEDIA[:4]):
        encode(tmp_path / name, codec, rate, bits)
        rows.append({"text": name, "label": "xy"[number % 2], "audio": name})
    build_here(table_corpus([("train", write_table(tmp_path / "train.csv", rows))], "any"), tmp_path / "out")
    assert not verify(tmp_path / "out", workers=1).faults
    assert Corpus.open(tmp_path / "out").info["splits"]["train"]["seconds"] == pytest.approx(12, abs=0.4)


def test_files_leaves_damaged_clips_out_by_name_and_takes_any_format(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    for name in ("ann_ang.wav", "ann_joy.wav", "ann_sad.flac", "ann_fun.wav"):
        write_clip(clips / name, 1)
    for name in ("ann_joy.wav", "ann_sad.flac"):
        cut(clips / name, 0.5)
    encode(clips / "bob_ang.m4a", "aac", 16_000, 64_000)
    encode(clips / "bob_fun.amr", "libopencore_amrnb", 8_000, 12_200)
    (clips / "bob_joy.m4a").write_bytes(b"no sound at all" * 99)
    labels = dict(zip(("ang", "joy", "sad", "fun"), "wxyz", strict=True))
    description = tmp_path / "mine.yaml"
    description.write_text(
        yaml.safe_dump({"pattern": r"(?P<speaker>\w+)_(?P<label>[a-z]+)\.(wav|flac|m4a|amr)", "labels": labels})
    )
    build_here(files_corpus(clips, read_description(description), "mine"), tmp_path / "out")
    corpus = Corpus.open(tmp_path / "out")
    train = corpus.split("train")
    assert [train.sample(i).dialogue for i in range(len(train))] == ["ann_ang", "ann_fun", "bob_ang", "bob_fun"]
    assert {fault["file"]: fault["fault"].partition(":")[0] for fault in corpus.info["faults"]} == {
        "ann_joy.wav": "is cut off or damaged",  # seen in its header, before anything is built
        "ann_sad.flac": "is cut off or damaged",
        "bob_joy.m4a": "no sound that can be read",
    }
    assert all(fault["done"] == "left out" for fault in corpus.info["faults"])
    assert sum(rows["read"] for rows in corpus.info["rows"].values()) == 7
    assert sum(rows["utterances"] for rows in corpus.info["rows"].values()) == 4
    write_clip(clips / "ann_joy.wav", 1)
    soundfile.write(clips / "ann_joy.wav", np.full(9_000, np.nan, dtype=np.float32), 16_000, subtype="FLOAT")
    build_here(files_corpus(clips, read_description(description), "mine"), tmp_path / "again")
    rows = Corpus.open(tmp_path / "again").info["rows"]
    assert rows["train"] == {"read": 6, "utterances": 4, "damaged clips": 2}
    assert not verify(tmp_path / "out", workers=1).faults


def row_of(clip: object, identity: str) -> Row:
    return Row(dialogue="d", turn=0, speaker="s", label=0, text="t", clip=clip, identity=identity, origin="here")


def test_the_fault_of_a_clip_names_no_path_of_this_machine(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", VOICE, 16_000)
    cut(tmp_path / "a.flac")
    (fault,) = read_sound_clips([row_of(tmp_path / "a.flac", "Session1/a.flac")])
    assert isinstance(fault, FaultyClip)
    assert fault.kept == "nothing"
    assert fault.file == "Session1/a.flac"
    assert str(tmp_path) not in fault.fault
    (gone,) = read_sound_clips([row_of(tmp_path / "gone.wav", "Session1/gone.wav")])
    assert isinstance(gone, FaultyClip)
    assert gone.fault == "cannot be read (No such file or directory)"
    encode(tmp_path / "b.mka", "pcm_s16le", 16_000)
    cut(tmp_path / "b.mka", 0.6)
    (kept,) = read_meld_clips([row_of(Clip(tmp_path, "b.mka", 3.0, frozenset()), "b.mka")])
    assert isinstance(kept, FaultyClip)
    assert kept.kept == "utterance"
    assert kept.fault.startswith("the clip is damaged: is cut off or damaged: its header promises 3.00 s")


@pytest.mark.parametrize("read", [lambda path: list(read_clips([row_of(path, "a")])), lambda path: load_clip(path)])
def test_no_message_of_a_clip_names_an_object_or_a_number_of_an_error(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF\x10\0\0\0WAVEfmt ")
    (tmp_path / "a.raw").write_bytes(b"\x01\x02" * 500)
    shutil.copytree(tmp_path, tmp_path / "folder.wav")
    for name in ("a.wav", "a.raw", "folder.wav", "gone.wav"):
        with pytest.raises((UserError, MediaError, OSError)) as caught:
            read(tmp_path / name)
        if isinstance(caught.value, UserError):
            assert "object" not in str(caught.value)
            assert "Errno" not in str(caught.value)
            assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ValueError, match="its audio does not decode") as bad:
        decode_flac(b"no flac at all")
    assert "object" not in str(bad.value)


def test_a_tone_still_comes_through_as_it_was(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1), 16_000, subtype="FLOAT")
    assert np.array_equal(load_clip(tmp_path / "a.wav"), tone(1))
