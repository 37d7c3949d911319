"""A byte-pair tokenizer trained on a corpus, for text encoders built from scratch."""

import shutil
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jointfuse.data.mixture import AnySplit
from jointfuse.errors import UserError
from jointfuse.files import naming, replace_folder


def train_tokenizer(split: AnySplit, vocabulary: int) -> PreTrainedTokenizerBase:
    """RoBERTa's kind of byte-level BPE with at most `vocabulary` entries, learnt from the texts of a split."""
    trained = ByteLevelBPETokenizer(lowercase=True)
    texts = (split.sample(id, audio=False).text for id in range(len(split)))
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
