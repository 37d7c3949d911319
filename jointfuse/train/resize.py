"""A checkpoint of another number of ranks, ZeRO stage, offload or device, read into this run's engine.

before       whole weights and moments                        after
stage 0      as they lie in the file                          stage 0      copied
stage 1-3    DeepSpeed's own conversion, in a folder beside   stage 1-3    DeepSpeed's setters

DeepSpeed's own loading of its conversion goes neither to stage 0 nor between {1, 2} and 3. A parameter is read when it
is set, so that no rank holds the moments of a whole model twice.
"""

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from torch.utils.serialization import config as serialization

from jointfuse.config import Config
from jointfuse.errors import UserError
from jointfuse.train.engine import Layout, divide, read_ds_config

# What the conversion asks of every checkpoint of stage 1 or 2, in the client state.
CONVERTIBLE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
SCRATCH = ".resize"
LONGEST = timedelta(hours=12)  # a conversion, while the other ranks wait
WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


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
    zero = read_ds_config(config.train).get("zero_optimization", {})
    on_nvme = any(zero.get(key, {}).get("device") == "nvme" for key in ("offload_optimizer", "offload_param"))
    if before != now and (on_nvme or (checkpoint / "offloaded_tensors").exists()):
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
        f"{checkpoint}: loss.pool = {config.loss.pool} had {old} utterances of all ranks, this run's has {new}; resume "
        f"with {way_out}"
    )


def described(before: Layout, now: Layout) -> str:
    """What was converted, for the line that says where a run goes on; empty where nothing was."""
    if before == now:
        return ""
    if str(before) == str(now):
        return f", from {before} on another device or with another DeepSpeed file"
    return f", from {before} to {now}"


def load_resized(engine: Any, checkpoint: Path, before: Layout, now: Layout) -> None:
    """Every rank calls it. Reads only what this run's own ranks wrote.

    Raises:
        UserError: the files are damaged or missing; the checkpoint is as it was.
    """
    with _converted(checkpoint, before, now) as whole:
        saved = _Saved(checkpoint, before, whole)
        with torch.no_grad():
            _restore(engine, saved)


def forget_conversion(checkpoints: Path) -> None:
    """What a process killed while it converted has left."""
    shutil.rmtree(checkpoints / SCRATCH, ignore_errors=True)


@contextlib.contextmanager
def _converted(checkpoint: Path, before: Layout, now: Layout) -> Iterator[Path]:
    """The folder of DeepSpeed's conversion while the body runs; empty for stage 0."""
    first = dist.get_rank() == 0
    # The default group's ranks give each other up after some minutes.
    patient = dist.new_group(backend="gloo", timeout=LONGEST)
    fault: list[str | None] = [None]
    try:
        if first:
            try:
                _convert(checkpoint, before)
            except Exception as error:  # whatever it is, the other ranks must hear of it
                fault = [f"{type(error).__name__}: {error}".splitlines()[0]]
        dist.broadcast_object_list(fault, src=0, group=patient)
        if fault[0]:
            raise UserError(
                f"{checkpoint} cannot be converted from {before} to {now} ({fault[0]}); resume as it was written, with "
                f"--ranks {before.world_size}, or from another checkpoint of the run"
            )
        yield checkpoint.parent / SCRATCH / "whole" / "zero"
        dist.barrier(patient)  # every rank has read
    finally:
        if first:
            forget_conversion(checkpoint.parent)
        dist.destroy_process_group(patient)


def _convert(checkpoint: Path, before: Layout) -> None:
    """PARAMETER/{fp32,exp_avg,exp_avg_sq}.pt, whole and in float32, from the shards of stages 1 to 3."""
    if before.stage == 0:
        return
    scratch = checkpoint.parent / SCRATCH
    scratch.mkdir()
    arguments = Namespace(
        input_folder=f"../{checkpoint.name}",
        output_folder="whole",
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    silence = io.StringIO()
    with (
        # It takes paths for patterns: a run's own name must not be part of them.
        contextlib.chdir(scratch),
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
        serialization.patch({"load.mmap": True}),  # type: ignore[attr-defined]  # put there when it is imported
    ):
        ds_to_universal.main(arguments)


def _read(path: Path) -> Any:
    """Tensors stay in the file until they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


class _Saved:
    """What a checkpoint holds, whatever wrote it."""

    def __init__(self, checkpoint: Path, before: Layout, whole: Path) -> None:
        self.whole, self.stage = whole, before.stage
        sharded = [f"zero_pp_rank_{rank}_" for rank in range(before.world_size)] if before.stage == 3 else [""]
        self.models = [_read(checkpoint / f"{prefix}mp_rank_00_model_states.pt") for prefix in sharded]
        self.model = self.models[0]
        if before.stage:
            (file,) = checkpoint.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")  # of BF16_Optimizer: bf16_zero_...
            self.optimizer = _read(file)["optimizer_state_dict"]
            adam = self.optimizer["optimizer_state_dict" if before.stage == 3 else "base_optimizer_state"]
        else:
            self.optimizer = self.model["optimizer"]
            adam = self.optimizer.get("optimizer_state_dict", self.optimizer)  # in the wrapper of bf16 and fp16
            self.unsharded = self._stage_0(adam)
        self.step = int(next(iter(adam["state"].values()))["step"])
        # A LossScaler object of stages 1 to 3; stage 0 has its figures beside the rest.
        scaler = self.optimizer.get("loss_scaler")
        figures = vars(scaler) if scaler else self.optimizer
        self.loss_scale = {name: figures[name] for name in LOSS_SCALE if name in figures}

    def _stage_0(self, adam: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
        module = self.model["module"]
        masters = self.optimizer.get("fp32_groups") or [[flat] for flat in self.optimizer.get("fp32_groups_flat", [])]
        found: dict[tuple[str, str], torch.Tensor] = {}
        for number, group in enumerate(adam["param_groups"]):
            names, shapes = group["names"], [module[name].shape for name in group["names"]]
            states = [adam["state"][index] for index in group["params"]]
            kept = {WEIGHT: masters[number] if masters else [module[name] for name in names]}
            kept |= {key: [state[key] for state in states] for key in MOMENTS}
            for key, tensors in kept.items():
                found |= {(name, key): view for name, view in zip(names, _singly(tensors, shapes), strict=True)}
        return found

    def trained(self, name: str, key: str) -> torch.Tensor:
        """float32, of any shape."""
        if self.stage == 0:
            return self.unsharded[name, key]
        kept = _read(self.whole / name / f"{key}.pt")
        tensor: torch.Tensor = kept["param"] if isinstance(kept, dict) else kept
        return tensor

    def frozen(self, name: str) -> torch.Tensor:
        """In the precision of training, flat; from stage 3 with the padding of its shards at the end."""
        if self.stage == 3:
            return torch.cat([model["frozen_param_fragments"][name].flatten() for model in self.models])
        tensor: torch.Tensor = self.model["module"][name]
        return tensor.flatten()


def _singly(tensors: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Views of a group's parameters, kept one by one or (by the wrapper around FusedAdam) in one flat tensor."""
    if len(tensors) < len(shapes):
        tensors = tensors[0].split([shape.numel() for shape in shapes])
    return [tensor.view(shape) for tensor, shape in zip(tensors, shapes, strict=True)]


def _restore(engine: Any, saved: _Saved) -> None:
    """Weights, Adam's moments and steps, frozen parameters, buffers, the loss scale and DeepSpeed's own counts."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
    _begin_adam(engine, saved.step)
    put = {0: _into_whole, 1: _into_partition, 2: _into_partition, 3: _into_shard}[stage](engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in (WEIGHT, *MOMENTS):
                put(name, parameter, key, saved.trained(name, key))
        else:
            _thaw(parameter, saved.frozen(name))
    # Weights of the forward pass from those that Adam moves.
    if stage == 3:
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        optimizer.update_lp_params()
    # Through the modules: they forget what they know about their buffers.
    buffers = {name: saved.model["module"][name] for name in saved.model["buffer_names"]}
    engine.module.load_state_dict(buffers, strict=False)
    scale_loss(optimizer, saved.loss_scale)
    for count in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, count, saved.model[count])


def _masters(engine: Any) -> list[torch.Tensor]:
    """What this rank's Adam moves: parameters, their float32 copies, or flat parts of all of a group's."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [master for group in engine.basic_optimizer.param_groups for master in group["params"]]


def _begin_adam(engine: Any, step: int) -> None:
    """Moments as before the first step, which nothing can be set into until they exist, and the count of steps."""
    adam = engine.basic_optimizer
    counts = isinstance(adam, DeepSpeedCPUAdam | FusedAdam)  # in a number; torch's in a tensor
    for master in _masters(engine):
        adam.state[master] = {
            "step": step if counts else torch.tensor(float(step), device=master.device),
            **{key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


Put = Callable[[str, nn.Parameter, str, torch.Tensor], None]


def _into_whole(engine: Any) -> Put:
    places: dict[tuple[str, str], torch.Tensor] = {}
    shapes = {name: parameter.shape for name, parameter in engine.module.named_parameters()}
    adam = engine.basic_optimizer
    for group in adam.param_groups:
        for key in (WEIGHT, *MOMENTS):
            masters = group["params"]
            tensors = masters if key == WEIGHT else [adam.state[master][key] for master in masters]
            views = _singly(tensors, [shapes[name] for name in group["names"]])
            places |= {(name, key): view for name, view in zip(group["names"], views, strict=True)}

    def put(name: str, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        places[name, key].copy_(value.view(parameter.shape))
        if key == WEIGHT:
            parameter.copy_(places[name, key])

    return put


def _into_partition(engine: Any) -> Put:
    def put(name: str, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    return put


def _into_shard(engine: Any) -> Put:
    # Not through safe_set_full_*: those run over the end of a parameter that the ranks do not divide.
    def put(name: str, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, _shard(value, parameter))
        else:
            safe_set_local_optimizer_state(parameter, _shard(value, parameter), key)

    return put


def _shard(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This rank's part of a whole parameter, padded as ZeRO-3 pads it."""
    size = parameter.ds_tensor.numel()
    flat = value.flatten()[: parameter.ds_numel]
    return nn.functional.pad(flat, (0, size * dist.get_world_size() - len(flat)))[dist.get_rank() * size :][:size]


def _thaw(parameter: Any, value: torch.Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        parameter.ds_tensor.copy_(_shard(value, parameter))
    else:
        parameter.copy_(value[: parameter.numel()].view(parameter.shape))


def scale_loss(optimizer: Any, figures: dict[str, Any]) -> None:
    """Carry fp16's loss scale over, where it is found by trial before and now."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    by_trial = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    if by_trial and figures.get("last_overflow_iter") is not None:
        for name, figure in figures.items():
            if hasattr(scaler, name):
                setattr(scaler, name, figure)
