"""A plan as tables, at most 100 columns wide."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jointfuse.capacity.plan import Memory, Plan

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_plan(plan: Plan, console: Console) -> None:
    division, sizes = plan.division, plan.sizes
    console.print(
        f"{plan.config.recipe}: {(sizes.trained + sum(sizes.frozen)) / 1e6:,.1f} M parameters "
        f"({sizes.trained / 1e6:,.1f} M trained), batch {plan.config.train.batch} = {division.world_size} ranks x "
        f"{division.accumulation} accumulated x {division.micro_batch}",
        highlight=False,
    )
    for table in (_memory(plan), _activations(plan), _wire(plan), _pool(plan), _time(plan)):
        if table.row_count:
            console.print(table)
    for assumption in plan.assumptions:
        console.print(f"- {assumption}", highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _memory(plan: Plan) -> Table:
    settings, load = plan.config.train, plan.load
    where = "a GPU" if plan.device == "gpu" else "a rank"
    names = [f"{name} *" if name == settings.deepspeed else name for name in plan.memory]
    table = _table(f"memory of {where}, by train.deepspeed", "", *(name.replace("_", "\n") for name in names))
    for column in table.columns:
        column.min_width = 8
    every: Sequence[Memory] = list(plan.memory.values())
    for what, sizes in (
        ("weights, trained", [one.states.trained for one in every]),
        ("weights, frozen", [one.states.frozen for one in every]),
        ("gathered weights", [one.states.gathered for one in every]),
        ("gradients", [one.states.gradients for one in every]),
        ("their buckets", [one.states.buckets for one in every]),
        ("optimizer", [one.states.optimizer for one in every]),
        ("activations", [plan.activations[settings.checkpointing].peak] * len(every)),
        ("contrastive pool", [load.pool_held + load.pool_passing] * len(every)),
        ("batches", [load.batches] * len(every)),
        ("making of a batch", [load.front_end] * len(every)),
    ):
        table.add_row(what, *map(size, sizes))
    table.add_section()
    table.add_row("at most, at a time", *(size(one.peak) for one in every), style="bold")
    table.add_row("which is in", *(one.peak_in for one in every))
    table.add_section()
    table.add_row("on the host", *(size(one.states.host) for one in every))
    table.caption = "* the recipe's. Not all parts are there at a time: the sum is more than the most."
    return table


def _activations(plan: Plan) -> Table:
    table = _table(
        f"activations of {plan.division.micro_batch} utterances of {plan.longest}",
        *("train.checkpointing", "kept for backward", "at most", "operations", "memory at most"),
    )
    fewest = min(found.forward + found.backward for found in plan.activations.values())
    for mode, found in plan.activations.items():
        times, chosen = (found.forward + found.backward) / fewest, mode == plan.config.train.checkpointing
        cells = (size(found.kept), size(found.peak), f"x {times:.2f}", size(plan.peaks[mode]))
        table.add_row(f"{mode} *" if chosen else mode, *cells)
    return table


def _wire(plan: Plan) -> Table:
    table = _table("on the wire, a step and rank", "what", "collective", "given", "sent, in a ring")
    table.columns[1].justify = "left"
    for one in plan.wire:
        table.add_row(one.purpose, one.kind, size(one.given), size(one.sent(plan.division.world_size)))
    if plan.wire:
        table.add_row("all", "", size(sum(one.given for one in plan.wire)), size(plan.sent), style="bold")
    return table


def _pool(plan: Plan) -> Table:
    table = _table("the contrastive pool", "pools a step", "anchors", "keys", "anchors without a partner, expected")
    if plan.pool:
        alone = f"{plan.share_without_partner:.3%}"
        table.add_row(str(plan.pool.a_step), f"{plan.pool.anchors:,}", f"{plan.pool.keys:,}", alone)
    return table


def _time(plan: Plan) -> Table:
    rates = plan.rates
    table = _table(f"a step of utterances of {plan.lengths}", "what", "10^12 operations", "ms", "utterances/s")

    def add(what: str, operations: int | None, seconds: float, whole: bool = False) -> None:
        done = "" if operations is None else f"{operations / 1e12:,.4f}"
        table.add_row(what, done, three(1000 * seconds), three(plan.config.train.batch / seconds) if whole else "")

    for what, operations in plan.operations.items():
        add(what, operations, operations / rates.reached)
    operations = sum(plan.operations.values())
    computing, communicating = operations / rates.reached, plan.communicating
    add("computing", operations, computing, whole=not communicating)
    table.caption = f"{rates.share:.0%} of {three(rates.operations / 1e12)} Tflop/s ({rates.operations_from})"
    if communicating:
        add(f"sending {size(plan.sent)}", None, communicating)
        table.add_section()
        add("a step, one after the other", None, computing + communicating, whole=True)
        add("a step, both at the same time", None, max(computing, communicating), whole=True)
    if plan.sent:
        bandwidth = f"{three(rates.bandwidth / 1e9)} GB/s out of a rank " if rates.bandwidth else "sending "
        table.caption = f"{table.caption}; {bandwidth}({rates.bandwidth_from})"
    return table


def size(number: int) -> str:
    """Bytes as people read them."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{three(number / unit)} {name}"
    return f"{number} B"


def three(number: float) -> str:
    """About three digits, and all of those before the point."""
    return f"{number:,.{sum(number < limit for limit in (1, 10, 100))}f}"
