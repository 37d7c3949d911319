"""A byte-pair tokenizer trained on a corpus, for text encoders built from scratch."""

from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jointfuse.data.mixture import AnySplit


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
