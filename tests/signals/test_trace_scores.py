"""What curves say about traces: figures by name, batches, tokens of steps, the model's own answers, plots."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.causal import CausalLM
from loglik.signals.detection import auroc
from loglik.signals.entropy_curve import EntropyCurve, trace_scores
from loglik.signals.trace_entropy import answer_entropy_curve, entropy_curve, step_tokens, trace_answers
from loglik.signals.trace_plots import curve_matrix, plot_entropy_curves
from zoo import CAUSAL, build, byte_level_tokenizer, llama_tokenizer

STEPS = ["yes", "it is", "so 42", "the answer"]


def curve(*values, likelihood=None) -> EntropyCurve:
    entropy = torch.tensor(values, dtype=torch.float64)
    return EntropyCurve(Measurement(entropy, Kind.EXACT, "answer_entropy"), entropy[:, None], likelihood)


def causal() -> CausalLM:
    return CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())


def test_scores_are_the_descriptors_and_higher_is_better():
    falling, rising = curve(2.0, 1.0, 0.2), curve(1.0, 1.5, 1.4, 2.0)
    got = trace_scores([falling, rising])
    expected = {
        "drop": [1.8, -1.0],
        "falling": [-falling.slope(), -rising.slope()],
        "seldom_rising": [0.0, -2 / 3],
        "monotone": [1.0, -rising.monotonicity()],
        "sure": [-0.2, -2.0],
        "short": [-2.0, -3.0],
    }
    assert list(got) == list(expected)
    for name, values in got.items():
        np.testing.assert_allclose(values, expected[name], atol=1e-12)
        assert auroc(values, [True, False]) == 1.0
    with pytest.raises(RowError, match="trace 1: its trace has no steps"):
        trace_scores([falling, curve(1.0)])
    with pytest.raises(InputError, match="there is no curve"):
        trace_scores([])


def test_an_impossible_answer_has_no_information_gain_and_stays_out_of_the_record():
    values = torch.tensor([-1.0, -math.inf, -2.0])
    likelihood = LogLikelihood(values, Kind.EXACT, Unit.TOKEN, torch.ones(3))
    got = curve(1.0, 0.5, 0.2, likelihood=likelihood)
    with pytest.raises(InputError, match="the answer has probability 0 after 1 steps"):
        _ = got.information_gain
    record = got.record()
    assert record["log_prob"] == [-1.0, None, -2.0]
    assert record["information_gain"] is None
    json.dumps(record, allow_nan=False)
    possible = curve(1.0, 0.5, 0.2, likelihood=LogLikelihood(-torch.ones(3), Kind.EXACT, Unit.TOKEN, torch.ones(3)))
    assert possible.record()["information_gain"] == [0.0, 0.0]
    assert possible.record()["utility"] == pytest.approx([0.5, 0.3])


def test_batches_change_nothing():
    model = causal()
    whole = answer_entropy_curve(model, "hello?", STEPS, " 42 so", batch_size=16)
    for size in (1, 2, 3):
        part = answer_entropy_curve(model, "hello?", STEPS, " 42 so", batch_size=size)
        torch.testing.assert_close(part.per_token, whole.per_token, atol=1e-5, rtol=0)
        torch.testing.assert_close(part.entropy.value, whole.entropy.value, atol=1e-5, rtol=0)
        torch.testing.assert_close(part.log_likelihood.per_unit, whole.log_likelihood.per_unit, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        answer_entropy_curve(model, "hello?", STEPS, " 42", batch_size=0)
    with pytest.raises(RowError, match="row 2: its first token has nothing before it"):
        entropy_curve(model, [[5], [6], []], [1], batch_size=2)


def test_tokens_of_the_steps_add_up_to_the_trace():
    for model in (causal(), CausalLM(build(CAUSAL["llama"], 330), llama_tokenizer())):
        counts = step_tokens(model, "hello?", STEPS)
        texts = ["hello?" + "".join("\n" + step for step in STEPS[:k]) for k in range(5)]
        lengths = [len(model.tokenizer(text)["input_ids"]) for text in texts]
        assert counts == np.diff(lengths).tolist()
        assert sum(counts) == lengths[-1] - lengths[0]
        assert step_tokens(model, "hello?", []) == []
    with pytest.raises(RowError, match="step 0: is empty"):
        step_tokens(causal(), "a", [""])


def test_answers_along_the_trace_are_greedy_first_lines(tiny):
    question, steps = "def add(a, b):", ["    # sum", "    c = a + b"]
    got = trace_answers(tiny, question, steps, cue="\n    return", max_tokens=6)
    for k, text in enumerate(got):
        context = question + "".join("\n" + s for s in steps[:k]) + "\n    return"
        ids = tiny.tokenizer(context, return_tensors="pt")["input_ids"]
        out = tiny.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
        )
        whole = tiny.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == whole.strip().split("\n")[0].strip()
    assert len(got) == 3
    with pytest.raises(InputError, match="max_tokens must be at least 1, got 0"):
        trace_answers(tiny, question, steps, max_tokens=0)


def test_plots_show_the_curves():
    curves = [curve(2.0, 1.0), curve(1.0, 0.5, 0.25), curve(3.0)]
    matrix = curve_matrix(curves)
    np.testing.assert_array_equal(matrix, [[2.0, 1.0, np.nan], [1.0, 0.5, 0.25], [3.0, np.nan, np.nan]])
    lines = plot_entropy_curves(curves).axes[0].get_lines()
    assert len(lines) == 4
    assert lines[-1].get_ydata().tolist() == [2.0, 0.75, 0.25]
    assert lines[-1].get_xdata().tolist() == [0, 1, 2]
    both = plot_entropy_curves(curves, [True, False, True])
    means = {line.get_label(): line.get_ydata().tolist() for line in both.axes[0].get_lines()}
    assert means["right (2 traces)"] == [2.5, 1.0]
    assert means["wrong (1 traces)"] == [1.0, 0.5, 0.25]
    assert len(plot_entropy_curves(curves, [True] * 3).axes[0].get_lines()) == 4
    with pytest.raises(InputError, match="there is no curve"):
        curve_matrix([])
    with pytest.raises(InputError, match="correct must have a value for each of the 3 curves"):
        plot_entropy_curves(curves, [True])
