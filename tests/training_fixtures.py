"""A tiny corpus and recipe, and one training of it inside a rank, for the tests of the trainer."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from jointfuse.config import load_config
from jointfuse.data.build import build
from jointfuse.data.corpora.table import table_corpus

LABELS = ("anger", "calm", "fear", "joy")
# With batches of 6 the last batch of an epoch holds one utterance and five fillers: of 2 or 3 ranks, all but one have
# nothing that counts. With batches of 8 it holds three.
SIZES = {"train": 43, "dev": 11, "test": 13}
FEAR = (4, 21)  # utterances of the rare class in train
WORDS = {"anger": "no stop that", "calm": "all is well", "fear": "who is there", "joy": "what a day"}
PITCH = {"anger": 900.0, "calm": 150.0, "fear": 2500.0, "joy": 400.0}

RECIPE: dict[str, Any] = {
    "data": {"max_seconds": 1.5, "max_tokens": 12, "workers": 0},
    "model": {
        "text_encoder": {"scratch": {"width": 16, "layers": 1, "heads": 2, "vocabulary": 300, "dropout": 0.0}},
        "extractor": {"layers": 1, "heads": 2, "width": 24, "dropout": 0.0},
        "language": {"scratch": {"width": 16, "layers": 3, "heads": 2, "dropout": 0.0}, "stem_layers": 1},
        "vision": {
            "scratch": {"width": 32, "layers": 3, "heads": 2, "dropout": 0.0},
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
        "lr": 2.0e-3,
        "freeze": [],
        "evaluate_every": "100 steps",
        "save_every": "100 steps",
    },
}
DROPOUT = [
    "model.text_encoder.scratch.dropout=0.1",
    "model.extractor.dropout=0.1",
    "model.language.scratch.dropout=0.1",
    "model.vision.scratch.dropout=0.1",
    "model.dropout=0.1",
]


def make_corpus(folder: Path) -> Path:
    """Texts and tones that give their class away, of 0.3 to 1.2 s, in dialogues of four turns."""
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
            rows.append(f"{split}{number // 4},{number % 4},{'AB'[number % 2]},{text},{label},{name}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        tables.append((split, folder / f"{split}.csv"))
    build(table_corpus(tables, "tones", labels=LABELS), folder / "corpus", workers=1, samples_per_shard=20)
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


# ------------------------------------------------------------------------------------------- inside the spawned ranks


@dataclass
class Trained:
    """What a training left behind on this rank; weights and rows are empty on ranks other than 0."""

    position: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    weights: dict[str, np.ndarray]
    temperature: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> np.ndarray:
        """(steps, 3): loss, loss_erc, loss_icl"""
        rows = [row for row in self.rows if row["kind"] == "train"]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return np.array([[row["loss"], row["loss_erc"], row["loss_icl"]] for row in rows])


class Stopped(Exception):
    """Raised by a test where a run is to die."""


@contextmanager
def trainer(recipe: Path, run: Path, *overrides: str, resume: bool = False) -> Iterator[Any]:
    """A Trainer that logs every step; its engine is taken apart afterwards."""
    from jointfuse.train.loop import Trainer

    made = Trainer(load_config(str(recipe), overrides), run, resume)
    made.log_every = 1
    try:
        yield made
    finally:
        made.engine.destroy()


def train(recipe: Path, run: Path, *overrides: str, resume: bool = False, stop_after: int | None = None) -> Trained:
    """A whole training in this rank, or one that dies after the step `stop_after` without another word."""
    with trainer(recipe, run, *overrides, resume=resume) as made:
        if stop_after is not None:
            _stop_after(made, stop_after)
        try:
            made.train()
        except Stopped:
            assert stop_after is not None
        return outcome(made)


def _stop_after(made: Any, step: int) -> None:
    display_of_step = made._step

    def step_or_stop(*arguments: Any) -> None:
        if made.position.step > step:
            raise Stopped
        display_of_step(*arguments)

    made._step = step_or_stop


def outcome(made: Any) -> Trained:
    from dataclasses import asdict

    from jointfuse.train.engine import full_state

    weights = {name: tensor.float().numpy() for name, tensor in full_state(made.engine).items()}
    log = made.run / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if made.rank == 0 else []
    return Trained(asdict(made.position), rows, weights)


def largest_difference(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], skip: tuple[str, ...] = ()
) -> float:
    """Of two state dicts with the same names; names that contain one of `skip` are left out."""
    assert one.keys() == other.keys()
    assert one, "there must be something to compare"
    kept = [name for name in one if not any(part in name for part in skip)]
    return max(float(np.abs(one[name] - other[name]).max()) for name in kept)
