"""The report: nothing from outside, nothing that runs, the same bytes twice; and figures of degenerate runs."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jointfuse.evaluate.metrics import Predictions, score
from jointfuse.evaluate.pictures import comparison_figure, confusion_figure, curves_figure, feature_figure, project
from jointfuse.evaluate.pictures import to_svg as draw
from jointfuse.evaluate.report import Hard, hardest, write_comparison, write_report

NAMES = ["joy", "fear", "<b>anger</b>"]
ATTACK = '<script>alert("1")</script><img src=x onerror="alert(2)">'
HISTORY = [
    {"kind": "train", "step": 1, "epoch": 0, "loss": 2.0, "loss_erc": 1.0, "loss_icl": 1.0, "learning_rate": 1e-4},
    {"kind": "train", "step": 2, "epoch": 0, "loss": 1.5, "loss_erc": 0.8, "loss_icl": 0.7, "learning_rate": 1e-4},
    {"kind": "dev", "step": 2, "epoch": 0, "weighted_f1": 0.5, "accuracy": 0.6, "macro_f1": 0.4, "best": 0.5},
]
CORPUS = {"name": "demo", "split": "test", "description": "Friends & family.", "synthetic": True}


class Page(HTMLParser):
    """The tags, the addresses and the text that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def clip() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(1600) / 10), 16000, format="FLAC")
    return file.getvalue()


def predictions(samples: int = 12) -> Predictions:
    random = np.random.default_rng(0)
    labels = np.arange(samples) % 3
    logits = random.normal(size=(samples, 3)).astype(np.float32)
    return Predictions(labels, logits, random.normal(size=(samples, 8)).astype(np.float32))


def report(folder: Path, **changes: object) -> Path:
    said = predictions()
    hard = [
        Hard("dia1_utt0", ATTACK, "Ann & Bo", "1", 0, "joy", NAMES[2], 0.01, clip()),
        Hard("dia1_utt1", "half a surrogate: \ud83d", "Cy", "1", 1, "fear", "fear", 0.2, None),
    ]
    arguments: dict = {
        "title": f"Run {ATTACK}",
        "settings_yaml": f"name: {ATTACK}\n",
        "corpus": CORPUS,
        "score": score(said.labels, said.predicted, NAMES),
        "names": NAMES,
        "predictions": said,
        "history": HISTORY,
        "hard": hard,
    }
    return write_report(folder, **(arguments | changes))


def test_a_transcript_with_a_script_is_shown_and_does_not_run(tmp_path: Path) -> None:
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    assert page.text.count(ATTACK) == 4  # the window's title, the heading, the utterance, the settings
    assert "script" not in page.tags
    assert page.handlers == []
    assert NAMES[2] in page.text


def test_the_page_needs_nothing_from_outside_and_may_not_ask_for_it(tmp_path: Path) -> None:
    text = report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses
    assert all(re.match("data:(image/svg\\+xml|audio/flac);base64,", address) for address in page.addresses)
    assert "default-src 'none'" in text
    for outside in ("http://", "https://", 'src="//', "url(", "@import", "<link", "<iframe"):
        assert outside not in text


def test_the_figures_ask_for_nothing_either(tmp_path: Path) -> None:
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    pictures = [base64.b64decode(a.split(",")[1]).decode() for a in page.addresses if a.startswith("data:image")]
    assert len(pictures) == 3
    for svg in pictures:
        links = re.findall('(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith("#") for link in links)
        assert "<script" not in svg
        assert "<b>" not in svg


def test_the_clip_in_the_page_is_the_clip_that_was_given(tmp_path: Path) -> None:
    page = Page(report(tmp_path).read_text(encoding="utf-8"))
    clips = [base64.b64decode(a.split(",")[1]) for a in page.addresses if a.startswith("data:audio")]
    assert clips == [clip()]
    assert "no audio" in page.text


def test_the_same_arguments_write_the_same_bytes_and_leave_no_temporary_file(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        report(tmp_path / folder)
    names = ["confusion.png", "metrics.json", "report.html"]
    for folder in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_metrics_json_is_the_score_with_sorted_keys(tmp_path: Path) -> None:
    report(tmp_path)
    said = predictions()
    facts = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert facts == score(said.labels, said.predicted, NAMES)
    assert list(facts) == sorted(facts)


def test_a_synthetic_corpus_is_named_so_before_the_first_figure_and_a_real_one_is_not(tmp_path: Path) -> None:
    synthetic = Page(report(tmp_path).read_text(encoding="utf-8")).text
    assert synthetic.index("Synthetic corpus") < synthetic.index("Weighted F1")
    real = Page(report(tmp_path, corpus={"name": "meld"}).read_text(encoding="utf-8")).text
    assert "Synthetic" not in real


def test_the_commonest_class_alone_is_scored_as_scikit_learn_scores_it(tmp_path: Path) -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    said = Predictions(labels, np.eye(3, dtype=np.float32)[labels], np.zeros((8, 4), dtype=np.float32))
    text = Page(report(tmp_path, score=score(labels, labels, NAMES), predictions=said).read_text("utf-8")).text
    alone = score(labels, np.zeros_like(labels), NAMES)
    shown = re.findall(r"commonest class alone: ([\d.]+)", text)
    assert shown == [f"{100 * alone[key]:.1f}" for key in ("weighted_f1", "accuracy", "macro_f1")]


def test_a_report_without_history_or_hard_cases_is_still_whole(tmp_path: Path) -> None:
    page = Page(report(tmp_path, history=[], hard=[]).read_text(encoding="utf-8"))
    assert "Hardest" not in page.text
    assert "Settings of this run" in page.text


def test_the_hardest_come_first_and_equals_keep_their_order() -> None:
    logits = np.array([[0, 0], [5, 0], [0, 5], [0, 0]], dtype=np.float32)
    said = Predictions(np.zeros(4, dtype=int), logits, np.zeros((4, 2), dtype=np.float32))
    assert hardest(said, 3).tolist() == [2, 0, 3]
    assert hardest(said, 9).tolist() == [2, 0, 3, 1]


def test_a_comparison_links_reports_by_relative_addresses_and_marks_the_best(tmp_path: Path) -> None:
    said = predictions()
    rows = {
        "text only": score(said.labels, said.predicted, NAMES),
        "fused & <i>": score(said.labels, said.labels, NAMES),
    }
    reports = {"text only": tmp_path / "runs" / "text only" / "report.html"}
    path = write_comparison(tmp_path / "out", rows, NAMES, reports, "Both", ATTACK)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [a for a in page.addresses if not a.startswith("data:")] == ["../runs/text%20only/report.html"]
    assert "fused & <i>" in page.text
    assert "script" not in page.tags
    assert re.findall('"n best">([^<]*)', text) == ["100.00"] * 3
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "features",
    [
        np.zeros((0, 4)),
        np.ones((1, 4)),
        np.ones((2, 1)),
        np.ones((50, 4)),
        np.full((5, 4), np.nan),
        np.repeat(np.eye(4), 20, axis=0),
        np.arange(40.0)[:, None],
        1 + 1e-12 * np.random.default_rng(0).normal(size=(40, 4)),
    ],
    ids=["no sample", "one", "one number each", "all equal", "not finite", "four places", "a line", "nearly equal"],
)
def test_degenerate_features_are_drawn_without_a_warning(features: np.ndarray) -> None:
    labels = np.arange(len(features)) % 3
    assert draw(feature_figure(features.astype(np.float64), labels, NAMES)).startswith("<svg")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"kind": "train"}, {"kind": "dev", "step": 3}, {}],
        [{"kind": "train", "step": 1, "loss": float("nan"), "loss_erc": None}],
        [{"kind": "dev", "step": 1, "weighted_f1": 0.5}],
        [{"kind": "train", "step": step, "loss": 1 / (step + 1)} for step in range(1000)],
    ],
    ids=["empty", "keys missing", "not finite", "one point", "long"],
)
def test_curves_of_incomplete_histories_are_drawn_without_a_warning(history: list[dict]) -> None:
    assert draw(curves_figure(history)).startswith("<svg")


def test_the_curves_mark_the_model_that_was_chosen_and_a_resumed_step_counts_once() -> None:
    scores = [(10, 0.9, 0.9), (10, 0.4, 0.4), (20, 0.6, 0.6), (30, 0.7, None)]  # by another score than the one drawn
    rows = [{"kind": "dev", "step": step, "weighted_f1": f1, "best": best} for step, f1, best in scores]
    assert "chosen: 60.0 at step 20" in draw(curves_figure(rows))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 4, 11])
def test_a_confusion_matrix_and_a_comparison_are_drawn_for_any_number_of_classes(classes: int) -> None:
    names = [f"class ${c}$" for c in range(classes)]
    result = score(np.zeros(3, dtype=int), np.full(3, classes - 1), names)
    assert all(name in draw(confusion_figure(result, names)) for name in names)
    assert draw(comparison_figure({"one": result, "two": result}, names)).startswith("<svg")


def test_the_plane_is_repeatable_and_keeps_separate_clusters_apart() -> None:
    labels = np.arange(60) % 2
    features = np.random.default_rng(0).normal(size=(60, 80)) + 20 * labels[:, None]
    plane, method = project(features)
    assert method == "t-SNE"
    assert (project(features)[0] == plane).all()
    centres = np.stack([plane[labels == c].mean(axis=0) for c in (0, 1)])
    nearest = np.linalg.norm(plane[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == labels).all()


def test_a_feature_plot_of_a_large_split_draws_a_sample_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jointfuse.evaluate.pictures.SHOWN", 20)
    features = np.random.default_rng(0).normal(size=(100, 4))
    assert "PCA, 20 of 100 samples" in draw(feature_figure(features, np.zeros(100, dtype=int), NAMES))
