"""A small MELD.Raw in the original's form: spoken by espeak-ng, in real MP4 files, with each fault planted once."""

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
from scipy.signal import resample_poly

from jointfuse.data.corpora.meld import COLUMNS, FOLDERS, LABELS, TABLES
from jointfuse.data.corpora.spoken import Speech, speak
from jointfuse.data.parallel import processes
from jointfuse.data.rows import Row

# Dialogues of four turns. 110 (dev) and 125 (train) have a fault in the original too; dev's 50 is in no other split.
DIALOGUES = {"train": (*range(8), 125), "dev": (0, 1, 50, 110), "test": (0, 1, 2)}
FIRST_TURN = {"dev110": 4}  # so that its last turn is 7
SPEAKERS = ("Chandler", "Monica", "Richard’s Date")
SENTENCES = (
    "Oh my God, it’s you.",
    "Why would you do that?",
    "I know!",
    "Okay, well, that’s great…",
    "No. “Never” means no.",
)
SENTIMENTS = dict.fromkeys(LABELS, "negative") | {"joy": "positive", "neutral": "neutral", "surprise": "positive"}
TEXTS = {  # clip of test -> how its text stands in the table
    "dia0_utt0": "I don\x92t know\x85",
    "dia0_utt1": "It’s “over”, donâ€™t you see?",
    "dia0_utt2": "What�s that? Café, garçon — naïve.",
}
MENDED = {
    "dia0_utt0": "I don’t know…",
    "dia0_utt1": "It’s “over”, don’t you see?",
    "dia0_utt2": TEXTS["dia0_utt2"],
}


def write_mp4(
    path: Path, sound: np.ndarray | None, rate: int = 48_000, channels: int = 2, seconds: float = 1.0
) -> None:
    """H.264's ancestor and AAC: `sound` (S,) float at 16 kHz in every channel, or a film of so many seconds without."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=24)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        audio = None
        if sound is not None:
            audio = container.add_stream("aac", rate=rate, layout={1: "mono", 2: "stereo"}[channels])
            seconds = len(sound) / 16_000
        for number in range(math.ceil(24 * min(seconds, 2.0))):
            picture = np.full((32, 32, 3), 10 * number % 256, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None and sound is not None:
            common = math.gcd(rate, 16_000)
            wave = resample_poly(sound, rate // common, 16_000 // common).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.stack([wave] * channels), "fltp", audio.layout.name)
            frame.sample_rate, frame.pts = rate, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def clock(seconds: float) -> str:
    """As MELD writes times: 00:16:16,059."""
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"


def _speak() -> dict[tuple[str, str], np.ndarray]:
    """(sentence, label) -> (S,) float32 at 16 kHz."""
    pairs = [(sentence, label) for sentence in SENTENCES for label in LABELS]
    voices = {label: Speech("en", 20 + 10 * number, 50, 180, -22.0, 0.0) for number, label in enumerate(LABELS)}
    rows = [Row("", 0, "", 0, sentence, voices[label], "", "") for sentence, label in pairs]
    return {pair: wave for pair, wave in zip(pairs, speak(rows), strict=True) if isinstance(wave, np.ndarray)}


def make_meld(folder: Path) -> dict[str, dict[str, int]]:
    """Write MELD.Raw into `folder`; utterances by split and label, without the row that is there twice."""
    with processes(1) as fresh:  # espeak-ng starts once in a process
        spoken = fresh.submit(_speak).result()
    published = {}
    number = 0
    for split, dialogues in DIALOGUES.items():
        clips = folder / FOLDERS[split]
        clips.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for dialogue in dialogues:
            start = 60.0 * dialogue
            for place in range(4):
                turn = FIRST_TURN.get(f"{split}{dialogue}", 0) + place
                clip = f"dia{dialogue}_utt{turn}"
                text = TEXTS.get(clip, "") if split == "test" else ""
                label = LABELS[number * 3 % 7]
                sound = spoken[SENTENCES[number % 5], label]
                write_mp4(clips / f"{clip}.mp4", sound, (44_100, 48_000)[number % 2], 2 - number % 3 // 2)
                cells = (
                    text or SENTENCES[number % 5],
                    SPEAKERS[number % 3],
                    label,
                    SENTIMENTS[label],
                    dialogue,
                    turn,
                    number % 9 + 1,
                    number % 24 + 1,
                    clock(start),
                    clock(start + len(sound) / 16_000),
                )
                rows.append({"Sr No.": number + 1, **dict(zip(COLUMNS, cells, strict=True))})
                start += len(sound) / 16_000 + 0.2
                number += 1
        published[split] = {label: Counter(row["Emotion"] for row in rows)[label] for label in LABELS}
        _plant(split, clips, rows)
        write_table(folder / TABLES[split], rows)
    wrong = folder / FOLDERS["dev"] / "dia50_utt1.mp4"
    wrong.rename(folder / FOLDERS["train"] / wrong.name)
    return published


def _plant(split: str, clips: Path, rows: list[dict[str, Any]]) -> None:
    """Each fault once, where the tests seek it."""
    by_clip = {f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}": row for row in rows}
    if split == "train":
        whole = (clips / "dia0_utt1.mp4").read_bytes()
        (clips / "dia0_utt1.mp4").write_bytes(whole[: len(whole) // 2])
        (clips / "dia125_utt3.mp4").write_bytes(b"no film at all " * 100)
        write_mp4(clips / "dia1_utt0.mp4", None)
        write_mp4(clips / "dia2_utt2.mp4", np.sin(np.arange(61 * 16_000) / 20) / 4)
        (clips / "dia3_utt1.mp4").write_bytes(b"")
        rows.append(by_clip["dia4_utt0"] | {"Sr No.": 9000, "Emotion": "fear"})
        row = by_clip["dia5_utt1"]
        row["EndTime"] = clock(5 * 60 + 30)
        row["StartTime"] = clock(5 * 60 + 20)
        (clips / "dia900_utt0.mp4").write_bytes(whole)
        (clips / "notes.txt").write_text("by hand", encoding="utf-8")
    elif split == "dev":
        (clips / "dia110_utt7.mp4").unlink()
    else:
        by_clip["dia2_utt3"]["EndTime"] = by_clip["dia2_utt3"]["StartTime"]
        for name in ("final_videos_testdia0_utt0.mp4", "final_videos_testdia0_utt1.mp4"):
            (clips / name).write_bytes((clips / "dia0_utt0.mp4").read_bytes())
        (clips / "._dia0_utt0.mp4").write_bytes(b"\x00\x05\x16\x07")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
