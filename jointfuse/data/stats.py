"""What is in a corpus: counts, durations, speakers and dialogue lengths, as tables and as one picture.

Everything but the names comes from corpus.json and the memory-mapped indexes; no tar is opened.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from jointfuse.data.fonts import lettering
from jointfuse.data.index import UNLABELLED
from jointfuse.data.shards import Corpus, Split
from jointfuse.files import replacing

COLOURS = ("#33658a", "#f26419", "#86bbd8", "#758e4f", "#9b5de5", "#2f4858")  # one a split, in order
SPEAKERS_SHOWN = 12


@dataclass(frozen=True)
class SplitStats:
    """One split in numbers."""

    name: str
    labels: np.ndarray  # (labels,) utterances
    unlabelled: int
    seconds: np.ndarray  # (clips,)
    turns: np.ndarray  # (dialogues,) utterances
    speakers: np.ndarray  # (speakers of the corpus,) utterances
    without_clip: int
    without_text: int

    @property
    def samples(self) -> int:
        return self.labelled + self.unlabelled

    @property
    def labelled(self) -> int:
        return int(self.labels.sum())


def split_stats(split: Split, labels: int, speakers: int) -> SplitStats:
    """Count one split; `labels` and `speakers` are the numbers there are in the corpus."""
    split.check_index()
    index = split.index
    seconds = index["duration_ms"] / 1000
    labelled = index["label"] != UNLABELLED
    return SplitStats(
        name=split.name,
        labels=np.bincount(index["label"][labelled], minlength=labels),
        unlabelled=int((~labelled).sum()),
        seconds=seconds[seconds > 0],
        turns=np.bincount(index["dialogue"]),
        speakers=np.bincount(index["speaker"], minlength=speakers),
        without_clip=int((seconds == 0).sum()),
        without_text=int((index["characters"] == 0).sum()),
    )


def corpus_stats(corpus: Corpus) -> list[SplitStats]:
    """Every split of the corpus, in its order."""
    return [split_stats(corpus.split(name), len(corpus.labels), len(corpus.speakers)) for name in corpus.splits]


def tables(corpus: Corpus, stats: list[SplitStats]) -> list[Table]:
    """The corpus at a glance, for rich's console: sizes, classes, durations and dialogues."""
    return [_sizes(corpus, stats), _classes(corpus, stats), _lengths(stats)]


def _table(title: str, first: str, stats: list[SplitStats]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for split in stats:
        table.add_column(split.name, justify="right")
    return table


def _sizes(corpus: Corpus, stats: list[SplitStats]) -> Table:
    table = _table(f"{corpus.name}{' (synthetic)' if corpus.info['synthetic'] else ''}", "", stats)
    table.add_row("utterances", *(f"{split.samples:,}" for split in stats))
    table.add_row("dialogues", *(f"{len(split.turns):,}" for split in stats))
    table.add_row("speakers", *(f"{int((split.speakers > 0).sum()):,}" for split in stats))
    heard = np.array([split.speakers > 0 for split in stats])
    if "train" in corpus.splits:
        train = heard[corpus.splits.index("train")]
        table.add_row("  of them in train too", *(f"{int((speakers & train).sum()):,}" for speakers in heard))
    table.add_row("hours", *(f"{split.seconds.sum() / 3600:.2f}" for split in stats))
    table.add_row("without a label", *(f"{split.unlabelled:,}" for split in stats))
    table.add_row("without a clip", *(f"{split.without_clip:,}" for split in stats))
    table.add_row("without a text", *(f"{split.without_text:,}" for split in stats))
    table.add_row("shards", *(f"{len(corpus.info['splits'][split.name]['shards']):,}" for split in stats))
    return table


def _classes(corpus: Corpus, stats: list[SplitStats]) -> Table:
    table = _table("classes", "label", stats)
    for number, label in enumerate(corpus.labels):
        counts = [(int(split.labels[number]), split.labelled) for split in stats]
        table.add_row(label, *(f"{count:,}  {count / labelled:6.1%}" for count, labelled in counts))
    return table


def _lengths(stats: list[SplitStats]) -> Table:
    table = _table("lengths", "", stats)
    for name, share in (("5 %", 5), ("median", 50), ("95 %", 95), ("longest", 100)):
        table.add_row(f"clip, seconds: {name}", *(_percentile(split.seconds, share, ".2f") for split in stats))
    for name, share in (("median", 50), ("longest", 100)):
        table.add_row(f"dialogue, turns: {name}", *(_percentile(split.turns, share, ".0f") for split in stats))
    return table


def _percentile(values: np.ndarray, share: int, form: str) -> str:
    return format(float(np.percentile(values, share)), form) if len(values) else "none"


# ------------------------------------------------------------------------------------------------------------- picture


def plot(corpus: Corpus, stats: list[SplitStats], path: str | os.PathLike[str]) -> None:
    """Four panels (classes, clip durations, dialogue lengths, speakers) as a picture at `path`."""
    with lettering([corpus.name, *corpus.labels, *corpus.splits, *corpus.speakers]):
        _plot(corpus, stats, path)


def _plot(corpus: Corpus, stats: list[SplitStats], path: str | os.PathLike[str]) -> None:
    figure = Figure(figsize=(12, 7.6), dpi=130, layout="constrained")
    synthetic = ", synthetic" if corpus.info["synthetic"] else ""
    total = (
        f"{sum(split.samples for split in stats):,} utterances, {sum(len(split.turns) for split in stats):,} dialogues"
    )
    figure.suptitle(f"{corpus.name}{synthetic}: {total}", fontsize=14, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(2, 2)
    plot_classes(panels[0, 0], corpus.labels, stats)
    plot_durations(panels[0, 1], stats)
    plot_dialogues(panels[1, 0], stats)
    plot_speakers(panels[1, 1], corpus.speakers, stats)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper right", ncols=len(names), frameon=False)
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png")


def plot_classes(panel: Axes, labels: list[str], stats: list[SplitStats]) -> None:
    width = 0.84 / len(stats)
    for number, split in enumerate(stats):
        places = np.arange(len(labels)) + (number - (len(stats) - 1) / 2) * width
        shares = 100 * split.labels / split.labelled
        bars = panel.bar(places, shares, width, color=COLOURS[number % len(COLOURS)], label=split.name)
        if len(labels) * len(stats) <= 40:
            panel.bar_label(bars, [f"{count}" for count in split.labels], fontsize=6.5, padding=1, rotation=90)
    panel.set_xticks(range(len(labels)), labels, rotation=0 if len(labels) <= 8 else 60)
    panel.margins(y=0.14)
    of_all = " with a label" if any(split.unlabelled for split in stats) else ""
    panel.set(title="Classes (bars: share of the split; numbers: utterances)", ylabel=f"% of utterances{of_all}")
    panel.grid(axis="y", alpha=0.3)


def plot_durations(panel: Axes, stats: list[SplitStats]) -> None:
    panel.set(title="Clip duration", xlabel="seconds", ylabel="% of clips")
    heard = [split.seconds for split in stats if len(split.seconds)]
    if not heard:
        panel.text(0.5, 0.5, "no clips", ha="center", transform=panel.transAxes)
        return
    every = np.concatenate(heard)
    # A handful of minute-long clips would squeeze all others into one bar.
    end = min(float(every.max()), 3 * float(np.percentile(every, 95)))
    histogram(panel, [np.minimum(split.seconds, end) for split in stats], np.linspace(float(every.min()), end, 41))
    beyond = int((every > end).sum())
    if beyond:
        panel.set_xlabel(f"seconds ({beyond} longer clips, up to {every.max():.0f} s, in the last bar)")


def plot_dialogues(panel: Axes, stats: list[SplitStats]) -> None:
    longest = max(int(split.turns.max()) for split in stats)
    step = max(1, longest // 30)
    histogram(panel, [split.turns for split in stats], np.arange(0.5, longest + step + 0.5, step))
    panel.set(title="Dialogue length", xlabel="turns", ylabel="% of dialogues")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def histogram(panel: Axes, values: list[np.ndarray], edges: np.ndarray) -> None:
    """One outlined step histogram a split, in percent of the split."""
    for number, one in enumerate(values):
        if len(one):
            shares = np.histogram(one, edges)[0] * 100 / len(one)
            colour = COLOURS[number % len(COLOURS)]
            panel.stairs(shares, edges, color=colour, linewidth=1.6)
            panel.stairs(shares, edges, color=colour, fill=True, alpha=0.12)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", alpha=0.3)


def plot_speakers(panel: Axes, speakers: list[str], stats: list[SplitStats]) -> None:
    total = np.sum([split.speakers for split in stats], axis=0)
    shown = np.argsort(-total, kind="stable")[:SPEAKERS_SHOWN][::-1]
    left = np.zeros(len(shown))
    for number, split in enumerate(stats):
        panel.barh(np.arange(len(shown)), split.speakers[shown], left=left, color=COLOURS[number % len(COLOURS)])
        left += split.speakers[shown]
    panel.set_xlim(0, 1.05 * left.max())
    panel.set_yticks(range(len(shown)), [speakers[number][:24] for number in shown], fontsize=8)
    of_all = f"the {len(shown)} most frequent of {len(speakers)}" if len(speakers) > len(shown) else "all"
    panel.set(title=f"Speakers ({of_all})", xlabel="utterances")
    panel.grid(axis="x", alpha=0.3)
