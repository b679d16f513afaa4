"""Covers against enumeration: of texts through the tokenizer itself, and of token sequences through the model."""

from __future__ import annotations

import itertools
import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.models.batch import TokenBatch
from loglik.models.canonical import BpeView, split_utf8
from loglik.models.causal import CausalLM
from loglik.scoring.covers import CoverEncoder, Tail, kind_of
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.windows import Window
from zoo import CAUSAL, CORPUS, END, bert_tokenizer, build, byte_level_tokenizer, llama_tokenizer

# The published patterns of Llama-3, Qwen2 and GPT-4o, and one that groups digits from the right.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{a}{CONTRACTIONS}?" for a in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*"))
GPT4O += r"|\p{N}{1,3}|" + REST.replace(r"\r\n]*|\s*", r"\r\n/]*|\s*", 1)
RIGHT = r"\d{1,3}(?=(?:\d{3})*(?!\d))|[^\d]"
TEXT = (
    CORPUS[0] * 3 + " it's we'll they're I've don't x'l  \n\n 1234 12345 foo  bar\n  baz\t\tqux  HELLO naïve 漢字漢" * 4
)
SPECIAL = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]


def trained(pattern=None, *, normalizer=None, extra=()):
    """Byte-level BPE with a pattern of its own; `extra` are tokens that only ``ignore_merges`` can write."""
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer = Tokenizer(models.BPE(ignore_merges=bool(extra)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": [END], "show_progress": False}
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=330, **options))
    state = json.loads(tokenizer.to_str())
    for token in extra:
        state["model"]["vocab"].setdefault(token, len(state["model"]["vocab"]))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=END, eos_token=END)


def spaced(pre_tokenizer, normalizer=None):
    """BPE over characters with byte fallback and "▁" for spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MAKE = {
    "gpt2": byte_level_tokenizer,
    "gpt2 longer words": lambda: trained(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "llama-3": lambda: trained(LLAMA3, extra=("Ġhellox", "abc", "Ġit", "ell", "wor", "'ll", "12", "ĠĠa", "'l")),
    "qwen": lambda: trained(QWEN, normalizer=normalizers.NFC()),
    "gpt-4o": lambda: trained(GPT4O),
    "digits from the right": lambda: trained(RIGHT),
    "no pattern": trained,
    "llama-2": llama_tokenizer,
    "metaspace": lambda: spaced(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace never": lambda: spaced(pre_tokenizers.Metaspace(prepend_scheme="never")),
    "gemma": lambda: spaced(pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
}


@cache
def tokenizer(name):
    return MAKE[name]()


@cache
def view(name) -> BpeView:
    return BpeView(tokenizer(name))


# ---- an oracle that knows nothing but the tokenizer: encode many texts that begin with the bytes

AFTER = [*"alsdreoxLSHé漢ñ€12 \n\r\t!'.’", "𐌰", "\u3000", "\u0301", "😀", "\U000f0000", "É", "ก"]
PAIRS = ["".join(pair) for pair in itertools.product("le1 \n'x漢", repeat=2)]
AFTER += [*PAIRS, *("".join(three) for three in itertools.product("l1 \n'", repeat=3)), "11111", "111111"]
POINTS = [*range(0x80, 0x3100), *range(0x4E00, 0x9FFF, 3), *range(0xAC00, 0xD7A3, 16), *range(0x10300, 0x10340)]
POINTS += [*range(0x6F22, 0x6F23), *range(0x5B57, 0x5B58), *range(0x1F300, 0x1F400), *range(0xF0000, 0xF0010)]
BEGUN: dict[bytes, list[str]] = {}
for point in POINTS:
    for cut_ in range(1, len(chr(point).encode())):
        if point != 0x2581:
            BEGUN.setdefault(chr(point).encode()[:cut_], []).append(chr(point))


def texts(data: bytes) -> list[str]:
    """Texts that begin with bytes: one, or one for each of some characters that complete the last."""
    parts = split_utf8(data)
    if parts is None:
        return []
    found = BEGUN.get(parts[1], []) if parts[1] else [""]
    return [parts[0] + char for char in found[:: max(1, len(found) // 150)]]


def covers_of_texts(name: str, x: bytes) -> set[tuple[int, ...]]:
    """For very many texts that begin with x: the tokens of their encoding up to the one that completes x."""
    look = view(name)
    lead = len(look.surface(b"a")) - 1
    xs = b" " * lead + x
    few = ("", "a", " ", "1", "\n", "\u0301")
    many = {start + after for start in texts(x) for after in (AFTER if len(texts(x)) == 1 else few)}
    for data in look.spelling.values():
        for m in range(max(0, len(xs) - len(data)), len(xs)):
            if data.startswith(xs[m:]):
                starts = texts((xs[:m] + data)[lead:])
                many |= {start + after for start in starts for after in (AFTER[:30] if len(starts) == 1 else few)}
    asked = [y for y in many if look.unchanged(y) and not (name == "metaspace" and y.startswith(" "))]
    out = set()
    for y, encoding in zip(asked, look.backend.encode_batch_fast(asked, add_special_tokens=False), strict=True):
        ends = np.cumsum([len(look.spelling[i]) for i in encoding.ids])
        assert ends[-1] == len(y.encode()) + lead
        out.add(tuple(encoding.ids[: int(np.searchsorted(ends, lead + len(x))) + 1]))
    return out


def covers(name: str, x: bytes) -> set[tuple[int, ...]]:
    fans = Tail(view(name), view(name).surface(x)).covers()
    found = [(*fan.path, token) for fan in fans for token in fan.tokens]
    assert len(set(found)) == len(found)
    return set(found)


WORDS = [
    "hello wor",
    "hello ",
    "Ans",
    "it's",
    "it'",
    "x'l",
    "a  ",
    "a   ",
    "a \n",
    "a\n ",
    "1",
    "12",
    "1234",
    "HEL",
    " h",
]
WORDS += ["x'r", "we'v", "?! ", "a\t ", "é", "a漢", "l\n\n", "12" * 9]
CUT = ["é".encode()[:1], "x漢".encode()[:3], "漢".encode()[:1], b"\xe2\x80", b"a\xe2", b"\xf0\x9f"]


@pytest.mark.parametrize("name", MAKE)
def test_covers_are_those_of_all_texts(name):
    """Spaces at the end, words and contractions cut in two, digits, white space with look-ahead, cut characters."""
    for x in [*(word.encode() for word in WORDS), *CUT]:
        if not (name == "metaspace" and x.startswith(b" ")):
            assert covers(name, x) == covers_of_texts(name, x), x


@given(x=st.text(st.sampled_from("hel owrd'l1\n漢é"), min_size=1, max_size=7), cut=st.integers(0, 2))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("name", ["gpt2", "llama-3", "llama-2"])
def test_covers_of_random_strings(name, x, cut):
    data = x.encode()[: max(1, len(x.encode()) - cut)]
    assert covers(name, data) == covers_of_texts(name, data)


def test_one_string_with_two_settled_pasts():
    """What stands before a place is not always one encoding: "'l" is one token only if "'ll" is to follow."""
    pattern = r"'ll| ?\p{L}+| ?[^\s\p{L}]+|\s+"
    state = json.loads(trained(pattern).backend_tokenizer.to_str())
    state["model"]["merges"].append(["'", "l"])
    state["model"]["vocab"]["'l"] = len(state["model"]["vocab"])
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if pair != ["l", "l"]]
    look = BpeView(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))))
    fans = Tail(look, b"x'l").covers()
    spelled = {tuple(look.spelling[i] for i in (*fan.path, token)) for fan in fans for token in fan.tokens}
    assert {(b"x", b"'", b"l"), (b"x", b"'l")} <= spelled


@st.composite
def random_vocabularies(draw):
    """Four letters, merges of them in any order, a pattern that looks ahead or names letters, whole words or not."""
    letters = ["a", "l", "'", "Ġ"]
    parts, merges = list(letters), []
    for _ in range(draw(st.integers(1, 8))):
        pair = [draw(st.sampled_from(parts)), draw(st.sampled_from(parts))]
        if pair not in merges and len("".join(pair)) <= 4:
            merges.append(pair)
            parts.append("".join(pair))
    whole = draw(st.lists(st.text(st.sampled_from("al'Ġ"), min_size=2, max_size=3), max_size=3))
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*parts, *whole]))}
    state = {"type": "BPE", "vocab": vocabulary, "merges": draw(st.permutations(merges)), "ignore_merges": bool(whole)}
    gpt2 = r"'ll|'a| ?\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+"
    pattern = draw(st.sampled_from([None, gpt2, LLAMA3, GPT4O, r"a{1,2}(?=(?:aa)*(?!a))|l+'?| +(?= )|."]))
    steps = (
        [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}] if pattern else []
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = json.loads(Tokenizer(models.BPE()).to_str())
    tokenizer |= {"model": state, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]}}
    return BpeView(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer))))


@given(
    random_vocabularies(), st.lists(st.text(st.sampled_from("al' "), min_size=1, max_size=4), min_size=3, max_size=3)
)
@settings(max_examples=30, deadline=None)
def test_covers_under_random_vocabularies(look, strings):
    """All texts that go on with up to five of the four letters: the longest token, and "ll" behind its apostrophe."""
    more = ["".join(t) for n in range(6) for t in itertools.product("al' ", repeat=n)]
    for x in strings:
        wanted = set()
        for encoding in look.backend.encode_batch_fast([x + after for after in more]):
            ends = np.cumsum([len(look.spelling[i]) for i in encoding.ids])
            wanted.add(tuple(encoding.ids[: int(np.searchsorted(ends, len(x))) + 1]))
        fans = Tail(look, x.encode()).covers()
        assert {(*fan.path, token) for fan in fans for token in fan.tokens} == wanted, x


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("x", [b"he", b"it'", b"a ", b"12", b"x\xe6"])
def test_extensions_are_covers_of_one_byte_more(name, x):
    """A token behind a cover that spells x exactly: a cover of x and one more byte, which begins its last token."""
    look = view(name)
    surface = look.surface(x)
    found = {(*fan.path, token) for fan in Tail(look, surface).extensions() for token in fan.tokens}
    for byte in [*b" eELl's1!\n", 0xC3, 0xBC, 0xF0]:
        if split_utf8(x + bytes([byte])) is None:
            continue
        longer = {cover for cover in covers(name, x + bytes([byte])) if spells(look, cover[:-1]) == surface}
        assert longer == {cover for cover in found if look.spelling[cover[-1]][0] == byte}, byte


def spells(look: BpeView, tokens) -> bytes:
    return b"".join(look.spelling[token] for token in tokens)


def remade(look: BpeView, vocabulary: dict[str, int], merges=()) -> BpeView:
    """The same pre-tokeniser over another vocabulary."""
    state = json.loads(look.backend.to_str())
    state["model"] |= {"vocab": vocabulary, "merges": list(merges)}
    state["added_tokens"] = []
    return BpeView(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))))


def found_by(look: BpeView, x: bytes) -> set[tuple[int, ...]]:
    return {(*fan.path, token) for fan in Tail(look, x).covers() for token in fan.tokens}


def test_a_whole_word_shuts_out_its_parts():
    """Where the piece cannot go on, a word of the vocabulary is its one encoding, though merges would not make it."""
    vocabulary = {"a": 0, "l": 1, "al": 2}
    assert found_by(remade(BpeView(trained("al|.", extra=("ĠĠ",))), vocabulary), b"al") == {(2,)}
    # A pattern that lets the piece go on lets the parts stand: "all" has no word.
    assert found_by(remade(BpeView(trained("al+|.", extra=("ĠĠ",))), vocabulary), b"al") == {(2,), (0, 1)}


def test_a_cut_character_must_be_able_to_go_on():
    """A first byte that merges with every byte that can follow is never a token of its own."""
    pair = {"Ã": 0, "©": 1, "Ã©": 2}
    assert found_by(remade(BpeView(trained()), pair, [["Ã", "©"]]), b"\xc3") == {(2,)}
    assert found_by(remade(BpeView(trained()), pair | {"¨": 3}, [["Ã", "©"]]), b"\xc3") == {(2,), (0,)}


def test_whole_words_that_look_ahead():
    """A word of the vocabulary that no merge makes, and a piece that ends in it only before one more space."""
    look = remade(BpeView(trained(r" +(?= )|.", extra=("ĠĠ",))), {"a": 0, "Ġ": 1, "ĠĠ": 2})
    assert look.encode("a   ") == [0, 2, 1]
    assert found_by(look, b"a ") == {(0, 1), (0, 2)}


def test_a_pattern_that_names_letters():
    """Letters are told apart where the pattern does: "al" is two pieces, "aa" is one."""
    look = remade(BpeView(trained(r"aa|.|\s")), {"a": 0, "l": 1, "aa": 2, "al": 3}, [["a", "a"], ["a", "l"]])
    assert found_by(look, b"a") == {(0,), (2,)}


# ---- full enumeration of token sequences, with the model's probabilities


def tiny(merges, letters, pattern=None):
    """A byte-level tokenizer with a handful of tokens, whose END is BOS and EOS."""
    vocabulary = {token: i for i, token in enumerate([END, *letters])}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)


TINY = {
    "letters": tiny([("a", "b"), ("b", "a"), ("ab", "a"), ("a", "a")], "ab"),
    "words": tiny([("Ġ", "a"), ("a", "b"), ("Ġa", "b"), ("Ġ", "Ġ")], ["a", "b", "Ġ"], "gpt2"),
    "characters": tiny([("Ã", "©"), ("a", "Ã"), ("Ã©", "a"), ("©", "a")], ["a", "Ã", "©", "¨"]),
}
STRINGS = {
    "letters": ["a", "ab", "abab", "aaa", "baab"],
    "words": ["a", " ", "a ", "a  ", "  a", "ab a", "a b"],
    "characters": ["a", "é", "aé", "éa", "aéa", "èé"],
}


@cache
def tiny_model(name):
    vocabulary = len(TINY[name])
    return CausalLM(build(CAUSAL["llama"], vocabulary, seed=3).double(), TINY[name])


def log_probs_of(model, sequences) -> torch.Tensor:
    """Log-probability of each sequence after BOS, one by one through the model."""
    rows = [[model.tokenizer.bos_token_id, *sequence] for sequence in sequences]
    with torch.no_grad():
        return model.log_prob(TokenBatch.from_lists(rows, starts=[1] * len(rows))).value


@cache
def encodings(name) -> frozenset[tuple[int, ...]]:
    """All beginnings of the encodings of all texts of up to seven characters."""
    backend = TINY[name].backend_tokenizer
    letters = {"letters": "ab", "words": "ab ", "characters": "aéè"}[name]
    every = ["".join(t) for n in range(8) for t in itertools.product(letters, repeat=n)]
    ids = [tuple(e.ids) for e in backend.encode_batch_fast(every, add_special_tokens=False)]
    return frozenset(t[:n] for t in ids for n in range(len(t) + 1))


def enumerated_mass(name, x: bytes) -> float:
    """M(x) from its definition: all token sequences, those that cover x, of these the beginnings of an encoding."""
    model, spelling = tiny_model(name), BpeView(TINY[name]).spelling
    found, open_ = [], [((), b"")]
    while open_:
        tokens, spelled = open_.pop()
        if len(spelled) >= len(x):
            found.append(tokens)
            continue
        for token, data in spelling.items():
            longer = spelled + data
            if longer.startswith(x) or x.startswith(longer):
                open_.append(((*tokens, token), longer))
    canonical = [tokens for tokens in found if tokens in encodings(name)]
    if x in (b"abab", b"ab a", "aéa".encode()):
        assert 0 < len(canonical) < len(found)  # the restriction says something
    return float(log_probs_of(model, canonical).exp().sum())


def each_cover(plan, fans) -> list[Window]:
    """One window per cover, its last token scored like the others."""
    first = len(plan.prefix) + plan.shared
    rows = [[*plan.prefix, *fan.path, token] for fan in fans for token in fan.tokens]
    return [Window(ids, first, first, len(ids), [-1] * len(ids), plan.shared, 0) for ids in rows]


def numerator(plan) -> list[Window]:
    return each_cover(plan, plan.upper)


def denominator(plan) -> list[Window]:
    return each_cover(plan, plan.lower)


def evaluate(model, windows) -> list[list[float]]:
    """The nats of each window's scored tokens: one forward pass over all windows."""
    if not windows:
        return []
    batch = TokenBatch.from_lists(
        [w.ids for w in windows], starts=[w.start for w in windows], scored_from=[w.scored_from for w in windows]
    )
    with torch.no_grad():
        likelihood, _ = model.score_tokens(batch)
    terms = likelihood.per_unit
    return [terms[i, w.scored_from : w.scored_to].tolist() for i, w in enumerate(windows)]


def log_p(model, prompt, completion, **options) -> float:
    plan = CoverEncoder(model.tokenizer, max_length=model.max_length, **options).plan(prompt, completion)
    return plan.combine(evaluate(model, numerator(plan)), evaluate(model, denominator(plan)))


@pytest.mark.parametrize("name", TINY)
def test_prefix_mass_by_full_enumeration(name):
    for text in STRINGS[name]:
        assert math.exp(log_p(tiny_model(name), "", text)) == pytest.approx(
            enumerated_mass(name, text.encode()), rel=1e-9
        )


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("bos", ["always", "auto"])
def test_conditional_is_a_ratio_of_masses(name, bos):
    """Every cut of every string, although the tokens that all covers share are not scored."""
    model = tiny_model(name)
    for text in STRINGS[name]:
        for cut in range(1, len(text)):
            prompt, completion = text[:cut], text[cut:]
            if bos == "auto" and CoverEncoder(model.tokenizer).plan(prompt, completion).prefix == []:
                continue  # no BOS stands before what is shared
            wanted = enumerated_mass(name, text.encode()) / enumerated_mass(name, prompt.encode())
            assert math.exp(log_p(model, prompt, completion, bos=bos)) == pytest.approx(wanted, rel=1e-9)


@cache
def model_of(name):
    return CausalLM(build(CAUSAL["llama"], 400, seed=1).double(), tokenizer(name))


@pytest.mark.parametrize("name", ["gpt2", "llama-3", "llama-2", "gemma"])
@pytest.mark.parametrize("text", ["hello world it", "The answer é漢 42", "a  b"])
def test_chain_rule_over_bytes(name, text):
    """However a string is cut, the parts add up to the whole; no policy about token boundaries has this."""
    model = model_of(name)
    whole = log_p(model, "", text, bos="always")
    for cut in range(1, len(text)):
        parts = log_p(model, "", text[:cut], bos="always"), log_p(model, text[:cut], text[cut:], bos="always")
        assert sum(parts) == pytest.approx(whole, abs=1e-8), cut
    letters = [log_p(model, text[:i], char, bos="always") for i, char in enumerate(text)]
    assert sum(letters) == pytest.approx(whole, abs=1e-8)
    assert max(letters) <= 1e-9
    if " w" not in text and "r é" not in text:
        return  # of one-letter tokens every policy is a chain rule
    for boundary in ("joint", "separate"):
        scorer = Scorer(model, ScoreOptions(boundary=boundary, bos="always"))
        sums = []
        for cut in range(1, len(text)):
            rows = scorer.score_pairs([("", text[:cut]), (text[:cut], text[cut:])])
            sums.append(sum(row.log_prob for row in rows))
        assert max(sums) - min(sums) > 0.1, boundary


@given(prompt=st.text(max_size=6), parts=st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=3))
@settings(max_examples=30, deadline=None)
def test_chain_rule_for_any_text(prompt, parts):
    """Any text at all: log p(ab | c) = log p(a | c) + log p(b | ca)."""
    model = model_of("gpt2")
    try:
        whole = log_p(model, prompt, "".join(parts), bos="always")
    except RowError:
        return  # surrogates and NUL
    terms = [log_p(model, prompt + "".join(parts[:i]), part, bos="always") for i, part in enumerate(parts)]
    assert sum(terms) == pytest.approx(whole, abs=1e-8)


def test_the_boundary_does_not_move_the_probability_of_what_follows():
    """The prompt boundary problem: one more word piece in the prompt, and the certain letter stays certain."""
    model = model_of("gpt2")
    for prompt, completion in [("Ans", "wer"), ("hello wor", "ld"), ("hello", " world"), ("hello ", "world")]:
        plan = CoverEncoder(model.tokenizer).plan(prompt, completion)
        assert plan.num_upper >= 1
        assert plan.num_lower >= 1
        assert plan.num_bytes == len(completion)
        spelled = {BYTES_OF(model, (*f.path, t)) for f in plan.upper for t in f.tokens}
        assert all(data.startswith((prompt + completion).encode()) for data in spelled)
        assert log_p(model, prompt, completion) <= 0


def BYTES_OF(model, tokens) -> bytes:  # noqa: N802
    spelling = BpeView(model.tokenizer).spelling
    return b"".join(spelling[token] for token in tokens)


def test_windows_score_what_is_not_shared():
    encoder = CoverEncoder(tokenizer("gpt2"))
    plan = encoder.plan("The answer is so. yes hello wor", "ld")
    rows = [*numerator(plan), *denominator(plan)]
    assert (len(numerator(plan)), len(denominator(plan))) == (plan.num_upper, plan.num_lower)
    shared = rows[0].ids[: plan.shared]
    assert plan.shared > 4
    assert all(row.ids[: plan.shared] == shared for row in rows)
    assert len({row.ids[plan.shared] for row in rows}) > 1
    assert all(row.start == row.scored_from == plan.shared < row.scored_to == len(row.ids) for row in rows)
    assert plan.prefix == []
    # Without a prompt all tokens are scored, BOS in front.
    first = encoder.plan("", "hello wor")
    assert denominator(first) == []
    assert first.num_lower == 0
    assert all(row.ids[0] == tokenizer("gpt2").bos_token_id and row.scored_from == 1 for row in numerator(first))


def test_what_is_all_shared_is_not_scored():
    """Prompts with one cover: their mass is the shared tokens' own, and cancels."""
    plan = CoverEncoder(TINY["letters"]).plan("b", "b")
    assert (plan.num_lower, len(denominator(plan)), plan.shared) == (2, 2, 0)  # "b" and "ba"
    lone = tiny([("a", "b")], "ab")
    plan = CoverEncoder(lone, bos="never").plan("b", "b")
    assert (plan.num_lower, denominator(plan), plan.shared) == (1, [], 1)
    assert [row.ids for row in numerator(plan)] == [[2, 2]]
    # And where prompt and completion have that one cover too, the completion is certain.
    certain = tiny([("Ã", "©")], ["Ã", "©"])
    plan = CoverEncoder(certain).plan("é", "é")
    assert plan.combine([[-1.0]], []) == -1.0
    assert plan.combine([], []) == 0.0


def test_combine_is_a_difference_of_log_sums():
    plan = CoverEncoder(tokenizer("gpt2")).plan("hel", "lo")
    value = plan.combine([[-800.0, -1.0], [-802.0]], [[-800.0], [-math.inf]])
    assert value == pytest.approx(math.log(math.exp(-1) + math.exp(-2)))
    assert plan.combine([[-math.inf]], [[-1.0]]) == -math.inf
    with pytest.raises(RowError, match="probability 0"):
        plan.combine([[-1.0]], [[-math.inf]])


def test_bos_policy():
    bos = tokenizer("gpt2").bos_token_id
    make = lambda **options: CoverEncoder(tokenizer("gpt2"), **options)  # noqa: E731
    assert make().plan("hello world it is", " so").prefix == []
    assert make().plan("h", "ello").prefix == [bos]  # the covers of "h" differ in their first token
    assert make(bos="always").plan("hello world it is", " so").prefix == [bos]
    assert make(bos="never").plan("hello world it is", " so").prefix == []
    with pytest.raises(RowError, match="nothing before it"):
        make(bos="never").plan("", "hello")
    with pytest.raises(RowError, match="nothing before it"):
        make(bos="never").plan("h", "ello")
    adds = CoverEncoder(tokenizer("llama-2"))
    assert adds.plan("hello world", " it").prefix == [1]
    assert adds.plan("<s>hello world", " it").prefix == []
    with pytest.raises(InputError, match="no BOS"):
        CoverEncoder(byte_level_tokenizer(bos=False), bos="always")


def test_added_tokens_in_the_prompt_stand_fast():
    """They are tokens as everywhere; covers begin behind the last of them."""
    encoder = CoverEncoder(tokenizer("gpt2"))
    bos = tokenizer("gpt2").bos_token_id
    plan = encoder.plan(f"hello{END}Ans", "wer")
    head = [*encoder.view.encode("hello"), bos]
    assert all(row.ids[: len(head)] == head for row in [*numerator(plan), *denominator(plan)])
    behind = {tuple(row.ids[len(head) :]) for row in denominator(plan)}
    assert behind == covers("gpt2", b"Ans")
    # A prompt that ends with one has that one cover, and what follows is unconditional.
    plan = encoder.plan(f"hello{END}", "Ans")
    assert (plan.num_lower, denominator(plan), plan.shared) == (1, [], len(head))
    assert {tuple(row.ids[len(head) :]) for row in numerator(plan)} == covers("gpt2", b"Ans")
    # A space that the tokenizer puts in front of every text stands in front of what follows a token, too.
    plan = CoverEncoder(tokenizer("llama-2")).plan("hello</s>Ans", "wer")
    head = view("llama-2").encode("hello</s>")
    assert {tuple(row.ids[1 + len(head) :]) for row in denominator(plan)} == covers("llama-2", b"Ans")
    for prompt, completion in [("a", f"b{END}"), ("a" + END[:3], END[3:] + "b")]:
        with pytest.raises(RowError, match=r"completion has '<\|endoftext\|>', a token and not text"):
            encoder.plan(prompt, completion)


@pytest.mark.parametrize("name", ["gpt2", "llama-2", "metaspace"])
def test_first_and_whole_encodings_are_covers(name):
    """The encoding of a text is one of its own covers, or its tokens but the last begin one."""
    for text in ["hello", "hello world. it is", "é漢", "yes, it's 42"]:
        whole = tuple(view(name).encode(text))
        assert Tail(view(name), view(name).surface(text.encode())).whole() == whole
        assert whole in covers(name, text.encode())


def test_rows_that_cannot_be_scored():
    encoder = CoverEncoder(tokenizer("gpt2"), max_length=4)
    with pytest.raises(RowError, match="the completion is empty"):
        encoder.plan("a", "")
    with pytest.raises(RowError, match="NUL"):
        encoder.plan("a", "b\0")
    plan = encoder.plan("hello yes yes yes", "!")
    assert max(len(row.ids) for row in numerator(plan)) == 5  # the last token is only ever a target
    with pytest.raises(RowError, match=r"has 6 tokens and the model's context is 4.*no windows"):
        encoder.plan("hello yes yes yes yes", "!")
    with pytest.raises(InputError, match="WordPiece"):
        CoverEncoder(bert_tokenizer())


def test_kinds():
    for prompt in (False, True):
        assert kind_of(Kind.EXACT, "canonical", prompt=prompt) is Kind.EXACT
    assert kind_of(Kind.EXACT, "all", prompt=False) is Kind.LOWER_BOUND
    assert kind_of(Kind.EXACT, "all", prompt=True) is Kind.SURROGATE
    assert kind_of(Kind.LOWER_BOUND, "canonical", prompt=True) is Kind.SURROGATE


def test_only_the_tail_of_a_long_prompt_is_looked_at():
    """A thousand tokens more in front change neither the covers' ends nor what is scored."""
    encoder = CoverEncoder(tokenizer("gpt2"))
    short = encoder.plan("it is so. hello wor", "ld")
    long = encoder.plan("The answer is 42, " * 200 + "it is so. hello wor", "ld")
    assert long.shared > 1000
    ends = lambda plan, rows: {tuple(row.ids[len(plan.prefix) + plan.shared :]) for row in rows}  # noqa: E731
    assert ends(long, numerator(long)) == ends(short, numerator(short))
    assert ends(long, denominator(long)) == ends(short, denominator(short))
    tail = Tail(encoder.view, ("The answer is 42, " * 200 + "hello wor").encode())
    assert len(tail.data) - tail.origin < 40
