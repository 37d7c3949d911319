"""One HTML file that tells how good a model is and where it fails; it needs no network, no server and no script."""

import json
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

from jointfuse.data.fonts import lettering
from jointfuse.evaluate.metrics import HEADLINES, Predictions
from jointfuse.evaluate.page import card, heard, paragraph, picture, swatch, write_page
from jointfuse.evaluate.pictures import (
    PALETTE,
    comparison_figure,
    confusion_figure,
    curves_figure,
    feature_figure,
    save_png,
)
from jointfuse.files import write_text


@dataclass
class Hard:
    """An utterance that the model got wrong, or nearly: what was said, by whom, and what the model made of it."""

    key: str
    text: str
    speaker: str
    dialogue: str
    turn: int
    label: str
    predicted: str
    probability_of_truth: float
    flac: bytes | None  # a whole FLAC file, or None where there is no audio to play


def hardest(predictions: Predictions, k: int) -> np.ndarray:
    """At most k indices, the least probable true label first; equals stay in index order."""
    return np.argsort(predictions.probability_of_truth, kind="stable")[:k]


def write_report(
    folder: Path,
    *,
    title: str,
    settings_yaml: str,
    corpus: dict,
    score: dict,
    names: list[str],
    predictions: Predictions,
    history: list[dict],
    hard: list[Hard],
) -> Path:
    """Write metrics.json, confusion.png and report.html into `folder`, each under a temporary name first.

    `corpus` has `name` and may have `split`, `description` and `synthetic` (true: the page says so at its top).
    `score` comes from metrics.score, `history` holds the rows of metrics.jsonl, and the clips of `hard` are carried
    inside the page. The same arguments give the same bytes. Returns the path of report.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lettering(names):
        confusion = confusion_figure(score, names)
        facts = json.dumps(score, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "metrics.json", facts)
        save_png(confusion, folder / "confusion.png")
        features = feature_figure(predictions.features, predictions.labels, names)
        many = len(names) > 8
        parts = [
            _heading(title, corpus),
            _headlines(score),
            card("Classes", f"F1, precision and recall in percent.{_absent(score)}", _classes(score, names)),
            f'<div class="{"" if many else "pair"}">',
            card(
                "Confusion matrix",
                "Number of utterances; colour and percentage are shares of the row, the true class.",
                picture(confusion, "Confusion matrix; its counts are in metrics.json", wide=many),
            ),
            card(
                "Fused features",
                "What the contrastive loss sees, flattened to a plane; distances between clusters are not to scale.",
                picture(features, "Fused features in a plane, coloured by the true class"),
            ),
            "</div>",
            card(
                "Training",
                "The star marks the best weighted F1 on the development set.",
                picture(curves_figure(history), "Losses and development scores over training steps", wide=True),
            ),
            _hard(hard),
            '<section class="card long"><details><summary>Settings of this run</summary>'
            f"<pre>{escape(settings_yaml)}</pre></details></section>",
            "<footer>Written by jointfuse. The scores are also in metrics.json beside this page.</footer>",
        ]
    return write_page(folder / "report.html", title, parts)


def write_comparison(
    folder: Path, rows: dict[str, dict], names: list[str], reports: dict[str, Path], title: str, note: str
) -> Path:
    """Write comparison.html into `folder`: the scores of several models side by side, F1 by class, and links.

    `rows` maps a model's name to its score (metrics.score), in the order to show; `reports` maps some of these names
    to the report.html they came with, which is linked relative to `folder`. `note` is plain text for the top of the
    page. Returns the path of comparison.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = "".join(f'<th class="n" scope="col">{_capital(heading)}</th>' for heading in HEADLINES.values())
    best = {key: max(row[key] for row in rows.values()) for key in HEADLINES}
    body = []
    for i, (name, row) in enumerate(rows.items()):
        label = swatch(i) + escape(name)
        if name in reports:
            link = Path(os.path.relpath(reports[name], folder)).as_posix()
            label = f'<a href="{quote(link)}">{label}</a>'
        cells = "".join(
            f'<td class="n{" best" if row[key] == best[key] else ""}">{100 * row[key]:.2f}</td>' for key in HEADLINES
        )
        body.append(f'<tr><th scope="row">{label}</th>{cells}<td class="n spare">{row["samples"]:,}</td></tr>')
    table = (
        f'<div class="scroll"><table><thead><tr><th scope="col">Model</th>{head}'
        f'<th class="n spare" scope="col">Samples</th></tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
    with lettering([*names, *rows]):
        bars = picture(comparison_figure(rows, names), "F1 by class", wide=True)
    parts = [
        f"<header><h1>{escape(title)}</h1>{paragraph(note)}</header>",
        card("Scores", "In percent. The best of each column is bold; a model's name opens its report.", table),
        card("Classes", "F1 of every class.", bars),
        "<footer>Written by jointfuse.</footer>",
    ]
    return write_page(folder / "comparison.html", title, parts)


def _heading(title: str, corpus: dict) -> str:
    split = f" · {escape(str(corpus['split']))} split" if corpus.get("split") else ""
    lines = [f'<header><h1>{escape(title)}</h1><p class="muted"><b>{escape(str(corpus["name"]))}</b>{split}</p>']
    lines.append(paragraph(str(corpus.get("description") or "")))
    if corpus.get("synthetic"):
        lines.append(
            '<p class="note"><b>Synthetic corpus.</b> These utterances were made by a program. The scores show that '
            "the software works; they say nothing about how well people's emotions are recognised.</p>"
        )
    return "\n".join([*lines, "</header>"])


def _headlines(score: dict) -> str:
    """The four figures people quote, with what always answering the commonest class would score beside them."""
    share = max(row["support"] for row in score["per_class"].values()) / score["samples"]
    f1 = 2 * share / (1 + share)
    trivial = {"weighted_f1": share * f1, "accuracy": share, "macro_f1": f1 / len(score["per_class"])}
    cards = [
        f'<div class="card{" first" if key == "weighted_f1" else ""}"><div class="label">{_capital(heading)}</div>'
        f'<div class="value">{100 * score[key]:.1f}<small> %</small></div>'
        f'<div class="under">commonest class alone: {100 * trivial[key]:.1f}{_present(score, key)}</div></div>'
        for key, heading in HEADLINES.items()
    ]
    classes = sum(row["support"] > 0 for row in score["per_class"].values())
    cards.append(
        f'<div class="card"><div class="label">Samples</div><div class="value">{score["samples"]:,}</div>'
        f'<div class="under">{classes} of {len(score["per_class"])} classes occur</div></div>'
    )
    return f'<div class="headlines">{"".join(cards)}</div>'


def _absent(score: dict) -> str:
    return f" Not in this split: {escape(', '.join(score['absent']))}." if score["absent"] else ""


def _present(score: dict, key: str) -> str:
    """Beside the macro F1 of all classes, that of those that occur, where some do not."""
    if key != "macro_f1" or not score["absent"]:
        return ""
    return f"<br>of the classes that occur: {100 * score['macro_f1_present']:.1f}"


def _classes(score: dict, names: list[str]) -> str:
    rows = []
    for c, name in enumerate(names):
        row = score["per_class"][name]
        bar = f'<span><i style="width:{100 * row["f1"]:.1f}%;background:{PALETTE[c % len(PALETTE)]}"></i></span>'
        rows.append(
            f'<tr><th scope="row">{swatch(c)}{escape(name)}</th><td class="bar">{bar}</td>'
            + "".join(f'<td class="n">{100 * row[key]:.1f}</td>' for key in ("f1", "precision", "recall"))
            + f'<td class="n">{row["support"]:,}</td></tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">Class</th><th class="spare"></th>'
        '<th class="n" scope="col">F1</th><th class="n" scope="col">Precision</th><th class="n" scope="col">Recall</th>'
        f'<th class="n" scope="col">Support</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _hard(hard: list[Hard]) -> str:
    if not hard:
        return ""
    rows = []
    for h in hard:
        wrong = "" if h.predicted == h.label else ' class="wrong"'
        rows.append(
            f'<tr><td class="said" dir="auto">{escape(h.text)}<small dir="ltr">{escape(h.key)} · dialogue '
            f"{escape(h.dialogue)}, turn {h.turn}</small></td>"
            f'<td data-label="Speaker">{escape(h.speaker)}</td><td data-label="True">{escape(h.label)}</td>'
            f'<td data-label="Predicted"><span{wrong}>{escape(h.predicted)}</span></td>'
            f'<td class="n" data-label="p(true)">{h.probability_of_truth:.3f}</td>'
            f'<td class="listen">{heard(h.flac)}</td></tr>'
        )
    table = (
        '<div class="scroll"><table class="stack"><thead><tr><th scope="col">Utterance</th><th scope="col">Speaker</th>'
        '<th scope="col">True</th><th scope="col">Predicted</th><th class="n" scope="col">p(true)</th>'
        f'<th class="listen" scope="col">Listen</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    hint = "The utterances whose true emotion the model found least probable, p(true)."
    return card("Hardest utterances", hint, table, long=True)


def _capital(heading: str) -> str:
    return heading[0].upper() + heading[1:]
