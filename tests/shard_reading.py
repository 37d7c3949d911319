"""What processes of their own do with a cache of shards; they import this and little else."""

import hashlib
import os
from typing import Any

import numpy as np

from jointfuse.data.cache import ShardCache


def content(cache: ShardCache, shard: dict[str, Any]) -> bytes:
    descriptor = cache.open("train", shard)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def whole(cache: ShardCache, shard: dict[str, Any]) -> bool:
    return hashlib.sha256(content(cache, shard)).hexdigest() == shard["sha256"]


def ask(cache: ShardCache, shards: list[dict[str, Any]], seed: int) -> bool:
    """Whether every shard is whole, each asked for once in an order of the seed's."""
    order = np.random.default_rng(seed).permutation(len(shards))
    return all(whole(cache, shards[number]) for number in order)
