"""Tokens of a text that is read in pieces are those of the whole text, and little of it is held at a time."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.models import token_stream as module
from loglik.models.encode import TextEncoder, _pieces
from loglik.models.ngram import byte_tokenizer
from loglik.models.token_stream import TokenPiece, read_chunks, token_stream
from zoo import CORPUS, END, bert_tokenizer, byte_level_tokenizer, llama_tokenizer, t5_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RICH = [
    *CORPUS,
    "aaaa aaaaaaa 12 1212 123123 4444 ababab \n\n  \n    \n\n\n don't we'll I'VE x's ''' ... !!!\n",
    "   spaces        and\t\ttabs \r\n\r\n漢字漢字 éé ñandú ﬁ",
]


def llama3_tokenizer():
    """Byte-level BPE with numbers in groups of three, and words that are tokens of their own taken whole."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        RICH * 5,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=[END], show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def gemma_tokenizer():
    """BPE over a whole text, whose one pre-tokenizer never finds the space it splits at; runs are merged greedily."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        RICH * 5, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    )
    mask = AddedToken("<mask>", lstrip=True, rstrip=True, special=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token=mask
    )
    assert fast.backend_tokenizer.get_added_tokens_decoder()[fast.mask_token_id].lstrip
    return fast


def encoder(tokenizer) -> TextEncoder:
    return TextEncoder(tokenizer, layout="causal", bos="never")


ENCODERS = {
    "byte_level": encoder(byte_level_tokenizer()),
    "llama": encoder(llama_tokenizer()),
    "unigram": encoder(t5_tokenizer()),
    "wordpiece": encoder(bert_tokenizer()),
    "llama3": encoder(llama3_tokenizer()),
    "gemma": encoder(gemma_tokenizer()),
    "bytes": encoder(byte_tokenizer()),
}
# Stretches whose cut depends on what stands far away, mixed with plain ones.
PARTS = [
    *["hello", " world", ".", " The", " answer", " is", "42", ", ", "wer", " é", " 漢字", "ñandú ", "then", "there"],
    *["'s", "'", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u3000", "\xa0", "ﬁ", "▁"],
    *[" " * 30, "\n" * 25, " \n" * 9, "\n" + " " * 40 + "\n", "a" * 35, "ab" * 20, "1" * 33, "12" * 20, "x1" * 15],
    *["'" * 20, "." * 33, "漢" * 30, "字漢" * 12, "😀" * 9, "e\u0301" * 9, "\u0301" * 12, "\u200b" * 20, "\x01" * 40],
    *["▁" * 20, END, "</s>", "<s>", "<unk>", "<mask>", "   <mask>   "],
]
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=60).map("".join),
    st.text(CHARACTERS, max_size=200),
    st.text("ab 1\n'.", max_size=400),
    st.lists(st.one_of(st.sampled_from(PARTS), st.text(CHARACTERS, max_size=8)), max_size=60).map("".join),
)


def cut(text: str, seed: int) -> list[str]:
    """Chunks of any sizes, empty ones too."""
    rng = random.Random(seed)
    edges = sorted(rng.choices(range(len(text) + 1), k=rng.choice([0, 1, 5, 60])))
    return [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]


def check(name: str, text: str, pieces: list[TokenPiece]) -> None:
    whole = ENCODERS[name]._tokens(text)
    assert "".join(piece.text for piece in pieces) == text
    assert [i for piece in pieces for i in piece.ids] == whole.ids
    assert [word for piece in pieces for word in piece.words] == whole.words
    assert [part for piece in pieces for part in piece.pieces] == _pieces(text, whole.spans)
    place = 0
    spans = []
    for piece in pieces:
        spans += [(a + place, b + place) for a, b in piece.spans]
        place += len(piece.text)
    assert spans == whole.spans


@pytest.mark.parametrize("name", ENCODERS)
@given(
    text=TEXTS, seed=st.integers(0, 99), block=st.sampled_from([8, 40, 64, 130]), overlap=st.sampled_from([4, 16, 33])
)
@example(text="\n" + " " * 300 + "\nhello world", seed=0, block=40, overlap=16)
@example(text="hello " * 9 + "1" * 200 + "2" + "12" * 80, seed=1, block=40, overlap=33)
@example(text="hello world. The answer " * 30, seed=3, block=40, overlap=33)
@example(text="a" * 301, seed=0, block=40, overlap=16)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pieces_have_the_tokens_of_the_whole(name, text, seed, block, overlap):
    """Ids, spans, words and text of every token, for blocks far smaller than the stretches that decide them."""
    check(name, text, list(token_stream(ENCODERS[name], cut(text, seed), block=block, overlap=overlap)))


def test_a_special_token_is_not_cut_by_the_edge_of_a_block():
    """The block before ends in ``<|endof``, the one behind begins with ``endoftext|>``: their bytes agree, wrongly."""
    for shift in range(len(END)):
        text = "x" * (38 - shift) + END + "y" * 90
        check("bytes", text, list(token_stream(ENCODERS["bytes"], [text], block=40, overlap=6)))


def test_white_space_that_the_end_of_its_run_decides():
    """Every space is a word, unless a newline ends their run: two blocks that end in the run agree, and are wrong."""
    tokenizer = Tokenizer(models.WordLevel({" ": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" +\n| |[^ \n]+|\n"), behavior="isolated")
    row = encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    for end in ("\n", "x"):
        text = "a b c d e f g h " + " " * 500 + end + " i j k l" * 200
        pieces = list(token_stream(row, cut(text, 0), block=60, overlap=20))
        assert [i for piece in pieces for i in piece.ids] == row._tokens(text).ids
        assert len(pieces) > 2


def block_of(begin: int, ids: list[int], *, first: int = 0) -> module._Block:
    """Words of two characters, one token each."""
    places = [begin + 2 * i for i in range(len(ids))]
    spans = [(place, place + 2) for place in places]
    end = begin + 2 * len(ids)
    return module._Block(begin, end, ids, spans, list(range(len(ids))), first, begin + 2 * first)


def test_what_counts_as_agreement():
    rule = module._Rule(any_token=False, margin=0)
    old = block_of(0, [1, 2, 3, 4, 5, 6, 7, 8])
    assert module._hand_over(old, block_of(6, [4, 5, 6, 7, 8, 9]), rule) == 5
    assert module._hand_over(old, block_of(6, [0, 5, 6, 7, 0, 9]), rule) is None  # three words are too few
    assert module._hand_over(old, block_of(7, [4, 5, 6, 7, 8, 9]), rule) is None  # other places
    # What the old block never confirmed may not be agreed with.
    assert module._hand_over(block_of(0, old.ids, first=5), block_of(6, [4, 5, 6, 7, 8, 9]), rule) is None
    assert module._hand_over(old, block_of(6, [4, 5, 6, 7, 8, 9]), module._Rule(any_token=False, margin=6)) is None
    # Agreement, difference, agreement: one block was wrong in between, and its words before or behind may be as well.
    long = block_of(0, list(range(20)))
    torn = block_of(2, [*range(1, 8), 99, *range(9, 20), 20])
    assert module._hand_over(long, torn, rule) is None
    assert module._hand_over(long, torn, module._Rule(any_token=True, margin=0)) == 14


class Reader:
    """Chunks of a text, and how much of it has been asked for."""

    def __init__(self, text: str, size: int) -> None:
        self.text, self.size, self.read = text, size, 0

    def __iter__(self):
        for begin in range(0, len(self.text), self.size):
            self.read = min(len(self.text), begin + self.size)
            yield self.text[begin : self.read]


@pytest.mark.parametrize("name", ENCODERS)
def test_little_is_read_ahead(name, monkeypatch):
    """No more than two blocks, their overlap and a chunk, in a text with words of ordinary length."""
    text = " ".join(random.Random(0).choices(CORPUS[0].split(), k=4000))
    source = Reader(text, 50)
    handed_out, ahead, pieces, held = 0, 0, [], []
    read_to = module._Text._read_to

    def noted(self, end):
        held.append(len(self._held))
        return read_to(self, end)

    monkeypatch.setattr(module._Text, "_read_to", noted)
    for piece in token_stream(ENCODERS[name], source, block=400, overlap=200):
        ahead = max(ahead, source.read - handed_out)
        handed_out += len(piece.text)
        pieces.append(piece)
    assert ahead <= 2 * 400 + 200 + 50
    assert 0 < max(held) <= 2 * 400 + 200 + 50
    check(name, text, pieces)


@pytest.mark.parametrize("name", ["byte_level", "unigram", "llama3"])
def test_a_huge_word_is_held_and_nothing_else(name):
    """Memory grows with the longest word; before and behind it blocks are as small as ever; work is not quadratic."""
    word = "ab" * 5000
    text = "hello world. " * 200 + word + " the answer is." * 200
    encoded, right = [], TextEncoder._tokens

    def counted(self, part):
        encoded.append(len(part))
        return right(self, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "_tokens", counted)
        pieces = list(token_stream(ENCODERS[name], [text], block=256, overlap=64))
    check(name, text, pieces)
    sizes = [len(piece.text) for piece in pieces]
    assert max(sizes) > len(word)
    assert sorted(sizes)[-2] < 1000
    assert sum(encoded) < 15 * len(text)


def test_a_huge_word_of_byte_pairs_without_words_is_not_held():
    """Where any shared token will do, no word is long."""
    for name in ("llama", "gemma", "bytes"):
        text = "ab1" * 4000
        pieces = list(token_stream(ENCODERS[name], [text], block=256, overlap=128))
        check(name, text, pieces)
        assert max(len(piece.text) for piece in pieces) <= 600


def test_usual_blocks():
    """A long document under the sizes that are used."""
    text = "".join(random.Random(1).choices(PARTS, k=5000))
    assert len(text) > 40_000
    for name, row in ENCODERS.items():
        pieces = list(token_stream(row, read_chunks(text)))
        assert len(pieces) > 3
        check(name, text, pieces)


def test_chunks_of_a_file_do_not_depend_on_its_lines():
    file = io.StringIO("x" * 5000)
    assert [len(chunk) for chunk in read_chunks(file, 2000)] == [2000, 2000, 1000]
    assert [len(chunk) for chunk in read_chunks("y" * 5000, 3000)] == [3000, 2000]
    assert list(read_chunks(iter(["ab", "", "c"]), 1)) == ["a", "b", "c"]


def test_place_of_what_is_no_text():
    with pytest.raises(RowError, match=r"the document has a lone surrogate \(U\+D83D\) at character 7: remove"):
        list(read_chunks(["abc", "", "d", "ef😀\ud83d"]))


def test_tokens_that_depend_on_the_far_end_are_refused():
    """A tokenizer that no cutting can follow: the length of the text decides its first tokens."""

    class Far:
        _backend = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))

        def _tokens(self, text: str):
            tokens = ENCODERS["wordpiece"]._tokens(text)
            tokens.ids[:] = [len(text)] * len(tokens.ids)
            return tokens

    far = token_stream(Far(), ["hello the " * 100], block=60, overlap=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_hand_over", _once(module._hand_over))
        with pytest.raises(InputError, match=r"choices before character \d+ depend on the text from \d+ on"):
            list(far)


def _once(hand_over):
    """A hand-over that is accepted without agreement, once: what follows must notice."""
    state = {"left": 1}

    def accepting(old, new, rule):
        if not state["left"]:
            return hand_over(old, new, rule)
        state["left"] = 0
        place = len(old.ids) - 2
        new.done = old.spans[place][0]
        new.first = [begin for begin, _ in new.spans].index(new.done)
        return place

    return accepting
