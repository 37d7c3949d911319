"""Scores against numbers worked out by hand."""

import json

import numpy as np
import pytest
from rich.console import Console

from jointfuse.errors import UserError
from jointfuse.evaluate.metrics import Predictions, score, score_table, summary_table

NAMES = ["joy", "fear", "anger"]
# joy: 2 of 3 found, 1 false alarm. fear: 1 of 1 found, 1 false alarm. anger: 1 of 2 found, no false alarm.
LABELS = np.array([0, 0, 0, 1, 2, 2])
PREDICTED = np.array([0, 0, 1, 1, 2, 0])


def printed(table: object) -> str:
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_small_case_gives_the_numbers_worked_out_by_hand() -> None:
    result = score(LABELS, PREDICTED, NAMES)
    assert result["samples"] == 6
    assert result["names"] == NAMES
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["per_class"]["joy"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert result["per_class"]["fear"] == pytest.approx({"precision": 1 / 2, "recall": 1, "f1": 2 / 3, "support": 1})
    assert result["per_class"]["anger"] == pytest.approx({"precision": 1, "recall": 1 / 2, "f1": 2 / 3, "support": 2})
    assert result["weighted_f1"] == pytest.approx(2 / 3)
    assert result["macro_f1"] == pytest.approx(2 / 3)
    assert result["confusion"] == [[2, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_weighted_f1_weighs_by_support_and_macro_f1_does_not() -> None:
    # joy: precision 3/4, recall 1, F1 6/7; fear: nothing found, F1 0.
    result = score(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0]), ["joy", "fear"])
    assert result["weighted_f1"] == pytest.approx(3 / 4 * 6 / 7)
    assert result["macro_f1"] == pytest.approx(3 / 7)


def test_a_class_that_occurs_nowhere_counts_as_zero_in_macro_f1_only() -> None:
    result = score(np.array([0, 2]), np.array([0, 2]), NAMES)
    assert result["per_class"]["fear"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert result["weighted_f1"] == pytest.approx(1.0)
    assert result["macro_f1"] == pytest.approx(2 / 3)
    assert result["confusion"] == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_a_single_wrong_sample_scores_zero() -> None:
    result = score(np.array([1]), np.array([2]), NAMES)
    assert (result["accuracy"], result["weighted_f1"], result["macro_f1"]) == (0, 0, 0)
    assert result["confusion"][1] == [0, 0, 1]


def test_the_order_of_the_samples_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(len(LABELS))
    assert score(LABELS[order], PREDICTED[order], NAMES) == score(LABELS, PREDICTED, NAMES)


def test_every_number_is_plain_python_and_survives_json() -> None:
    result = score(LABELS, PREDICTED, NAMES)
    assert json.loads(json.dumps(result)) == result
    assert type(result["accuracy"]) is float
    assert type(result["per_class"]["joy"]["support"]) is int


def test_an_empty_split_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError, match="no samples"):
        score(np.array([], dtype=int), np.array([], dtype=int), NAMES)


@pytest.mark.parametrize(("labels", "predicted"), [([0, 3], [0, 0]), ([0, 0], [0, 3]), ([0, -1], [0, 0])])
def test_a_class_without_a_name_is_an_error(labels: list[int], predicted: list[int]) -> None:
    with pytest.raises(UserError, match="has no name"):
        score(np.array(labels), np.array(predicted), NAMES)


@pytest.mark.filterwarnings("error")
def test_the_probability_of_the_truth_is_the_softmax_and_zero_for_broken_logits() -> None:
    logits = np.array([[0, np.log(3)], [2000, -2000], [-2000, 2000], [np.nan, 0], [np.inf, 0]], dtype=np.float32)
    predictions = Predictions(np.array([1, 0, 0, 0, 0]), logits, np.zeros((5, 2), dtype=np.float32))
    assert predictions.probability_of_truth == pytest.approx([0.75, 1, 0, 0, 0])
    assert predictions.predicted[:3].tolist() == [1, 0, 1]


def test_the_tables_show_percent_and_the_spread_over_seeds() -> None:
    first, second = score(LABELS, PREDICTED, NAMES), score(LABELS, LABELS, NAMES)
    assert "66.67" in printed(score_table(first))
    assert all(name in printed(score_table(first)) for name in NAMES)
    assert "mean" not in printed(summary_table({"seed 1": first, "seed 2": second}))
    # Mean and sample deviation of 66.67 and 100.
    assert "83.33 ± 23.57" in printed(summary_table({"seed 1": first, "seed 2": second}, mean=True))
