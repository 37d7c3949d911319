"""Figures of an evaluation. A class keeps its colour and its marker in all of them, on screen and in grey print."""

import io
import math
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from jointfuse.files import replacing

# Okabe and Ito's colours without the two that vanish on white or on black, then mid-tones that differ in lightness.
PALETTE = [
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#8a8a8a",
    "#8f5bd6",
    "#b8a929",
    "#a0522d",
    "#2fb5a5",
]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]

# to_svg finds this very colour again and turns it into the page's text colour.
INK = "#1b2431"
MUTED = "#76808f"
CELL = "#0a56ad"

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": MUTED,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "jointfuse",
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$"
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
SHOWN = 2000  # points of a feature plot: more take minutes and show less
CURVE = 150  # points of a line

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under STYLE and leave matplotlib's own settings as they were."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@styled
def confusion_figure(score: dict, names: list[str]) -> Figure:
    """Counts of (true, predicted) pairs; the colour is the share of the true class's samples, i.e. of the row."""
    counts = np.asarray(score["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(names)
    side = max(3.0, 0.64 * size)
    figure = canvas(side + 1.3, side + 1.0)
    axes = figure.add_subplot()
    for (row, column), share in np.ndenumerate(shares):
        axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, color=CELL, alpha=0.05 + 0.95 * share, lw=0))
        # Readable on a light and on a dark page: only cells this full are dark on both.
        ink = "#ffffff" if share > 0.7 else INK
        count = counts[row, column]
        axes.text(column, row - 0.09, f"{count:,}", ha="center", va="center", color=ink, alpha=1 if count else 0.45)
        if count:
            axes.text(column, row + 0.25, f"{share:.0%}", ha="center", va="center", color=ink, fontsize=7.5)
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if size > 4 else {}
    axes.set_xticks(range(size), names, **turned)
    axes.set_yticks(range(size), names)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="predicted", ylabel="true", aspect="equal")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _series(history: list[dict], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one quantity. A resumed run repeats steps: the last row of a step is the one kept."""
    found = {
        row["step"]: float(row[key])
        for row in history
        if row.get("kind") == kind and "step" in row and row.get(key) is not None and math.isfinite(row[key])
    }
    steps = sorted(found)
    return np.array(steps, dtype=float), np.array([found[step] for step in steps])


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    if len(steps) > CURVE:
        steps, values = (np.array([part.mean() for part in np.array_split(all_, CURVE)]) for all_ in (steps, values))
    if len(steps) == 1:
        style.setdefault("marker", "o")  # a line through one point cannot be seen
    if len(steps):
        axes.plot(steps, values, **style)


@styled
def curves_figure(history: list[dict]) -> Figure:
    """Losses (left) and development scores in percent (right) over optimiser steps; the best weighted F1 is marked.

    `history` holds the rows of metrics.jsonl. What a row lacks, or has as NaN, is left out.
    """
    figure = canvas(9.6, 3.6)
    losses, scores = figure.subplots(1, 2)
    lines: list[tuple[str, str, str, dict[str, Any]]] = [
        ("train", "loss", "training, total", {"color": PALETTE[0]}),
        ("train", "loss_erc", "classification", {"color": PALETTE[4], "linestyle": (0, (5, 1.5))}),
        ("train", "loss_icl", "contrastive", {"color": PALETTE[3], "linestyle": (0, (1.5, 1.2))}),
        ("dev", "loss", "development", {"color": PALETTE[5], "marker": "o", "markersize": 4}),
    ]
    for kind, key, label, style in lines:
        _line(losses, *_series(history, kind, key), label=label, **style)
    dev = [("weighted_f1", "weighted F1", 0, "o"), ("accuracy", "accuracy", 1, "s"), ("macro_f1", "macro F1", 2, "^")]
    for key, label, colour, marker in dev:
        steps, values = _series(history, "dev", key)
        _line(scores, steps, 100 * values, label=label, color=PALETTE[colour], marker=marker, markersize=4)
    steps, values = _series(history, "dev", "best")
    if len(steps):
        scores.axvline(steps[-1], color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)), zorder=1)
        label = f"chosen: {100 * values[-1]:.1f} at step {steps[-1]:,.0f}"
        scores.plot(steps[-1], 100 * values[-1], "*", color=INK, markersize=12, zorder=5, label=label)
    for axes, title in ((losses, "Loss"), (scores, "Development set, %")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.margins(y=0.12)
        if axes.lines:
            axes.legend(fontsize=8.5)
        else:
            _say(axes, "nothing recorded")
    return figure


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def _principal(features: np.ndarray, most: int) -> np.ndarray:
    """(N, D) to (N, min(N, D, most)): the directions of largest variance, each with a repeatable sign."""
    centred = features - features.mean(axis=0)
    left, scale, right = np.linalg.svd(centred, full_matrices=False)
    largest = right[np.arange(len(right)), np.abs(right).argmax(axis=1)]
    return (left * scale * np.where(largest < 0, -1.0, 1.0))[:, :most]


def project(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """(N, D) finite features to (N, 2) float64 for the eye, and the name of the method.

    PCA to 50 dimensions and t-SNE where at least 30 different points exist, the first two principal components
    otherwise. The same features and seed give the same plane.
    """
    features = features.astype(np.float64)
    # Threads add up in no fixed order, and t-SNE magnifies the last bit.
    with threadpool_limits(1):
        if len(np.unique(features, axis=0)) < 30:
            plane = _principal(features, 2)
            return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1]))), "PCA"
        reduced = _principal(features, 50)
        reduced /= reduced.std()
        start = 1e-4 * np.pad(reduced, ((0, 0), (0, 1)))[:, :2]
        tsne = TSNE(perplexity=min(30.0, (len(features) - 1) / 3), init=start, random_state=seed, max_iter=750)
        return tsne.fit_transform(reduced).astype(np.float64), "t-SNE"


@styled
def feature_figure(features: np.ndarray, labels: np.ndarray, names: list[str], seed: int = 0) -> Figure:
    """(N, D) features in the plane (see project), coloured by their (N,) true classes.

    At most 2,000 samples are drawn, chosen by `seed`. Samples with a feature that is not finite are left out.
    """
    kept = np.flatnonzero(np.isfinite(features).all(axis=1))
    if len(kept) > SHOWN:
        kept = np.sort(np.random.default_rng(seed).choice(kept, SHOWN, replace=False))
    figure = canvas(6.2, 5.4)
    axes = figure.add_subplot()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if not len(kept):
        _say(axes, "no finite features")
        return figure
    plane, method = project(features[kept], seed)
    shown = labels[kept]
    of = f" of {len(features):,}" if len(kept) < len(features) else ""
    axes.set_title(f"{method}, {len(kept):,}{of} samples", fontsize=9.5, fontweight="normal")
    for c in np.unique(shown):
        points = plane[shown == c]
        look = {"color": PALETTE[c % len(PALETTE)], "marker": MARKERS[c % len(MARKERS)], "linewidths": 0}
        axes.scatter(points[:, 0], points[:, 1], s=20 if len(kept) > 500 else 32, alpha=0.75, label=names[c], **look)
    legend = figure.legend(loc="outside lower center", ncols=4, handletextpad=0.2, columnspacing=1.4, markerscale=1.5)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


@styled
def comparison_figure(rows: dict[str, dict], names: list[str]) -> Figure:
    """F1 in percent of every class (groups) under every model (bars); `rows` maps a model's name to its score."""
    figure = canvas(max(5.5, 0.28 * len(names) * (len(rows) + 1) + 1.5), 3.8)
    axes = figure.add_subplot()
    width = 0.8 / max(len(rows), 1)
    for i, (model, score) in enumerate(rows.items()):
        heights = [100 * score["per_class"][name]["f1"] for name in names]
        places = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * width
        axes.bar(places, heights, 0.9 * width, color=PALETTE[i % len(PALETTE)], label=model)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, 100), ylabel="F1, %")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as SVG text without a background, which follows the reader's light or dark setting. Repeatable."""
    with rc_context(STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", facecolor="none", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    theme = f"<style>svg{{color:{INK}}}@media screen and (prefers-color-scheme:dark){{svg{{color:#e4e8ee}}}}</style>"
    return re.sub(r"(<svg[^>]*>)", lambda match: match[1] + theme, svg, count=1)


def save_png(figure: Figure, path: Path) -> None:
    """The figure on white at 200 dots an inch, for papers and slides."""
    with rc_context(STYLE), replacing(path) as file:
        figure.savefig(file, format="png", dpi=200, facecolor="white")
