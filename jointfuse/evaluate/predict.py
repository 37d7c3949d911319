"""A split through a network, on one rank or many: the same predictions either way."""

from collections.abc import Iterable

import numpy as np
import torch

from jointfuse.data.batch import Batch
from jointfuse.data.feed import Feed
from jointfuse.data.plan import evaluation_batches
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.stream import stream
from jointfuse.evaluate.metrics import Predictions
from jointfuse.losses.gather import gather_numbers, gather_rows, group_rank, world_size
from jointfuse.model.network import Network

EVALUATION_BATCH = 32  # utterances a rank holds at once


@torch.no_grad()
def predict(network: Network, reader: UtteranceReader, workers: int) -> Predictions:
    """Predictions of a whole split, in index order, on every rank.

    The batches do not depend on the number of ranks; those that only keep ranks in step are dropped. Every rank calls
    it. The network's mode is restored afterwards.
    """
    device = next(network.parameters()).device
    lengths = reader.positions(network.settings.vision.patch)[:]
    training = network.training
    network.eval()
    planned = evaluation_batches(lengths, EVALUATION_BATCH, world_size(), group_rank())
    valid, *rows = judged(
        network, Feed(stream(reader, planned, workers, pin=device.type == "cuda"), device, reader.front_end)
    )
    network.train(training)
    kept = valid.nonzero().squeeze(1)
    mine = [part.index_select(0, kept) for part in rows]
    held = torch.tensor([len(mine[0])], dtype=torch.float64, device=device)
    sizes = [int(number) for (number,) in gather_numbers(held)]
    ids, labels, logits, features = (gather_rows(part, sizes).cpu().numpy() for part in mine)
    order = np.argsort(ids)
    assert np.array_equal(ids[order], np.arange(len(lengths))), "every utterance exactly once"
    return Predictions(labels=labels[order], logits=logits[order], features=features[order])


@torch.no_grad()
def judged(network: Network, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Of all utterances in the order they came: valid, ids, labels, logits and features. The host waits for nothing but
    the batches."""
    rows = ((batch.valid, batch.ids, batch.labels, *network(batch)) for batch in batches)
    return [torch.cat(part) for part in zip(*rows, strict=True)]
