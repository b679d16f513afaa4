"""Entropy of an answer along a trace against enumeration, torch.distributions, and the model's own conditionals."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood, Measurement
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.signals import span_entropy as span_module
from loglik.signals.entropy_curve import EntropyCurve
from loglik.signals.span_entropy import span_entropy
from loglik.signals.trace_entropy import answer_entropy_curve, entropy_curve, open_entropy_curve, split_steps
from zoo import CAUSAL, MASKED, SEQ2SEQ, build, byte_level_tokenizer, t5_tokenizer

V = 4


class Table:
    """A free conditional after every prefix of tokens."""

    kind, unit = Kind.EXACT, Unit.TOKEN

    def __init__(self, seed=0, scale=1.5, fixed=None):
        self.seed, self.scale, self.tables, self.asked = seed, scale, dict(fixed or {}), []

    def row(self, prefix):
        if prefix not in self.tables:
            g = torch.Generator().manual_seed(hash((self.seed, *prefix)) % 2**31)
            self.tables[prefix] = (self.scale * torch.randn(V, generator=g, dtype=torch.float64)).log_softmax(0)
        return self.tables[prefix]

    def next_log_probs(self, prefix):
        assert prefix.attention_mask.all(), "rows of one length"
        self.asked.append(prefix.starts.tolist())
        return torch.stack([self.row(tuple(row)) for row in prefix.ids.tolist()])


def entropy(log_p) -> float:
    return float(scipy.stats.entropy(log_p.exp().numpy()))


def curve(*values, likelihood=None) -> EntropyCurve:
    tensor = torch.tensor(values, dtype=torch.float64)
    return EntropyCurve(Measurement(tensor, Kind.EXACT, "answer_entropy"), tensor[:, None], likelihood)


# ------------------------------------------------------------------------------------------ against enumeration
def test_one_token_is_the_entropy_of_the_table():
    model, contexts = Table(), [[0], [0, 1], [0, 1, 3]]
    for answer in range(V):  # the entropy does not depend on the answer; its likelihood does
        got = entropy_curve(model, contexts, [answer])
        expected = [entropy(model.row(tuple(c))) for c in contexts]
        np.testing.assert_allclose(got.entropy.value, expected, atol=1e-12)
        np.testing.assert_allclose(got.first_token, expected, atol=1e-12)
        log_p = [model.row(tuple(c))[answer].item() for c in contexts]
        np.testing.assert_allclose(got.log_likelihood.value, log_p, atol=1e-12)
        np.testing.assert_allclose(got.information_gain, np.diff(log_p), atol=1e-12)
    assert got.entropy.kind is Kind.EXACT
    assert got.num_steps == 2


def test_two_tokens_are_conditioned_on_the_true_first_one():
    """(H_1 + H_2 | y_1) / 2, which is half the joint entropy only on average over y_1."""
    model, context = Table(1), [2]
    first = model.row((2,))
    found = []
    for y in range(V):
        got = entropy_curve(model, [context], [y, 0])
        expected = (entropy(first) + entropy(model.row((2, y)))) / 2
        assert got.entropy.item() == pytest.approx(expected, abs=1e-12)
        np.testing.assert_allclose(got.per_token[0], [entropy(first), entropy(model.row((2, y)))], atol=1e-12)
        found.append(expected)
    joint = torch.cat([first[y] + model.row((2, y)) for y in range(V)])
    assert float(first.exp().numpy() @ found) == pytest.approx(entropy(joint) / 2, abs=1e-12)
    assert max(abs(value - entropy(joint) / 2) for value in found) > 0.01


def test_steps_of_the_model_lower_the_entropy_on_average_by_the_information_they_give():
    """E[H_{k-1} - H_k] = I(Y; Z_k | Z_<k) >= 0 by enumeration of the joint; single steps may raise it."""
    joint = torch.randn(V, V, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64).flatten()
    joint = (2 * joint).log_softmax(0).reshape(V, V, V)  # of two steps and the answer
    fixed = {(): joint.logsumexp((0, 1)), (0,): joint.logsumexp((0, 1)).log_softmax(0)}
    for a, b in product(range(V), repeat=2):
        fixed[0, a] = joint[a].logsumexp(0).log_softmax(0)
        fixed[0, a, b] = joint[a, b].log_softmax(0)
    model = Table(fixed=fixed)
    weight = joint.logsumexp(2).exp()
    mean, singles = torch.zeros(2, dtype=torch.float64), []
    for a, b in product(range(V), repeat=2):
        got = entropy_curve(model, [[0], [0, a], [0, a, b]], [1])
        mean += weight[a, b] * got.utility
        singles += got.utility.tolist()

    def h(log_p):
        return entropy(log_p.flatten())

    first = h(joint.logsumexp((0, 1))) + h(joint.logsumexp((1, 2))) - h(joint.logsumexp(1))
    both = h(joint.logsumexp((0, 1))) + h(joint.logsumexp(2)) - h(joint)
    np.testing.assert_allclose(mean, [first, both - first], atol=1e-12)
    assert (mean > 0).all()
    assert min(singles) < 0


def test_uniform_and_certain_predictors():
    size = 5
    for row, expected in ((torch.zeros(size), math.log(size)), (torch.tensor([0.0, *[-torch.inf] * 4]), 0.0)):
        model = Table(fixed={(0,): row.double().log_softmax(0), (0, 0): row.double().log_softmax(0)})
        got = entropy_curve(model, [[0]], [0, 0])
        assert got.entropy.item() == pytest.approx(expected, abs=1e-12)
        assert not math.copysign(1, got.entropy.item()) < 0


# ------------------------------------------------------------------------------------------------ of real networks
ROWS, STARTS = [[1, 5, 9, 2], [1, 7, 8, 4, 4, 11], [3, 3, 6]], [2, 1, 1]


def rows(side="right"):
    return TokenBatch.from_lists(ROWS, starts=STARTS, padding_side=side)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba"])
def test_entropies_are_those_of_torch_distributions(name):
    model = CausalLM(build(CAUSAL[name], 30))
    for side in ("left", "right"):
        batch = rows(side)
        got = span_entropy(model, batch)
        for i, (ids, start) in enumerate(zip(ROWS, STARTS, strict=True)):
            with torch.no_grad():
                logits = model.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double()
            for shift in (0.0, 50.0):
                expected = torch.distributions.Categorical(logits=logits + shift).entropy()
                torch.testing.assert_close(got.per_token[i][batch.scored_mask[i]].double(), expected, atol=1e-5, rtol=0)
            assert got.entropy.value[i].item() == pytest.approx(expected.mean().item(), abs=1e-5)
        assert not got.per_token[~batch.scored_mask].any()
        torch.testing.assert_close(
            got.log_likelihood.per_unit, model.log_prob(batch).per_unit.detach(), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_pass_and_every_prefix_give_the_same(name, monkeypatch):
    model = CausalLM(build(CAUSAL[name], 30))
    once = span_entropy(model, rows("left"))
    monkeypatch.setattr(span_module, "_one_pass", span_module._prefixes)
    for size in (1, 2, 256):
        monkeypatch.setattr(span_module, "_CHUNK_ROWS", size)
        each = span_entropy(model, rows("left"))
        torch.testing.assert_close(each.per_token, once.per_token, atol=1e-5, rtol=0)
        torch.testing.assert_close(each.log_likelihood.per_unit, once.log_likelihood.per_unit, atol=1e-5, rtol=0)


def test_chunks_bound_the_logits_and_change_nothing(monkeypatch):
    model = CausalLM(build(CAUSAL["llama"], 30))
    whole = span_entropy(model, rows())
    for positions in (1, 2, 5):
        monkeypatch.setattr(span_module, "_CHUNK_LOGITS", positions * 30)
        torch.testing.assert_close(span_entropy(model, rows()).per_token, whole.per_token, atol=1e-5, rtol=0)
    model.trunk._form = None  # a head that is no plain matrix is used as it is
    torch.testing.assert_close(span_entropy(model, rows()).per_token, whole.per_token, atol=1e-5, rtol=0)


def test_half_precision_is_widened():
    model = CausalLM(build(CAUSAL["llama"], 30).bfloat16())
    got = span_entropy(model, rows())
    assert got.per_token.dtype == torch.float32
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ROWS[0]])).logits[0, 1:-1]
    expected = torch.distributions.Categorical(logits=logits.float()).entropy()
    torch.testing.assert_close(got.per_token[0, 2:4], expected, atol=0.1, rtol=0)


def test_encoder_decoders_and_n_grams_read_every_prefix():
    pair = Seq2SeqLM(build(SEQ2SEQ["t5"], 30))
    batch = TokenBatch.from_lists([[5, 6, 7, 8], [5, 9, 10]], starts=[2, 1])
    got = span_entropy(pair, batch)
    torch.testing.assert_close(got.log_likelihood.value, pair.log_prob(batch).value.detach(), atol=1e-5, rtol=0)
    last = pair.next_log_probs(TokenBatch.from_lists([[5, 6, 7]], starts=[2])).detach()[0]
    assert got.per_token[0, 3].item() == pytest.approx(entropy(last.double()), abs=1e-5)
    grams = NGramLM.train(["abcabc", "abd"], order=2)
    found = answer_entropy_curve(grams, "ab", ["c"], "ab", separator="", cue="")
    ids = grams.tokenizer("abcab")["input_ids"]
    after_c, after_a = (entropy(grams.next_log_probs(TokenBatch.from_lists([ids[:n]]))[0]) for n in (3, 4))
    np.testing.assert_allclose(found.per_token[1], [after_c, after_a], atol=1e-12)


def test_the_first_column_of_starts_reaches_the_model():
    model = Table()
    entropy_curve(model, [[0], [0, 1]], [2, 3])
    assert sorted(start for starts in model.asked for start in starts) == [1, 1, 2, 2]


# ------------------------------------------------------------------------------------------------------------ texts
def test_texts_are_read_as_question_steps_and_cue():
    model = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())
    got = answer_entropy_curve(model, "hello?", ["yes", "it is"], " 42 so")
    ids = model.tokenizer(" 42 so")["input_ids"]
    texts = ["hello?\nAnswer:", "hello?\nyes\nAnswer:", "hello?\nyes\nit is\nAnswer:"]
    expected = entropy_curve(model, [model.tokenizer(text)["input_ids"] for text in texts], ids)
    torch.testing.assert_close(got.per_token, expected.per_token, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.log_likelihood.value, expected.log_likelihood.value, atol=1e-5, rtol=0)
    assert got.per_token.shape == (3, len(ids))
    own = answer_entropy_curve(model, "hello?", ["yes"], " 42", separator=" ", cue=" so")
    short = entropy_curve(
        model,
        [model.tokenizer(t)["input_ids"] for t in ("hello? so", "hello? yes so")],
        model.tokenizer(" 42")["input_ids"],
    )
    torch.testing.assert_close(own.entropy.value, short.entropy.value, atol=1e-5, rtol=0)


def test_an_open_curve_is_the_first_term_whatever_the_answer():
    model = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())
    got = open_entropy_curve(model, "hello?", ["yes", "it is"])
    for answer in (" 42", " so"):
        closed = answer_entropy_curve(model, "hello?", ["yes", "it is"], answer)
        torch.testing.assert_close(got.entropy.value, closed.first_token, atol=1e-5, rtol=0)
    assert got.log_likelihood is None
    assert got.record()["log_prob"] is None
    with pytest.raises(InputError, match="the information gain needs the likelihood of an answer"):
        _ = got.information_gain


def test_an_encoder_decoder_reads_the_trace_as_its_source():
    tokenizer = t5_tokenizer()
    model = Seq2SeqLM(build(SEQ2SEQ["t5"], len(tokenizer)), tokenizer)
    got = answer_entropy_curve(model, "hello", ["yes"], "it is")
    assert got.per_token.shape[1] == len(tokenizer("it is")["input_ids"])
    first = open_entropy_curve(model, "hello", ["yes"])
    torch.testing.assert_close(first.entropy.value, got.first_token, atol=1e-5, rtol=0)


def test_a_trace_without_steps_has_one_entropy_and_no_slope():
    model = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())
    got = answer_entropy_curve(model, "hello?", [], " 42")
    assert (got.num_steps, got.drop(), len(got.utility)) == (0, 0.0, 0)
    assert got.record()["slope"] is None
    for call in (got.slope, got.share_rising, got.monotonicity):
        with pytest.raises(InputError, match="needs at least one step"):
            call()


# ------------------------------------------------------------------------------------------------------ descriptors
def test_descriptors_equal_numpy_and_scipy():
    g = np.random.default_rng(0)
    for length in (2, 3, 8):
        values = g.exponential(size=length)
        got = curve(*values)
        assert got.drop() == pytest.approx(values[0] - values[-1])
        assert got.slope() == pytest.approx(np.polyfit(np.arange(length), values, 1)[0])
        assert got.share_rising() == pytest.approx((np.diff(values) > 0).mean())
        assert got.monotonicity() == pytest.approx(scipy.stats.kendalltau(np.arange(length), values).statistic)
        np.testing.assert_allclose(got.utility, -np.diff(values))
        assert got.utility.sum().item() == pytest.approx(got.drop())
        json.dumps(got.record(), allow_nan=False)
    assert curve(3.0, 2.0, 1.0).monotonicity() == -1
    assert curve(1.0, 1.0, 1.0).monotonicity() == 0
    assert curve(1.0, 1.0, 2.0).share_rising() == 0.5


def test_until_leaves_the_conclusion_out():
    likelihood = LogLikelihood.from_per_unit(torch.full((4, 2), -1.0), torch.ones(4, 2, dtype=torch.bool))
    whole = curve(3.0, 2.0, 2.5, 0.0, likelihood=likelihood)
    cut = whole.until(-1)
    assert cut.entropy.value.tolist() == [3.0, 2.0, 2.5]
    assert (len(cut.log_likelihood), cut.num_steps, cut.drop()) == (3, 2, 0.5)
    assert whole.until(0).entropy.value.tolist() == [3.0]
    assert whole.until(3).drop() == whole.drop()
    for step in (4, -4):
        with pytest.raises(InputError, match="the trace has 3 steps"):
            whole.until(step)


def test_early_stop():
    got = curve(2.0, 1.5, 0.4, 0.9, 0.3, 0.2)
    assert (got.early_stop(0.5).step, got.early_stop(0.5).reason, got.early_stop(0.5).saved) == (2, "sure", 3)
    assert got.early_stop(0.5, patience=2).step == 5
    assert got.early_stop(2.0).step == 0
    assert got.early_stop(0.1).step is None
    assert got.early_stop(0.1).reason == "continue"
    assert got.early_stop(0.4, stall=1).step == 2  # sure comes first
    flat = curve(2.0, 1.99, 2.1, 1.98, 1.0)
    assert (flat.early_stop(0.5, stall=2, min_fall=0.1).step, flat.early_stop(0.5, stall=2).step) == (2, None)
    assert flat.early_stop(0.5, stall=1).reason == "stalled"
    assert flat.early_stop(0.5, stall=1).step == 2
    assert flat.early_stop(0.5, stall=4, min_fall=0.1).step is None
    # Small falls add up to one.
    assert curve(2.0, 1.95, 1.88, 1.83, 1.76).early_stop(0.5, stall=2, min_fall=0.1).step is None


def test_advice_looks_at_no_later_step():
    g = np.random.default_rng(1)
    for _ in range(200):
        values = g.exponential(size=7)
        options = {"patience": int(g.integers(1, 3)), "stall": int(g.integers(1, 4)), "min_fall": 0.1}
        whole = curve(*values).early_stop(0.3, **options)
        for step in range(7):
            early = curve(*values[: step + 1]).early_stop(0.3, **options)
            expected = whole.step if whole.step is not None and whole.step <= step else None
            assert early.step == expected


def test_split_steps():
    trace = "She has 3.5 eggs. She sells 2!\n\n So 1.5 are left? A: 1.5\n"
    assert split_steps(trace) == ["She has 3.5 eggs. She sells 2!", "So 1.5 are left? A: 1.5"]
    assert split_steps(trace, "sentences") == ["She has 3.5 eggs.", "She sells 2!", "So 1.5 are left?", "A: 1.5"]
    assert split_steps(" \n ") == []
    with pytest.raises(InputError, match="by must be lines or sentences"):
        split_steps("a", "words")


# ------------------------------------------------------------------------------------------------------- bad input
def test_labels_of_other_models():
    class Estimated(Table):
        kind = Kind.ESTIMATE

    assert entropy_curve(Estimated(), [[0]], [1]).entropy.kind is Kind.SURROGATE


def test_refusals(tiny):
    model, table = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer()), Table()
    with pytest.raises(InputError, match="answer entropy needs per-token conditionals"):
        span_entropy(MaskedLM(build(MASKED["bert"], 30), mask_token_id=3), rows())
    with pytest.raises(InputError, match="answer entropy needs per-token conditionals"):
        answer_entropy_curve(object(), "a", [], "b")
    with pytest.raises(InputError, match="answer entropy needs per-token conditionals"):
        open_entropy_curve(object(), "a", [])
    with pytest.raises(InputError, match="got 0 contexts, 1 tokens"):
        entropy_curve(table, [], [1])
    with pytest.raises(InputError, match="got 1 contexts, 0 tokens"):
        entropy_curve(table, [[1]], [])
    with pytest.raises(RowError, match="row 1: its first token has nothing before it"):
        entropy_curve(table, [[1], []], [1])
    batch = rows()
    batch.scored_mask[2] = False
    with pytest.raises(RowError, match="row 2: has no scored token"):
        span_entropy(table, batch)
    nan = Table(fixed={(0, 1): torch.full((V,), math.nan, dtype=torch.float64)})
    with pytest.raises(RowError, match="row 1: the model gives no distribution for the token in column 2"):
        entropy_curve(nan, [[0], [0, 1]], [1])
    with pytest.raises(InputError, match="steps must be several texts, not one string; use split_steps"):
        answer_entropy_curve(model, "a", "b", " c")
    for curve_of in (lambda s: answer_entropy_curve(model, "a", s, " c"), lambda s: open_entropy_curve(model, "a", s)):
        with pytest.raises(RowError, match="step 1: is empty"):
            curve_of(["a", " "])
        with pytest.raises(RowError, match=r"after 2 steps: the trace has .* tokens with its answer and the model's"):
            curve_of(["a", "漢字 " * 200])
    with pytest.raises(RowError, match="after 0 steps: the completion is empty"):
        answer_entropy_curve(model, "a", ["b"], "")
    with pytest.raises(InputError, match="the model has no tokenizer"):
        answer_entropy_curve(CausalLM(build(CAUSAL["gpt2"], 30)), "a", [], " b")


def test_an_answer_whose_tokens_depend_on_the_trace_is_refused():
    model = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())
    pieces = [model.tokenizer.convert_ids_to_tokens(i) for i in range(330)]
    merged = next(p for p in pieces if len(p) == 2 and p.isascii() and p.isalpha())
    with pytest.raises(InputError, match="the answer has other tokens after 1 steps than before the first"):
        answer_entropy_curve(model, "so 42", [merged[0]], merged[1], cue="")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold and min_fall must be at least 0 and finite"),
        ({"threshold": math.nan}, "threshold and min_fall must be at least 0 and finite"),
        ({"threshold": 0.1, "min_fall": -1.0}, "threshold and min_fall must be at least 0 and finite"),
        ({"threshold": 0.1, "patience": 0}, "patience and stall must be at least 1"),
        ({"threshold": 0.1, "stall": 0}, "patience and stall must be at least 1"),
    ],
)
def test_options_of_early_stop_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        curve(1.0, 0.5).early_stop(**options)
