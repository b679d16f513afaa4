"""Bytes and words through the engine equal the same sums over plain forward passes, whatever path runs."""

from __future__ import annotations

import math

import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.scoring.covers import CoverEncoder
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.rows import InputRow
from loglik.scoring.score import score
from loglik.scoring.words import WordVocabulary, probes_for, word_scores
from zoo import CAUSAL, MASKED, bert_tokenizer, build, byte_level_tokenizer, llama_tokenizer

BYTES = byte_level_tokenizer()
PAIRS = [
    ("hello wor", "ld. The"),
    ("The ans", "wer"),
    ("yes ", "yes, it"),
    ("", "hello"),
    ("the é", " 漢字"),
    ("hello wor", "ld. The"),
]


def llama(tokenizer=BYTES) -> CausalLM:
    return CausalLM(build(CAUSAL["llama"], len(tokenizer)), tokenizer)


def plain_log_softmax(model: CausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)


def naive_exact(model: CausalLM, prompt: str, completion: str) -> float:
    """Every cover of both sides as a row of its own, from the token on where covers begin to differ."""
    plan = CoverEncoder(model.tokenizer, bos="always").plan(prompt, completion)
    sums = []
    for fans in (plan.upper, plan.lower):
        covers = [[*plan.prefix, *fan.path, token] for fan in fans for token in fan.tokens]
        values = []
        for ids in covers:
            logp = plain_log_softmax(model, ids)
            values.append(sum(float(logp[t - 1, ids[t]]) for t in range(len(plan.prefix) + plan.shared, len(ids))))
        sums.append(torch.tensor(values, dtype=torch.float64).logsumexp(0).item() if values else 0.0)
    return sums[0] - sums[1]


@pytest.mark.parametrize("path", ["packed", "cached", "padded"])
def test_exact_equals_one_row_per_cover(path):
    model = llama()
    scorer = Scorer(model, ScoreOptions(boundary="exact", bos="always", path=path))
    results = scorer.score_pairs(PAIRS)
    for (prompt, completion), result in zip(PAIRS, results, strict=True):
        assert result.log_prob == pytest.approx(naive_exact(model, prompt, completion), abs=1e-4)
        assert result.num_bytes == len(completion.encode())


def test_exact_obeys_the_chain_rule_over_bytes_and_no_other_boundary_does():
    """However a text is cut, the pieces add up to the same; tokenised prompts do not (lm-evaluation-harness #1322)."""
    model = llama()
    text = "hello world"

    def total(cut: int, boundary: str) -> float:
        rows = [("", text[:cut]), (text[:cut], text[cut:])]
        return float(score(model, rows, boundary=boundary, bos="always").value.sum())

    exact = [total(cut, "exact") for cut in range(1, len(text))]
    assert max(exact) - min(exact) < 1e-4
    for boundary in ("joint", "separate"):
        others = [total(cut, boundary) for cut in range(1, len(text))]
        assert max(others) - min(others) > 0.1


def test_exact_labels_follow_the_arithmetic_of_kinds():
    model = llama()
    rows = [("The ans", "wer"), ("", "hello")]
    canonical = score(model, rows, boundary="exact")
    assert (canonical.kind, canonical.unit, canonical.num_units.tolist()) == (Kind.EXACT, Unit.BYTE, [3, 5])
    assert score(model, rows[1:], boundary="exact", tokenisations="all").kind is Kind.LOWER_BOUND
    assert score(model, rows[:1], boundary="exact", tokenisations="all").kind is Kind.SURROGATE
    everything = score(model, rows, boundary="exact", tokenisations="all")
    assert everything.kind is Kind.SURROGATE
    torch.testing.assert_close(everything.value, canonical.value)


def test_exact_row_has_bytes_and_no_tokens():
    row = Scorer(llama(), ScoreOptions(boundary="exact")).score_rows([InputRow("a", "line 1", "The ans", "wer")])[0]
    assert (row.boundary, row.num_bytes, row.num_tokens, row.is_greedy) == ("exact", 3, None, None)
    assert row.bits_per_byte == pytest.approx(-row.log_prob / math.log(2) / 3)


def test_exact_refuses_what_it_cannot_do():
    model = llama()
    with pytest.raises(InputError, match="boundary exact has no windows"):
        ScoreOptions(boundary="exact", overflow="window")
    with pytest.raises(InputError, match="choose one of them"):
        ScoreOptions(boundary="exact", level="word")
    masked = MaskedLM(build(MASKED["bert"], 70), bert_tokenizer())
    for options in (ScoreOptions(boundary="exact"), ScoreOptions(level="word")):
        with pytest.raises(InputError, match="needs a causal model of transformers"):
            Scorer(masked, options)
    long = "yes " * 200
    (error,) = Scorer(model, ScoreOptions(boundary="exact")).score_pairs([(long, "no")])
    assert isinstance(error, RowError)
    assert "the model's context is 64" in error.reason
    assert not error.skipped
    (skipped,) = Scorer(model, ScoreOptions(boundary="exact", overflow="skip")).score_pairs([(long, "no")])
    assert isinstance(skipped, RowError)
    assert skipped.skipped


@pytest.mark.parametrize("path", ["packed", "cached", "padded"])
@pytest.mark.parametrize("tokenizer", [BYTES, llama_tokenizer()], ids=["byte-level", "metaspace"])
def test_words_equal_full_logits(path, tokenizer):
    """Masses of the whole vocabulary's subset, from the logits of one plain forward pass per row."""
    model = llama(tokenizer)
    pairs = [("hello the", " answer is 42, yes"), ("", "hello world."), ("hel", "lo there it is so"), ("yes", " so")]
    scorer = Scorer(model, ScoreOptions(level="word", path=path))
    vocabulary = WordVocabulary.of(tokenizer, len(tokenizer))
    for (prompt, completion), result in zip(pairs, scorer.score_pairs(pairs), strict=True):
        text = scorer.encoder.encode(prompt, completion)
        ids = [*text.prefix, *text.content]
        logp, shift = plain_log_softmax(model, ids), len(text.prefix)
        terms = [
            float(logp[t + shift - 1, token]) if t >= text.scored_from else 0.0 for t, token in enumerate(text.content)
        ]
        masses = [float(logp[i + shift, vocabulary.subset].logsumexp(0)) for i in probes_for(text, vocabulary)]
        expected = word_scores(text, vocabulary, terms, masses)
        assert [word.text for word in result.words] == [word.text for word in expected]
        for got, want in zip(result.words, expected, strict=True):
            assert got.log_prob == pytest.approx(want.log_prob, abs=1e-4)


def test_words_of_windows_telescope():
    """Each mass is one number: what ends a word in one window begins the next word in another."""
    model = llama()
    text = " yes the answer is 42 hello there" * 20
    options = ScoreOptions(level="word", overflow="window", stride=7, bos="always")
    (result,) = Scorer(model, options).score_pairs([("", text[1:])])
    assert result.num_windowed > 0
    total = sum(word.log_prob for word in result.words)
    last = sum(window.probes.count(len(window.ids) - 1) for window in result.windows[-1:])
    assert last == 1
    # Corrections cancel between neighbours: what is left is the tokens and the mass after the last.
    probe = result.windows[-1]
    logp = plain_log_softmax(model, probe.ids)
    subset = WordVocabulary.of(BYTES, len(BYTES)).subset
    assert total == pytest.approx(result.log_prob + float(logp[-1, subset].logsumexp(0)), abs=1e-3)


def test_a_row_that_fills_the_context_leaves_room_for_what_follows_it():
    """The last token is read too when words are scored, so that one token less fits."""
    model = llama()
    ids = BYTES("yes" + " yes" * 200, add_special_tokens=False)["input_ids"]
    fits = BYTES.decode(ids[:63])
    assert len(BYTES(fits, add_special_tokens=False)["input_ids"]) == 63
    scorer = Scorer(model, ScoreOptions(level="word", bos="always"))
    longer = BYTES.decode(ids[:64])
    good, bad = scorer.score_pairs([("", fits), ("", longer)])
    assert not isinstance(good, RowError)
    assert isinstance(bad, RowError)
    assert not isinstance(Scorer(model, ScoreOptions(bos="always")).score_pairs([("", longer)])[0], RowError)
