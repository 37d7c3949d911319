"""`jointfuse compare` a second time into one folder: what counts as done, what is refused, what is trained anew."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_fixtures import LABELS, corpus, recipe, scores
from typer.testing import CliRunner

from jointfuse.cli import app
from jointfuse.config import load_config, with_overrides
from jointfuse.data.mixture import corpus_digest, open_data
from jointfuse.errors import ReadableError
from jointfuse.evaluate.run import Evaluation
from jointfuse.experiments import modalities
from jointfuse.files import write_json
from jointfuse.train.run_folder import FINISHED, RUNNING, create_run_folder, write_status

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
RUNS = ["text-seed0", "audio-seed0", "both-seed0"]


class Desk:
    """compare with trainings that leave a run folder and nothing else."""

    def __init__(self, recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipe, self.out = recipe, out
        self.trained: list[tuple[str, bool]] = []  # of the last command: run and whether it was resumed
        self.scored: list[tuple[str, Any]] = []
        self.status = FINISHED
        monkeypatch.setattr(modalities, "launch_training", self._train)
        monkeypatch.setattr(modalities, "evaluate_run", self._evaluate)

    def _train(self, recipe: str, overrides: list[str], run: Path, resume: bool, ranks: int, brief: bool) -> int:
        self.trained.append((run.name, resume))
        config = load_config(recipe, overrides)
        create_run_folder(run, config, ranks)
        (run / "best").mkdir(exist_ok=True)
        write_json(run / "best" / "model.json", {"info": {"corpus": corpus_digest(open_data(config.data))}})
        write_status(run, self.status)
        return 0 if self.status == FINISHED else 1

    def _evaluate(self, run: Path, split: str, *where: Any) -> Evaluation:
        self.scored.append((run.name, where))
        nothing = {"precision": 0.0, "recall": 0.0, "f1": 0.5, "support": 3}
        each = {"per_class": dict.fromkeys(LABELS, nothing), "confusion": [[0] * 4] * 4, "samples": 12}
        return Evaluation(scores(list(LABELS), 0.5) | each, run / "eval-test")

    def compare(self, *arguments: str) -> str:
        """What it says; of a refusal the message."""
        self.trained, self.scored = [], []
        command = ["compare", "--recipe", str(self.recipe), "--out", str(self.out), *arguments]
        answer = CliRunner().invoke(app, command)
        if isinstance(answer.exception, ReadableError):
            assert "\n" not in str(answer.exception)
            return str(answer.exception)
        assert answer.exit_code == 0, answer.output
        return answer.output


@pytest.fixture
def desk(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(recipe, tmp_path / "out", monkeypatch)
    desk.compare()
    assert desk.trained == [(name, False) for name in RUNS]
    return desk


def config_of(run: Path) -> dict[str, Any]:
    return load_config(str(run / "config.yaml")).model_dump()


def test_runs_of_these_settings_are_scored_again_and_not_trained(desk: Desk) -> None:
    for free in ("data.workers=1", "train.save_every=3 steps", "train.deepspeed=zero1", "train.keep_checkpoints=1"):
        desk.compare(free)
        assert desk.trained == []
        assert [name for name, _ in desk.scored] == RUNS


@pytest.mark.parametrize(
    ("setting", "old", "new"),
    [
        ("train.lr", 0.001, 0.5),
        ("train.steps", 20, 7),
        ("train.evaluate_every", "'100 steps'", "'5 steps'"),
        ("model.blocks", 2, 1),
        ("train.deepspeed", "'zero2'", "'zero2_bf16'"),
        ("data.labels", "{}", "{'fear': None}"),
    ],
)
def test_a_run_of_another_setting_is_refused_with_both_values_and_the_ways_out(
    desk: Desk, setting: str, old: Any, new: Any
) -> None:
    value = str(new).strip("'").replace("None", "null").replace("'", "")
    message = desk.compare(f"{setting}={value}")
    run = desk.out / "text-seed0"
    assert message.startswith(f"{run} was trained with {setting}")
    assert f"= {old}, where {new} is asked for" in message or setting == "data.labels"
    assert "(2 more runs likewise); add --retrain" in message
    assert "(the old run stays, as text-seed0.old-1), or choose another --out" in message
    assert desk.trained == desk.scored == []


def test_a_run_of_another_corpus_is_refused_wherever_that_corpus_lies(desk: Desk, corpus: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(corpus, tmp_path / "moved")
    desk.compare(f"data.corpus={moved}")
    assert desk.trained == []
    assert [where for _, where in desk.scored] == [(str(moved), [])] * 3
    remote = "pipe: cat {shard} # from there"
    desk.compare(f"data.corpus={moved}", f"data.remote={json.dumps(remote)}", f"data.cache={tmp_path / 'cache'}")
    _, (_, overrides) = desk.scored[0]
    assert with_overrides(load_config(str(desk.recipe)), overrides).data.remote == remote
    info = json.loads((moved / "corpus.json").read_text(encoding="utf-8"))
    (moved / "corpus.json").write_text(json.dumps(info | {"description": "another"}), encoding="utf-8")
    message = desk.compare(f"data.corpus={moved}")
    assert message.startswith(f"{desk.out / 'text-seed0'} was trained on another corpus than {moved} is now (2 more ")
    assert desk.trained == desk.scored == []


def test_retrain_trains_what_differs_and_keeps_the_old_runs(desk: Desk) -> None:
    kept = [path.read_bytes() for path in (desk.out / name / "config.yaml" for name in RUNS)]
    for times in (1, 2):
        said = desk.compare("--retrain", f"train.lr={times}")
        assert desk.trained == [(name, False) for name in RUNS]
        assert f"it is {desk.out / 'both-seed0'}.old-{times} now" in said
        assert config_of(desk.out / "both-seed0")["train"]["lr"] == times
    assert [(desk.out / f"{name}.old-1" / "config.yaml").read_bytes() for name in RUNS] == kept
    desk.compare("--retrain", "train.lr=2")
    assert desk.trained == []


def test_retrain_moves_nothing_when_the_new_run_cannot_start(desk: Desk) -> None:
    before = sorted(path.name for path in desk.out.iterdir())
    message = desk.compare("--retrain", "--ranks", "5", "train.lr=3")
    assert "train.batch" in message
    assert sorted(path.name for path in desk.out.iterdir()) == before


def test_an_interrupted_run_goes_on_only_with_its_settings(desk: Desk) -> None:
    shutil.rmtree(desk.out / "both-seed0")
    desk.status = RUNNING
    assert "both-seed0: training failed" in desk.compare()
    desk.status = FINISHED
    assert "(2 more runs likewise)" in desk.compare("train.lr=0.2"), "of which one is not finished"
    assert desk.trained == []
    desk.compare()
    assert desk.trained == [("both-seed0", True)]


def test_a_run_that_does_not_say_its_corpus_has_it_in_its_checkpoint(desk: Desk) -> None:
    run = desk.out / "audio-seed0"
    write_json(run / "best" / "model.json", {"info": {"step": 3}})
    checkpoint = run / "checkpoints" / "step-00000003"
    checkpoint.mkdir()
    (run / "checkpoints" / "latest").write_text("step-00000003\n", encoding="utf-8")
    write_json(checkpoint / "position.json", {"corpus": "0" * 64})
    assert "audio-seed0 was trained on another corpus" in desk.compare()
