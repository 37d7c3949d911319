"""data.on_error=skip: an utterance that cannot be read is left out as if it had never counted, and said so."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run_program, run_ranks
from helpers import reader_of
from torch.utils.data import get_worker_info
from training_fixtures import SIZES, Trained, corpus, damage_a_clip, largest_difference, moved, recipe, train

from jointfuse.data.augment import Augmentation
from jointfuse.data.plan import Plan, Planned
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream
from jointfuse.errors import UserError

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
DAMAGED = (2, 17, 30)
SETTINGS = ("train.batch=6", "train.steps=9", "data.most_skipped=0.2")
MICRO = {"at once": (), "in three parts": ("train.micro_batch=1",)}


@pytest.fixture(scope="module")
def damaged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The corpus with clips that do not decode, and their keys."""
    copied = Path(shutil.copytree(corpus, tmp_path_factory.mktemp("damaged") / "corpus"))
    return copied, [damage_a_clip(copied, id) for id in DAMAGED]


@contextmanager
def not_counting(ids: tuple[int, ...]) -> Iterator[None]:
    """Training in which these utterances are read, and never count."""
    from jointfuse.train.loop import Trainer

    batches, micro_batches = Plan.batches, Trainer._batches

    def marked(self: Plan, epoch: int, start: int = 0) -> Iterator[Planned]:
        for number, valid in batches(self, epoch, start):
            yield number, valid & ~np.isin(number, ids)

    def with_totals(self: Any) -> Iterator[Any]:
        totals = [int(valid.sum()) for _, valid in self.plan.batches(self.position.epoch, self.position.batch)]
        for total, (_, micro) in zip(totals, micro_batches(self), strict=True):
            yield total, micro

    Plan.batches, Trainer._batches = marked, with_totals  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plan.batches, Trainer._batches = batches, micro_batches  # type: ignore[method-assign]


def skipped_and_left_out(recipe: Path, damaged: Path, folder: Path) -> dict[str, Trained]:
    runs: dict[str, Trained] = {}
    for name, micro in MICRO.items():
        skip = ("data.on_error=skip", f"data.corpus={damaged}", "data.workers=1", *SETTINGS, *micro)
        runs[f"skipped {name}"] = train(recipe, folder / f"skipped {name}", *skip)
        with not_counting(DAMAGED):
            runs[f"left out {name}"] = train(recipe, folder / f"left out {name}", *SETTINGS, *micro)
    runs["plain"] = train(recipe, folder / "plain", *SETTINGS)
    return runs


@pytest.fixture(scope="module")
def runs(
    recipe: Path, damaged: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Trained], Path]:
    folder = tmp_path_factory.mktemp("skip")
    return run_ranks(2, skipped_and_left_out, folder / "ranks", recipe, damaged[0], folder)[0], folder


@pytest.mark.parametrize("micro", MICRO)
def test_what_is_skipped_has_no_part_in_any_loss_or_gradient(micro: str, runs: tuple[dict[str, Trained], Path]) -> None:
    skipped, left_out, plain = runs[0][f"skipped {micro}"], runs[0][f"left out {micro}"], runs[0]["plain"]
    assert skipped.losses.shape == (9, 3)
    assert np.abs(skipped.losses - left_out.losses).max() < 5e-6
    assert np.allclose(skipped.norms, left_out.norms, rtol=1e-4)
    assert largest_difference(moved(skipped.weights), moved(left_out.weights)) < 2e-5
    assert np.abs(skipped.losses - plain.losses).max() > 1e-3, "it would have made a difference"


def test_what_is_skipped_is_counted_and_named(
    runs: tuple[dict[str, Trained], Path], damaged: tuple[Path, list[str]]
) -> None:
    said = (runs[1] / "ranks" / "rank0.log").read_text(encoding="utf-8")
    for micro in MICRO:
        rows = [row for row in runs[0][f"skipped {micro}"].rows if row["kind"] == "train"]
        assert sum(row["skipped"] for row in rows if row["epoch"] == 0) == len(DAMAGED)
        lines = (runs[1] / f"skipped {micro}" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
        named = [json.loads(line) for line in lines]
        assert len(named) == sum(row["skipped"] for row in rows)
        for key in damaged[1]:
            assert any(key in one["why"] and "at byte" in one["why"] for one in named)
        line = f"epoch 1: 3 of {SIZES['train']} utterances could not be read and were skipped; "
        assert f"{line}{runs[1] / f'skipped {micro}' / 'skipped.jsonl'} names them" in said
    assert not (runs[1] / "plain" / "skipped.jsonl").exists()


def test_too_many_damaged_utterances_end_the_run_with_one_line(
    recipe: Path, damaged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "jointfuse.train", "--recipe", str(recipe), "--run", str(run)]
    settings = ["data.on_error=skip", "data.most_skipped=0.03", f"data.corpus={damaged[0]}", "train.epochs=2"]
    ended = run_program([*command, *settings, "train.steps=null"])
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"{len(DAMAGED)} of {SIZES['train']} utterances could not be read so far in epoch 1" in ended.stderr
    assert f"{run / 'skipped.jsonl'} names them" in ended.stderr


def test_a_batch_of_which_nothing_can_be_read_is_a_batch_that_does_not_count(damaged: tuple[Path, list[str]]) -> None:
    reader = reader_of(Corpus.open(damaged[0]), "both", on_error="skip")
    reader = reader.for_training(reader.augmentation)
    (batch,) = stream(reader, [(np.array(DAMAGED), np.array([True, True, False]))], 0)
    assert batch.ids.tolist() == list(DAMAGED)
    assert not batch.valid.any()
    assert len(batch.skipped) == 2, "a repeat was not to count"
    assert batch.frames.tolist() == [0, 0, 0]


def test_scores_are_never_of_fewer_utterances(damaged: tuple[Path, list[str]]) -> None:
    reader = reader_of(Corpus.open(damaged[0]), "both", on_error="skip")
    with pytest.raises(UserError, match=damaged[1][0]):
        list(stream(reader, [(np.array(DAMAGED), np.ones(3, dtype=bool))], 0))


class Killed(UtteranceReader):
    """Its first decoding process is killed at the third batch."""

    def batch(self, planned: Planned) -> Any:
        worker = get_worker_info()
        if worker and worker.id == 0 and 4 in planned[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(planned)


def test_a_killed_decoding_process_ends_the_stream_with_one_line(corpus: Path) -> None:
    reader = reader_of(Corpus.open(corpus), "both")
    reader.__class__ = Killed
    planned = [(np.array([id]), np.ones(1, dtype=bool)) for id in range(8)]
    with pytest.raises(
        UserError, match=r"a decoding process ended \(DataLoader worker .*\), .* fewer data.workers"
    ) as caught:
        list(stream(reader, planned, 2))
    assert "\n" not in str(caught.value)


def test_the_variants_of_other_clips_are_the_same_where_one_is_skipped(
    corpus: Path, damaged: tuple[Path, list[str]]
) -> None:
    from jointfuse.config import AugmentSettings

    variant = Augmentation(AugmentSettings(speed=0.1, noise=(10, 20), gain=6.0), seed=1, epoch=2)
    planned = (np.array([1, 2, 3]), np.ones(3, dtype=bool))
    whole, less = (
        reader_of(Corpus.open(path), "both", on_error="skip").for_training(variant).batch(planned)
        for path in (corpus, damaged[0])
    )
    for row in (0, 2):
        samples = 160 * int(whole.frames[row])
        assert whole.frames[row] == less.frames[row]
        assert torch.equal(whole.clips[row, :samples], less.clips[row, :samples])


def delete(tar: Path) -> None:
    tar.unlink()


def truncate(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size // 2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("fault", "why"), [(delete, "No such file or directory"), (truncate, r"ends \d+ bytes early")])
def test_a_shard_that_goes_bad_while_it_is_read_is_named_or_skipped_and_the_others_are_read_in_order(
    fault: Any, why: str, workers: int, corpus: Path, tmp_path: Path
) -> None:
    planned = [(np.array([id]), np.ones(1, dtype=bool)) for id in range(SIZES["train"])]
    for on_error in ("skip", "fail"):
        copied = Corpus.open(shutil.copytree(corpus, tmp_path / on_error))
        reader = reader_of(copied, "both", on_error=on_error)
        reader.split._handles.clear()  # the tokenizer has read all of it
        batches = stream(reader.for_training(reader.augmentation), planned, workers)
        first = next(batches)
        tar = reader.split.shards[1]
        fault(tar)
        if on_error == "fail":
            with pytest.raises(UserError, match=rf"{tar}: sample .* at byte \d+ cannot be read \(.*{why}"):
                list(batches)
            continue
        found = [first, *batches]
        assert [int(batch.ids) for batch in found] == list(range(SIZES["train"]))
        bad = [int(batch.ids) for batch in found if not batch.valid]
        assert set(range(30, 40)) <= set(bad) <= set(range(20, 40)), "the second shard, or its second half"
        assert all(str(tar) in why for batch in found for why in batch.skipped)
        assert sum(len(batch.skipped) for batch in found) == len(bad)
