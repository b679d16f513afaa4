"""P(True) against likelihoods by hand, P(IK) against scikit-learn and closed forms, curves against loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.scoring.score import score
from loglik.signals import p_true as p_true_module
from loglik.signals.calibration import brier_score
from loglik.signals.choice import choose
from loglik.signals.metacognition import risk_coverage_curve
from loglik.signals.p_ik import PIKProbe, binomial_cross_entropy, question_states, success_counts
from loglik.signals.p_true import PTrueTemplate, option_pairs, p_true
from loglik.signals.self_knowledge import self_knowledge_curve
from zoo import CAUSAL, build, byte_level_tokenizer

QUESTIONS, ANSWERS = ["hello world?", "The answer?"], ["yes it is", "42"]


def causal() -> CausalLM:
    """With room for long prompts."""
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 1024, "bos_token_id": 0, "eos_token_id": 0}
    network = build(lambda v: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=v, **config)), 330)
    return CausalLM(network, byte_level_tokenizer())


# --------------------------------------------------------------------------------------------------------- P(True)
def test_the_prompt_word_for_word():
    plain = PTrueTemplate().prompt("Why?", "So.")
    assert plain == (
        "Question: Why?\nProposed answer: So.\nIs the proposed answer:\n (A) True\n (B) False\nThe proposed answer is:"
    )
    with_ideas = PTrueTemplate().prompt("Why?", "So.", ["No.", "{answer}"])
    assert with_ideas == plain.replace(
        "Proposed answer: So.", "Here are some brainstormed ideas:\nNo.\n{answer}\nProposed answer: So."
    )
    swapped = PTrueTemplate().swapped()
    assert swapped.prompt("Why?", "So.") == plain.replace("(A) True\n (B) False", "(A) False\n (B) True")
    assert PTrueTemplate().continuations() == (" (A)", " (B)")
    assert swapped.continuations() == (" (B)", " (A)")
    assert swapped.swapped() == PTrueTemplate()
    assert PTrueTemplate().prompt("{answer}", "{ideas}").startswith("Question: {answer}\nProposed answer: {ideas}\n")


def test_values_are_likelihoods_of_the_labels_after_the_prompt():
    """p_A / (p_A + p_B) = sigma(log p_A - log p_B); labels of several tokens are sums over them."""
    model, template = causal(), PTrueTemplate()
    got = p_true(model, QUESTIONS, ANSWERS)
    for i, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        prompt = template.prompt(question, answer)
        ids = [model.tokenizer(prompt + label)["input_ids"] for label in (" (A)", " (B)")]
        start = len(model.tokenizer(prompt)["input_ids"])
        assert len(ids[0]) - start > 1
        logs = []
        for row in ids:
            with torch.no_grad():
                log_p = model.model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
            logs.append(sum(float(log_p[t - 1, row[t]]) for t in range(start, len(row))))
        true, false = np.exp(logs)
        assert got.raw.value[i].item() == pytest.approx(true, rel=1e-4)
        assert got.coverage.value[i].item() == pytest.approx(true + false, rel=1e-4)
        assert got.log_odds.value[i].item() == pytest.approx(logs[0] - logs[1], abs=1e-4)
        assert got.probability.value[i].item() == pytest.approx(true / (true + false), abs=1e-5)
    for measured in (got.probability, got.log_odds, got.raw, got.coverage):
        assert measured.kind is Kind.EXACT


def test_ideas_and_demonstrations_stand_where_the_paper_puts_them():
    model, template = causal(), PTrueTemplate()
    ideas = [["no", "yes"], []]
    shown = [("hello?", "so", True), ("The?", "wer", False)]
    got = p_true(model, QUESTIONS, ANSWERS, ideas=ideas, demonstrations=shown)
    before = f"{template.prompt('hello?', 'so')} (A)\n\n{template.prompt('The?', 'wer')} (B)\n\n"
    contexts = [before + template.prompt(q, a, i) for q, a, i in zip(QUESTIONS, ANSWERS, ideas, strict=True)]
    likelihood = score(model, [(c, label) for c in contexts for label in (" (A)", " (B)")]).value.reshape(2, 2)
    torch.testing.assert_close(got.log_odds.value, likelihood[:, 0] - likelihood[:, 1], atol=1e-6, rtol=0)
    alone = p_true(model, QUESTIONS[1:], ANSWERS[1:], demonstrations=shown)
    torch.testing.assert_close(alone.log_odds.value, got.log_odds.value[1:], atol=1e-4, rtol=0)


def test_other_labels_and_words():
    template = PTrueTemplate(labels=("1", "2"), options=("yes", "no"), close="Answer:")
    got = p_true(causal(), QUESTIONS, ANSWERS, template=template)
    contexts = [template.prompt(q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    assert contexts[0].endswith(" 1 yes\n 2 no\nAnswer:")
    values = score(causal(), [(c, label) for c in contexts for label in (" 1", " 2")]).value.reshape(2, 2)
    torch.testing.assert_close(got.probability.value, values.softmax(1)[:, 0], atol=1e-6, rtol=0)


def test_a_model_without_content_gives_the_label_and_its_order_flips_it():
    """A unigram model does not read the prompt: P(True) is that of a letter, and the swapped one its complement."""
    model = NGramLM.train(["(A) (A) (A) (B)"], order=1)
    plain = p_true(model, QUESTIONS, ANSWERS).probability.value
    swapped = p_true(model, QUESTIONS, ANSWERS, template=PTrueTemplate().swapped()).probability.value
    assert (plain > 0.5).all()
    torch.testing.assert_close(plain, 1 - swapped)


def test_temperature_changes_no_decision():
    got = p_true(causal(), QUESTIONS, ANSWERS)
    for temperature in (0.3, 2.5):
        warm = p_true(causal(), QUESTIONS, ANSWERS, temperature=temperature)
        torch.testing.assert_close(warm.log_odds.value, got.log_odds.value)
        torch.testing.assert_close(warm.probability.value, torch.sigmoid(got.log_odds.value / temperature))


def test_kinds_and_impossible_options():
    def likelihood(kind=Kind.EXACT, value=(-1.0,), **more):
        values = torch.tensor(value, dtype=torch.float64)
        constant = ConstantKey.of("z") if kind is Kind.UNNORMALIZED else None
        return LogLikelihood(values, kind, Unit.TOKEN, torch.ones(len(values)), constant=constant, **more)

    def kinds(one):
        got = p_true_module._p_true(one, one, 1.0)
        return got.probability.kind, got.log_odds.kind, got.raw.kind

    exact, odd = Kind.EXACT, Kind.SURROGATE
    assert kinds(likelihood()) == (exact, exact, exact)
    # An unknown constant cancels between two options, and leaves nothing to say about one of them.
    assert kinds(likelihood(Kind.UNNORMALIZED)) == (exact, exact, odd)
    assert kinds(likelihood(Kind.LOWER_BOUND)) == (odd, odd, Kind.LOWER_BOUND)
    noise = {"stderr": torch.ones(1, dtype=torch.float64), "draws": DrawsKey.of("a")}
    assert kinds(likelihood(Kind.LOWER_BOUND, **noise)) == (odd, odd, odd)
    never = likelihood(value=[-math.inf])
    assert p_true_module._p_true(likelihood(), never, 1.0).probability.item() == 1.0
    assert p_true_module._p_true(never, likelihood(), 1.0).probability.item() == 0.0
    with pytest.raises(RowError, match="question 0: neither option is possible"):
        p_true_module._p_true(never, never, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": []}, "each question needs its answer"),
        ({"answers": ["a"]}, "each question needs its answer.* got 2 questions, 1 answers"),
        ({"ideas": [["a"]]}, "1 lists of ideas"),
        ({"questions": "ab"}, "questions must be several texts"),
        ({"answers": "ab"}, "answers must be several texts"),
        ({"answers": ["a", " "]}, "question 1: needs a question and an answer that are not empty"),
        ({"questions": ["", "a"]}, "question 0: needs a question and an answer"),
        ({"ideas": [["a"], [""]]}, "question 1: needs a question and an answer.*ideas"),
        ({"ideas": [["a"], "ab"]}, "question 1: needs a question and an answer.*ideas"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, "temperature must be positive and finite"),
    ],
)
def test_p_true_refuses_with_a_sentence(change, message):
    given = {"questions": QUESTIONS, "answers": ANSWERS} | change
    with pytest.raises((InputError, RowError), match=message):
        p_true(causal(), given.pop("questions"), given.pop("answers"), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "Q:"}, "question must have {question} in it"),
        ({"answer": "A: {question}"}, "answer must have {answer} in it"),
        ({"ideas": ""}, "ideas must have {ideas} in it"),
        ({"labels": ("a", "a")}, "labels must be two different texts"),
        ({"options": ("", "a")}, "options must be two different texts"),
    ],
)
def test_templates_without_a_place_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(PTrueTemplate(), **change)


def test_a_prompt_that_does_not_fit_is_named_by_its_question():
    with pytest.raises(RowError, match="question 1: "):
        p_true(causal(), ["hello?", "漢字 " * 2000], ["a", "b"])


# -------------------------------------------------------------------------------------------------- multiple choice
def test_pairs_of_all_options():
    values = torch.tensor([0.2, 0.5, 0.3, 0.9, 0.1], dtype=torch.float64).log()
    likelihood = LogLikelihood.from_per_unit(values[:, None], torch.ones(5, 1, dtype=torch.bool))
    choices = choose(likelihood, [0, 0, 0, 1, 1])
    probability, right = option_pairs(choices, [2, 0])
    torch.testing.assert_close(probability, values.exp())
    assert right.tolist() == [False, False, True, True, False]
    with pytest.raises(InputError, match="the answer of question 1 is option 2, and it has 2 options, from 0"):
        option_pairs(choices, [2, 2])
    with pytest.raises(InputError, match="answer must be 2 whole numbers"):
        option_pairs(choices, [2])
    with pytest.raises(InputError, match="is option -1"):
        option_pairs(choices, [-1, 0])


# ----------------------------------------------------------------------------------------------------------- P(IK)
def data(seed=0, questions=60, width=4, most=9):
    g = np.random.default_rng(seed)
    x = g.normal(size=(questions, width)) * [1, 5, 0.2, 1] + [0, 3, 0, -8]
    trials = g.integers(1, most, size=questions)
    return x, g.binomial(trials, 1 / (1 + np.exp(-x[:, 0] + 0.3))), trials


def test_loss_is_that_of_all_samples_in_value_and_gradient():
    _, successes, trials = data()
    z = torch.linspace(-3, 3, 60, dtype=torch.float64, requires_grad=True)
    got = binomial_cross_entropy(z, torch.from_numpy(successes), torch.from_numpy(trials))
    hard = [(i, float(n < k)) for i, (k, m) in enumerate(zip(successes, trials, strict=True)) for n in range(m)]
    rows, labels = map(list, zip(*hard, strict=True))
    target = torch.tensor(labels, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z[rows], target)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("c", [0.05, 3.0])
def test_probe_equals_logistic_regression_on_the_samples(c, standardise):
    x, successes, trials = data()
    probe = PIKProbe(c=c, standardise=standardise).fit(x, successes, trials)
    z = StandardScaler().fit_transform(x) if standardise else x
    doubled = np.concatenate([z, z])
    labels = np.repeat([1, 0], len(x))
    weights = np.concatenate([successes, trials - successes]) / trials.mean()
    peer = LogisticRegression(C=c, tol=1e-8, max_iter=1000, solver="newton-cholesky").fit(
        doubled, labels, sample_weight=weights
    )
    np.testing.assert_allclose(probe.log_odds(x), peer.decision_function(z), atol=2e-4)
    np.testing.assert_allclose(probe.predict_proba(x), peer.predict_proba(z), atol=1e-4)
    np.testing.assert_allclose(probe.p_ik(x), probe.predict_proba(x)[:, 1])


def test_without_features_the_probe_is_the_mean_and_its_brier_score_the_variance():
    _, successes, trials = data()
    probe = PIKProbe().fit(np.zeros((60, 0)), successes, trials)
    mean = successes.sum() / trials.sum()
    np.testing.assert_allclose(probe.p_ik(np.zeros((2, 0))), [mean] * 2, atol=1e-6)
    hard = np.concatenate([np.arange(m) < k for k, m in zip(successes, trials, strict=True)])
    assert brier_score(np.full(len(hard), mean), hard) == pytest.approx(mean * (1 - mean))
    # A feature that never changes is no feature.
    constant = PIKProbe().fit(np.full((60, 1), 7.0), successes, trials)
    np.testing.assert_allclose(constant.p_ik([[7.0]]), [mean], atol=1e-6)


def test_the_probe_does_not_depend_on_units_and_order_and_the_number_of_samples():
    x, successes, trials = data()
    first = PIKProbe(c=0.3).fit(x, successes, trials).p_ik(x)
    moved = x * [2, -0.1, 30, 1] + 5
    np.testing.assert_allclose(PIKProbe(c=0.3).fit(moved, successes, trials).p_ik(moved), first, atol=1e-5)
    order = np.random.default_rng(1).permutation(60)
    again = PIKProbe(c=0.3).fit(torch.from_numpy(x[order]), successes[order], trials[order])
    np.testing.assert_allclose(again.p_ik(torch.from_numpy(x)), first, atol=1e-5)
    np.testing.assert_allclose(PIKProbe(c=0.3).fit(x, 10 * successes, 10 * trials).p_ik(x), first, atol=1e-5)
    share = PIKProbe(c=0.3).fit(x, successes / trials).p_ik(x)
    equal = PIKProbe(c=0.3).fit(x, successes / trials * 8, 8).p_ik(x)
    np.testing.assert_allclose(share, equal, atol=1e-5)


def test_soft_targets_recover_the_truth():
    """Many samples of a logistic truth: weights within four standard errors of it."""
    g = np.random.default_rng(2)
    x = g.normal(size=(400, 2))
    p = 1 / (1 + np.exp(-(0.5 + x @ [1.0, -2.0])))
    probe = PIKProbe(c=1e6, standardise=False).fit(x, g.binomial(50, p), 50)
    design = np.c_[x, np.ones(400)]
    stderr = np.sqrt(np.diag(np.linalg.inv(design.T @ (design * (50 * p * (1 - p))[:, None]))))
    assert (np.abs(np.append(probe.coef_, probe.intercept_) - [1.0, -2.0, 0.5]) < 4 * stderr).all()


def test_success_counts():
    successes, trials = success_counts([1, 0, 1, 1, 0], [7, 7, -2, 7, 7])
    assert (successes.tolist(), trials.tolist()) == ([1, 2], [1, 4])
    with pytest.raises(InputError, match="there is no sample"):
        success_counts([], [])
    with pytest.raises(InputError, match="question and correct must be of one length"):
        success_counts([1], [0, 0])
    with pytest.raises(InputError, match="correct must be 0 or 1"):
        success_counts([0.5], [0])


def test_states_are_those_of_the_last_token():
    model = CausalLM(build(CAUSAL["llama"], 30))
    rows = [[1, 5, 9], [4], [7, 7, 2, 6, 3]]
    for side in ("left", "right"):
        batch = TokenBatch.from_lists(rows, padding_side=side)
        for size in (1, 2, 16):
            got = question_states(model, batch, batch_size=size)
            for i, row in enumerate(rows):
                with torch.no_grad():
                    out = model.model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
                torch.testing.assert_close(got[i], out, atol=1e-5, rtol=0)
    text = causal()
    ids = text.tokenizer("hello world")["input_ids"]
    expected = question_states(text, TokenBatch.from_lists([ids]))
    torch.testing.assert_close(question_states(text, ["hello world"]), expected, atol=1e-6, rtol=0)


def test_probes_and_states_refuse_with_a_sentence():
    x, successes, trials = data()
    with pytest.raises(InputError, match="c must be positive"):
        PIKProbe(c=0.0)
    with pytest.raises(InputError, match="max_iter at least 1"):
        PIKProbe(max_iter=0)
    with pytest.raises(InputError, match="the probe has not been fitted: call fit first"):
        PIKProbe().p_ik(x)
    with pytest.raises(InputError, match=r"features must have shape \(Q, D\)"):
        PIKProbe().fit(x[:, 0], successes, trials)
    with pytest.raises(InputError, match="at least one row"):
        PIKProbe().fit(x[:0], successes[:0], trials[:0])
    with pytest.raises(InputError, match=r"need successes \(60,\)"):
        PIKProbe().fit(x, successes[:5], trials[:5])
    with pytest.raises(InputError, match=r"and as many trials or one number: got \(60,\) and \(5,\)"):
        PIKProbe().fit(x, successes, trials[:5])
    with pytest.raises(InputError, match=r"successes must lie between 0 and trials.* got 5.0 of 4.0 in row 1"):
        PIKProbe().fit(x[:2], [1, 5], 4)
    for bad in (math.nan, -1.0):
        with pytest.raises(InputError, match="in row 0"):
            PIKProbe().fit(x[:2], [bad, 1], 4)
    with pytest.raises(InputError, match="which are positive"):
        PIKProbe().fit(x[:2], [0, 1], [0, 1])
    for value, which in ((0, "wrong"), (4, "right")):
        with pytest.raises(InputError, match=f"every sample is {which}, so that there is nothing to learn"):
            PIKProbe().fit(x[:2], [value, value], 4)
    with pytest.raises(InputError, match="the features of row 1 are not finite"):
        PIKProbe().fit([[0.0], [math.nan]], [0, 1], 1)
    with pytest.raises(InputError, match="features must have 4 columns as in fit, got 3"):
        PIKProbe().fit(x, successes, trials).p_ik(x[:, :3])
    with pytest.raises(InputError, match="did not converge in 1 steps"):
        PIKProbe(max_iter=1, standardise=False).fit(x, successes, trials)
    with pytest.raises(InputError, match="must have one shape"):
        binomial_cross_entropy(torch.zeros(2), torch.zeros(3), torch.ones(3))
    with pytest.raises(InputError, match="in row 1"):
        binomial_cross_entropy(torch.zeros(2), torch.tensor([0, 2]), torch.ones(2))
    with pytest.raises(InputError, match="needs hidden states"):
        question_states(NGramLM.train(["ab"], order=1), ["a"])
    model = CausalLM(build(CAUSAL["llama"], 30))
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        question_states(model, TokenBatch.from_lists([[1]]), batch_size=0)
    with pytest.raises(InputError, match="there is no question"):
        question_states(model, TokenBatch.from_lists([]))
    with pytest.raises(RowError, match="question 1: has no token"):
        question_states(model, TokenBatch.from_lists([[1], []], starts=[0, 0]))
    with pytest.raises(RowError, match=r"question 1: has .* tokens and the model's context is .*: shorten it"):
        question_states(causal(), ["hello", "漢字 " * 2000])


# ---------------------------------------------------------------------------------------------------------- curves
def test_curve_equals_a_loop_over_thresholds():
    g = np.random.default_rng(4)
    confidence = g.integers(0, 11, size=200) / 10
    correct = g.random(200) < confidence
    curve = self_knowledge_curve(confidence, correct)
    assert curve.threshold.tolist() == sorted(set(confidence.tolist()))
    assert curve.base == correct.mean() == curve.accuracy[0]
    assert curve.share[0] == 1.0
    for threshold in [*curve.threshold, 0.05, 0.55, 0.999]:
        chosen = confidence >= threshold
        at = curve.at(float(threshold))
        assert (at.count, at.share) == (chosen.sum(), chosen.mean())
        assert at.accuracy == pytest.approx(correct[chosen].mean())
        assert at.low <= at.accuracy <= at.high
    # At the share of a threshold, the risk is what the accuracy leaves.
    risk = risk_coverage_curve(confidence, correct)
    np.testing.assert_allclose([1 - risk.at(s) for s in curve.share], curve.accuracy, atol=1e-12)


def test_a_calibrated_model_is_as_accurate_above_a_threshold_as_it_says():
    g = np.random.default_rng(5)
    confidence = g.random(20_000)
    correct = g.random(20_000) < confidence
    curve = self_knowledge_curve(confidence, correct)
    for threshold in (0.0, 0.3, 0.5, 0.9):
        chosen = confidence >= threshold
        stderr = math.sqrt((confidence * (1 - confidence))[chosen].sum()) / chosen.sum()
        assert abs(curve.at(threshold).accuracy - confidence[chosen].mean()) < 4 * stderr


def test_a_threshold_without_answers_has_no_accuracy():
    at = self_knowledge_curve([0.2, 0.4], [1, 0]).at(0.5)
    assert (at.count, at.share, at.accuracy, at.low, at.high) == (0, 0.0, None, 0.0, 1.0)


def test_float32_confidences_meet_their_threshold():
    curve = self_knowledge_curve(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
    assert curve.at(0.9).count == 1


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, 1.2], [0, 1], r"confidence must lie in \[0, 1\], got 1.2 in row 1"),
        ([0.5, math.nan], [0, 1], "confidence holds NaN in row 1"),
        ([0.5], [0, 1], "must be of one length"),
        ([], [], "there are no rows"),
        ([0.5], [2], "correct must be 0 or 1"),
    ],
)
def test_curves_refuse_with_a_sentence(confidence, correct, message):
    with pytest.raises(InputError, match=message):
        self_knowledge_curve(confidence, correct)


def test_options_of_curves_out_of_range_are_refused():
    with pytest.raises(InputError, match="level must lie between 0 and 1"):
        self_knowledge_curve([0.5], [1], level=1.0)
    with pytest.raises(InputError, match=r"threshold must lie in \[0, 1\], got -0.1"):
        self_knowledge_curve([0.5], [1]).at(-0.1)
