"""The turns before an utterance in front of its text, and who speaks."""

import numpy as np
import pytest
from helpers import reader_of

from jointfuse.data.plan import Plan
from jointfuse.data.reader import UtteranceReader
from jointfuse.data.shards import Corpus
from jointfuse.data.stream import stream


def reader_with(corpus: Corpus, modality: str = "text", max_tokens: int = 400, **settings: object) -> UtteranceReader:
    reader = reader_of(corpus, modality, missing_modality="allow", **settings)
    reader.settings = reader.settings.model_copy(update={"max_tokens": max_tokens})
    return reader


def pieces(reader: UtteranceReader, id: int) -> list[str]:
    """What stands between the separators."""
    (batch,) = stream(reader, [(np.array([id]), np.ones(1, dtype=bool))], 0)
    assert reader.tokenizer is not None
    tokens = batch.tokens[0][batch.token_mask[0]].tolist()
    assert tokens[0] == reader.tokenizer.cls_token_id
    assert tokens[-1] == reader.tokenizer.sep_token_id
    found: list[list[int]] = [[]]
    for token in tokens[1:-1]:
        if token == reader.tokenizer.sep_token_id:
            found.append([])
        else:
            found[-1].append(token)
    return [reader.tokenizer.decode(piece).strip() for piece in found]


def turns(corpus: Corpus, id: int, number: int) -> list[tuple[str, str]]:
    """(speaker, text) of an utterance and so many before it, by their own words."""
    split = corpus.split("train")
    own = split.sample(id, audio=False)
    found = [split.sample(one, audio=False) for one in range(max(0, id - number), id + 1)]
    return [(turn.speaker, turn.text.lower()) for turn in found if turn.dialogue == own.dialogue]


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_the_turns_before_an_utterance_come_first_and_none_of_another_dialogue(
    number: int, uneven_corpus: Corpus
) -> None:
    reader = reader_with(uneven_corpus, context=number)
    held = set()
    for id in range(len(reader.split)):
        expected = turns(uneven_corpus, id, number)
        assert pieces(reader, id) == [text for _, text in expected]
        held.add(len(expected))
    assert held == set(range(1, min(number, 3) + 2)), "a dialogue has four turns"


def test_a_speaker_has_a_name_or_the_same_tag_throughout(uneven_corpus: Corpus) -> None:
    named = reader_with(uneven_corpus, context=3, speakers="names")
    tagged = reader_with(uneven_corpus, context=3, speakers="tags")
    several = 0
    for id in range(len(named.split)):
        expected = turns(uneven_corpus, id, 3)
        assert pieces(named, id) == [f"{speaker.lower()}: {text}" for speaker, text in expected]
        order = list(dict.fromkeys(speaker for speaker, _ in expected))
        assert pieces(tagged, id) == [f"{'abcd'[order.index(speaker)]}: {text}" for speaker, text in expected]
        several += len(order) > 1
    assert several > 5


def test_without_context_and_speakers_the_tokens_are_the_tokenizers_own(uneven_corpus: Corpus) -> None:
    plain, reader = reader_with(uneven_corpus), reader_with(uneven_corpus, context=0, speakers="names")
    for id in range(len(plain.split)):
        utterance = plain.split.sample(id)
        assert reader.tokenizer is not None
        own = plain.examples([id], [utterance])[0].tokens.tolist()
        named = reader.tokenizer(f"{utterance.speaker}: {utterance.text}")["input_ids"]
        assert own == reader.tokenizer(utterance.text)["input_ids"]
        assert reader.examples([id], [utterance])[0].tokens.tolist() == named


@pytest.mark.parametrize("room", [4, 9, 20, 40])
def test_what_does_not_fit_is_the_oldest_and_then_the_end_of_the_utterance(room: int, uneven_corpus: Corpus) -> None:
    whole = reader_with(uneven_corpus, context=3)
    less = reader_with(uneven_corpus, context=3, max_tokens=room)
    assert whole.tokenizer is not None
    cuts = 0
    for id in range(len(whole.split)):
        utterance = whole.split.sample(id)
        long, short = (reader.examples([id], [utterance])[0] for reader in (whole, less))
        own = len(whole.tokenizer(utterance.text, add_special_tokens=False)["input_ids"])
        assert not long.cut_tokens
        assert short.cut_tokens == (own > room - 2)
        assert len(short.tokens) <= room
        cuts += short.cut_tokens
        kept = short.tokens[1:].tolist()
        if not short.cut_tokens:
            assert kept == long.tokens.tolist()[-len(kept) :]
            assert long.tokens[-len(kept) - 1] in (whole.tokenizer.cls_token_id, whole.tokenizer.sep_token_id)
    assert cuts > 0 or room == 40


def test_turns_without_text_are_no_context_and_blank_utterances_have_none(gapped_corpus: Corpus) -> None:
    reader = reader_with(gapped_corpus, "both", context=3)
    blank = 0
    for id in range(len(reader.split)):
        expected = [text for _, text in turns(gapped_corpus, id, 3)]
        if expected[-1]:
            assert pieces(reader, id) == [text for text in expected if text]
        else:
            assert len(reader.examples([id], [reader.split.sample(id)])[0].tokens) == 0
            blank += 1
    assert blank > 2


def test_batches_are_of_similar_length_with_their_context(uneven_corpus: Corpus) -> None:
    reader = reader_with(uneven_corpus, context=2)
    positions = reader.positions((16, 16))
    expected = [sum(len(text) for _, text in turns(uneven_corpus, id, 2)) for id in range(len(reader.split))]
    assert positions[:].tolist() == expected
    some = np.array([5, 0, 17])
    assert positions[some].tolist() == [expected[id] for id in some]
    assert len(list(Plan(positions, 4, 0).batches(0))) == 6
