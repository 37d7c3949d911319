"""The model a recipe trains, as shapes: on the meta device, without weights and without the hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from jointfuse.config import BackboneSettings, Config
from jointfuse.data.mel import FRAMES_PER_SECOND
from jointfuse.model.backbones import Description, pretrained_config, vision_backbone
from jointfuse.model.network import Network
from jointfuse.train.objective import Objective

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MINI = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
ROBERTA = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
BERT = {"model_type": "bert", "vocab_size": 30522}
# Of the names that recipes use, so that planning needs no network; what is left out is transformers' default.
KNOWN: dict[str, dict[str, Any]] = {
    "roberta-base": ROBERTA,
    "roberta-large": ROBERTA | LARGE,
    "bert-base-uncased": BERT,
    "bert-large-uncased": BERT | LARGE,
    "all-MiniLM-L6-v2": BERT | MINI,
}


def objective_of_shapes(config: Config, classes: int, accumulation: int, vocabulary: int | None = None) -> Objective:
    """What DeepSpeed would train, on the meta device, frozen as the recipe says.

    Args:
        classes: C.
        vocabulary: of an encoder built from scratch; as large as its settings allow unless given.

    Raises:
        UserError: a backbone of which no sizes are known here.
    """
    model = config.model
    if vocabulary is None:
        vocabulary = model.text_encoder.scratch.vocabulary if model.text_encoder.scratch else 0
    known: dict[str, Description] = {}
    if model.modality != "audio":
        for part, settings in (("text_encoder", model.text_encoder), ("language", model.language)):
            if settings.weights:
                known[part] = _language(settings, f"model.{part}.weights")
    if model.modality != "text" and model.vision.weights:
        frames = 1 + round(config.data.max_seconds * FRAMES_PER_SECOND)
        with torch.device("meta"):
            known["vision"] = vision_backbone(model.vision, frames, pretrained=False)[1]
    with torch.device("meta"):
        network = Network(
            model,
            classes,
            config.data.max_tokens,
            config.data.max_seconds,
            tokenizer_size=vocabulary,
            descriptions=known,
            checkpointing=config.train.checkpointing,
        )
        objective = Objective(network, config.loss, accumulation)
    network.freeze(config.train.freeze)
    if "temperature" in config.train.freeze and objective.trained_temperature is not None:
        objective.trained_temperature.requires_grad_(False)
    return objective


def _language(settings: BackboneSettings, setting: str) -> Description:
    assert settings.weights is not None
    sizes = KNOWN.get(settings.weights.rsplit("/", 1)[-1])
    if Path(settings.weights).is_dir() or sizes is None:
        config = pretrained_config(settings, setting)
    else:
        config = AutoConfig.for_model(**sizes)
        if settings.dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = settings.dropout
    return {key: value for key, value in config.to_dict().items() if key not in ("architectures", "dtype")}
