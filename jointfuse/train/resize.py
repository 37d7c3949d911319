"""A checkpoint of another number of ranks, ZeRO stage, offload or device, read into this run's engine.

Every rank maps the files of all ranks that wrote, and puts a parameter and its moments together when it sets them, so
that no rank holds the moments of a whole model twice and nothing is written. DeepSpeed's own conversion writes
everything twice, in files by parameter and rank, and loads neither between {1, 2} and 3 nor to or from stage 0.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from jointfuse.config import Config
from jointfuse.errors import UserError
from jointfuse.train.deepspeed_file import read_deepspeed_file
from jointfuse.train.engine import Layout, divide
from jointfuse.train.quiet import deepspeed

WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
Pieces = dict[tuple[str, str], list[torch.Tensor]]  # of (parameter, WEIGHT or a moment), by rank


def check_resize(checkpoint: Path, written: Config, before: Layout, config: Config, now: Layout) -> None:
    """Whether `now` may go on from `before`, without a look at DeepSpeed's files.

    Raises:
        UserError: another precision, tensors on NVMe, or another pool of the contrastive loss.
    """
    named = f"train.deepspeed = '{config.train.deepspeed}'"
    if before.precision != now.precision:
        raise UserError(
            f"{checkpoint} was written in {before.precision}, {named} trains in {now.precision}; choose a DeepSpeed "
            f"file of that precision, such as {written.train.deepspeed}"
        )
    if before != now and (read_deepspeed_file(config.train).on_nvme or (checkpoint / "offloaded_tensors").exists()):
        raise UserError(
            f"{checkpoint}: state on NVMe cannot be converted from {before} to {now}, {named}; resume with "
            f"--ranks {before.world_size} train.deepspeed={written.train.deepspeed}"
        )
    _check_pool(checkpoint, written, before, config, now)


def _check_pool(checkpoint: Path, written: Config, before: Layout, config: Config, now: Layout) -> None:
    if config.loss.pool == "step" or not config.loss.icl_weight:
        return
    old = divide(written.train, before.world_size).micro_batch * before.world_size
    new = divide(config.train, now.world_size).micro_batch * now.world_size
    if old == new:
        return
    kept, rest = divmod(old, now.world_size)
    if rest or (config.train.batch // now.world_size) % kept:
        way_out = f"--ranks {before.world_size} train.micro_batch={old // before.world_size}"
    else:
        way_out = f"train.micro_batch={kept}"
    raise UserError(
        f"{checkpoint}: loss.pool = {config.loss.pool} had {old} utterances of all ranks at once, this run's has "
        f"{new}; resume with {way_out}"
    )


def described(before: Layout, now: Layout) -> str:
    """What was converted, for the line that says where a run goes on; empty where nothing was."""
    if before == now:
        return ""
    if str(before) == str(now):
        return f", from {before} on another device or with another DeepSpeed file"
    return f", from {before} to {now}"


def load_resized(engine: Any, checkpoint: Path, before: Layout) -> None:
    """Every rank calls it. Reads only what this run's own ranks wrote.

    Raises:
        UserError: files are damaged or missing; nothing is loaded then.
    """
    try:
        saved = _Saved(checkpoint, before)
    except Exception as error:  # unpickling may raise anything
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{checkpoint}: the state of {before} cannot be read ({why}); resume from another checkpoint of the run"
        ) from error
    with torch.no_grad():
        _restore(engine, saved)


# ---------------------------------------------------------------------------------------------------------- what it was


def state_files(checkpoint: Path, before: Layout) -> Iterator[Path]:
    """DeepSpeed's files of a checkpoint: of the model, then of the optimizer."""
    yield from _model_files(checkpoint, before)
    yield from _optimizer_files(checkpoint, before)


def _model_files(checkpoint: Path, before: Layout) -> Iterator[Path]:
    ranks = range(before.world_size) if before.stage == 3 else [None]
    for rank in ranks:
        name = "mp_rank_00" if rank is None else f"zero_pp_rank_{rank}_mp_rank_00"
        yield checkpoint / f"{name}_model_states.pt"


def _optimizer_files(checkpoint: Path, before: Layout) -> Iterator[Path]:
    # BF16_Optimizer, which DeepSpeed takes for stage 1, writes bf16_zero_pp_rank_...
    prefix = "bf16_" if next(checkpoint.glob("bf16_*"), None) else ""
    for rank in range(before.world_size if before.stage else 0):
        yield checkpoint / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _read(path: Path) -> Any:
    """Tensors stay in the file until they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


class _Saved:
    """What a checkpoint holds, whatever wrote it.

    Attributes:
        step: of Adam.
        loss_scale: of fp16.
        model: DeepSpeed's own counts, and under `module` the buffers.
    """

    def __init__(self, checkpoint: Path, before: Layout) -> None:
        self.models = [_read(path) for path in _model_files(checkpoint, before)]
        self.model, self.stage = self.models[0], before.stage
        if before.stage == 0:
            optimizer = self.model["optimizer"]
            adam = optimizer.get("optimizer_state_dict", optimizer)  # in the wrapper of bf16 and fp16
            self.pieces = _whole(self.model["module"], optimizer, adam)
        else:
            shards = [_read(path)["optimizer_state_dict"] for path in _optimizer_files(checkpoint, before)]
            optimizer = shards[0]
            adam = optimizer["optimizer_state_dict" if before.stage == 3 else "base_optimizer_state"]
            self.pieces = _shards(shards, self.model["param_shapes"]) if before.stage == 3 else _partitions(shards)
        self.step = int(next(iter(adam["state"].values()))["step"])
        # Stages 1 to 3 keep a LossScaler, stage 0 its figures.
        scaler = optimizer.get("loss_scaler")
        figures = vars(scaler) if scaler else optimizer
        self.loss_scale = {name: figures[name] for name in LOSS_SCALE if name in figures}

    def trained(self, name: str, key: str, numel: int) -> torch.Tensor:
        """(numel,) float32: the master weights or a moment of a trained parameter."""
        pieces = [piece.flatten() for piece in self.pieces[name, key]]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0])[:numel]

    def frozen(self, name: str, numel: int) -> torch.Tensor:
        """(numel,) in the precision of training."""
        if self.stage < 3:
            tensor: torch.Tensor = self.model["module"][name]
            return tensor.flatten()
        return torch.cat([model["frozen_param_fragments"][name].flatten() for model in self.models])[:numel]


def _whole(module: dict[str, torch.Tensor], optimizer: dict[str, Any], adam: dict[str, Any]) -> Pieces:
    """Stage 0: every rank had everything."""
    # Of the wrapper that keeps a float32 copy of every parameter, of the one around FusedAdam that keeps one a group.
    masters = optimizer.get("fp32_groups") or [[flat] for flat in optimizer.get("fp32_groups_flat", [])]
    pieces: Pieces = {}
    for number, group in enumerate(adam["param_groups"]):
        names = group["names"]
        states = [adam["state"][index] for index in group["params"]]
        kept = {WEIGHT: masters[number] if masters else [module[name] for name in names]}
        kept |= {key: [state[key] for state in states] for key in MOMENTS}
        for key, tensors in kept.items():
            singly = _singly(tensors, [module[name].shape for name in names])
            pieces |= {(name, key): [tensor] for name, tensor in zip(names, singly, strict=True)}
    return pieces


def _singly(tensors: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Views of a group's parameters, which are kept one by one or in one flat tensor."""
    if len(tensors) < len(shapes):
        tensors = tensors[0].split([shape.numel() for shape in shapes])
    return [tensor.view(shape) for tensor, shape in zip(tensors, shapes, strict=True)]


def _partitions(shards: list[dict[str, Any]]) -> Pieces:
    """Stages 1 and 2: a group's parameters lie in a row, and each rank has a part of the row."""
    pieces: Pieces = defaultdict(list)
    for shard in shards:
        for number, addresses in enumerate(shard["param_slice_mappings"]):
            flat = {WEIGHT: shard["single_partition_of_fp32_groups"][number]}
            flat |= {key: shard["base_optimizer_state"]["state"][number][key] for key in MOMENTS}
            for name, address in addresses.items():
                for key, tensor in flat.items():
                    pieces[name, key].append(tensor.narrow(0, address.start, address.numel))
    return pieces


def _shards(shards: list[dict[str, Any]], groups: list[dict[str, torch.Size]]) -> Pieces:
    """Stage 3: each rank has a part of every parameter, and zeros behind the last one's."""
    pieces: Pieces = defaultdict(list)
    for shard in shards:
        for number, shapes in enumerate(groups):
            flat = {WEIGHT: shard["fp32_flat_groups"][number]}
            flat |= {key: shard["optimizer_state_dict"]["state"][number][key] for key in MOMENTS}
            sizes = [math.ceil(shape.numel() / len(shards)) for shape in shapes.values()]
            for key, tensor in flat.items():
                for name, piece in zip(shapes, tensor.split(sizes), strict=True):
                    pieces[name, key].append(piece)
    return pieces


# --------------------------------------------------------------------------------------------------------- what it is


def _restore(engine: Any, saved: _Saved) -> None:
    """Weights, Adam's moments and steps, frozen parameters, buffers, the loss scale and DeepSpeed's own counts."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    _begin_adam(engine, saved.step)
    put = {0: _into_whole, 1: _into_partition, 2: _into_partition, 3: _into_shard}[stage](engine)
    for name, parameter in engine.module.named_parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.requires_grad:
            for key in (WEIGHT, *MOMENTS):
                put(name, parameter, key, saved.trained(name, key, numel))
        elif stage == 3:
            parameter.ds_tensor.copy_(_shard(saved.frozen(name, numel), parameter))
        else:
            parameter.copy_(saved.frozen(name, numel).view(parameter.shape))
    # The weights of the forward pass, from those that Adam moves.
    if stage == 3:
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    # By way of the modules, which forget what they know about their buffers.
    buffers = {name: saved.model["module"][name] for name in saved.model["buffer_names"]}
    engine.module.load_state_dict(buffers, strict=False)
    carry_loss_scale(saved.loss_scale, optimizer)
    for count in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, count, saved.model[count])


def _begin_adam(engine: Any, step: int) -> None:
    """Moments of zeros, since before the first step there is nothing to set, and the count of steps."""
    stage, adam = engine.zero_optimization_stage(), engine.basic_optimizer
    # Parameters, their float32 copies, or flat parts of a group.
    masters = [master for group in adam.param_groups for master in group["params"]]
    if stage == 3:  # which shows them to Adam for the time of a step
        masters = engine.optimizer.fp32_partitioned_groups_flat
    in_numbers = isinstance(
        adam, deepspeed.ops.adam.DeepSpeedCPUAdam | deepspeed.ops.adam.FusedAdam
    )  # torch's counts in tensors
    for master in masters:
        adam.state[master] = {
            "step": step if in_numbers else torch.tensor(float(step), device=master.device),
            **{key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS},
        }
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


Put = Callable[[str, nn.Parameter, str, torch.Tensor], None]  # name, parameter, WEIGHT or a moment, (numel,) float32


def _into_whole(engine: Any) -> Put:
    places: dict[tuple[str, str], torch.Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in engine.module.named_parameters()}
    adam = engine.basic_optimizer
    for group in adam.param_groups:
        kept = {WEIGHT: group["params"]}
        kept |= {key: [adam.state[master][key] for master in group["params"]] for key in MOMENTS}
        for key, tensors in kept.items():
            singly = _singly(tensors, [shapes[name] for name in group["names"]])
            places |= {(name, key): tensor for name, tensor in zip(group["names"], singly, strict=True)}

    def put(name: str, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        places[name, key].copy_(value.view(parameter.shape))
        if key == WEIGHT:
            parameter.copy_(places[name, key])

    return put


def _into_partition(engine: Any) -> Put:
    def put(name: str, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if key == WEIGHT:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)

    return put


def _into_shard(engine: Any) -> Put:
    # Not by safe_set_full_*, which runs over the end of a parameter that cannot be divided by the ranks.
    def put(name: str, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if key == WEIGHT:
            deepspeed.utils.safe_set_local_fp32_param(parameter, _shard(value, parameter))
        else:
            deepspeed.utils.safe_set_local_optimizer_state(parameter, _shard(value, parameter), key)

    return put


def _shard(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This rank's part of a flat parameter, with zeros behind the last one's."""
    size = parameter.ds_tensor.numel()
    own = value[dist.get_rank() * size :][:size]
    return nn.functional.pad(own, (0, size - len(own)))


def carry_loss_scale(figures: dict[str, Any], optimizer: Any) -> None:
    """fp16's loss scale, where it was found by trial and is again."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    by_trial = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    if by_trial and figures.get("last_overflow_iter") is not None:
        for name, figure in figures.items():
            if hasattr(scaler, name):
                setattr(scaler, name, figure)
