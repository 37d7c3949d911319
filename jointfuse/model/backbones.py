"""Weights in: the text encoder, the language layers and the vision transformer, pretrained, from scratch or as saved.

A backbone is described by a plain dictionary (`description`), stored with every exported model, so that loading an
export needs neither the hub nor the folder its weights once came from.
"""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer, get_model_args
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase, RobertaConfig
from transformers.utils import logging as transformers_logging

from jointfuse.config import BackboneSettings, VisionSettings
from jointfuse.errors import UserError
from jointfuse.model.layers import require_language_family, serves

Description = dict[str, Any]

for _noisy in ("timm.models._builder", "timm.models._hub", "huggingface_hub", "httpx"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()


def language_backbone(
    settings: BackboneSettings, setting: str, tokenizer_size: int, description: Description | None = None
) -> tuple[Any, Description]:
    """A transformers encoder without its pooler.

    Args:
        settings: pretrained weights or sizes.
        setting: dotted name for messages.
        tokenizer_size: size of the vocabulary where the encoder is built from scratch.
        description: of an exported model; nothing pretrained is read then.

    Returns:
        The encoder (float32) and its description.

    Raises:
        UserError: weights that cannot be had, or an encoder that cannot serve.
    """
    if description is not None:
        model = AutoModel.from_config(AutoConfig.for_model(**description), dtype=torch.float32)
    elif settings.scratch:
        sizes = settings.scratch
        model = AutoModel.from_config(
            RobertaConfig(
                vocab_size=tokenizer_size,
                hidden_size=sizes.width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                intermediate_size=4 * sizes.width,
                hidden_dropout_prob=settings.dropout or 0.0,
                attention_probs_dropout_prob=settings.dropout or 0.0,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
            )
        )
    else:
        config = pretrained_config(settings, setting)
        model, report = _pretrained(
            AutoModel, settings.weights, setting, config=config, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
        if missing:
            # transformers would go on with random weights in their place
            raise UserError(
                f"{setting}: '{settings.weights}' lacks {len(missing)} of the encoder's weights (first: {missing[0]}); "
                f"get the checkpoint again"
            )
    if hasattr(model, "pooler"):
        model.pooler = None
    kept = {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "_name_or_path", "dtype")}
    return model, kept


def pretrained_config(settings: BackboneSettings, setting: str) -> Any:
    """The sizes of a pretrained encoder, without its weights. Raises UserError where they cannot be had or used."""
    config = _pretrained(AutoConfig, settings.weights, setting)
    require_language_family(config, setting)
    if settings.dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = settings.dropout
    return config


def pretrained_tokenizer(settings: BackboneSettings, setting: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to pretrained weights. Raises UserError if it cannot be had."""
    return _pretrained(AutoTokenizer, settings.weights, setting)


def _pretrained(factory: Any, weights: str | None, setting: str, **options: Any) -> Any:
    assert weights is not None
    folder = Path(weights)
    if not folder.is_dir() and _looks_like_path(weights):
        raise UserError(f"{setting}: there is no folder '{weights}'")
    try:
        return (
            factory.from_pretrained(weights, use_safetensors=True, **options)
            if factory is AutoModel
            else factory.from_pretrained(weights)
        )
    except Exception as error:  # transformers, the hub and safetensors raise kinds of their own
        raise UserError(_unavailable(weights, setting, error)) from error


def _looks_like_path(weights: str) -> bool:
    return weights.startswith((".", "/", "~")) or weights.count("/") > 1


def _unavailable(weights: str, setting: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    section = setting.rsplit(".", 1)[0]
    return (
        f"{setting}: the pretrained weights '{weights}' cannot be had here ({reason}); download them on a machine that "
        f"reaches the hub and name their folder, or set {section}.scratch to train from random weights"
    )


def vision_backbone(
    settings: VisionSettings, frames: int, description: Description | None = None, pretrained: bool = True
) -> tuple[VisionTransformer, Description]:
    """A timm VisionTransformer for one-channel images of 80 mel bins x `frames`, its patch kernel and positions
    resampled from the checkpoint's.

    Args:
        description: of an exported model; nothing pretrained is read then.
        pretrained: false: of that architecture, with random weights.

    Returns:
        The model (float32) and its description.

    Raises:
        UserError: weights that cannot be had, or a model that is no VisionTransformer with a class token.
    """
    patch = tuple(settings.patch)
    time_patches = -(-frames // patch[1])
    sizes: dict[str, Any] = {
        "img_size": (80, time_patches * patch[1]),
        "patch_size": patch,
        "in_chans": 1,
        "num_classes": 0,
        "global_pool": "token",
        "proj_drop_rate": settings.dropout or 0.0,
        "drop_path_rate": settings.drop_path,
    }
    setting = "model.vision.weights"
    if description is None and settings.scratch:
        scratch = settings.scratch
        description = {
            "architecture": "vit_tiny_patch16_224",
            "arguments": sizes | {"embed_dim": scratch.width, "depth": scratch.layers, "num_heads": scratch.heads},
        }
    if description is not None:
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in description["arguments"].items()}
        return timm.create_model(description["architecture"], pretrained=False, **arguments), description
    assert settings.weights is not None
    local = Path(settings.weights).is_dir()
    if not local and _looks_like_path(settings.weights):
        raise UserError(f"{setting}: there is no folder '{settings.weights}'")
    name = f"local-dir:{settings.weights}" if local else settings.weights
    try:
        model = timm.create_model(name, pretrained=pretrained, **sizes)
    except (TypeError, AssertionError) as error:
        # The arguments are those of a VisionTransformer: something else takes offence at them.
        raise UserError(_cannot_serve(settings.weights, timm.create_model(name, pretrained=False))) from error
    except Exception as error:  # timm, the hub and their transports raise kinds of their own
        raise UserError(_unavailable(settings.weights, setting, error)) from error
    if not serves(model):
        raise UserError(_cannot_serve(settings.weights, model))
    architecture = model.pretrained_cfg.get("architecture") or settings.weights
    # A folder or hub repository may change its architecture's widths and depth: those are arguments too.
    return model, {"architecture": architecture, "arguments": get_model_args(model) | sizes}


def _cannot_serve(weights: str, model: torch.nn.Module) -> str:
    return (
        f"model.vision.weights: '{weights}' is a {type(model).__name__} that cannot serve; choose a model of timm's "
        f"VisionTransformer family with a class token and learned positions"
    )
