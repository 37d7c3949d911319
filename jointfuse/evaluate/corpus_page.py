"""A page about a corpus: what is in it, what was wrong with it, and a few utterances of each class to see and hear."""

from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from jointfuse.data.features import continued, log_mel
from jointfuse.data.fonts import lettering
from jointfuse.data.mel import FRAMES_PER_SECOND, SAMPLE_RATE, frames_of
from jointfuse.data.samples import Utterance
from jointfuse.data.shards import Corpus, Split
from jointfuse.data.stats import (
    SplitStats,
    corpus_stats,
    histogram,
    plot_classes,
    plot_dialogues,
    plot_durations,
    plot_speakers,
)
from jointfuse.evaluate.page import card, heard, paragraph, picture, swatch, write_page
from jointfuse.evaluate.pictures import INK, MUTED, PALETTE, canvas, styled

SAMPLES = 3  # of each class are shown
SHOWN_SECONDS = 12.0  # a longer clip is shown only where its class has no shorter one
TEXTS_READ = 20_000  # of a split, evenly spaced, whose words are counted
FAULTS_LISTED = 300
COLUMNS = 400  # of a drawn waveform


def write_corpus_page(corpus: Corpus, path: Path) -> Path:
    """Write the page into the file `path`, which carries all it shows. The same corpus gives the same bytes.

    Raises:
        UserError: a sample that is shown cannot be read.
    """
    with lettering([*corpus.labels, *corpus.splits, *corpus.speakers]):
        return _write(corpus, path)


def _write(corpus: Corpus, path: Path) -> Path:
    stats = corpus_stats(corpus)
    words = [_words(corpus.split(split)) for split in corpus.splits]
    parts = [
        _heading(corpus),
        _headlines(corpus, stats),
        card("Splits", "Lengths are of utterances with a clip, words of those with a text.", _splits(stats, words)),
        card("Classes", _shares_of(corpus), _classes(corpus, stats)),
        card(
            "Distributions",
            "In percent of each split, so that splits of any size compare.",
            picture(distributions(corpus, stats, words), "Classes, durations, words, dialogues, speakers", wide=True),
        ),
        _faults(corpus.info.get("faults")),
        *(_samples(corpus, label) for label in range(len(corpus.labels))),
        "<footer>Written by jointfuse from corpus.json, the indices and the tars.</footer>",
    ]
    return write_page(path, f"{corpus.name}: the corpus", parts)


def _words(split: Split) -> np.ndarray:
    """(texts,) number of words."""
    with_text = np.flatnonzero(split.index["characters"])
    step = max(1, -(-len(with_text) // TEXTS_READ))
    return np.array([len(split.sample(int(id), audio=False).text.split()) for id in with_text[::step]], dtype=np.int64)


def _heading(corpus: Corpus) -> str:
    info = corpus.info
    terms = " · ".join(str(part) for part in (info.get("source"), info.get("licence")) if part)
    lines = [f"<header><h1>{escape(corpus.name)}</h1>", paragraph(str(info.get("description") or "")), paragraph(terms)]
    if info["synthetic"]:
        lines.append('<p class="note"><b>Synthetic corpus.</b> These utterances were made by a program.</p>')
    return "\n".join([*lines, "</header>"])


def _headlines(corpus: Corpus, stats: list[SplitStats]) -> str:
    hours = sum(float(split.seconds.sum()) for split in stats) / 3600
    figures = (
        ("Utterances", f"{sum(split.samples for split in stats):,}", f"{len(corpus.labels)} classes"),
        ("Dialogues", f"{sum(len(split.turns) for split in stats):,}", f"{len(stats)} splits"),
        ("Speakers", f"{len(corpus.speakers):,}", _some(corpus.speakers)),
        ("Hours", f"{hours:,.2f}", "log-mel {:.2f} ± {:.2f} (train)".format(*corpus.mel) if corpus.mel else ""),
    )
    cards = (
        f'<div class="card"><div class="label">{label}</div><div class="value">{value}</div>'
        f'<div class="under">{escape(under)}</div></div>'
        for label, value, under in figures
    )
    return f'<div class="headlines">{"".join(cards)}</div>'


def _some(names: list[str]) -> str:
    shown = ", ".join(name[:16] for name in names[:3])
    return shown + (", …" if len(names) > 3 else "")


def _splits(stats: list[SplitStats], words: list[np.ndarray]) -> str:
    train = next((split.speakers > 0 for split in stats if split.name == "train"), np.zeros(0, dtype=bool))
    rows: dict[str, list[str]] = {
        "Utterances": [f"{split.samples:,}" for split in stats],
        "Dialogues": [f"{len(split.turns):,}" for split in stats],
        "Speakers": [f"{int((split.speakers > 0).sum()):,}" for split in stats],
        "of them in train too": [
            f"{int(((split.speakers > 0) & train).sum()):,}" if len(train) else "" for split in stats
        ],
        "Hours": [f"{split.seconds.sum() / 3600:,.2f}" for split in stats],
        "Seconds, median and longest": [_spread(split.seconds, ".1f") for split in stats],
        "Words, median and most": [_spread(counts, ".0f") for counts in words],
        "Turns, median and most": [_spread(split.turns, ".0f") for split in stats],
        "Without a label": [f"{split.unlabelled:,}" for split in stats],
        "Without a clip": [f"{split.without_clip:,}" for split in stats],
        "Without a text": [f"{split.without_text:,}" for split in stats],
    }
    return _table(["", *(split.name for split in stats)], [[name, *cells] for name, cells in rows.items()])


def _spread(values: np.ndarray, form: str) -> str:
    return f"{np.median(values):{form}}, {values.max():{form}}" if len(values) else "none"


def _shares_of(corpus: Corpus) -> str:
    labelled = " that has a label; the rest is heard before other utterances" if corpus.unlabelled else ""
    return f"Utterances of each class, and their share of what is in the split{labelled}."


def _classes(corpus: Corpus, stats: list[SplitStats]) -> str:
    rows = []
    for number, label in enumerate(corpus.labels):
        cells = [f"{split.labels[number]:,} · {split.labels[number] / split.labelled:.1%}" for split in stats]
        rows.append([swatch(number) + escape(label), *cells])
    return _table(["Class", *(split.name for split in stats)], rows, escaped=True)


def _table(head: list[str], rows: list[list[str]], escaped: bool = False) -> str:
    """A first column of names, further ones of numbers. `escaped`: the names are HTML already."""
    first, *others = (escape(name) for name in head)
    top = f'<th scope="col">{first}</th>' + "".join(f'<th class="n" scope="col">{name}</th>' for name in others)
    body = "".join(
        f'<tr><th scope="row">{name if escaped else escape(name)}</th>'
        + "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _faults(faults: list[dict[str, Any]] | None) -> str:
    """What the builder found wrong with the source, and what it did; corpora whose builder names none have no such
    part."""
    if faults is None:
        return ""
    counts = Counter((str(fault.get("fault")), str(fault.get("done"))) for fault in faults)
    summary = _table(
        ["Fault", "Treated", "Times"], [[fault, done, f"{n:,}"] for (fault, done), n in counts.most_common()]
    )
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(str(fault.get(name) or ''))}</td>" for name in FAULT_COLUMNS) + "</tr>"
        for fault in faults[:FAULTS_LISTED]
    )
    head = "".join(f'<th scope="col">{name.capitalize()}</th>' for name in FAULT_COLUMNS)
    more = f"the first {FAULTS_LISTED} of {len(faults):,}" if len(faults) > FAULTS_LISTED else f"all {len(faults):,}"
    listed = (
        f"<details><summary>Listed: {more}</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>'
    )
    hint = "What the builder found wrong with the source, and what it did about it."
    return card("Faults of the source", hint, summary + listed if faults else paragraph("None found."), long=True)


FAULT_COLUMNS = ("split", "key", "file", "fault", "done")


# ------------------------------------------------------------------------------------------------------------- samples


def _samples(corpus: Corpus, label: int) -> str:
    blocks = []
    for split, id in _chosen(corpus, label):
        utterance = split.sample(id)
        clip = utterance.waveform
        drawn = (
            paragraph("no audio")
            if clip is None
            else picture(sound(clip, label), f"Waveform and mel of {utterance.key}")
        )
        blocks.append(f"<div>{_said(utterance, split.name)}{drawn}{_player(split, id, clip)}</div>")
    if not blocks:
        return ""
    hint = f"{len(blocks)} utterances drawn at random, the same ones every time."
    return card(
        swatch(label) + escape(corpus.labels[label]), hint, f'<div class="samples">{"".join(blocks)}</div>', long=True
    )


def _player(split: Split, id: int, clip: np.ndarray | None) -> str:
    return "" if clip is None else heard(split.audio_bytes(id))


def _said(utterance: Utterance, split: str) -> str:
    place = f"{split} · {utterance.key} · {utterance.speaker} · turn {utterance.turn}"
    text = escape(utterance.text) or '<span class="none">no text</span>'
    return f'<p class="said" dir="auto">{text}<small dir="ltr">{escape(place)}</small></p>'


def _chosen(corpus: Corpus, label: int) -> Iterator[tuple[Split, int]]:
    """Up to SAMPLES utterances of a class, from train before the other splits and short clips before long ones."""
    random = np.random.default_rng(label)
    left = SAMPLES
    for name in sorted(corpus.splits, key=lambda name: name != "train"):
        split = corpus.split(name)
        ids = random.permutation(np.flatnonzero(split.index["label"] == label))
        long = split.index["duration_ms"][ids] > 1000 * SHOWN_SECONDS
        for id in ids[np.argsort(long, kind="stable")][:left]:
            yield split, int(id)
            left -= 1


@styled
def sound(clip: np.ndarray, colour: int) -> Figure:
    """Waveform above log-mel of a clip, (S,) int16, over the same seconds."""
    figure = canvas(4.2, 2.5)
    wave, mel = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.7])
    seconds = len(clip) / SAMPLE_RATE
    pieces = np.array_split(clip / 32768, min(COLUMNS, len(clip)))
    times = np.linspace(0, seconds, len(pieces))
    low, high = ([extreme(piece) for piece in pieces] for extreme in (np.min, np.max))
    wave.fill_between(times, low, high, color=PALETTE[colour % len(PALETTE)], linewidth=0.4)
    wave.set(ylim=(-1, 1), yticks=[-1, 0, 1])
    spectrogram = log_mel(torch.from_numpy(continued(clip))[None])[0, : frames_of(len(clip))].numpy()
    end = max(seconds, len(spectrogram) / FRAMES_PER_SECOND)
    mel.imshow(spectrogram.T, aspect="auto", origin="lower", cmap="magma", extent=(0, end, 0, 80), interpolation="none")
    mel.set(xlabel="seconds", ylabel="mel bin", yticks=[0, 40, 80], xlim=(0, end))
    for axes in (wave, mel):
        axes.grid(False)
        axes.tick_params(labelsize=7.5)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
    return figure


@styled
def distributions(corpus: Corpus, stats: list[SplitStats], words: list[np.ndarray]) -> Figure:
    """Classes, clip durations, words, dialogue lengths and speakers, a colour a split."""
    figure = canvas(11, 9.5)
    panels = figure.subplot_mosaic(
        [["classes", "classes"], ["durations", "words"], ["dialogues", "speakers"]], height_ratios=[1.1, 1, 1]
    )
    plot_classes(panels["classes"], corpus.labels, stats)
    plot_durations(panels["durations"], stats)
    _plot_words(panels["words"], words)
    plot_dialogues(panels["dialogues"], stats)
    plot_speakers(panels["speakers"], corpus.speakers, stats)
    for text in (text for axes in panels.values() for text in axes.texts):
        text.set_color(INK)
    handles, names = panels["classes"].get_legend_handles_labels()
    # In the line of the title: the bars may reach anywhere below it.
    panels["classes"].legend(
        handles, names, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=len(names), frameon=False
    )
    return figure


def _plot_words(panel: Any, words: list[np.ndarray]) -> None:
    panel.set(title="Words of an utterance", xlabel="words", ylabel="% of texts")
    told = [counts for counts in words if len(counts)]
    if not told:
        panel.text(0.5, 0.5, "no texts", ha="center", transform=panel.transAxes, color=MUTED)
        return
    most = int(np.concatenate(told).max())
    step = max(1, most // 30)
    histogram(panel, words, np.arange(0.5, most + step + 0.5, step))
