"""The scores of a split, computed by scikit-learn over every class of the corpus."""

from dataclasses import dataclass

import numpy as np
from rich.table import Table
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from jointfuse.errors import UserError

HEADLINES = {"weighted_f1": "weighted F1", "accuracy": "accuracy", "macro_f1": "macro F1"}


@dataclass(frozen=True)
class Predictions:
    """What a model said about a whole split: index order, each sample once, no padding."""

    labels: np.ndarray  # (N,) int
    logits: np.ndarray  # (N, C) float32
    features: np.ndarray  # (N, D) float32, the fused features that the contrastive loss sees

    @property
    def predicted(self) -> np.ndarray:
        """(N,) the class with the largest logit."""
        return self.logits.argmax(axis=1)

    @property
    def probability_of_truth(self) -> np.ndarray:
        """(N,) float64, softmax probability of the true class; 0 where the logits are not finite."""
        finite = np.isfinite(self.logits).all(axis=1)
        logits = np.nan_to_num(self.logits.astype(np.float64), posinf=0.0, neginf=0.0)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        return np.where(finite, probabilities[np.arange(len(logits)), self.labels], 0.0)


def score(labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> dict:
    """Compare two (N,) integer arrays; every number in the answer is a fraction or a count in plain python.

    Keys: samples, names, accuracy, weighted_f1 (weighted by support), macro_f1, macro_f1_present, absent, per_class
    {name: precision, recall, f1, support}, confusion (C lists of C counts, rows are the truth). The order of the
    samples does not matter.

    A ratio with nothing below the line is 0. So a class that occurs neither in the labels nor in the predictions
    has F1 0: it does not touch the weighted F1 and it lowers the macro F1, which is always the mean over all C
    classes. That keeps macro F1 comparable between splits and seeds. `macro_f1_present` is the mean over the classes
    that the labels have, `absent` names the others.

    Raises UserError for an empty split and for a class number without a name.
    """
    if len(labels) == 0:
        raise UserError("there is nothing to score: the split has no samples; check `split` and the corpus's index")
    lowest, highest = min(labels.min(), predicted.min()), max(labels.max(), predicted.max())
    if lowest < 0 or highest >= len(names):
        raise UserError(
            f"class {lowest if lowest < 0 else highest} has no name: the corpus names {len(names)} classes; "
            "was the model trained on another corpus?"
        )
    classes = list(range(len(names)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, average=None, zero_division=0
    )
    return {
        "samples": len(labels),
        "names": list(names),
        "accuracy": float(accuracy_score(labels, predicted)),
        "weighted_f1": float(np.average(f1, weights=support)),
        "macro_f1": float(np.mean(f1)),
        "macro_f1_present": float(np.mean(f1[support > 0])),
        "absent": [name for name, held in zip(names, support, strict=True) if not held],
        "per_class": {
            name: {
                "precision": float(precision[c]),
                "recall": float(recall[c]),
                "f1": float(f1[c]),
                "support": int(support[c]),
            }
            for c, name in enumerate(names)
        },
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def percent(fraction: float) -> str:
    """Two decimals, as the field's tables print them."""
    return f"{100 * fraction:.2f}"


def score_table(score: dict) -> Table:
    """One row a class, in percent, and the averages below."""
    table = Table("class", title=f"{score['samples']:,} samples", title_justify="left")
    for heading in ("precision", "recall", "F1", "support"):
        table.add_column(heading, justify="right")
    for name in score["names"]:
        row = score["per_class"][name]
        table.add_row(name, *(percent(row[key]) for key in ("precision", "recall", "f1")), f"{row['support']:,}")
    table.add_section()
    for key, heading in HEADLINES.items():
        table.add_row(heading, "", "", percent(score[key]), f"{score['samples']:,}", style="bold")
    if score["absent"]:
        present = len(score["names"]) - len(score["absent"])
        heading = f"macro F1 of the {present} present"
        table.add_row(heading, "", "", percent(score["macro_f1_present"]), f"{score['samples']:,}", style="bold")
    return table


def summary_table(rows: dict[str, dict], mean: bool = False) -> Table:
    """Several scores side by side, in percent, one row each under its name.

    With `mean` (rows that differ in their seed only) a last row gives mean ± sample standard deviation.
    """
    table = Table("run")
    for heading in HEADLINES.values():
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(percent(row[key]) for key in HEADLINES))
    if mean and len(rows) > 1:
        table.add_section()
        columns = [np.array([row[key] for row in rows.values()]) for key in HEADLINES]
        cells = (f"{percent(column.mean())} ± {percent(column.std(ddof=1))}" for column in columns)
        table.add_row(f"mean of {len(rows)}", *cells, style="bold")
    return table
