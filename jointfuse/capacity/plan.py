"""A recipe, a number of ranks and two rates, put together into what a training needs."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from jointfuse.capacity.corpus import CHARACTERS, Corpus, corpus_of
from jointfuse.capacity.memory import Load, load_of, peak
from jointfuse.capacity.pool import Pool, pool_of, share_without_partner, share_without_partner_of
from jointfuse.capacity.rates import Rates, measured_rates
from jointfuse.capacity.rehearsal import Device, Lengths, Rehearsal, rehearse
from jointfuse.capacity.shapes import objective_of_shapes
from jointfuse.capacity.states import Sizes, States, fullest_rank, states
from jointfuse.capacity.wire import Collective, Step, collectives, gathers_more
from jointfuse.capacity.zero import ZeroFile, zero_file
from jointfuse.config import Config, TrainSettings
from jointfuse.data.features import FRAMES_PER_SECOND
from jointfuse.train.engine import Division, divide, ds_config_names, parameter_groups, read_ds_config
from jointfuse.train.objective import Objective

MODES: tuple[str, ...] = get_args(TrainSettings.model_fields["checkpointing"].annotation)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """With one DeepSpeed file: bytes on the fullest rank."""

    file: str
    chosen: bool
    states: States
    peak: int
    peak_in: str


@dataclass(frozen=True)
class Mode:
    """One mode of train.checkpointing, with the recipe's DeepSpeed file."""

    mode: str
    chosen: bool
    activations: Rehearsal
    peak: int


@dataclass(frozen=True)
class Time:
    """Of a step, on one rank: operations and seconds."""

    lengths: Lengths
    training: int  # forward and backward
    again: int  # what checkpointing computes a second time
    beforehand: int  # the forward passes that fill the pool
    contrast: int
    computing: float  # seconds
    communicating: float | None


@dataclass(frozen=True)
class Plan:
    recipe: str
    device: Device
    division: Division
    parts: dict[str, list[int]]  # elements trained and frozen
    corpus: Corpus
    longest: Lengths
    memory: list[Memory]
    modes: list[Mode]
    load: Load
    pool: Pool | None
    share_without_partner: float | None
    wire: list[Collective]
    rates: Rates
    share: float  # of the matmul rate that a step reaches
    time: Time
    assumptions: list[str]

    def as_json(self) -> dict[str, Any]:
        wire = [asdict(one) | {"sent": one.sent(self.division.world_size)} for one in self.wire]
        return asdict(self) | {"wire": wire}


def plan_recipe(
    config: Config, ranks: int, device: Device, classes: int, tera: float | None, giga: float | None, share: float
) -> Plan:
    """As make_plan, with what is not given taken from the corpus and measured on this machine. Raises UserError."""
    divide(config.train, ranks)
    corpus = corpus_of(config, classes)
    precision = zero_file(read_ds_config(config.train)).precision
    return make_plan(config, ranks, device, corpus, measured_rates(tera, giga, DTYPES[precision], ranks), share)


def make_plan(
    config: Config, ranks: int, device: Device, corpus: Corpus, rates: Rates, share: float, vocabulary: int = 0
) -> Plan:
    """Everything about a recipe on so many ranks.

    Args:
        share: of the matmul rate that a step reaches.
        vocabulary: entries of the tokenizer of an encoder from scratch; as many as the recipe allows unless given.

    Raises:
        UserError: a batch that cannot be divided, or a model whose sizes are not known here.
    """
    division = divide(config.train, ranks)
    scratch = config.model.text_encoder.scratch
    vocabulary = vocabulary or (scratch.vocabulary if scratch else 0)
    objective = objective_of_shapes(config, corpus.classes, division.accumulation, vocabulary)
    sizes, parts, step = _sizes(objective, config), _parts(objective), _step(objective, config, division)
    files = comparable_files(config.train)
    file = files[config.train.deepspeed]
    objective.to(DTYPES[file.precision])
    longest = Lengths(config.data.max_tokens, 1 + round(config.data.max_seconds * FRAMES_PER_SECOND))
    pool = pool_of(step, ranks, config.loss.queue)
    load = load_of(step, longest, pool, device)
    on_gpu, accumulates = device == "gpu", step.micro_steps > 1
    modes, memory = [], []
    rehearsed = {mode: rehearse(objective, step.rows, longest, mode, device) for mode in MODES}
    for name, one in files.items():
        found = states(one, sizes, ranks, fullest_rank(one, sizes, ranks), accumulates, on_gpu)
        most = peak(one, found, rehearsed[config.train.checkpointing], load, step, device)
        memory.append(Memory(name, one is file, found, *most))
        if one is file:
            for mode, activations in rehearsed.items():
                most = peak(one, found, activations, load, step, device)
                modes.append(Mode(mode, mode == config.train.checkpointing, activations, most[0]))
    wire = collectives(file, sizes, ranks, step)
    lengths = corpus.mean or longest
    plain, chosen = (
        rehearse(objective, step.rows, lengths, mode, device) for mode in ("none", config.train.checkpointing)
    )
    return Plan(
        recipe=config.recipe,
        device=device,
        division=division,
        parts=parts,
        corpus=corpus,
        longest=longest,
        memory=memory,
        modes=modes,
        load=load,
        pool=pool,
        share_without_partner=_alone(corpus, pool) if pool else None,
        wire=wire,
        rates=rates,
        share=share,
        time=_time(step, plain, chosen, pool, lengths, rates, share, sum(one.sent(ranks) for one in wire)),
        assumptions=_assumptions(config, device, corpus, file, step),
    )


def comparable_files(settings: TrainSettings) -> dict[str, ZeroFile]:
    """The recipe's DeepSpeed file and the shipped ones of its precision, in the order of their stages."""
    own = zero_file(read_ds_config(settings))
    found = {settings.deepspeed: own}
    for name in ds_config_names():
        other = zero_file(read_ds_config(settings.model_copy(update={"deepspeed": name})))
        if other.precision == own.precision:
            found.setdefault(name, other)
    return dict(sorted(found.items(), key=lambda item: (item[1].stage, item[1].host_optimizer)))


def _sizes(objective: Objective, config: Config) -> Sizes:
    groups = parameter_groups(objective, config.train)
    frozen = [parameter.numel() for parameter in objective.parameters() if not parameter.requires_grad]
    return Sizes([[parameter.numel() for parameter in group["params"]] for group in groups], frozen)


def _parts(objective: Objective) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for part, _, parameter in objective.network.parts():
        found[part][not parameter.requires_grad] += parameter.numel()
    temperature = objective.trained_temperature
    if temperature is not None:
        found["temperature"][not temperature.requires_grad] += temperature.numel()
    return dict(found)


def _step(objective: Objective, config: Config, division: Division) -> Step:
    temperature = objective.trained_temperature
    return Step(
        rows=division.micro_batch,
        micro_steps=division.accumulation,
        pool=config.loss.pool,
        width=objective.network.feature_width if objective.contrast else 0,
        temperature=int(temperature is not None and temperature.requires_grad),
        hears=objective.network.reads_audio,
        clips=config.train.clip > 0,
        skips=config.data.on_error == "skip",
    )


def _alone(corpus: Corpus, pool: Pool) -> float:
    if corpus.counts:
        return share_without_partner(corpus.counts, pool.keys)
    return share_without_partner_of(corpus.shares, pool.keys)


def _time(
    step: Step,
    plain: Rehearsal,
    chosen: Rehearsal,
    pool: Pool | None,
    lengths: Lengths,
    rates: Rates,
    share: float,
    sent: int,
) -> Time:
    training = step.micro_steps * (plain.forward + plain.backward)
    again = step.micro_steps * (chosen.forward + chosen.backward) - training
    beforehand = step.micro_steps * plain.forward * step.pools_beforehand
    contrast = pool.a_step * pool.operations(step.width) if pool else 0
    computing = (training + again + beforehand + contrast) / (rates.operations * share)
    communicating = sent / rates.bandwidth if rates.bandwidth else (None if sent else 0.0)
    return Time(lengths, training, again, beforehand, contrast, computing, communicating)


def _assumptions(config: Config, device: Device, corpus: Corpus, file: ZeroFile, step: Step) -> list[str]:
    data, said = config.data, []
    said.append(f"memory: every text has {data.max_tokens} tokens and every clip {data.max_seconds:g} s")
    if device == "gpu":
        said.append("memory not counted: the CUDA context, NCCL's buffers, what the allocator cannot use again")
    else:
        said.append("memory not counted: the interpreter and its libraries, decoding processes, fragments of the heap")
    if config.train.compile:
        said.append("train.compile keeps less than is counted here")
    if config.model.text_encoder.scratch and config.model.modality != "audio":
        said.append(f"a tokenizer of all {config.model.text_encoder.scratch.vocabulary} entries")
    if corpus.mean:
        said.append(f"time: mean lengths of {corpus.name}, {CHARACTERS} characters a token, no padding")
    else:
        said.append("time: as long as memory's; with data.corpus, its mean lengths")
    said.append("time: what is sent goes round one ring of all ranks at one rate, latency left out")
    if gathers_more(file, step):
        said.append(
            "ZeRO-3 with loss.pool=step in several micro-batches gathers some parameters at every use: "
            "more bytes than are counted here (loss.pool=micro does not)"
        )
    if step.width and corpus.counts:
        said.append("partners: a pool is drawn from the training split at random, without replacement")
    elif step.width and corpus.name:
        said.append("partners: classes are drawn one by one, by their shares under data.balance and the weights")
    elif step.width:
        said.append(f"partners: {corpus.classes} classes, all as frequent; with data.corpus, its own")
    return said
