"""What is wrong in a corpus is said with its file before it reaches a loss."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_helpers import run_tool, small_corpus

from jointfuse.data.columns import Weights
from jointfuse.data.index import INDEX_DTYPE, UNLABELLED
from jointfuse.data.mixture import Mixture
from jointfuse.data.samples import decode_flac
from jointfuse.data.shards import Corpus
from jointfuse.data.stats import corpus_stats
from jointfuse.errors import UserError

pytestmark = pytest.mark.required
Tree = dict[str, Any]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus() / "built", tmp_path / "corpus"))


def rewrite(path: Path, change: Callable[[Tree], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_index(path: Path, row: int, **columns: int) -> None:
    index = np.fromfile(path, INDEX_DTYPE)
    for name, value in columns.items():
        index[row][name] = value
    index.tofile(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i: i["labels"].pop(), "splits.train: label_counts is of anger, fear, joy, labels are anger, fear; "),
        (lambda i: i["labels"].append("joy"), "labels: one of the names is there twice; "),
        (lambda i: i.update(labels=[]), "labels: List should have at least 1 item"),
        (lambda i: i["mel"].update(mean=float("nan")), "mel.mean: Input should be a finite number; "),
        (lambda i: i["mel"].update(deviation=0), "mel.deviation: Input should be greater than 0; "),
        (lambda i: i["splits"]["dev"].update(samples=10**30), "splits.dev.samples: Input should be less than or equal"),
        (lambda i: i["splits"]["dev"].update(samples=5), "splits.dev: 5 samples, its shards have 6; "),
        (lambda i: i["splits"]["dev"]["label_counts"].update(joy=99), "splits.dev: label_counts add up to "),
        (lambda i: i["splits"]["dev"]["shards"][0].update(bytes=-1), "splits.dev.shards.0.bytes: Input should be"),
        (lambda i: i["splits"]["dev"]["shards"][0].update(sha256="00"), "splits.dev.shards.0.sha256: "),
        (lambda i: i["splits"].update({"../dev": i["splits"].pop("dev")}), "splits.../dev: '../dev' leads outside"),
        (lambda i: i.pop("speakers"), "speakers: Field required; "),
        (lambda i: i.update(splits={}), "splits: there is none; "),
    ],
)
def test_a_corpus_description_that_cannot_be_is_refused_with_its_place(
    copy: Path, change: Callable[[Tree], Any], says: str
) -> None:
    rewrite(copy / "corpus.json", change)
    with pytest.raises(UserError) as caught:
        Corpus.open(copy)
    assert str(caught.value).startswith(f"{copy / 'corpus.json'}: {says}")
    assert str(caught.value).endswith("; copy the corpus again or build it again")


def test_mel_statistics_without_a_training_split_are_nobodys(copy: Path) -> None:
    rewrite(copy / "corpus.json", lambda info: info["splits"].pop("train"))
    assert Mixture([(Corpus.open(copy), None)], {}).mel is None


def test_what_corpus_json_holds_besides_comes_back_as_it_is(copy: Path) -> None:
    rewrite(
        copy / "corpus.json", lambda info: info.update(rows={"read": 9}, mel={"mean": 0, "deviation": 1, "of": "x"})
    )
    rewrite(copy / "corpus.json", lambda info: info["splits"]["dev"].update(unlabelled=0, seconds=3))
    assert Corpus.open(copy).info == json.loads((copy / "corpus.json").read_text())
    assert json.dumps(Corpus.open(copy).info["mel"]["mean"]) == "0", "its digest is of what is on disk"
    rewrite(copy / "corpus.json", lambda info: info.update(mel=None))
    Corpus.open(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["samples"][0].update(size=10**30), "samples.0.size: Input should be less than"),
        (lambda s: s["samples"][1].update(offset=-1), "samples.1.offset: Input should be greater than or equal to 0"),
        (lambda s: s["samples"][1].update(offset=10**9), "samples.1: it ends at byte 10000"),
        (lambda s: s["samples"][2].update(turn=None), "samples.2.turn: Input should be a valid integer"),
        (lambda s: s["samples"][2].pop("key"), "samples.2.key: Field required"),
        (lambda s: s["samples"].pop(), "2 samples, corpus.json says 3"),
    ],
)
def test_a_sidecar_that_cannot_be_is_named_where_it_is_read_and_by_verify(
    copy: Path, change: Callable[[Tree], Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "dev" / "shard-000000.json"
    rewrite(path, change)
    with pytest.raises(UserError, match=r"; copy the corpus again or build it again$") as caught:
        Corpus.open(copy).split("dev").key(0)
    assert str(caught.value).startswith(f"{path}: {says}")
    status, out, _ = run_tool("verify_shards", copy, "--workers", 1, capsys=capsys)
    assert status == 1
    assert says in out


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": 3}, "entry 2: label 3 does not exist"),
        ({"shard": 9}, "entry 2: shard 9 does not exist"),
        ({"offset": 2**63 + 5}, f"entry 2: offset {2**63 + 5} does not exist"),
        ({"offset": 2**64 - 100, "size": 200}, f"entry 2: offset {2**64 - 100} does not exist"),
        ({"size": 2**32 - 1}, "entry 2: offset "),
    ],
)
def test_an_index_that_points_nowhere_is_named_by_whoever_reads_the_entry(
    copy: Path, columns: dict[str, int], says: str
) -> None:
    path = copy / "dev" / "index.bin"
    rewrite_index(path, 2, **columns)
    corpus = Corpus.open(copy)
    split = corpus.split("dev")
    assert split.sample(1).text, "others are read"
    readers: list[Callable[[], Any]] = [
        lambda: split.sample(2),
        lambda: Mixture([(corpus, None)], {"joy": "glad"}).split("dev"),
        lambda: corpus_stats(corpus),
    ]
    split.read_ahead([2])
    for reader in readers:
        with pytest.raises(UserError) as caught:
            reader()
        assert str(caught.value).startswith(f"{path}: {says}")
        assert str(caught.value).endswith("; copy the corpus again or build it again")


@pytest.mark.parametrize("more", [-512, -200, 1, 200, 346, 511, 512])
def test_an_index_that_ends_a_sample_elsewhere_is_named_or_changes_nothing(copy: Path, more: int) -> None:
    whole = Corpus.open(copy).split("train").sample(0)
    rewrite_index(copy / "train" / "index.bin", 0, size=int(Corpus.open(copy).split("train").index[0]["size"]) + more)
    message = ""
    try:
        sample = Corpus.open(copy).split("train").sample(0)
    except UserError as error:
        message = str(error)
    if message:
        assert "shard-000000.tar: sample" in message
    else:
        assert (sample.text, sample.meta) == (whole.text, whole.meta)
        assert np.array_equal(sample.waveform, whole.waveform)


@pytest.mark.parametrize("columns", [{"speaker": 10**9}, {"dialogue": 4 * 10**9}, {"shard": 1}])
def test_an_index_out_of_order_is_refused_before_it_is_counted(copy: Path, columns: dict[str, int]) -> None:
    rewrite_index(copy / "dev" / "index.bin", 2, **columns)
    with pytest.raises(UserError, match=r"dev/index\.bin: entry 2: "):
        corpus_stats(Corpus.open(copy))


def test_classes_are_balanced_by_labels_that_exist(copy: Path) -> None:
    rewrite_index(copy / "dev" / "index.bin", 2, label=3)
    rewrite_index(copy / "train" / "index.bin", 2, label=UNLABELLED)
    corpus = Corpus.open(copy)
    with pytest.raises(UserError, match=r"dev/index\.bin: label 3 of 3"):
        Weights(corpus.split("dev"), "class")[np.arange(6)]
    corpus.split("train").check_index()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"label": 1', b'"label": 2', "its label is 2, index.bin says 1"),
        (b'"label": 1', b'"label":99', "its label is 99, index.bin says 1"),
        (b'"turn": 2', b'"turn":[]', "its JSON is not as it should be: turn: Input should be a valid integer"),
        (b'"dialogue": "dev0"', b'"dialogue":   1234', "its JSON is not as it should be: dialogue: "),
        (b'"dialogue": "dev0"', b"[" * 18, "its JSON is not as it should be: Invalid JSON"),
    ],
)
def test_a_sample_whose_json_cannot_be_is_named(copy: Path, old: bytes, new: bytes, says: str) -> None:
    split = Corpus.open(copy).split("dev")
    entry, data = split.index[2], bytearray(split.shards[0].read_bytes())
    at = data.index(old, int(entry["offset"]))
    data[at : at + len(old)] = new
    split.shards[0].write_bytes(data)
    with pytest.raises(UserError) as caught:
        split.sample(2, audio=False)
    assert f"{split.shards[0]}: sample dev_dev0_002 at byte {entry['offset']} cannot be read ({says}" in str(
        caught.value
    )


def test_sound_that_does_not_decode_is_said_without_the_object_it_lies_in() -> None:
    with pytest.raises(ValueError, match="its audio does not decode") as caught:
        decode_flac(b"no sound")
    assert "object at" not in str(caught.value)
