"""A recipe, a number of ranks and two rates, put together into what a training needs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from jointfuse.capacity.corpus import CHARACTERS, Corpus, corpus_of
from jointfuse.capacity.memory import Load, load_of, peak
from jointfuse.capacity.pool import Pool, pool_of, share_without_partner
from jointfuse.capacity.rates import Rates, measured_rates
from jointfuse.capacity.rehearsal import Device, Lengths, Rehearsal, rehearse
from jointfuse.capacity.shapes import objective_of_shapes
from jointfuse.capacity.states import Sizes, States, fullest_rank, states
from jointfuse.capacity.wire import Collective, Step, collectives, gathers_more
from jointfuse.capacity.zero import ZeroFile, zero_file
from jointfuse.config import Config, TrainSettings
from jointfuse.data.mel import FRAMES_PER_SECOND
from jointfuse.train.deepspeed_file import deepspeed_file_names, read_deepspeed_file, slow_precision
from jointfuse.train.engine import Division, divide, parameter_groups
from jointfuse.train.objective import Objective

MODES: tuple[str, ...] = get_args(TrainSettings.model_fields["checkpointing"].annotation)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """With one DeepSpeed file: bytes on the fullest rank."""

    states: States
    peak: int
    peak_in: str


@dataclass(frozen=True)
class Plan:
    config: Config
    device: Device
    division: Division
    sizes: Sizes
    corpus: Corpus
    longest: Lengths
    memory: dict[str, Memory]  # by DeepSpeed file, with the recipe's checkpointing
    activations: dict[str, Rehearsal]  # by mode of checkpointing
    peaks: dict[str, int]  # by mode of checkpointing, with the recipe's DeepSpeed file
    load: Load
    pool: Pool | None
    share_without_partner: float
    wire: list[Collective]
    rates: Rates
    lengths: Lengths  # those of which the time is told
    operations: dict[str, int]  # of a step, on one rank
    assumptions: list[str]

    @property
    def sent(self) -> int:
        """Bytes that leave a rank in a step."""
        return sum(one.sent(self.division.world_size) for one in self.wire)

    @property
    def communicating(self) -> float | None:
        """Seconds of a step; None: no rate is known."""
        return self.sent / self.rates.bandwidth if self.rates.bandwidth else (None if self.sent else 0.0)


def plan_recipe(
    config: Config,
    ranks: int,
    device: Device,
    counts: Sequence[int],
    tera: float | None,
    giga: float | None,
    share: float,
) -> Plan:
    """As make_plan, with what is not given taken from the corpus and measured on this machine. A recipe with fewer
    utterances in a batch than there are ranks gets a micro-batch for each of them. Raises UserError."""
    settings, said = config.train, []
    if settings.batch < ranks:
        batch = ranks * (settings.micro_batch or 1)
        said.append(f"train.batch={batch}: a micro-batch a rank, since the recipe's {settings.batch} are too few")
        config = config.model_copy(update={"train": settings.model_copy(update={"batch": batch})})
    divide(config.train, ranks)
    corpus = corpus_of(config, counts)
    file = read_deepspeed_file(config.train)
    if slow := slow_precision(file, device):
        said.append(slow)
    plan = make_plan(config, ranks, device, corpus, measured_rates(tera, giga, share, DTYPES[file.precision], ranks))
    return replace(plan, assumptions=[*said, *plan.assumptions])


def make_plan(
    config: Config, ranks: int, device: Device, corpus: Corpus, rates: Rates, vocabulary: int | None = None
) -> Plan:
    """Everything about a recipe on so many ranks.

    Args:
        vocabulary: entries of the tokenizer of an encoder from scratch; as many as the recipe allows unless given.

    Raises:
        UserError: a batch that cannot be divided, or a model whose sizes are not known here.
    """
    settings, division = config.train, divide(config.train, ranks)
    objective = objective_of_shapes(config, len(corpus.counts), division.accumulation, vocabulary)
    sizes, step = _sizes(objective, config), _step(objective, config, division)
    files = comparable_files(settings)
    file = files[settings.deepspeed]
    objective.to(DTYPES[file.precision])
    longest = Lengths(config.data.max_tokens, 1 + round(config.data.max_seconds * FRAMES_PER_SECOND))
    lengths = corpus.mean or longest
    pool = pool_of(step, ranks, config.loss.queue)
    load = load_of(step, longest, pool, device)
    activations = {mode: rehearse(objective, step.rows, longest, mode, device) for mode in MODES}
    timed = activations
    if lengths != longest:
        timed = {
            mode: rehearse(objective, step.rows, lengths, mode, device) for mode in {"none", settings.checkpointing}
        }

    def memory(one: ZeroFile, mode: str) -> Memory:
        rank = fullest_rank(one, sizes, ranks)
        found = states(one, sizes, ranks, rank, accumulates=step.micro_steps > 1, on_gpu=device == "gpu")
        return Memory(found, *peak(one, found, activations[mode], load, step, device))

    return Plan(
        config=config,
        device=device,
        division=division,
        sizes=sizes,
        corpus=corpus,
        longest=longest,
        memory={name: memory(one, settings.checkpointing) for name, one in files.items()},
        activations=activations,
        peaks={mode: memory(file, mode).peak for mode in MODES},
        load=load,
        pool=pool,
        share_without_partner=share_without_partner(corpus.counts, pool.keys, corpus.shares) if pool else 0.0,
        wire=collectives(file, sizes, ranks, step),
        rates=rates,
        lengths=lengths,
        operations=_operations(step, timed["none"], timed[settings.checkpointing], pool),
        assumptions=_assumptions(config, device, corpus, file, step),
    )


def comparable_files(settings: TrainSettings) -> dict[str, ZeroFile]:
    """The recipe's DeepSpeed file and the shipped ones of its precision, in the order of their stages."""
    own = zero_file(read_deepspeed_file(settings))
    found = {settings.deepspeed: own}
    for name in deepspeed_file_names():
        other = zero_file(read_deepspeed_file(settings.model_copy(update={"deepspeed": name})))
        if other.precision == own.precision:
            found.setdefault(name, other)
    return dict(sorted(found.items(), key=lambda item: (item[1].stage, item[1].host_optimizer)))


def _sizes(objective: Objective, config: Config) -> Sizes:
    groups = parameter_groups(objective, config.train)
    frozen = [parameter.numel() for parameter in objective.parameters() if not parameter.requires_grad]
    return Sizes([[parameter.numel() for parameter in group["params"]] for group in groups], frozen)


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


def _operations(step: Step, plain: Rehearsal, chosen: Rehearsal, pool: Pool | None) -> dict[str, int]:
    training = step.micro_steps * (plain.forward + plain.backward)
    found = {
        "forward and backward": training,
        "computed a second time": step.micro_steps * (chosen.forward + chosen.backward) - training,
        "forward beforehand, for the pool": step.micro_steps * plain.forward * step.pools_beforehand,
        "contrastive loss": pool.a_step * pool.operations(step.width) if pool else 0,
    }
    return {what: number for what, number in found.items() if number}


def _assumptions(config: Config, device: Device, corpus: Corpus, file: ZeroFile, step: Step) -> list[str]:
    data = config.data
    said = [f"memory: every text has {data.max_tokens} tokens and every clip {data.max_seconds:g} s"]
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
        said.append("time: utterances as long as memory's; with data.corpus, of its mean lengths")
    said.append("time: what is sent goes round one ring of all ranks at one rate, latency left out")
    if gathers_more(file, step):
        said.append(
            "ZeRO-3 with loss.pool=step in several micro-batches gathers some parameters at every use: "
            "more bytes than are counted here (loss.pool=micro does not)"
        )
    if step.width:
        whose = f"in {corpus.name}" if corpus.name else "given (--counts); with data.corpus, its own"
        drawn = "one by one, as data.balance and the corpora's weights have it" if corpus.shares else "each once"
        said.append(f"partners: utterances of each class as {whose}; drawn at random, {drawn}")
    return said
