"""Files of a corpus, an exported model and a run, damaged in every way: they work still, or a person is told which."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch.distributed as dist
from damaged import write_run
from helpers import SIZES, build_corpus
from hypothesis import given
from hypothesis import strategies as st
from training_fixtures import RECIPE

from jointfuse.config import Config, load_config, validate
from jointfuse.data import verify as verifying
from jointfuse.data.columns import Weights
from jointfuse.data.mixture import Mixture
from jointfuse.data.shards import Corpus
from jointfuse.data.stats import corpus_stats
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.data.verify import verify
from jointfuse.errors import UserError
from jointfuse.evaluate.history import read_metrics
from jointfuse.model.export import load_model, save_model
from jointfuse.model.network import Network
from jointfuse.train.checkpoint import check_resumable
from jointfuse.train.run_folder import check_run_folder, read_status
from jointfuse.train.whole import agreed_checkpoint, latest_checkpoint

pytestmark = pytest.mark.required
DRAWS = int(os.environ.get("SOAK_FILES", "25"))  # of each test; tools/soak.sh files
drawn = hypothesis.settings(
    max_examples=DRAWS,
    derandomize="SOAK_FILES" not in os.environ,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
DEEP = "a list in a list, ten thousand times"
VALUES = [None, float("nan"), float("inf"), -1, 0, 1, 0.5, 2**32, 2**63, 10**30, -(10**30), 1e300, True, "", "x"]
VALUES += ["../x", "\0", "step-00000001", [], {}, [[]], [None], {"x": None}, DEEP]
Change = Callable[[bytes], bytes | None]  # None: the file is removed


# -------------------------------------------------------------------------------------------------------- what is there


@pytest.fixture(scope="module")
def config() -> Config:
    return validate(RECIPE | {"recipe": "tiny"}, "here")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict.fromkeys(SIZES, 6)
    return build_corpus(
        tmp_path_factory.mktemp("fuzz") / "corpus", gaps=("clip",), samples_per_shard=4, sizes=sizes
    ).path


@pytest.fixture(scope="module")
def model(corpus: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    opened = Corpus.open(corpus)
    tokenizer = train_tokenizer(opened.split("train"), 300)
    data = config.data
    network = Network(
        config.model, len(opened.labels), data.max_tokens, data.max_seconds, tokenizer_size=len(tokenizer)
    )
    folder = tmp_path_factory.mktemp("fuzz") / "best"
    save_model(folder, network.state_dict(), network, config, opened.labels, (0.0, 1.0), tokenizer, {"step": 1})
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("fuzz") / "run"
    write_run(run, config, corpus, (1, 2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield run
    dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------- how it breaks


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a tree of JSON."""
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(inner, (*place, key))


def changed(text: bytes, choose: Callable[[Any], Any]) -> bytes:
    """A tree of JSON with one value replaced, or gone."""
    tree = {"root": json.loads(text)}
    *way, last = choose(st.sampled_from(list(places(tree))[1:]))
    node: Any = tree
    for key in way:
        node = node[key]
    if choose(st.booleans()) and way:
        del node[last]
    else:
        node[last] = choose(st.sampled_from(VALUES))
    return json.dumps(tree["root"]).replace(json.dumps(DEEP), "[" * 10_000 + "]" * 10_000).encode()


def spoilt(data: bytes, choose: Callable[[Any], Any]) -> bytes | None:
    """Removed, cut, emptied, a byte flipped, or filled with something else."""
    way = choose(st.sampled_from(["removed", "cut", "flipped", "flipped", "zeros", "longer", "junk", "brackets"]))
    at = choose(st.integers(0, max(0, len(data) - 1)))
    flipped = data[:at] + bytes([data[at] ^ (1 << choose(st.integers(0, 7)))]) + data[at + 1 :] if data else b"x"
    return {
        "removed": None,
        "cut": data[:at],
        "flipped": flipped,
        "zeros": data[:at] + bytes(len(data) - at),
        "longer": data + data[:at],
        "junk": b"\xff\xfe" + data,
        "brackets": b"[" * 20_000,
    }[way]


def in_a_tar(data: bytes, choose: Callable[[Any], Any]) -> bytes:
    """The JSON of a tar's first sample changed, where it is no longer than before."""
    begin = data.index(b'{"')
    end = data.index(b"}", begin) + 1
    text = changed(data[begin:end], choose)
    return data[:begin] + text.ljust(end - begin) + data[end:] if len(text) <= end - begin else data[:begin]


@contextmanager
def damaged(path: Path, data: bytes | None) -> Iterator[None]:
    """A file with other content, or none, for a while."""
    whole = path.read_bytes()
    try:
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        yield
    finally:
        path.write_bytes(whole)


def draw_damage(files: list[Path], choose: Callable[[Any], Any]) -> tuple[Path, bytes | None]:
    path = choose(st.sampled_from(files))
    data = path.read_bytes()
    if path.suffix == ".json" and choose(st.booleans()):
        return path, changed(data, choose)
    if path.suffix == ".tar" and choose(st.booleans()):
        return path, in_a_tar(data, choose)
    return path, spoilt(data, choose)


def works_or_tells(root: Path, action: Callable[[], Any]) -> bool:
    """Whether an action worked; what it raises instead names a file under `root`, on one line, and a way out."""
    try:
        action()
    except UserError as error:
        assert_told(root, str(error))
        return False
    return True


def assert_told(root: Path, message: str) -> None:
    assert str(root) in message
    assert "; " in message, message
    assert_plain(message)


def assert_plain(message: str) -> None:
    assert "\n" not in message
    assert "[Errno" not in message
    assert " object at 0x" not in message
    assert len(message) < 2000


# --------------------------------------------------------------------------------------------------------- what is read


def read_all(corpus: Path) -> None:
    opened = Corpus.open(corpus)
    for name in opened.splits:
        split = opened.split(name)
        Weights(split, "class")[np.arange(len(split))]
        for id in range(len(split)):
            split.read_ahead([id])
            utterance = split.sample(id)
            assert utterance.label < len(opened.labels), "what reaches the loss"
            split.key(id)
            split.turns_before(id, 2)
            split.audio_bytes(id)


def mix_all(corpus: Path) -> None:
    opened = Mixture([(Corpus.open(corpus), None)], {"joy": "glad", "fear": None})
    for name in opened.splits:
        split = opened.split(name)
        for id in range(len(split)):
            assert split.sample(id).label < len(opened.labels)


def describe(corpus: Path) -> None:
    corpus_stats(Corpus.open(corpus))


@given(data=st.data())
@drawn
def test_a_damaged_corpus_is_read_or_its_file_is_named(corpus: Path, data: st.DataObject) -> None:
    files = sorted(path for path in corpus.rglob("*") if path.is_file())
    path, content = draw_damage(files, data.draw)
    another = content != path.read_bytes()
    with damaged(path, content), pytest.MonkeyPatch.context() as patch:
        for action in (read_all, mix_all, describe):
            works_or_tells(corpus, lambda action=action: action(corpus))
        patch.setattr(verifying, "processes", lambda *_: ThreadPoolExecutor(1))
        patch.setattr(verifying, "progress", lambda *_: nullcontext(lambda: None))
        faults: list[str] = []
        if works_or_tells(corpus, lambda: faults.extend(verify(corpus, workers=1).faults)):
            for fault in faults:
                assert str(corpus) in fault
                assert_plain(fault)
            assert faults or path.suffix == ".json" or not another, "every byte of tars and indices is looked at"


@given(data=st.data())
@drawn
def test_a_damaged_model_is_loaded_or_its_file_is_named(model: Path, data: st.DataObject) -> None:
    files = sorted(path for path in model.rglob("*") if path.is_file())
    path, content = draw_damage(files, data.draw)
    with damaged(path, content):
        works_or_tells(model, lambda: load_model(model))


@given(data=st.data())
@drawn
def test_a_damaged_run_goes_on_or_its_file_is_named(
    run: Path, corpus: Path, config: Config, data: st.DataObject
) -> None:
    files = sorted(path for path in run.rglob("*") if path.is_file())
    opened = Corpus.open(corpus)
    path, content = draw_damage(files, data.draw)

    def resume() -> None:
        check_run_folder(run, resume=True)
        check_resumable(found(latest_checkpoint(run)), config, 2, opened)
        checkpoint, told = agreed_checkpoint(run)
        for line in told:
            assert str(run) in line
            assert_plain(line)
        check_resumable(found(checkpoint), config, 2, opened)

    with damaged(path, content):
        for action in (resume, lambda: read_metrics(run)):
            works_or_tells(run, action)
        with suppress(UserError):  # a recipe like those that people write
            load_config(str(run / "config.yaml"))
        read_status(run)


def found(checkpoint: Path | None) -> Path:
    assert checkpoint is not None, "there are two"
    return checkpoint
