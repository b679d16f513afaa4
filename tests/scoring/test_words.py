"""Word probabilities: they sum to one, they telescope, and they are what the model's joint probabilities say."""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.encode import EncodedText, TextEncoder
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.words import WordVocabulary, beginning_of_word, probes_for, word_scores, word_spans
from zoo import CAUSAL, CORPUS, bert_tokenizer, build, byte_level_tokenizer, llama_tokenizer


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE whose tokens never span words; white space other than the space falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


BYTES, LLAMA, METASPACE = byte_level_tokenizer(), llama_tokenizer(), metaspace_tokenizer()
ZOO = pytest.mark.parametrize(
    ("family", "tokenizer"),
    [("gpt2", BYTES), ("llama", LLAMA), ("llama", METASPACE)],
    ids=["byte_level", "llama", "metaspace"],
)

# Letters, white space alone, white space with a letter, a mark that ends a line, an end, a turn that is not text.
TOKENS = ["<e>", "<m>", "a", "b", " ", "\n", " a", " b", ".", ".\n", "ab"]
EOS, TURN = 0, 1
SUBSET = {0, 4, 5, 6, 7}
VOCABULARY = len(TOKENS) + 2  # two embeddings without a token


def small_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    merges = [(" ", "a"), (" ", "b"), (".", "\n"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    special = special or {"bos_token": "<e>", "eos_token": "<e>", "additional_special_tokens": ["<m>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


SMALL = small_tokenizer()
MODEL = CausalLM(build(CAUSAL["gpt2"], VOCABULARY).double(), SMALL)
WORDS = WordVocabulary.of(SMALL, VOCABULARY)


def row(context: list[int], completion: list[int]) -> EncodedText:
    """A row of any tokens, canonical or not."""
    ids = [*context, *completion]
    pieces = ["" if i >= len(TOKENS) else TOKENS[i] for i in ids]
    size = len("".join(pieces[len(context) :]).encode())
    return EncodedText([EOS], ids, [], len(context), len(context), "aligned", size, pieces, [-1] * len(ids), False)


def next_log_probs(model: CausalLM, text: EncodedText) -> torch.Tensor:
    """(T, V): row i predicts what stands behind ``(prefix + content)[i]``."""
    return of_ids(model, (*text.prefix, *text.content))


@functools.lru_cache(maxsize=8192)
def of_ids(model: CausalLM, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.double(), -1)


def inputs(model: CausalLM, text: EncodedText, words: WordVocabulary, subset=None) -> tuple[list[float], list[float]]:
    """Terms and masses as an engine gives them."""
    log_probs, shift = next_log_probs(model, text), len(text.prefix)
    subset = words.subset if subset is None else subset
    terms = [
        float(log_probs[shift + t - 1, token]) if t >= text.scored_from else 0.0 for t, token in enumerate(text.content)
    ]
    masses = [float(log_probs[shift + i][subset].logsumexp(0)) for i in probes_for(text, words)]
    return terms, masses


def scored(model: CausalLM, text: EncodedText, words: WordVocabulary):
    return word_scores(text, words, *inputs(model, text, words))


# --------------------------------------------------------------------------------------------- enumeration
class Enumeration:
    """Every next word after `context`, walked token by token; nothing here calls the code under test but `word`."""

    def __init__(self, context: list[int], depth: int) -> None:
        self.context, self.depth = context, depth
        self.corrected = self.uncorrected = 0.0
        self.rest = 0.0  # end of the text, tokens that are no text, words longer than `depth`
        self.strings: dict[str, float] = {}
        is_open = bool(context) and context[-1] != EOS and not TOKENS[context[-1]][-1].isspace()
        self.start_mass = sum(float(self.probs(())[v]) for v in SUBSET) if is_open else 1.0
        self.walk((), 1.0, in_word=False, allowed=SUBSET if is_open else set(range(VOCABULARY)))

    def probs(self, sequence: tuple[int, ...]) -> torch.Tensor:
        return of_ids(MODEL, (EOS, *self.context, *sequence))[-1].exp()

    def word(self, sequence: tuple[int, ...], joint: float) -> None:
        (score,) = scored(MODEL, row(self.context, list(sequence)), WORDS)
        assert score.corrected
        assert score.whole
        assert score.log_prob is not None
        self.corrected += math.exp(score.log_prob)
        self.uncorrected += joint
        self.strings[score.text] = self.strings.get(score.text, 0.0) + math.exp(score.log_prob)

    def walk(self, sequence: tuple[int, ...], joint: float, *, in_word: bool, allowed: set[int]) -> None:
        probs = self.probs(sequence)
        if in_word:
            self.word(sequence, joint)
        if len(sequence) == self.depth:
            ends = sum(float(probs[v]) for v in SUBSET) if in_word else 0.0
            self.rest += joint * (1 - ends) / self.start_mass
            return
        for v in sorted(allowed):
            if in_word and v in SUBSET:
                continue  # the word ended before it
            p = joint * float(probs[v])
            text = TOKENS[v] if v < len(TOKENS) else ""
            if v in (EOS, TURN) or not text:
                self.rest += p / self.start_mass
            elif not text.isspace() and text[-1].isspace():
                self.word((*sequence, v), p)
            else:
                self.walk((*sequence, v), p, in_word=not text.isspace(), allowed=set(range(VOCABULARY)))


@pytest.mark.parametrize(
    "context",
    [[], [3], [6, 10], [2, 4], [2, 5], [2, 9], [8, 2, 7], [2, EOS]],
    ids=["start", "b", "_aab", "a_", "a-newline", "mark-newline", "dot-a_b", "after-the-end"],
)
def test_probabilities_of_all_words_sum_to_one(context):
    """Words up to three tokens, the end of the text and the exactly known rest; without the correction they do not."""
    found = Enumeration(context, depth=3)
    assert found.corrected > 0.05
    assert found.corrected + found.rest == pytest.approx(1, abs=1e-9)
    assert abs(found.uncorrected + found.rest - 1) > 0.01


def test_value_is_a_lower_bound_for_the_string():
    """The tokenizer's way to spell "ab" after a letter is one of three; the probability of the string sums them."""
    found = Enumeration([3], depth=3)
    canonical = TextEncoder(SMALL, layout="causal").encode("b", " ab")
    assert [TOKENS[i] for i in canonical.content] == ["b", " a", "b"]
    (score,) = scored(MODEL, row([3], canonical.content[1:]), WORDS)
    assert score.kind is Kind.EXACT
    assert math.exp(score.log_prob) < found.strings["ab"] - 1e-4


def test_rest_of_a_word_cut_by_the_boundary_sums_to_one():
    """After a prompt that ends inside a word: the word may end there (the empty piece) or go on."""
    context = [6]
    log_probs = next_log_probs(MODEL, row(context, []))[-1]
    total = sum(float(log_probs[v].exp()) for v in SUBSET)  # the empty piece
    rest = sum(float(log_probs[v].exp()) for v in range(VOCABULARY) if v == TURN or v >= len(TOKENS))
    for sequence in itertools.chain.from_iterable(itertools.product([2, 3, 8, 9, 10], repeat=n) for n in (1, 2, 3)):
        if 9 in sequence[:-1]:
            continue  # a new word would begin behind it
        (score,) = scored(MODEL, row(context, list(sequence)), WORDS)
        assert not score.whole
        assert score.corrected
        total += math.exp(score.log_prob)
        text = row(context, list(sequence))
        after, joint = next_log_probs(MODEL, text)[-1].exp(), math.exp(math.fsum(inputs(MODEL, text, WORDS)[0]))
        if sequence[-1] != 9:
            lost = [TURN, 11, 12] if len(sequence) < 3 else [v for v in range(VOCABULARY) if v not in SUBSET]
            rest += joint * float(after[lost].sum())
    assert total + rest == pytest.approx(1, abs=1e-9)


# --------------------------------------------------------------------------------------------- joint probabilities
def literal_subset(tokenizer, vocabulary: int) -> list[int]:
    """The set written down from the names of the tokens."""
    controls = "\t\n\v\f\r\x1c\x1d\x1e\x1f"
    names = tokenizer.get_vocab()
    if tokenizer is BYTES:
        heads = tuple("Ġ" + "".join(chr(256 + ord(c)) for c in controls))
    else:
        heads = ("▁", *(f"<0x{ord(c):02X}>" for c in controls + " "))
    found = {i for name, i in names.items() if name.startswith(heads)} | {tokenizer.eos_token_id}
    return sorted(i for i in found if i < vocabulary)


@ZOO
def test_subset_by_the_names_of_the_tokens(family, tokenizer):
    subset = beginning_of_word(tokenizer, len(tokenizer) + 7)
    assert subset.dtype == torch.bool
    assert subset.shape == (len(tokenizer) + 7,)
    assert subset.nonzero().flatten().tolist() == literal_subset(tokenizer, len(tokenizer))
    assert beginning_of_word(tokenizer, 40).nonzero().flatten().tolist() == literal_subset(tokenizer, 40)


@ZOO
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("", "hello world. The answer"),
        ("hello world.", " The answer is 42, yes"),
        ("The\nanswer", "\n\n  is\tñandú\n then"),
        ("hello wor", "ld there"),
        ("so", " 漢字 é"),
    ],
)
def test_values_are_ratios_of_joint_probabilities(family, tokenizer, prompt, completion):
    r"""p(w | c) = sum_v p(c, w, v) / sum_v p(c, v) with v in the set, each a whole sequence scored by the model."""
    vocabulary = len(tokenizer) + 3
    model = CausalLM(build(CAUSAL[family], vocabulary).double(), tokenizer)
    words = WordVocabulary.of(tokenizer, vocabulary)
    text = TextEncoder(tokenizer, layout="causal", bos="always").encode(prompt, completion)
    subset = literal_subset(tokenizer, vocabulary)

    def log_joint(ids: list[int], ends: list[list[int]]) -> float:
        with torch.no_grad():
            value = model.log_prob(TokenBatch.from_lists([[*text.prefix, *ids, *end] for end in ends])).value
        return float(value.logsumexp(0))

    def closed(ids: list[int]) -> bool:
        """Nothing, or white space at the end: by the spelling in the vocabulary."""
        names = tokenizer.convert_ids_to_tokens(ids[-1:])
        return not names or names[0][-1] in "Ġ▁Ċĉ" or names[0] in ("<0x0A>", "<0x09>")

    spans = word_spans(text, words)
    # The llama tokenizer of the zoo has tokens that span words, which stay together.
    assert " ".join(span.text for span in spans).split() == "".join(text.pieces[text.start :]).split()
    for span, score in zip(spans, scored(model, text, words), strict=True):
        before, after = text.content[: span.begin], text.content[: span.end]
        every = [[v] for v in subset]
        top = log_joint(after, [[]] if closed(after) else every)
        bottom = log_joint(before, every if span.whole and not closed(before) else [[]]) if before else 0.0
        assert score.log_prob == pytest.approx(top - bottom, abs=1e-8)
        assert score.surprisal == pytest.approx(-(top - bottom) / math.log(2), abs=1e-8)
        assert score.num_tokens == span.end - span.begin
        assert score.kind is Kind.EXACT


@pytest.mark.parametrize("tokenizer", [BYTES, METASPACE], ids=["byte_level", "metaspace"])
def test_sum_over_words_telescopes(tokenizer):
    """Sum of the words = sum of the tokens + log mass behind the last - log mass before the first."""
    model = CausalLM(build(CAUSAL["gpt2"], len(tokenizer)).double(), tokenizer)
    words = WordVocabulary.of(tokenizer, len(tokenizer))
    text = TextEncoder(tokenizer, layout="causal", bos="always").encode(
        "The answers", " is 42, yes\n\nit is so the there"
    )
    terms, masses = inputs(model, text, words)
    log_probs, shift = next_log_probs(model, text), len(text.prefix)
    subset = literal_subset(tokenizer, len(tokenizer))
    first, last = (float(log_probs[shift + i][subset].logsumexp(0)) for i in (text.start - 1, len(text.content) - 1))
    total = math.fsum(score.log_prob for score in word_scores(text, words, terms, masses))
    assert total == pytest.approx(math.fsum(terms) + last - first, abs=1e-9)
    assert abs(last) > 0.01
    assert abs(first) > 0.01
    assert math.fsum(span.end - span.begin for span in word_spans(text, words)) == len(text.content) - text.start


def test_values_do_not_depend_on_the_batch():
    """Terms of the scorer for any batch budget, and masses of a padded batch, give the same words."""
    model = CausalLM(build(CAUSAL["gpt2"], len(BYTES)), BYTES)
    words = WordVocabulary.of(BYTES, len(BYTES))
    pairs = [
        ("hello", " world. The answer is 42"),
        ("", "so"),
        ("yes yes,", " it is\nso"),
        ("The ", "answer the there"),
    ]
    for budget in (1, 30, 4096):
        rows = Scorer(model, ScoreOptions(max_batch_tokens=budget)).score_pairs(pairs)
        full = [[*r.text.prefix, *r.text.content] for r in rows]
        batch = TokenBatch.from_lists(full, padding_side="right")
        with torch.no_grad():
            log_probs = torch.log_softmax(model.model(input_ids=batch.ids).logits, -1)
        for i, result in enumerate(rows):
            at = [len(result.text.prefix) + p for p in probes_for(result.text, words)]
            masses = log_probs[i, at][:, words.subset].logsumexp(-1).tolist()
            got = [score.log_prob for score in word_scores(result.text, words, result.terms, masses)]
            alone = [score.log_prob for score in scored(model, result.text, words)]
            assert got == pytest.approx(alone, abs=1e-4)
            assert len(got) == len(pairs[i][1].split())


# --------------------------------------------------------------------------------------------- borders
def spans_of(tokenizer, prompt: str, completion: str, **policy):
    text = TextEncoder(tokenizer, layout="causal", **policy).encode(prompt, completion)
    words = WordVocabulary.of(tokenizer, len(tokenizer))
    return text, words, word_spans(text, words)


@pytest.mark.parametrize("tokenizer", [BYTES, LLAMA, METASPACE], ids=["byte_level", "llama", "metaspace"])
@pytest.mark.parametrize(
    "completion",
    ["hello", "  hello  world \n", "\nyes, yes.\t\tit's (so)!", "é 漢字 ñandú", "a\n\n\nb", ' "The answer" is: 42...'],
)
def test_words_are_what_split_gives(tokenizer, completion):
    """Punctuation stays; every token is a word's or white space behind the last one."""
    text, words, spans = spans_of(tokenizer, "", completion)
    assert [span.text for span in spans] == completion.split()
    assert [span.begin for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert all(text.content[i] in words.blank for i in range(spans[-1].end, len(text.content)))
    assert all(span.whole and span.ended for span in spans)


def test_white_space_alone_belongs_to_the_border():
    """Counted with the word it leads up to; the mass stands before the white space, and none stands behind it."""
    _, _, (first, second) = spans_of(BYTES, "", "hello  world\n")
    assert (first.begin, first.end, first.opened, first.closed) == (0, 1, None, 0)
    assert (second.begin, second.end, second.opened, second.closed) == (1, 3, 0, 2)
    text, words, (word,) = spans_of(BYTES, "hello ", "world", boundary="separate")
    assert text.pieces == ["hello", " ", "wor", "ld"]
    assert (word.opened, word.closed, word.whole) == (None, 3, True)  # the prompt's space has ended "hello"
    assert probes_for(text, words) == (3,)


def test_boundary_inside_a_word():
    """A token over the boundary makes the word whole; otherwise the fragment is a piece without denominator."""
    text, _, (word, after) = spans_of(BYTES, "hello wor", "ld there")
    assert text.boundary == "straddled"
    assert (word.text, word.whole, word.opened) == ("world", True, 0)
    assert (after.text, after.opened) == ("there", 1)
    text, _, (piece, after) = spans_of(BYTES, "hello wo", "rld there", boundary="separate")
    assert (piece.text, piece.whole, piece.opened, piece.closed) == ("rld", False, None, piece.end - 1)
    assert (after.text, after.whole, after.opened) == ("there", True, piece.end - 1)


def test_first_word_has_no_denominator():
    for tokenizer in (BYTES, LLAMA, METASPACE):
        for completion in ("hello the", " hello the"):
            _, _, (first, second) = spans_of(tokenizer, "", completion)
            assert first.opened is None
            assert first.whole
            closed = first.closed is None  # a token such as "o▁" ends the word itself
            assert second.opened == (None if closed else first.closed)


def test_unscored_word_stays_in_the_list():
    """Without BOS the first token has no probability, so its word has none; the words still align with the text."""
    tokenizer = byte_level_tokenizer(bos=False)
    model = CausalLM(build(CAUSAL["gpt2"], len(tokenizer)).double(), tokenizer)
    text, words, _ = spans_of(tokenizer, "", "hello world there")
    assert text.scored_from == 1
    first, second, third = scored(model, text, words)
    assert (first.text, first.log_prob, first.surprisal, first.corrected) == ("hello", None, None, False)
    assert None not in (second.log_prob, third.log_prob)
    assert probes_for(text, words) == (0, 1, 2)
    text, words, (only,) = spans_of(tokenizer, "", "hello.")
    assert (only.begin, only.end) == (0, 2)
    assert probes_for(text, words) == ()
    assert word_scores(text, words, [0.0, -1.0], [])[0].log_prob is None


def test_special_tokens_are_not_text():
    """EOS ends a word inside the set; another special token ends it outside, so the end is not accounted for."""
    begin = [3]
    text = row(begin, [6, EOS, 2, TURN, 7])
    first, second, third = word_spans(text, WORDS)
    assert (first.text, first.opened, first.closed, first.ended) == ("a", 0, 1, True)
    assert (second.text, second.opened, second.closed, second.ended) == ("a", None, None, False)
    assert (third.text, third.opened, third.closed, third.whole) == ("b", None, 5, True)
    scores = scored(MODEL, text, WORDS)
    terms, _ = inputs(MODEL, text, WORDS)
    assert [s.kind for s in scores] == [Kind.EXACT, Kind.UPPER_BOUND, Kind.EXACT]
    assert [s.corrected for s in scores] == [True, False, True]
    assert scores[1].log_prob == pytest.approx(terms[3], abs=1e-12)
    assert WORDS.subset.nonzero().flatten().tolist() == sorted(SUBSET)
    assert WORDS.special == {EOS, TURN}


def test_unknown_token_gives_an_upper_bound_for_its_word_alone():
    tokenizer = small_tokenizer(bos_token="<e>", eos_token="<e>", unk_token="<m>")
    words = WordVocabulary.of(tokenizer, VOCABULARY)
    assert TURN not in words.special
    scores = scored(MODEL, row([], [2, TURN, 7, 6]), words)
    assert [(s.kind, s.num_tokens) for s in scores] == [(Kind.UPPER_BOUND, 2), (Kind.EXACT, 1), (Kind.EXACT, 1)]


def test_token_that_spans_two_words_makes_one_of_them():
    vocab = {"<e>": 0, "a": 1, "b": 2, " ": 3, " a": 4, " b": 5, " a b": 6}
    merges = [(" ", "a"), (" ", "b"), (" a", " b")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<e>", eos_token="<e>")
    _, _, spans = spans_of(fast, "", "b a b a")
    assert [(s.text, s.begin, s.end) for s in spans] == [("b", 0, 1), ("a b", 1, 2), ("a", 2, 3)]


def test_vocabulary_that_marks_ends_needs_no_correction():
    """``</w>`` closes the word by itself: the value is the sum of the tokens."""
    vocab = {"<e>": 0, "a</w>": 1, "b</w>": 2, "a": 3, "b": 4, "ab</w>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b</w>")], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<e>", eos_token="<e>")
    text, words, spans = spans_of(fast, "a", " ab aa")
    assert text.content == [1, 5, 3, 1]
    assert [(s.text, s.begin, s.end) for s in spans] == [("ab", 1, 2), ("aa", 2, 4)]
    assert probes_for(text, words) == ()
    assert words.subset.tolist() == [True, *[False] * 5]
    model = CausalLM(build(CAUSAL["gpt2"], len(vocab)).double(), fast)
    terms, masses = inputs(model, text, words)
    scores = word_scores(text, words, terms, masses)
    assert [s.log_prob for s in scores] == pytest.approx([terms[1], terms[2] + terms[3]], abs=1e-12)
    assert all(s.corrected and s.whole for s in scores)


def test_word_piece_vocabulary_divides_by_its_own_marks():
    """A token without ## begins a word; the text of the row holds no white space to go by."""
    tokenizer = bert_tokenizer()
    names = tokenizer.get_vocab()
    subset = beginning_of_word(tokenizer, len(tokenizer))
    assert subset[names["hello"]]
    assert not subset[names["."]]  # written without a space before it
    assert all(not subset[i] for name, i in names.items() if name.startswith("##"))


def test_added_tokens_of_white_space_begin_a_word():
    """Runs of spaces added to a byte-level vocabulary as plain text, as GPT-NeoX has them."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("<think>", normalized=False)])
    words = WordVocabulary.of(tokenizer, len(tokenizer))
    spaces, think = tokenizer.convert_tokens_to_ids(["    ", "<think>"])
    assert words.subset[spaces]
    assert spaces in words.blank
    assert not words.subset[think]
    assert think not in words.special
    _, _, spans = spans_of(tokenizer, "", "hello    world <think>so")
    assert [span.text for span in spans] == ["hello", "world", "<think>so"]


def test_impossible_word_is_log_zero():
    """-inf minus -inf is no number: a word without probability stays without."""
    text = row([3], [6])
    assert probes_for(text, WORDS) == (0, 1)
    (score,) = word_scores(text, WORDS, [0.0, -math.inf], [-math.inf, -0.5])
    assert score.log_prob == -math.inf
    assert score.surprisal == math.inf


def test_refusals():
    with pytest.raises(ValueError, match="2 terms and 2 masses, got 2 and 1"):
        word_scores(row([3], [6]), WORDS, [0.0, -1.0], [-0.5])
    with pytest.raises(ValueError, match="2 terms and 2 masses, got 1 and 2"):
        word_scores(row([3], [6]), WORDS, [-1.0], [-0.5, -0.5])
    with pytest.raises(InputError, match="no character offsets"):
        WordVocabulary.of(object(), 3)
    silent = Tokenizer(models.WordLevel({"<e>": 0, ".": 1}, unk_token="<e>"))
    with pytest.raises(InputError, match="spells a letter or a digit"):
        WordVocabulary.of(PreTrainedTokenizerFast(tokenizer_object=silent, eos_token="<e>"), 2)


# --------------------------------------------------------------------------------------------- a peer
def minicons_scorer(model: CausalLM):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = pytest.importorskip("minicons.scorer", reason="minicons is not installed", exc_type=ImportError)
        return scorer.IncrementalLMScorer(model.model, device="cpu", tokenizer=byte_level_tokenizer())


def test_equals_minicons_where_the_sets_agree():
    """minicons' set is the tokens written with the mark of the space; EOS, tab and newline are not in it.

    With that set both give one number for single-spaced words. With the whole set ours differ by the logarithms of the
    probability that minicons leaves out.
    """
    model = CausalLM(build(CAUSAL["gpt2"], len(BYTES)), BYTES)
    words = WordVocabulary.of(BYTES, len(BYTES))
    peer = minicons_scorer(model)
    for sentence in ("hello world. The answer is 42", "yes yes, it is so. ñandú", "there"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (theirs,) = peer.word_score_tokenized(sentence, str.split, bow_correction=True, bos_token=True)
        text = TextEncoder(BYTES, layout="causal", bos="always").encode("", sentence)
        narrow = torch.tensor(sorted(i for name, i in BYTES.get_vocab().items() if name[0] == "Ġ"))
        ours = word_scores(text, words, *inputs(model, text, words, narrow))
        assert [s.text for s in ours] == [word for word, _ in theirs]
        assert [s.log_prob for s in ours] == pytest.approx([value for _, value in theirs], abs=1e-4)
        whole = scored(model, text, words)
        gap = math.fsum(s.log_prob for s in whole) - sum(value for _, value in theirs)
        last = next_log_probs(model, text)[-1]
        left_out = float(last[words.subset].logsumexp(0) - last[narrow].logsumexp(0))
        assert gap == pytest.approx(left_out, abs=1e-4)
        assert left_out > 1e-3
