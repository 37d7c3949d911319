"""All settings of a run: YAML recipes load into these models, `section.key=value` overrides land in them.

A setting lives in exactly one place. Stage, offload and precision belong to the DeepSpeed file named by
`train.deepspeed`; batch, accumulation, clipping and learning rates belong to the recipe.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jointfuse.errors import UserError
from jointfuse.faults import blame, find_fault, neighbour
from jointfuse.files import read_yaml
from jointfuse.overrides import overridden
from jointfuse.patience import PATIENCE

Part = Literal[
    "text_encoder",  # the encoder whose hidden state enters the extractor
    "extractor",  # the two transformer layers behind it
    "language_stem",  # language layers run on the text alone before fusion
    "language",  # LTrans of equations (2) and (3)
    "vision_embed",  # patch projection, [CLS] and positions
    "vision_stem",  # vision layers run on the audio alone before fusion
    "vision",  # VTrans of equations (1) and (4), and the final norm
    "joint",  # v, u, f and g
    "heads",
    "temperature",
]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AugmentSettings(Settings):
    """How training clips are varied, drawn anew for every utterance in every epoch. All of it is off unless set."""

    speed: Share = Field(0.0, description="playback is up to this share slower or faster, pitch with it", le=0.5)
    noise: tuple[float, float] | None = Field(None, description="white noise, at signal-to-noise ratios in dB")
    gain: NotNegative = Field(0.0, description="up to so many dB softer or louder")
    bin_masks: tuple[Count, Annotated[int, Field(gt=0, le=20)]] = Field(
        (0, 12), description="how many bands of mel bins are set to the corpus mean, and the widest"
    )
    frame_masks: tuple[Count, Positive] = Field((0, 30), description="the same of frames; a quarter of a clip at most")

    @field_validator("noise")
    @classmethod
    def _range_is_ordered(cls, noise: tuple[float, float] | None) -> tuple[float, float] | None:
        if noise and not -20 <= noise[0] <= noise[1] <= 120:
            raise ValueError("write [lowest, highest], each between -20 and 120 dB")
        return noise


class MixSettings(Settings):
    """One of several corpora that are trained on together."""

    corpus: str = Field(min_length=1, description="folder made by tools/build_shards.py")
    weight: Rate | None = Field(
        None, description="its share of an epoch, against the others'; every utterance once where none has one"
    )
    remote: str = Field("", description="as data.remote")


class DataSettings(Settings):
    """What is read, and how much of each utterance."""

    corpus: str = Field("", description="folder made by tools/build_shards.py")
    mix: list[MixSettings] = Field([], description="several corpora read as one; takes the place of corpus")
    labels: dict[str, str | None] = Field(
        {}, description="labels under other names, alike where they have one name; null leaves utterances out"
    )
    remote: str = Field(
        "",
        description="where tars lie that are not in the corpus: URL, or pipe: and command, with {split} and {shard}",
    )
    cache: str = Field("", description="with remote: folder on a local disk that keeps tars; all ranks may share it")
    cache_gib: Rate = Field(100.0, description="the most it holds; let it hold the tars of two shuffle blocks")
    balance: Literal["none", "sqrt", "class"] = Field(
        "none", description="draw rare classes more often: all alike, or by the square root of their numbers"
    )
    shuffle_block: Positive = Field(2**16, description="utterances shuffled together, in whole shards")
    max_seconds: Rate = Field(10.0, description="longer clips are cut, counted and reported", le=120)
    max_tokens: Positive = Field(128, description="longer texts are cut, counted and reported", ge=4)
    context: Count = Field(0, description="turns of the dialogue before an utterance that are put before its text")
    speakers: Literal["none", "names", "tags"] = Field(
        "none", description="put before each text who speaks: the corpus's names, or A, B, C as they come"
    )
    missing_modality: Literal["error", "allow"] = Field(
        "error", description="allow: a sample without clip or text goes through the modality it has"
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="skip: a training utterance that cannot be read is left out, counted and named"
    )
    patience: NotNegative = Field(
        PATIENCE, description="seconds for a disk or server that is away to come back, until the run ends"
    )
    most_skipped: Share = Field(0.01, description="share of an epoch that may be skipped until the run ends")
    verify: bool = Field(
        False, description="read every tar before the first step and compare its SHA-256 with corpus.json"
    )
    workers: Count = Field(1, description="decoding processes a rank")
    augment: AugmentSettings = AugmentSettings()

    @model_validator(mode="after")
    def _corpora_are_named_once(self) -> Self:
        if self.mix and (self.corpus or self.remote):
            raise ValueError("give either corpus (and remote) or mix, one of the two")
        if len({one.corpus for one in self.mix}) < len(self.mix):
            raise ValueError("mix names a corpus twice; a weight makes it count more")
        if len({one.weight is None for one in self.mix}) > 1:
            raise ValueError("mix gives some corpora a weight and others none; give it to all or to none")
        return self


class ScratchSettings(Settings):
    """A transformer built from random weights."""

    width: Positive
    layers: Positive
    heads: Positive
    vocabulary: Positive = Field(
        1000, description="text encoder only: size of the BPE vocabulary trained on the corpus"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class BackboneSettings(Settings):
    """Pretrained weights (a hub name or a local folder) or a transformer from scratch; exactly one of the two."""

    weights: str | None = None
    scratch: ScratchSettings | None = None
    dropout: Share | None = Field(None, description="the checkpoint's own unless set; none from scratch")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.weights is None) == (self.scratch is None):
            raise ValueError("give either weights (a hub name or a local folder) or scratch (sizes), one of the two")
        return self


class TextEncoderSettings(BackboneSettings):
    hidden_state: Positive | None = Field(None, description="which layer's output is used; the last one unless set")


class ExtractorSettings(Settings):
    """Feature extractor: linear d_enc -> width, transformer layers, linear width -> d_t. With 0 layers it is absent."""

    layers: Count = 2
    heads: Positive = 8
    width: Positive = 1024
    dropout: Share = 0.1

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class StreamSettings(BackboneSettings):
    """Where LTrans or VTrans come from: `blocks` layers of the checkpoint, after `stem_layers` unimodal ones."""

    layers: Literal["first", "last"] = "first"
    stem_layers: Count = 0


class VisionSettings(StreamSettings):
    patch: tuple[Positive, Positive] = Field((16, 16), description="mel bins x frames")
    drop_path: Share = Field(0.0, description="stochastic depth of the vision layers")

    @field_validator("patch")
    @classmethod
    def _patch_divides_bins(cls, patch: tuple[int, int]) -> tuple[int, int]:
        if 80 % patch[0]:
            raise ValueError("its first number must divide the 80 mel bins")
        return patch


class ModelSettings(Settings):
    modality: Literal["both", "text", "audio"] = "both"
    text_encoder: TextEncoderSettings
    extractor: ExtractorSettings = ExtractorSettings()
    language: StreamSettings
    vision: VisionSettings
    joint_vectors: Count = Field(4, description="J; 0 leaves two independent stacks")
    blocks: Positive = Field(2, description="N joint-fusion blocks")
    routing: Literal["modality", "literal"] = "modality"
    dropout: Share = Field(0.0, description="dropout before the classification heads")


class LossSettings(Settings):
    icl_weight: NotNegative = Field(1.0, description="L = L_ERC + icl_weight * L_ICL")
    temperature: Rate = 0.1
    train_temperature: bool = False
    normalize: bool = Field(True, description="false: the paper's raw dot products")
    pool: Literal["step", "micro", "queue"] = Field(
        "step",
        description="who meets whom: all utterances of a step, those of a micro-batch over all ranks, or the latter "
        "and past ones",
    )
    queue: Count = Field(0, description="past features that stay keys, with pool: queue")
    backend: Literal["auto", "reference", "tiled", "triton"] = "auto"

    @model_validator(mode="after")
    def _queue_has_a_length(self) -> Self:
        if (self.pool == "queue") != (self.queue > 0):
            raise ValueError("pool: queue and a queue longer than 0 go together; set both or neither")
        return self


class TrainSettings(Settings):
    seed: Count = 0
    deepspeed: str = Field("zero2", description="a file of ds_configs/ by name, or a path to a JSON file")
    batch: Positive = Field(32, description="utterances a step, over all ranks and accumulation")
    micro_batch: Positive | None = Field(None, description="utterances a rank holds at once; batch / ranks unless set")
    epochs: Positive | None = None
    steps: Positive | None = None
    evaluate_every: str = "1 epoch"
    save_every: str = "1 epoch"
    log_every: Positive = Field(10, description="steps; a line of the log holds their means")
    record_batches: bool = Field(False, description="every rank writes down which utterances each step had")
    keep_checkpoints: Positive = 2
    save_async: bool = Field(False, description="train on while a checkpoint is written; it takes as much host memory")
    choose_by: Literal["weighted_f1", "macro_f1", "accuracy", "last"] = Field(
        "weighted_f1",
        description="dev score by which the model is chosen; last: the model at the end, where dev is too small",
    )
    patience: Positive | None = Field(None, description="stop after so many evaluations on dev without a better one")
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: Rate = 1e-4
    part_lr: dict[Part, Rate] = Field({}, description="learning rates of single parts")
    freeze: list[Part] = Field(["text_encoder"], description="parts that are not trained")
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: Rate = 1e-8
    weight_decay: NotNegative = Field(0.0, description="never on norms, biases and temperature")
    warmup: Share = Field(0.1, description="share of the steps in which the learning rate rises")
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: NotNegative = Field(1.0, description="largest gradient norm; 0 turns clipping off")
    checkpointing: Literal["none", "block", "attention", "layer"] = Field(
        "none",
        description="what the backward pass computes again: fused blocks and unimodal layers as a whole (block), the "
        "same but for attention (attention), or fused blocks in parts (layer)",
    )
    most_broken: Count = Field(
        5, description="steps in a row whose loss or gradient is not finite; they are skipped, one more ends the run"
    )
    longest_step: Rate = Field(
        1800.0, description="seconds for a step with the evaluation and checkpoint behind it, until the run is given up"
    )
    compile: bool = Field(
        False,
        description="fuse what lies between the matrix products with torch.compile: minutes at the start, faster steps "
        "(ZeRO 0 to 2, checkpointing none or block)",
    )
    init_from: str | None = Field(None, description="folder of an exported model (RUN/best) to start from")

    @field_validator("evaluate_every", "save_every")
    @classmethod
    def _interval(cls, text: str) -> str:
        parse_interval(text)
        return text

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps, one of the two")
        return self

    @model_validator(mode="after")
    def _patience_waits_for_a_score(self) -> Self:
        if self.patience and self.choose_by == "last":
            raise ValueError("patience waits for a better dev score, and choose_by: last chooses by none; drop one")
        return self


class Config(Settings):
    """The resolved settings of one run."""

    recipe: str = ""
    data: DataSettings = DataSettings()
    model: ModelSettings
    loss: LossSettings = LossSettings()
    train: TrainSettings

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.train.micro_batch and self.train.batch % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} does not divide train.batch {self.train.batch}"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def parse_interval(text: str) -> tuple[int, Literal["epoch", "step"]]:
    """'1 epoch', '200 steps' -> (count, unit). Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([1-9]\d*)\s+(epoch|step)s?\s*", text)
    if not match:
        raise ValueError("write a number and a unit: '1 epoch', '3 epochs' or '200 steps'")
    unit: Literal["epoch", "step"] = "epoch" if match[2] == "epoch" else "step"
    return int(match[1]), unit


RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe by name or path, with `section.key=value` overrides on top.

    Raises:
        UserError: an unknown recipe or key (its nearest neighbour is named), a wrong value (key, value and what is
            allowed are named), a file that is not YAML. It is told of the override where it is an override's.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
        if not path.exists():
            raise UserError(
                f"there is no recipe '{recipe}'{neighbour(recipe, recipe_names())}; "
                f"recipes: {', '.join(recipe_names())}, or a path to a .yaml file"
            )
    recipe_tree = read_yaml(path, "a recipe has the sections data, model, loss and train")
    recipe_tree.setdefault("recipe", path.stem)
    return _config_of(recipe_tree, str(path), overrides)


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Settings with `section.key=value` overrides on top. Raises UserError as `load_config`."""
    return _config_of(config.model_dump(mode="json"), f"settings of {config.recipe}", overrides)


def _config_of(tree: dict[str, Any], origin: str, overrides: Sequence[str]) -> Config:
    whole = overridden(tree, overrides)
    fault = find_fault(whole, Config)
    if fault:
        raise UserError(f"{blame(fault, Config, tree, origin, overrides)}: {fault.message}")
    return Config.model_validate(whole)


def validate(tree: dict[str, Any], origin: str, way_out: str = "") -> Config:
    """The settings in `tree`. Raises UserError naming `origin`, the key, the value and what is allowed, and `way_out`
    where no person has written them."""
    fault = find_fault(tree, Config)
    if fault:
        raise UserError(f"{origin}: {fault.message}{f'; {way_out}' if way_out else ''}")
    return Config.model_validate(tree)


def changed_keys(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
