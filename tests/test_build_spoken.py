import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import hashes, run_tool

from jointfuse.data.build import build
from jointfuse.data.corpora.spoken import EMOTIONS, VOICES, spoken_corpus
from jointfuse.data.shards import Corpus
from jointfuse.data.verify import verify


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spoken") / "demo"
    build(spoken_corpus("demo", dialogues=3), out, workers=2, samples_per_shard=12)
    return out


def test_the_corpus_says_that_it_is_synthetic_and_how_emotion_is_made(built: Path) -> None:
    corpus = Corpus.open(built)
    assert corpus.info["synthetic"] is True
    assert corpus.labels == ["neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear"]
    assert corpus.info["description"].startswith("Synthetic")
    assert "fear = plain words + lowered voice" in corpus.info["description"]
    assert not verify(built, workers=1).faults


def test_a_resumed_build_speaks_the_same_samples(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(built, out)
    (out / "corpus.json").unlink()
    # espeak-ng's output depends on what its process spoke before: the second shard must not need the first.
    (out / "train" / "shard-000001.json").unlink()
    build(spoken_corpus("demo", dialogues=3), out, workers=1, samples_per_shard=12)
    assert hashes(out) == hashes(built)


def test_voices_that_breathe_noise_speak_the_same_samples_in_every_process() -> None:
    # espeak-ng seeds the noise by the clock, in whole seconds.
    code = (
        "import hashlib; from jointfuse.data.corpora.spoken import Speech, _Espeak; "
        "sound = _Espeak()('The new map.', Speech('en+f2', 50, 50, 175, -20.0, 0.0)); "
        "print(hashlib.sha256(sound.tobytes()).hexdigest())"
    )
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first = run().stdout
    time.sleep(1.1)
    assert run().stdout == first


def test_speech_is_short_and_its_level_is_the_manner_s(built: Path) -> None:
    split = Corpus.open(built).split("train")
    levels: dict[str, list[float]] = {voice: [] for voice in VOICES}
    for i in range(len(split)):
        utterance = split.sample(i)
        assert utterance.waveform is not None
        assert 0.3 < len(utterance.waveform) / 16_000 < 5
        assert len(utterance.text.split()) <= 12
        levels[utterance.meta["voice"]].append(20 * np.log10(utterance.waveform.std()))
    assert np.mean(levels["raised"]) > np.mean(levels["level"]) + 3


def test_words_and_voice_together_name_the_emotion_and_neither_does_alone() -> None:
    pairs = [(words, voice) for _, words, voice in EMOTIONS.values()]
    assert len(set(pairs)) == len(pairs)
    for part in (0, 1):
        shared = Counter(pair[part] for pair in pairs)
        assert sum(count > 1 for count in shared.values()) >= 2
    rows = list(itertools.chain(*spoken_corpus("demo").splits["train"]))
    for row in rows:
        _, words, voice = EMOTIONS[list(EMOTIONS)[row.label]]
        assert (row.extra["words"], row.extra["voice"]) == (words, voice)


def test_the_default_corpus_has_meld_s_imbalance_and_mostly_new_sentences_in_dev_and_test() -> None:
    splits = {name: list(itertools.chain(*content)) for name, content in spoken_corpus("demo").splits.items()}
    assert 1900 < len(splits["train"]) < 2100
    assert 300 < len(splits["dev"]) < 400
    assert 450 < len(splits["test"]) < 550
    counts = Counter(row.label for row in splits["train"])
    for label, (share, _, _) in enumerate(EMOTIONS.values()):
        assert counts[label] / len(splits["train"]) == pytest.approx(share, abs=0.03)
    known = {row.text for row in splits["train"]}
    vocabulary = {word for text in known for word in text.lower().split()}
    for name in ("dev", "test"):
        assert np.mean([row.text not in known for row in splits[name]]) > 0.9
        words = [word for row in splits[name] for word in row.text.lower().split()]
        assert np.mean([word in vocabulary for word in words]) > 0.99


def test_no_voice_is_heard_in_two_splits() -> None:
    splits = spoken_corpus("demo").splits
    variants = {
        name: {row.clip.voice.partition("+")[2] for dialogue in content for row in dialogue}
        for name, content in splits.items()
    }
    for one, other in itertools.combinations(variants.values(), 2):
        assert not one & other


def test_every_voice_of_the_script_exists() -> None:
    import espeakng_loader

    from jointfuse.data.corpora.spoken import _script

    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    voices = [voice for speakers in _script()["voices"].values() for voice in speakers.values()]
    assert len(set(voices)) == len(voices)
    assert all((folder / voice.partition("+")[2]).is_file() for voice in voices)


def test_dialogues_alternate_between_two_or_three_speakers() -> None:
    for dialogue in spoken_corpus("demo", dialogues=50).splits["train"]:
        assert 4 <= len(dialogue) <= 10
        assert 2 <= len({row.speaker for row in dialogue}) <= 3
        assert all(one.speaker != other.speaker for one, other in itertools.pairwise(dialogue))


def test_a_larger_corpus_begins_with_the_smaller_and_another_seed_is_another() -> None:
    small, large = (spoken_corpus("demo", dialogues=n).splits["train"] for n in (2, 5))
    assert large[:2] == small
    assert spoken_corpus("demo", dialogues=2, seed=1).splits["train"] != small


def test_without_espeak_the_way_to_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", _all_but("espeakng_loader", importlib.util.find_spec))
    status, _, err = run_tool("build_shards", "spoken", "--out", tmp_path / "out", capsys=capsys)
    assert status == 2
    assert err == "error: the spoken corpus needs espeak-ng: pip install 'jointfuse[demo]'\n"
    assert not (tmp_path / "out").exists()


def _all_but(missing: str, find: object) -> object:
    return lambda name, *rest: None if name == missing else find(name, *rest)  # type: ignore[operator]


def test_the_meta_of_a_sample_is_plain_json(built: Path) -> None:
    utterance = Corpus.open(built).split("dev").sample(0)
    assert json.loads(json.dumps(utterance.meta)) == utterance.meta
    assert utterance.meta["start"] is None
