"""The classification loss. It has no collective, so its shares can be taken one after another in one process."""

from typing import Any

import pytest
import torch
from helpers import planned_epoch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from jointfuse.data.plan import Plan, micro_batches
from jointfuse.losses import classification_loss


@st.composite
def shares(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What each rank holds in each accumulation step: logits, labels, validity; at least one row of all is valid."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
    valid = draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)).filter(any))
    made, start = [], 0
    for size in sizes:
        made.append(
            {
                "logits": 3 * torch.randn(size, 4, generator=generator),
                "labels": torch.randint(4, (size,), generator=generator),
                "valid": torch.tensor(valid[start : start + size], dtype=torch.bool),
            }
        )
        start += size
    return made


@given(shares())
def test_the_mean_of_uneven_shares_is_the_mean_over_all_real_utterances(parts: list[dict[str, Any]]) -> None:
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    total = int(whole["valid"].sum())
    inputs = [part["logits"].clone().requires_grad_() for part in parts]
    losses = [
        classification_loss(logits, part["labels"], part["valid"], len(parts), total)
        for logits, part in zip(inputs, parts, strict=True)
    ]
    mean = torch.stack(losses).mean()
    mean.backward()
    reference = whole["logits"].clone().requires_grad_()
    expected = cross_entropy(reference[whole["valid"]], whole["labels"][whole["valid"]])
    expected.backward()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(torch.cat([logits.grad for logits in inputs]), reference.grad)


def test_what_stands_in_a_row_that_is_not_valid_does_not_matter() -> None:
    logits = torch.randn(3, 4)
    spoilt = torch.cat([logits, torch.full((2, 4), torch.inf)]).requires_grad_()
    labels, valid = torch.tensor([0, 3, 1, 0, 0]), torch.tensor([True, True, True, False, False])
    loss = classification_loss(spoilt, labels, valid, 1, 3)
    torch.testing.assert_close(loss, cross_entropy(logits, labels[:3]))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (3, 2), (1, 6), (6, 2)])
def test_the_total_of_a_planned_batch_makes_every_division_of_it_equal(world_size: int, accumulation: int) -> None:
    # 29 utterances in batches of 12: the last one holds 5 and 7 repeats.
    plan = Plan(torch.arange(29).numpy(), 12, seed=3)
    ids, valid = (part[-1] for part in planned_epoch(plan, 0))
    total = int(valid.sum())
    assert total == 5
    logits, labels = torch.randn(29, 4), torch.arange(29) % 4
    losses, counts = [], []
    for rank in range(world_size):
        rows = zip(*(micro_batches(part, world_size, rank, accumulation) for part in (ids, valid)), strict=True)
        for own, counted in rows:
            row, mask = torch.from_numpy(own.copy()), torch.from_numpy(counted.copy())
            losses.append(classification_loss(logits[row], labels[row], mask, world_size * accumulation, total))
            counts.append(int(mask.sum()))
    real = torch.from_numpy(ids[valid])
    torch.testing.assert_close(torch.stack(losses).mean(), cross_entropy(logits[real], labels[real]))
    assert sum(counts) == total
