"""Tiny corpora, models and batches for the tests of the model, the losses and the stream."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jointfuse.config import DataSettings, ModelSettings
from jointfuse.data import build as building
from jointfuse.data.batch import Batch, Example, collate
from jointfuse.data.features import FrontEnd
from jointfuse.data.mixture import AnyCorpus
from jointfuse.data.plan import Plan
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.rows import CorpusSpec, Row
from jointfuse.data.shards import Corpus
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.model.network import Network

LABELS = ("anger", "fear", "joy", "neutral")
SIZES = {"train": 23, "dev": 7}
SECONDS = (0.2, 6.0, 1.3, 0.45, 2.7, 0.9, 4.2, 0.25, 1.8, 3.4, 0.6)
WORDS = ["Well,", "I", "never", "said", "that", "we", "would", "all", "go", "because", "it", "had", "rained"]
VOCABULARY = 300
MAX_SECONDS = 6.0


def _row(split: str, number: int, gaps: Collection[str]) -> Row:
    words = 1 + number * 7 % 30
    text = " ".join(WORDS[(number + word) % len(WORDS)] for word in range(words))
    without_all = "everything" in gaps and number % 5 == 2
    without_text = without_all or ("text" in gaps and number % 5 == 3)
    without_clip = without_all or ("clip" in gaps and number % 5 == 4)
    seconds = SECONDS[number % len(SECONDS)]
    return Row(
        dialogue=f"{split}{number // 4}",
        turn=number % 4,
        speaker=("Ann", "Bob", "Cy", "Dot")[number * 5 // 3 % 4],
        label=number * 5 // 2 % 4,
        text="" if without_text else text,
        clip=None if without_clip else (seconds, number),
        identity=f"{split} {number}",
        origin=f"utterance {number} of {split}",
    )


def _render(rows: Sequence[Row]) -> Iterator[np.ndarray | None]:
    """A rising tone with noise for each row."""
    for row in rows:
        if row.clip is None:
            yield None
            continue
        seconds, seed = row.clip
        noise = np.random.default_rng(seed).standard_normal(round(seconds * 16_000))
        time = np.arange(len(noise)) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * (150 + 40 * seed + 90 * time) * time) + 0.05 * noise
        yield wave.astype(np.float32)


def build_corpus(
    folder: Path,
    gaps: Collection[str] = (),
    samples_per_shard: int = 9,
    labels: Sequence[str] = LABELS,
    sizes: Mapping[str, int] = SIZES,
) -> Corpus:
    """A corpus through the builder itself, its jobs run in this process: starting another takes longer than the rest.

    Args:
        gaps: what some utterances are left without: text, clip, everything.
        labels: four.
    """
    splits: dict[str, list[list[Row]]] = {}
    for split, size in sizes.items():
        rows = [_row(split, number, gaps) for number in range(size)]
        splits[split] = [
            [row for row in rows if row.dialogue == name] for name in dict.fromkeys(r.dialogue for r in rows)
        ]
    spec = CorpusSpec("tones", tuple(labels), splits, _render, source="", licence="", description="", synthetic=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "processes", lambda *_: ThreadPoolExecutor(1))
        building.build(spec, folder, workers=1, samples_per_shard=samples_per_shard)
    return Corpus.open(folder)


def reader_of(corpus: AnyCorpus, modality: str, split: str = "train", **settings: Any) -> UtteranceReader:
    """A reader whose tokenizer is trained on the corpus."""
    data = DataSettings(max_seconds=MAX_SECONDS, max_tokens=40, **settings)
    tokenizer = None if modality == "audio" else train_tokenizer(corpus.split("train"), 300)
    return UtteranceReader(
        corpus.split(split), data, tokenizer, modality != "text", corpus.mel_mean, corpus.mel_deviation
    )


def read(reader: UtteranceReader, ids: Iterable[int]) -> Batch:
    """Those utterances as the model takes them, all valid."""
    chosen = np.array(list(ids))
    return reader.batch((chosen, np.ones(len(chosen), dtype=bool))).to("cpu", reader.front_end)


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`tree` with dotted keys replaced."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        tree[section] = merged(tree.get(section, {}), {rest: value}) if rest else value
    return tree


MODEL: dict[str, Any] = {
    "text_encoder": {"scratch": {"width": 20, "layers": 2, "heads": 2}},
    "extractor": {"layers": 1, "heads": 2, "width": 32},
    "language": {"scratch": {"width": 24, "layers": 4, "heads": 3}},
    "vision": {"scratch": {"width": 16, "layers": 4, "heads": 2}, "patch": [16, 16]},
}
SAME_WIDTH = {"language.scratch.width": 24, "vision.scratch.width": 24}


def model_settings(**changes: Any) -> ModelSettings:
    """Two-block settings whose every width differs; `changes` by dotted key, `__` for the dot."""
    return ModelSettings.model_validate(merged(MODEL, {key.replace("__", "."): v for key, v in changes.items()}))


def make_network(settings: ModelSettings, seed: int = 0, **options: Any) -> Network:
    """A network of random weights, none of them still at 0 or 1 as an initialisation may leave biases and norms."""
    torch.manual_seed(seed)
    network = Network(settings, len(LABELS), 48, MAX_SECONDS, tokenizer_size=VOCABULARY, **options)
    stir(network)
    return network


def stir(module: torch.nn.Module, scale: float = 0.1) -> None:
    """Move every parameter a little away from where initialisation put it."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def make_batch(
    tokens: Sequence[int],
    frames: Sequence[int],
    seed: int = 0,
    labels: Sequence[int] = (),
    valid: Sequence[bool] = (),
) -> Batch:
    """Random utterances of so many tokens and mel frames (0: without that modality), all valid unless said."""
    rng = np.random.default_rng(seed)
    examples = [
        Example(
            id=number,
            # Entries 0 to 3 are special; a text starts with <s>.
            tokens=np.concatenate([[0], rng.integers(4, VOCABULARY, count - 1)]) if count else np.empty(0, np.int64),
            clip=torch.empty(0, dtype=torch.int16),
            frames=length,
            bin_masks=np.zeros((0, 2), np.int64),
            frame_masks=np.zeros((0, 2), np.int64),
            label=labels[number] if labels else number % 2,
            cut_tokens=False,
            cut_audio=False,
        )
        for number, (count, length) in enumerate(zip(tokens, frames, strict=True))
    ]
    batch = collate(examples, np.array(valid or [True] * len(examples)), pad_token=1).to("cpu", FrontEnd(0.0, 1.0))
    mel = torch.zeros(len(frames), max(1, *frames), 80)
    for row, length in enumerate(frames):
        mel[row, :length] = torch.from_numpy(rng.standard_normal((length, 80), dtype=np.float32))
    return replace(batch, mel=mel)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of every parameter that has one, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def saved_bytes(work: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of `work`."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = work()
    del graph
    return sum(storages.values())


def planned_epoch(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """A whole epoch: ids and whether they count, each (steps, batch)."""
    ids, valid = zip(*plan.batches(epoch), strict=True)
    return np.stack(ids), np.stack(valid)


def example_of(reader: UtteranceReader, id: int) -> Example:
    return reader.examples([id], [reader.split.sample(id, audio=reader.audio)])[0]
