"""What a model is scored on, and the folder in which its report is kept."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jointfuse.config import Config, DataSettings, with_overrides
from jointfuse.data.mixture import AnyCorpus, Mixture, corpus_digest, open_data
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError

# Settings that an evaluation may have of its own; what a model reads, and how, is its own for good.
ALLOWED = (
    "data.labels",
    "data.missing_modality",
    "data.workers",
    "data.remote",
    "data.cache",
    "data.cache_gib",
)


@dataclass(frozen=True)
class Scored:
    """Data under the labels of a model.

    Args:
        own: they are what the model was trained on.
    """

    settings: DataSettings
    corpus: AnyCorpus
    own: bool

    @property
    def corpora(self) -> list[Corpus]:
        return [part.corpus for part in self.corpus.parts] if isinstance(self.corpus, Mixture) else [self.corpus]

    def identity(self, split: str) -> dict[str, Any]:
        """What scores are of, for whoever finds them alone."""
        return {
            "split": split,
            "corpora": [{"name": corpus.name, "sha256": corpus_digest(corpus)} for corpus in self.corpora],
            "labels": dict(self.settings.labels),
            "missing_modality": self.settings.missing_modality,
        }

    def folder(self, run: Path, split: str) -> Path:
        """RUN/eval-SPLIT for what the model was trained on, RUN/eval-SPLIT-NAME-DIGEST for anything else."""
        if self.own:
            return run / f"eval-{split}"
        name = re.sub(r"[^\w.]+", "-", self.corpus.name)[:40].strip("-.") or "corpus"
        digest = hashlib.sha256(json.dumps(self.identity(split), sort_keys=True).encode()).hexdigest()
        return run / f"eval-{split}-{name}-{digest[:8]}"


def open_scored(
    config: Config, labels: list[str], trained_on: str | None, corpus_path: str | None, overrides: Sequence[str]
) -> Scored:
    """The data that a model is to be scored on.

    Args:
        config: of the model.
        labels: of the model.
        trained_on: digest of what the model was trained on; None where its export does not say.
        corpus_path: another corpus; what the model was trained on unless set.
        overrides: `section.key=value` of ALLOWED.

    Raises:
        UserError: no such corpus, an override that is not allowed, or labels that the model does not know.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key not in ALLOWED:
            raise UserError(
                f"override '{override}': a model is scored as it was trained; of its settings, eval changes only "
                f"{', '.join(ALLOWED)} (and --corpus names another corpus)"
            )
    data = config.data
    if corpus_path:
        data = data.model_copy(update={"corpus": corpus_path, "mix": [], "remote": "", "cache": ""})
    data = with_overrides(config.model_copy(update={"data": data}), overrides).data
    corpus = open_data(data, labels)
    read_alike = (data.labels, data.missing_modality) == (config.data.labels, config.data.missing_modality)
    same = corpus_digest(corpus) == trained_on if trained_on else data.corpus == config.data.corpus
    scored = Scored(data, corpus, read_alike and (same or not corpus_path))
    if data.labels != config.data.labels:
        known = dict.fromkeys(
            [*(label for one in scored.corpora for label in one.labels), *config.data.labels, *labels]
        )
        unknown = [label for label in data.labels if label not in known]
        if unknown:
            raise UserError(
                f"data.labels: neither a corpus nor the model has a label {unknown[0]!r}; there are {', '.join(known)}"
            )
    return scored
