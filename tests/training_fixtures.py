"""A tiny corpus and recipe, and one training of it inside a rank, for the tests of the trainer."""

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from jointfuse.config import load_config
from jointfuse.data.build import build
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.shards import Corpus

LABELS = ("anger", "calm", "fear", "joy")
# With batches of 6 the last batch of an epoch holds one utterance and five fillers: of 2 or 3 ranks, all but one have
# nothing that counts. With batches of 8 it holds three.
SIZES = {"train": 43, "dev": 11, "test": 13}
FEAR = (4, 21)  # the utterances of each split, counted from 0, that are of the rare class
WORDS = {"anger": "no stop that", "calm": "all is well", "fear": "who is there", "joy": "what a day"}
PITCH = {"anger": 900.0, "calm": 150.0, "fear": 2500.0, "joy": 400.0}

RECIPE: dict[str, Any] = {
    "data": {"max_seconds": 1.5, "max_tokens": 12, "workers": 0},
    "model": {
        "text_encoder": {"scratch": {"width": 16, "layers": 1, "heads": 2, "vocabulary": 300}},
        "extractor": {"layers": 1, "heads": 2, "width": 24, "dropout": 0.0},
        "language": {"scratch": {"width": 16, "layers": 2, "heads": 2}},
        "vision": {
            "scratch": {"width": 32, "layers": 3, "heads": 2},
            "stem_layers": 1,
            "patch": [40, 16],
        },
        "blocks": 2,
    },
    "loss": {"temperature": 0.2, "train_temperature": True},
    "train": {
        "deepspeed": "zero2",
        "batch": 6,
        "steps": 20,
        "lr": 1.0e-3,
        "freeze": [],
        "evaluate_every": "100 steps",
        "save_every": "100 steps",
        "log_every": 1,
    },
}
DROPOUT = (
    "model.text_encoder.dropout=0.1",
    "model.extractor.dropout=0.1",
    "model.language.dropout=0.1",
    "model.vision.dropout=0.1",
    "model.dropout=0.1",
)


def make_corpus(folder: Path, gaps: bool = False) -> Path:
    """Texts and tones that give their class away, of 0.3 to 1.2 s, in dialogues of four turns.

    Args:
        gaps: two of three utterances have no clip, one of five no text, none lacks both.
    """
    rng = np.random.default_rng(0)
    (folder / "wav").mkdir(parents=True)
    tables = []
    for split, size in SIZES.items():
        rows = ["dialogue,turn,speaker,text,emotion,audio"]
        for number in range(size):
            common = [label for label in LABELS if label != "fear"]
            label = "fear" if number in FEAR else common[int(rng.integers(3))]
            seconds = rng.uniform(0.3, 1.2)
            time = np.arange(round(seconds * 16_000)) / 16_000
            clip = 0.3 * np.sin(2 * np.pi * PITCH[label] * time) + 0.05 * rng.standard_normal(len(time))
            name = f"wav/{split}{number}.wav"
            soundfile.write(folder / name, clip, 16_000)
            text = f"{WORDS[label]} {' '.join(rng.choice(['and', 'so', 'then'], int(rng.integers(1, 5))))}"
            no_clip, no_text = gaps and number % 3 > 0, gaps and number % 15 in (0, 6, 12)
            rows.append(
                f"{split}{number // 4},{number % 4},{'AB'[number % 2]},"
                f"{'' if no_text else text},{label},{'' if no_clip else name}"
            )
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        tables.append((split, folder / f"{split}.csv"))
    spec = table_corpus(tables, "tones", labels=LABELS, allow_missing=gaps)
    build(spec, folder / "corpus", workers=1, samples_per_shard=20)
    return folder / "corpus"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="session")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.yaml: text and audio of different widths, a stem and two blocks, dropout 0, trained temperature."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    tree = RECIPE | {"data": RECIPE["data"] | {"corpus": str(corpus)}}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def damage_a_clip(corpus: Path, id: int) -> str:
    """Overwrite the sound of one training utterance, none of its bytes moved; the utterance's key."""
    split = Corpus.open(corpus).split("train")
    entry = split.index[id]
    tar = split.shards[int(entry["shard"])]
    data = bytearray(tar.read_bytes())
    begin = data.index(b"fLaC", int(entry["offset"]), int(entry["offset"]) + int(entry["size"]))
    data[begin : begin + 64] = bytes(64)
    tar.write_bytes(data)
    return split.key(id)


def stage_file(stage: int, folder: Path) -> Path:
    """The shipped file of a ZeRO stage; stage 3 shards small parameters too, where its default would hide faults."""
    from jointfuse.train.deepspeed_file import deepspeed_file_path

    settings = json.loads(deepspeed_file_path(f"zero{stage}").read_text(encoding="utf-8"))
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"stage{stage}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def scores(labels: list[str], weighted_f1: float) -> dict[str, Any]:
    """What a score function may answer, for tests that say how well a model did."""
    return {"names": labels, "weighted_f1": weighted_f1, "accuracy": weighted_f1, "macro_f1": weighted_f1}


# ------------------------------------------------------------------------------------------- inside the spawned ranks


@dataclass
class Trained:
    """What a training left behind on this rank; weights and rows are empty on ranks other than 0."""

    position: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    weights: dict[str, np.ndarray]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> np.ndarray:
        """(steps, 3): loss, loss_erc, loss_icl; NaN for a step that the optimizer did not take"""
        rows = [row for row in self.rows if row["kind"] == "train"]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "one row a step, none twice"
        return np.array([[row["loss"], row["loss_erc"], row["loss_icl"]] for row in rows], dtype=float)

    @property
    def norms(self) -> np.ndarray:
        """(steps,) gradient norm: Adam and clipping hide a gradient's scale, this does not. Not kept at stage 0."""
        return np.array([row["gradient_norm"] for row in self.rows if row["kind"] == "train"], dtype=float)

    @property
    def dev(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "dev"]


class Stopped(Exception):
    """Raised where a test has a run die."""


@cache
def _trainer_class() -> Any:
    from jointfuse.train.loop import Trainer

    # DeepSpeed calls gc.collect() up to a hundred times an engine; over all these libraries each takes 0.1 s.
    gc.freeze()
    return Trainer


@contextmanager
def trainer(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> Iterator[Any]:
    """A Trainer; its engine is taken apart afterwards."""
    made = _trainer_class()(load_config(str(recipe), overrides), run, resume)
    try:
        yield made
    finally:
        made.engine.destroy()


def die_after(made: Any, stop_after: int | None) -> None:
    """Have a Trainer raise Stopped in the step behind `stop_after`; None lets it live."""
    step = made._step

    def step_or_die(*arguments: Any) -> None:
        if stop_after is not None and made.position.step > stop_after:
            raise Stopped
        step(*arguments)

    made._step = step_or_die


def train(recipe: Path, run: Path, *overrides: str, resume: bool = False, stop_after: int | None = None) -> Trained:
    """A whole training in this rank, or one that dies after the step `stop_after` without another word."""
    with trainer(recipe, run, *overrides, resume=resume) as made:
        die_after(made, stop_after)
        try:
            made.train()
        except Stopped:
            made.log and made.log.close()
        return outcome(made)


def outcome(made: Any) -> Trained:
    from jointfuse.train.engine import full_state

    weights = {name: tensor.float().numpy() for name, tensor in full_state(made.engine).items()}
    log = made.run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if made.rank == 0 else []
    return Trained(asdict(made.position), rows, weights)


def largest_difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Of two state dicts with the same names."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def moved(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict less its key biases, alone or as the first half of key_value.bias: softmax does not see them, their
    gradient is rounding, and Adam makes steps of whatever has a sign."""
    return {
        name: np.split(value, 2)[1] if name.endswith("key_value.bias") else value
        for name, value in weights.items()
        if not name.endswith("key.bias")
    }
