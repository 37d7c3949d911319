"""A plan as tables."""

from rich.console import Console
from rich.table import Table

from jointfuse.capacity.memory import Load
from jointfuse.capacity.plan import Plan

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def print_plan(plan: Plan, console: Console) -> None:
    division, pool = plan.division, plan.pool
    console.print(
        f"{plan.recipe} on {division.world_size} ranks: batch {division.world_size * _a_rank(plan)} = "
        f"{division.world_size} ranks x {division.accumulation} accumulated x {division.micro_batch}",
        highlight=False,
    )
    console.print(_parts(plan))
    console.print(_memory(plan))
    console.print(_modes(plan))
    console.print(_wire(plan))
    if pool:
        console.print(_pool(plan))
    console.print(_time(plan))
    for assumption in plan.assumptions:
        console.print(f"- {assumption}", highlight=False, markup=False)


def _a_rank(plan: Plan) -> int:
    return plan.division.accumulation * plan.division.micro_batch


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _parts(plan: Plan) -> Table:
    table = _table("parameters, millions", "part", "trained", "frozen")
    for part, (trained, frozen) in plan.parts.items():
        table.add_row(part, _millions(trained), _millions(frozen))
    sums = [sum(part[column] for part in plan.parts.values()) for column in (0, 1)]
    table.add_row("all", *map(_millions, sums), style="bold")
    return table


def _memory(plan: Plan) -> Table:
    where = "a GPU" if plan.device == "gpu" else "a rank"
    table = _table(
        f"memory of {where}, by DeepSpeed file",
        *("train.deepspeed", "weights, trained", "frozen", "gathered", "gradients", "buckets", "optimizer", "on host"),
        *("peak", "in"),
    )
    for one in plan.memory:
        found = one.states
        sizes = (found.trained, found.frozen, found.gathered, found.gradients, found.buckets, found.optimizer)
        style = "bold" if one.chosen else None
        name = f"{one.file} *" if one.chosen else one.file
        table.add_row(name, *map(size, sizes), size(found.host), size(one.peak), one.peak_in, style=style)
    table.caption = f"* the recipe's; beside these, a step takes {_load(plan.load)}"
    table.caption_justify = "left"
    return table


def _load(load: Load) -> str:
    pool = f", the contrastive pool {size(load.pool_held)} and {size(load.pool_passing)} in its backward pass"
    return f"batches of {size(load.batches)}, {size(load.front_end)} to make one{pool if load.pool_held else ''}"


def _modes(plan: Plan) -> Table:
    lengths = f"{plan.longest.tokens} tokens, {plan.longest.frames} frames"
    table = _table(
        f"activations of {plan.division.micro_batch} utterances of {lengths}",
        *("train.checkpointing", "kept for the backward pass", "at most", "operations", "peak of all"),
    )
    fewest = min(mode.activations.forward + mode.activations.backward for mode in plan.modes)
    for mode in plan.modes:
        found = mode.activations
        times = (found.forward + found.backward) / fewest
        name = f"{mode.mode} *" if mode.chosen else mode.mode
        style = "bold" if mode.chosen else None
        table.add_row(name, size(found.kept), size(found.peak), f"x {times:.2f}", size(mode.peak), style=style)
    return table


def _wire(plan: Plan) -> Table:
    table = _table("on the wire, a step and rank", "what", "collective", "given", "sent, in a ring")
    ranks = plan.division.world_size
    for one in plan.wire:
        table.add_row(one.purpose, one.kind, size(one.given), size(one.sent(ranks)))
    table.add_row("all", "", "", size(sum(one.sent(ranks) for one in plan.wire)), style="bold")
    table.columns[1].justify = "left"
    table.caption = "of the contrastive loss nothing is sent backward"
    table.caption_justify = "left"
    return table


def _pool(plan: Plan) -> Table:
    assert plan.pool is not None
    assert plan.share_without_partner is not None
    table = _table("the contrastive pool", "", "")
    table.add_row("pools a step", f"{plan.pool.a_step}")
    table.add_row("anchors in a pool", f"{plan.pool.anchors:,}")
    table.add_row("keys in a pool", f"{plan.pool.keys:,}")
    table.add_row("anchors without a partner, expected", f"{plan.share_without_partner:.4%}")
    table.show_header = False
    return table


def _time(plan: Plan) -> Table:
    time, rates = plan.time, plan.rates
    title = f"a step of utterances of {time.lengths.tokens} tokens, {time.lengths.frames} frames"
    table = _table(title, "what, on one rank", "10^12 operations")
    for what, operations in (
        ("forward and backward", time.training),
        ("computed a second time", time.again),
        ("forward beforehand, for the pool", time.beforehand),
        ("contrastive loss", time.contrast),
    ):
        table.add_row(what, f"{operations / 1e12:,.4f}")
    table.add_row("computing", f"{time.computing:.4g} s", style="bold")
    if time.communicating is None:
        table.add_row("communicating", "not known")
    else:
        table.add_row("communicating", f"{time.communicating:.4g} s", style="bold")
        utterances = plan.division.world_size * _a_rank(plan)
        apart, over = time.computing + time.communicating, max(time.computing, time.communicating)
        for what, seconds in (("one after the other", apart), ("at the same time", over)):
            table.add_row(f"a step, {what}", f"{seconds:.4g} s: {utterances / seconds:,.1f} utterances/s")
    bandwidth = f"{rates.bandwidth / 1e9:,.4g} GB/s" if rates.bandwidth else "no rate"
    table.caption = (
        f"{plan.share:.0%} of {rates.operations / 1e12:,.4g} Tflop/s ({rates.operations_from}), "
        f"{bandwidth} out of a rank ({rates.bandwidth_from})"
    )
    table.caption_justify = "left"
    return table


def size(number: int) -> str:
    """Bytes as people read them."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number} B"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.3f}"
