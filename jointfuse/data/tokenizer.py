"""From texts to tokens, and the byte-pair tokenizer that text encoders built from scratch learn from a corpus."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jointfuse.data.mixture import AnySplit
from jointfuse.errors import UserError
from jointfuse.files import naming, replace_folder


def train_tokenizer(split: AnySplit, vocabulary: int, unreadable: list[str] | None = None) -> PreTrainedTokenizerBase:
    """RoBERTa's kind of byte-level BPE with at most `vocabulary` entries, learnt from the texts of a split.

    Args:
        unreadable: takes up why a text cannot be read, in place of an error.

    Raises:
        UserError: a text cannot be read.
    """
    trained = ByteLevelBPETokenizer(lowercase=True)
    texts = (_text(split, id, unreadable) for id in range(len(split)))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    trained.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
    )


def _text(split: AnySplit, id: int, unreadable: list[str] | None) -> str:
    try:
        return split.text(id)
    except UserError as error:
        if unreadable is None:
            raise
        unreadable.append(str(error))
        return ""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
    """The tokens of each text. What reads like a control token, as `<s>` or `[MASK]`, is text as any other.

    Args:
        longest: so many tokens at most, those in front and behind included; None: all of them, with nothing around.
    """
    around = {"add_special_tokens": False} if longest is None else {"truncation": True, "max_length": longest}
    # All in one call: most of a call is not tokenising.
    answer = tokenizer(list(texts), split_special_tokens=True, return_special_tokens_mask=True, **around)
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    encoded: list[list[int]] = []
    for text, tokens, added in zip(texts, answer["input_ids"], answer["special_tokens_mask"], strict=True):
        # The vocabulary of a Unigram tokenizer has its control tokens among the words.
        smuggled = sum(token in control for token in tokens) > sum(added)
        encoded.append(_spelt(tokenizer, text, longest, control) if smuggled else tokens)
    return encoded


def _spelt(tokenizer: PreTrainedTokenizerBase, text: str, longest: int | None, control: set[int]) -> list[int]:
    """The tokens of a text, those that are control tokens spelt letter by letter."""
    tokens: list[int] = []
    for token in tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]:
        letters = list(tokenizer.convert_ids_to_tokens(token)) if token in control else []
        tokens += tokenizer.convert_tokens_to_ids(letters) if letters else [token]
    if longest is None:
        return tokens
    return [tokenizer.cls_token_id, *tokens[: longest - 2], tokenizer.sep_token_id]


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as a folder, which is there whole or not at all. Raises OSError."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with naming(partial):
        tokenizer.save_pretrained(partial)
    replace_folder(partial, folder)


def read_tokenizer(folder: Path, way_out: str) -> PreTrainedTokenizerBase:
    """What `write_tokenizer` wrote. Raises UserError, which ends with `way_out`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: missing; {way_out}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        tokenizer("a text")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises kinds of its own, and what panics in Rust is no Exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{folder}: damaged ({reason}); {way_out}") from error
    missing = [name for name in ("pad", "cls", "sep") if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise UserError(f"{folder}: damaged, it has no {missing[0]} token; {way_out}")
    return tokenizer
