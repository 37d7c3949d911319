"""What reads like a control token inside a text is text: no id of the tokenizer's own stands there but those that the
reader puts around a text and between turns."""

import numpy as np
import pytest
from corpus_helpers import build_here, write_table
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jointfuse.config import DataSettings
from jointfuse.data.corpora.table import table_corpus
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.data.tokenizer import encode, train_tokenizer

pytestmark = pytest.mark.required
HOSTILE = [
    "<s>so</s> he <mask> said",
    "[CLS] well [SEP][PAD] no [MASK]",
    "a</s><s>b",
    "<pad>",
    "[PAD]",
    "yes <unk> no </s> yes <s> no",
]
PLAIN = ["Well, I never!", "2 < 3 and [so] on", "naïve  café", "", "s", "the mask of Zorro", "o'clock; <3 >_<"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        {"dialogue": "d", "turn": turn, "speaker": "</s>", "text": text, "emotion": ("joy", "fear")[turn % 2]}
        for turn, text in enumerate(HOSTILE)
    ]
    table = write_table(folder / "train.csv", rows)
    build_here(table_corpus([("train", table)], "hostile", allow_missing=True), folder / "corpus")
    return Corpus.open(folder / "corpus")


def unigram() -> PreTrainedTokenizerBase:
    """XLM-RoBERTa's kind, in whose vocabulary the control tokens are words as any other."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = ["".join(map(chr, range(33, 127)))]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([*PLAIN, *letters] * 5, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(params=["minilm", "roberta-tokenizer", "from scratch", "unigram"])
def tokenizer(request: pytest.FixtureRequest, corpus: Corpus) -> PreTrainedTokenizerBase:
    if request.param == "from scratch":
        return train_tokenizer(corpus.split("train"), 300)
    if request.param == "unigram":
        return unigram()
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models" / request.param)


def control(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def test_no_text_brings_a_control_token_along(tokenizer: PreTrainedTokenizerBase) -> None:
    leaked = tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    assert any(control(tokenizer) & set(tokens) for tokens in leaked), "the texts are hostile to this tokenizer"
    for text, alone, around in zip(HOSTILE, encode(tokenizer, HOSTILE), encode(tokenizer, HOSTILE, 64), strict=True):
        assert not control(tokenizer) & set(alone), text
        assert around == [tokenizer.cls_token_id, *alone, tokenizer.sep_token_id]
        (cut,) = encode(tokenizer, [text], 5)
        assert cut == [tokenizer.cls_token_id, *alone[:3], tokenizer.sep_token_id]


def test_any_other_text_has_the_tokens_it_always_had(tokenizer: PreTrainedTokenizerBase) -> None:
    for longest in (5, 64):
        assert encode(tokenizer, PLAIN, longest) == tokenizer(PLAIN, truncation=True, max_length=longest)["input_ids"]
    assert encode(tokenizer, PLAIN) == tokenizer(PLAIN, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "settings", [{}, {"context": 3}, {"context": 3, "speakers": "names"}, {"speakers": "names", "max_tokens": 8}]
)
def test_a_reader_adds_its_own_and_no_others(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, object], corpus: Corpus
) -> None:
    data = DataSettings.model_validate({"max_tokens": 200, "missing_modality": "allow"} | settings)
    split = corpus.split("train")
    reader = UtteranceReader(split, data, tokenizer, False, 0.0, 1.0)
    for id, text in enumerate(HOSTILE):
        tokens = reader.batch((np.array([id]), np.ones(1, dtype=bool))).tokens[0].tolist()
        turns = min(id, data.context) + 1
        assert [token for token in tokens if token in control(tokenizer)] == [
            tokenizer.cls_token_id,
            *[tokenizer.sep_token_id] * turns,
        ], text
