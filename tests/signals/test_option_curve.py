"""Probabilities of options along a trace: by hand from scores, and the information of an enumerated joint."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.scoring.score import score
from loglik.signals import option_curve
from loglik.signals.choice import OptionScores
from loglik.signals.option_curve import option_entropy_curve
from zoo import CAUSAL, MASKED, bert_tokenizer, build, byte_level_tokenizer

STEPS, OPTIONS = ["yes", "it is", "so 42"], ["42", "the answer", "no"]


def causal() -> CausalLM:
    return CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())


def test_values_are_softmaxes_of_likelihoods_by_hand():
    model = causal()
    got = option_entropy_curve(model, "hello?", STEPS, OPTIONS, right=1)
    contexts = ["hello?" + "".join("\n" + s for s in STEPS[:k]) + "\nAnswer:" for k in range(4)]
    values = score(model, [(c, " " + o) for c in contexts for o in OPTIONS]).value.reshape(4, 3)
    log_p = values.log_softmax(1)
    torch.testing.assert_close(got.log_probs, log_p, atol=1e-5, rtol=0)
    expected = [scipy.stats.entropy(row.exp().double().numpy()) for row in log_p]
    np.testing.assert_allclose(got.curve.entropy.value, expected, atol=1e-5)
    assert got.choice.tolist() == values.argmax(1).tolist()
    torch.testing.assert_close(got.curve.log_likelihood.value, log_p[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.curve.information_gain, log_p[:, 1].diff(), atol=1e-5, rtol=0)
    assert got.curve.entropy.kind is Kind.EXACT
    assert got.curve.log_likelihood.unit is Unit.EVENT
    assert got.curve.per_token.shape == (4, 1)
    # Another right option changes no entropy, another order of the options none either.
    other = option_entropy_curve(model, "hello?", STEPS, OPTIONS[::-1], right=0)
    torch.testing.assert_close(other.curve.entropy.value, got.curve.entropy.value, atol=1e-5, rtol=0)
    assert option_entropy_curve(model, "hello?", STEPS, OPTIONS).curve.log_likelihood is None


def test_words_around_the_steps_and_normalisations():
    got = option_entropy_curve(
        causal(), "hello?", ["yes"], ["42", "no no"], separator=" ", cue=" so", space=" ", normalise="token"
    )
    found = score(causal(), [(c, " " + o) for c in ("hello? so", "hello? yes so") for o in ("42", "no no")])
    expected = (found.value / found.num_units).reshape(2, 2).log_softmax(1)
    torch.testing.assert_close(got.log_probs, expected, atol=1e-5, rtol=0)


def fake_scores(table):
    """In place of `score_options`: the log-probabilities of the options after each context."""

    def scores(model, contexts, options, *, separator):
        rows = torch.tensor(np.concatenate([table(context) for context in contexts]))
        width = len(options[0])
        likelihood = LogLikelihood(rows.log(), Kind.EXACT, Unit.TOKEN, torch.ones(len(rows)))
        lengths = torch.ones(len(rows))
        return OptionScores(likelihood, torch.arange(len(contexts)).repeat_interleave(width), lengths, lengths, None)

    return scores


def test_mean_utility_is_mutual_information(monkeypatch):
    """A joint of two binary steps and an answer of three: over drawn steps the mean fall is I(Y; step | before) > 0."""
    joint = np.random.default_rng(0).dirichlet(np.full(12, 0.5)).reshape(2, 2, 3)

    def table(context):
        part = joint[tuple(map(int, context))]
        mass = part.reshape(-1, 3).sum(0)
        return mass / mass.sum()

    monkeypatch.setattr(option_curve, "score_options", fake_scores(table))
    mean, singles = np.zeros(2), []
    for a, b in product(range(2), repeat=2):
        got = option_entropy_curve(None, "", [str(a), str(b)], ["x", "y", "z"], separator="", cue="")
        mean += joint[a, b].sum() * got.curve.utility.numpy()
        singles += got.curve.utility.tolist()

    def h(p):
        return scipy.stats.entropy(np.ravel(p))

    first = h(joint.sum((0, 1))) + h(joint.sum((1, 2))) - h(joint.sum(1))
    both = h(joint.sum((0, 1))) + h(joint.sum(2)) - h(joint)
    np.testing.assert_allclose(mean, [first, both - first], atol=1e-12)
    assert min(mean) > 0
    assert min(singles) < 0


def test_an_impossible_option_and_a_certain_one(monkeypatch):
    monkeypatch.setattr(option_curve, "score_options", fake_scores(lambda context: np.array([0.4, 0.0])))
    got = option_entropy_curve(None, "a", ["b"], ["x", "y"], right=0)
    assert got.curve.entropy.value.tolist() == [0.0, 0.0]
    assert math.copysign(1, got.curve.entropy.value[0].item()) > 0
    with pytest.raises(RowError, match="after 0 steps: the right option has probability 0"):
        option_entropy_curve(None, "a", ["b"], ["x", "y"], right=1)


def test_any_text_model_will_do():
    """A masked model has no next-token distributions; its pseudo-likelihoods give surrogates."""
    tokenizer = bert_tokenizer()
    model = MaskedLM(build(MASKED["bert"], len(tokenizer)), tokenizer)
    got = option_entropy_curve(model, "hello world", ["yes"], ["no", "yes yes"], right=0)
    assert got.curve.entropy.kind is Kind.SURROGATE
    assert bool(((got.curve.entropy.value >= 0) & (got.curve.entropy.value <= math.log(2) + 1e-6)).all())


def test_refusals():
    model = causal()
    for right in (3, -1, True):
        with pytest.raises(InputError, match="right must be an option's number from 0 to 2"):
            option_entropy_curve(model, "a", STEPS, OPTIONS, right=right)
    with pytest.raises(RowError, match="the options: needs a list of at least two options"):
        option_entropy_curve(model, "a", STEPS, ["b"])
    with pytest.raises(RowError, match="the options: option 1 must be a text that is not empty"):
        option_entropy_curve(model, "a", STEPS, ["b", " "])
    with pytest.raises(RowError, match="step 1: is empty"):
        option_entropy_curve(model, "a", ["b", ""], OPTIONS)
    with pytest.raises(InputError, match="steps must be several texts, not one string"):
        option_entropy_curve(model, "a", "b", OPTIONS)
    with pytest.raises(RowError, match="after 1 steps, option 0: "):
        option_entropy_curve(model, "a", ["漢字 " * 200], OPTIONS)
    with pytest.raises(InputError, match="normalise must be one of"):
        option_entropy_curve(model, "a", STEPS, OPTIONS, normalise="words")
