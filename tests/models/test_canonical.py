"""What a BPE tokenizer can write, against the tokenizer itself: spelling, merges, cuts, completions and refusals."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.models.canonical import BpeView, split_utf8
from zoo import END, bert_tokenizer, byte_level_tokenizer, llama_tokenizer, t5_tokenizer

BYTES, LLAMA = byte_level_tokenizer(), llama_tokenizer()
VIEWS = {"byte level": BpeView(BYTES), "characters": BpeView(LLAMA)}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), min_size=1, max_size=12)


def changed(**model):
    """The byte-level tokenizer with other options of its BPE."""
    state = json.loads(BYTES.backend_tokenizer.to_str())
    state["model"].update(model)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END)


def with_merges(merges: list[tuple[str, str]], alphabet: str = "ab") -> BpeView:
    """A byte-level vocabulary of single letters and what `merges` make of them."""
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return BpeView(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@st.composite
def merge_lists(draw):
    """Merges of letters and of earlier products in any order of use: several may make the same token."""
    parts, merges = ["a", "b"], []
    for _ in range(draw(st.integers(1, 7))):
        pair = (draw(st.sampled_from(parts)), draw(st.sampled_from(parts)))
        if pair not in merges and len("".join(pair)) <= 6:
            merges.append(pair)
            parts.append("".join(pair))
    return draw(st.permutations(merges))


@given(TEXT)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("name", VIEWS)
def test_tokens_spell_the_surface(name, text):
    """The bytes of the tokenizer's own tokens, one after the other, are the surface of the text."""
    view = VIEWS[name]
    ids = [i for i in view.encode(text) if i in view.spelling]
    if not any(content in text for content in view.added):
        assert b"".join(view.spelling[i] for i in ids) == view.surface(text.encode())


@given(TEXT)
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("name", VIEWS)
def test_pieces_are_the_tokenizer(name, text):
    """Cut where the pre-tokeniser cuts and run the merges over each piece: that is the encoding."""
    view = VIEWS[name]
    if any(content in text for content in view.added):
        return
    data = view.surface(text.encode())
    ends = (0, *view.ends(data.decode()))
    joined = [i for begin, end in pairwise(ends) for i in view.piece(data[begin:end])]
    assert joined == view.encode(text)
    if data:
        assert ends[-1] == len(data)


@given(merge_lists(), st.lists(st.integers(0, 8), min_size=1, max_size=5))
@settings(max_examples=600, deadline=None)
def test_canonical_is_a_property_of_neighbours(merges, picks):
    """A sequence is the encoding of what it spells exactly if each token and each pair of neighbours is."""
    view = with_merges(merges)
    tokens = [sorted(view.spelling)[i % len(view.spelling)] for i in picks]
    spelled = "".join(view.spelling[i].decode() for i in tokens)
    by_pairs = view.alone(tokens[0]) and all(view.adjacent(a, b) for a, b in pairwise(tokens))
    assert by_pairs == (view.backend.encode(spelled).ids == tokens)


@pytest.mark.parametrize("prefix", [b"", b"a", b" ", b"th", "é".encode()[:1], b"\xff", b"zzzz"])
@pytest.mark.parametrize("name", VIEWS)
def test_tokens_starting_with(name, prefix):
    view = VIEWS[name]
    wanted = {index for index, data in view.spelling.items() if data.startswith(prefix)}
    assert set(view.starting_with(prefix)) == wanted
    assert len(view.starting_with(prefix)) == len(wanted)
    assert not wanted & {BYTES.eos_token_id} or name == "characters"


def test_special_tokens_are_not_spelled_but_byte_fallback_is():
    assert BYTES.eos_token_id not in VIEWS["byte level"].spelling
    view = VIEWS["characters"]
    assert view.spelling[LLAMA.convert_tokens_to_ids("<0x41>")] == b"A"
    assert LLAMA.bos_token_id not in view.spelling
    assert view.spelling[LLAMA.convert_tokens_to_ids("▁he")] == b" he"


@given(TEXT, st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_split_utf8_at_every_cut(text, cut):
    data = text.encode()[:cut]
    parts = split_utf8(data)
    assert parts is not None
    assert parts[0].encode() + parts[1] == data
    assert text.startswith(parts[0])
    assert len(parts[1]) <= 3


@pytest.mark.parametrize("data", [b"\x80", b"\xc0", b"\xc1", b"\xed\xa0", b"\xf4\x90", b"\xf5", b"\xe0\x80", b"a\xc3a"])
def test_what_no_text_begins_with(data):
    assert split_utf8(data) is None
    with pytest.raises(RowError, match="beginning of a UTF-8 string"):
        VIEWS["byte level"].surface(data)


@pytest.mark.parametrize("rest", ["é", "ñ", "漢", "ก", "\u2028"])
def test_completions_are_all_kinds_of_characters(rest):
    """Against all code points: each completion begins with the bytes, and none of their next bytes is left out."""
    view = VIEWS["byte level"]
    for cut in range(1, len(rest.encode())):
        start = rest.encode()[:cut]
        every = [chr(p).encode() for p in range(0x110000) if not 0xD800 <= p < 0xE000 and p < 0x3000]
        every = [data for data in every if data.startswith(start)]
        found = [char.encode() for char in view.completions(start)]
        assert all(data.startswith(start) for data in found)
        assert len(set(found)) == len(found)
        assert {data[cut] for data in every} <= {data[cut] for data in found}


def test_space_in_front():
    def spelled(pre, normalizer=None, text=b"x"):
        state = json.loads(LLAMA.backend_tokenizer.to_str())
        tokenizer = Tokenizer.from_str(json.dumps({**state, "normalizer": None}))
        tokenizer.pre_tokenizer = pre
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        view = BpeView(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
        assert b"".join(view.spelling[i] for i in view.encode(text.decode())) == view.surface(text)
        return view.surface(text), view.surface(text, at_start=False)

    metaspace = pre_tokenizers.Metaspace
    assert spelled(metaspace(prepend_scheme="always")) == (b" x", b" x")
    assert spelled(metaspace(prepend_scheme="first")) == (b" x", b"x")
    assert spelled(metaspace(prepend_scheme="never")) == (b"x", b"x")
    # Gemma: no space in front, and a pre-tokeniser that finds no space any more.
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    assert spelled(split, normalizers.Replace(" ", "▁"), b"x y") == (b"x y", b"x y")
    with pytest.raises(RowError, match="begins with a space"):
        spelled(metaspace(prepend_scheme="always"), text=b" x")


def test_text_that_is_not_given_back():
    with pytest.raises(RowError, match=r"U\+2581"):
        VIEWS["characters"].surface("a▁".encode())
    state = json.loads(BYTES.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    view = BpeView(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))))
    assert view.surface("é".encode()) == "é".encode()
    with pytest.raises(RowError, match="NFC"):
        view.surface("e\u0301".encode())
    with pytest.raises(RowError, match="cannot spell"):
        with_merges([("a", "b")]).surface(b"c")


def test_refusals_are_sentences():
    lower = json.loads(BYTES.backend_tokenizer.to_str()) | {"normalizer": {"type": "Lowercase"}}
    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    drops = json.loads(BYTES.backend_tokenizer.to_str())
    drops["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, drops["pre_tokenizer"]],
    }
    for tokenizer, why in [
        (bert_tokenizer(), "WordPiece"),
        (t5_tokenizer(), "Unigram"),
        (object(), "backend"),
        (changed(dropout=0.1), "dropout"),
        (changed(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(lower))), "Lowercase"),
        (PreTrainedTokenizerFast(tokenizer_object=plain), "byte fallback"),
    ]:
        with pytest.raises(InputError, match=f"'exact' needs a reversible BPE tokenizer.*{why}.*'joint'"):
            BpeView(tokenizer)
    view = BpeView(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(drops))))
    with pytest.raises(InputError, match="white space"):
        view.ends("a b")
