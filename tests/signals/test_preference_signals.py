"""CHES and likelihood displacement against closed forms, autograd and plain loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
import transformers as tf

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.signals import preference
from loglik.signals.preference import (
    ches_score,
    ches_scores,
    edit_similarity,
    filter_by_ches,
    last_state_similarities,
    last_state_similarity,
    likelihood_displacement,
    predicting_states,
)
from zoo import CAUSAL, MORE_CAUSAL, SEQ2SEQ, build

V = 30
PROMPTS = [[3, 9, 4], [5, 6], [7, 7, 7, 8]]
CHOSEN = [[10, 11, 12, 2], [13, 2], [14, 15, 16]]
REJECTED = [[10, 11, 2], [20, 21, 22, 23, 2], [14]]


def rows(completions, side="right"):
    """Prompts and completions in one batch; the completion is scored."""
    texts = [p + c for p, c in zip(PROMPTS, completions, strict=True)]
    return TokenBatch.from_lists(texts, starts=[len(p) for p in PROMPTS], padding_side=side)


def loop_states(model: CausalLM, prompt, completion) -> torch.Tensor:
    """(|y|, D) states after the final norm that predict the completion, from transformers alone."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        out = model.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    return out[len(prompt) - 1 : -1]


def loop_ches(plus: torch.Tensor, minus: torch.Tensor, normalise: bool) -> float:
    plus, minus = plus.double(), minus.double()
    s_plus, s_minus = plus.sum(0), minus.sum(0)
    if not normalise:
        return float(s_plus @ s_minus - s_plus @ s_plus)
    return float(s_plus @ s_minus / (len(plus) * len(minus)) - s_plus @ s_plus / len(plus) ** 2)


def random_pair(seed=0, shape=(4, 6, 5), other=9, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    plus = torch.randn(shape, generator=g, dtype=dtype)
    minus = torch.randn(shape[0], other, shape[2], generator=g, dtype=dtype)
    keep_plus = torch.rand(shape[:2], generator=g) < 0.6
    keep_minus = torch.rand(shape[0], other, generator=g) < 0.6
    keep_plus[:, 0] = keep_minus[:, -1] = True
    return plus, keep_plus, minus, keep_minus


# ---------------------------------------------------------------------------------------------- the score on tensors
@pytest.mark.parametrize("normalise", [False, True])
def test_score_is_the_formula_row_by_row(normalise):
    plus, keep_plus, minus, keep_minus = random_pair()
    got = ches_score(plus, keep_plus, minus, keep_minus, length_normalise=normalise)
    expected = [loop_ches(plus[i][keep_plus[i]], minus[i][keep_minus[i]], normalise) for i in range(4)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


def test_equal_completions_score_exactly_zero():
    plus, keep, _, _ = random_pair(dtype=torch.float32)
    for normalise in (False, True):
        assert ches_score(plus * 1e3, keep, plus * 1e3, keep, length_normalise=normalise).tolist() == [0.0] * 4


def test_orthogonal_sums_leave_minus_the_squared_norm():
    plus = torch.tensor([[[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]]])
    minus = torch.tensor([[[0.0, 0.0, 7.0]]])
    ones = torch.ones(1, 2, dtype=torch.bool)
    assert ches_score(plus, ones, minus, ones[:, :1]).item() == pytest.approx(-(4.0**2 + 1.0**2))


def test_adding_a_vector_to_the_rejected_sum_adds_its_product_with_the_chosen_sum():
    plus, keep, _, _ = random_pair(1)
    v = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    s_plus = (plus * keep[..., None]).sum(1)
    minus = torch.stack([s_plus, v], 1)  # two states whose sum is S+ + v
    got = ches_score(plus, keep, minus, torch.ones(4, 2, dtype=torch.bool))
    torch.testing.assert_close(got, (s_plus * v).sum(-1), atol=1e-12, rtol=1e-12)


def test_length_normalised_is_the_score_of_the_mean_states():
    plus, keep_plus, minus, keep_minus = random_pair(3)
    mean = [(s * k[..., None]).sum(1, keepdim=True) / k.sum(1)[:, None, None] for s, k in
            ((plus, keep_plus), (minus, keep_minus))]  # fmt: skip
    one = torch.ones(4, 1, dtype=torch.bool)
    got = ches_score(plus, keep_plus, minus, keep_minus, length_normalise=True)
    torch.testing.assert_close(got, ches_score(mean[0], one, mean[1], one), atol=1e-12, rtol=1e-12)


def test_score_is_not_symmetric():
    plus, keep_plus, minus, keep_minus = random_pair(4)
    assert not torch.allclose(
        ches_score(plus, keep_plus, minus, keep_minus), ches_score(minus, keep_minus, plus, keep_plus)
    )


def test_half_precision_states_are_summed_in_double():
    """Ten thousand equal bfloat16 states: a sum in their own dtype would stop growing at 256."""
    states = torch.ones(1, 10_000, 2, dtype=torch.bfloat16)
    mask = torch.ones(1, 10_000, dtype=torch.bool)
    got = ches_score(states, mask, 2 * states, mask)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(2 * 10_000**2, rel=1e-6)


def test_what_the_mask_leaves_out_may_be_anything():
    plus, keep_plus, minus, keep_minus = random_pair(5)
    dirty = plus.masked_fill(~keep_plus[..., None], math.nan)
    torch.testing.assert_close(
        ches_score(dirty, keep_plus, minus, keep_minus), ches_score(plus, keep_plus, minus, keep_minus)
    )


# -------------------------------------------------------------------------------------- what the score stands for
def test_single_token_dynamics_equal_autograd():
    """d/dt log p_z under gradient flow on W and h is the closed form of the sheet, for the chosen token and others."""
    g = torch.Generator().manual_seed(0)
    size, dim, plus, minus, beta = 7, 4, 2, 5, 0.3
    w = torch.randn(size, dim, generator=g, dtype=torch.float64, requires_grad=True)
    h = torch.randn(dim, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(size, generator=g, dtype=torch.float64), 0)
    log_p = torch.log_softmax(w @ h, 0)
    delta = (log_p[plus] - log_p[minus]) - (reference[plus] - reference[minus])
    loss = -torch.nn.functional.logsigmoid(beta * delta)
    down = torch.autograd.grad(loss, (w, h), retain_graph=True)
    c = beta * torch.sigmoid(-beta * delta.detach())
    p, square = log_p.exp().detach(), float(h.detach() @ h.detach())
    rows = w.detach()
    between = rows[plus] - rows[minus]
    for token in range(size):
        grads = torch.autograd.grad(log_p[token], (w, h), retain_graph=True)
        rate = -sum((a * b).sum() for a, b in zip(grads, down, strict=True))
        if token == plus:
            others = [z for z in range(size) if z not in (plus, minus)]
            closed = (
                (1 - p[plus]) * rows[plus] @ rows[plus]
                + p[minus] * rows[minus] @ rows[minus]
                - (1 - p[plus] + p[minus]) * rows[plus] @ rows[minus]
                - sum(p[z] * rows[z] @ between for z in others)
                + square * (1 - p[plus] + p[minus])
            )
        elif token == minus:
            continue
        else:
            closed = (rows[token] - p @ rows) @ between + square * (p[minus] - p[plus])
        assert float(rate) == pytest.approx(float(c * closed), rel=1e-12, abs=1e-14)


def unembedding_inner_product(model: CausalLM, prompt, plus, minus) -> float:
    """<grad_W log pi(y+), grad_W (log pi(y+) - log pi(y-))> of the head's weight by autograd."""
    weight = model.model.get_output_embeddings().weight

    def grad(completion) -> torch.Tensor:
        batch = TokenBatch.from_lists([prompt + completion], starts=[len(prompt)])
        return torch.autograd.grad(model.log_prob(batch).value.sum(), weight)[0]

    a, b = grad(plus), grad(minus)
    return float((a * (a - b)).sum())


def test_multi_token_unembedding_formula_equals_autograd():
    """The coefficients that CHES replaces by 1, with the states that `predicting_states` gives."""
    model = CausalLM(build(CAUSAL["llama"], V).double())
    weight = model.model.get_output_embeddings().weight.detach()
    for prompt, plus, minus in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        states, residual = {}, {}
        for name, y in (("+", plus), ("-", minus)):
            h, _ = predicting_states(model, TokenBatch.from_lists([prompt + y], starts=[len(prompt)]))
            states[name] = h
            residual[name] = torch.nn.functional.one_hot(torch.tensor(y), V) - torch.softmax(h @ weight.T, -1)
        same = (residual["+"] @ residual["+"].T) * (states["+"] @ states["+"].T)
        cross = (residual["+"] @ residual["-"].T) * (states["+"] @ states["-"].T)
        expected = unembedding_inner_product(model, prompt, plus, minus)
        assert float(same.sum() - cross.sum()) == pytest.approx(expected, rel=1e-9)
        ones = (states["+"] @ states["+"].T).sum() - (states["+"] @ states["-"].T).sum()
        pair = [TokenBatch.from_lists([prompt + y], starts=[len(prompt)]) for y in (plus, minus)]
        assert ches_scores(model, *pair).item() == pytest.approx(-float(ones), rel=1e-9)


# ------------------------------------------------------------------------------------------ the states of a model
@pytest.mark.parametrize("name", CAUSAL)
def test_states_are_those_that_the_head_reads(name):
    """Head of the state = the model's own logits at the position before the token; post-norm in every architecture."""
    model = CausalLM(build(CAUSAL[name], V))
    states, mask = predicting_states(model, rows(CHOSEN))
    logits = model.trunk.logits(states)
    got = torch.log_softmax(logits.float(), -1).gather(1, rows(CHOSEN).ids[mask][:, None])[:, 0]
    with torch.no_grad():
        likelihood = model.log_prob(rows(CHOSEN))
    assert mask.equal(likelihood.mask)
    torch.testing.assert_close(got, likelihood.per_unit[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_scores_equal_a_loop_over_transformers(name, normalise):
    """Exactly |y| vectors, from the last prompt token on, in a padded batch as in a loop."""
    model = CausalLM(build(CAUSAL[name], V))
    expected = [
        loop_ches(loop_states(model, p, c), loop_states(model, p, r), normalise)
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    got = ches_scores(model, rows(CHOSEN), rows(REJECTED), length_normalise=normalise)
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-4)


def test_padding_and_batching_change_nothing(monkeypatch):
    model = CausalLM(build(CAUSAL["llama"], V))
    right = ches_scores(model, rows(CHOSEN), rows(REJECTED))
    left = ches_scores(model, rows(CHOSEN, "left"), rows(REJECTED, "left"))
    torch.testing.assert_close(left, right, atol=0, rtol=0)
    alone = [
        ches_scores(
            model,
            TokenBatch.from_lists([p + c], starts=[len(p)]),
            TokenBatch.from_lists([p + r], starts=[len(p)]),
        )
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), right, atol=1e-4, rtol=1e-4)
    for budget in (1, 8, 13):
        monkeypatch.setattr(preference, "_PASS_TOKENS", budget)
        torch.testing.assert_close(ches_scores(model, rows(CHOSEN), rows(REJECTED)), right, atol=1e-4, rtol=1e-4)


def test_rows_on_either_side_of_a_rotary_limit_do_not_run_together():
    """A long row changes the frequencies of what runs with it (longrope from 8 tokens on)."""
    model = CausalLM(build(MORE_CAUSAL["phi3_longrope"], V))
    texts = [[3, 4, 5, 6], list(range(3, 17)), [9, 8, 7], list(range(5, 17))]
    together, _ = predicting_states(model, TokenBatch.from_lists(texts, starts=[2] * 4))
    alone = [predicting_states(model, TokenBatch.from_lists([t], starts=[2]))[0] for t in texts]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_passes_cover_every_row_once_within_the_budget(monkeypatch):
    monkeypatch.setattr(preference, "_PASS_TOKENS", 10)
    rng = random.Random(0)
    for start in (None, 4):
        lengths = [rng.randint(1, 12) for _ in range(40)]
        found = list(preference._passes(lengths, start))
        assert [i for part, _ in found for i in range(part.start, part.stop)] == list(range(40))
        for part, width in found:
            own = lengths[part]
            assert width == max(own)
            assert len(own) == 1 or width * len(own) <= 10
            assert start is None or len({n > start for n in own}) == 1
    assert list(preference._passes([], None)) == []


def test_the_model_keeps_its_mode_and_no_graph():
    config = tf.GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.5)
    model = CausalLM(tf.GPT2LMHeadModel(config).train())
    first, second = (ches_scores(model, rows(CHOSEN), rows(REJECTED)) for _ in range(2))
    assert first.equal(second)  # dropout is off meanwhile
    assert model.model.training
    assert not first.requires_grad


def test_models_without_separate_states_are_refused():
    seq2seq = Seq2SeqLM(build(SEQ2SEQ["t5"], V))
    with pytest.raises(InputError, match=r"CHES needs a causal model.*Seq2SeqLM cannot"):
        ches_scores(seq2seq, rows(CHOSEN), rows(REJECTED))
    whole = CausalLM(build(CAUSAL["llama"], V))
    whole.__dict__["trunk"] = None  # as for a network that cannot be taken apart
    with pytest.raises(InputError, match="LlamaForCausalLM cannot"):
        ches_scores(whole, rows(CHOSEN), rows(REJECTED))


def test_empty_completions_and_unpaired_rows_are_refused():
    model = CausalLM(build(CAUSAL["llama"], V))
    empty = rows(CHOSEN)
    empty.scored_mask[1] = False
    with pytest.raises(RowError, match="row 1: the chosen completion has no token"):
        ches_scores(model, empty, rows(REJECTED))
    with pytest.raises(RowError, match="row 1: the rejected"):
        ches_scores(model, rows(CHOSEN), empty)
    with pytest.raises(InputError, match="as many rows, got 3 and 1"):
        ches_scores(model, rows(CHOSEN), TokenBatch.from_lists([[3, 4]]))
    states, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(InputError, match="bool mask"):
        ches_score(states, mask.int(), states, mask)
    with pytest.raises(InputError, match="bool mask"):
        ches_score(states, mask[:, :2], states, mask)
    with pytest.raises(InputError, match="rows and dimensions"):
        ches_score(states, mask, states[..., :3], mask)
    with pytest.raises(InputError, match="rows and dimensions"):
        ches_score(states, mask, states[:1], mask[:1])


# --------------------------------------------------------------------------------------------------------- baselines
def test_last_state_similarity_takes_the_last_masked_state():
    plus, keep_plus, minus, keep_minus = random_pair(6)
    expected = [
        float(plus[i][keep_plus[i]][-1] @ minus[i][keep_minus[i]][-1]) for i in range(4)
    ]  # fmt: skip
    got = last_state_similarity(plus, keep_plus, minus, keep_minus)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_state_of_a_model_is_that_of_the_last_token(side):
    model = CausalLM(build(CAUSAL["llama"], V))
    expected = []
    with torch.no_grad():
        for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
            plus, minus = (
                model.model(input_ids=torch.tensor([p + y]), output_hidden_states=True).hidden_states[-1][0, -1]
                for y in (c, r)
            )
            expected.append(float(plus @ minus))
    got = last_state_similarities(model, rows(CHOSEN, side), rows(REJECTED, side))
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_edit_similarity_equals_a_plain_table():
    def plain(a, b):
        table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                change = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
        return table[-1][-1]

    rng = random.Random(0)
    draw = [[[rng.randrange(3) for _ in range(rng.randint(0, 9))] for _ in range(200)] for _ in range(2)]
    pairs = [(a, b) for a, b in zip(*draw, strict=True) if a or b]
    got = edit_similarity([a for a, _ in pairs], [b for _, b in pairs])
    expected = [-plain(a, b) / max(len(a), len(b)) for a, b in pairs]
    assert got.tolist() == expected
    assert edit_similarity([[1, 2, 3]], [[1, 2, 3]]).item() == 0
    assert edit_similarity([[1, 2, 3]], [[]]).item() == -1
    assert edit_similarity([[1, 2, 3, 4]], [[2, 3, 4]]).item() == -0.25  # one deletion, not four substitutions
    with pytest.raises(RowError, match="row 1: both completions are empty"):
        edit_similarity([[1], []], [[1], []])
    with pytest.raises(InputError, match="got 1 and 2 rows"):
        edit_similarity([[1]], [[1], [2]])


# ------------------------------------------------------------------------------------------------------ the filter
def test_filter_keeps_the_lowest_scores_in_the_order_of_the_data():
    scores = torch.tensor([0.5, -3.0, 2.0, -1.0, -3.0])
    assert filter_by_ches(scores, 2).tolist() == [1, 4]
    assert filter_by_ches(scores, 1).tolist() == [1]  # of equal scores the first
    assert filter_by_ches(scores, 0.6).tolist() == [1, 3, 4]
    assert filter_by_ches(scores, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert filter_by_ches(scores, 0.01).tolist() == [1]


@pytest.mark.parametrize("keep", [0, 6, -1, 0.0, 1.05, math.nan, True])
def test_filter_refuses_what_it_cannot_keep(keep):
    with pytest.raises(InputError, match="keep must be a share"):
        filter_by_ches(torch.zeros(5), keep)


def test_filter_refuses_scores_that_are_none():
    with pytest.raises(RowError, match="row 1: the score is nan"):
        filter_by_ches(torch.tensor([1.0, math.nan]), 1)
    with pytest.raises(InputError, match="N > 0"):
        filter_by_ches(torch.empty(0), 1)


# ------------------------------------------------------------------------------------------------- displacement
def likelihood(values, units=None, kind=Kind.EXACT) -> LogLikelihood:
    return LogLikelihood(torch.tensor(values), kind, Unit.TOKEN, torch.tensor(units or [2] * len(values)))


def test_displacement_per_pair_mean_and_share():
    got = likelihood_displacement(likelihood([-1.0, -2.0, -3.0, -4.0]), likelihood([-2.0, -1.0, -3.0, -7.0]))
    assert got.change.value.tolist() == [-1.0, 1.0, 0.0, -3.0]
    assert got.change.kind is Kind.EXACT
    assert got.mean.item() == pytest.approx(-0.75)
    assert got.mean.stderr.item() == pytest.approx(torch.tensor([-1.0, 1.0, 0.0, -3.0]).std().item() / 2)
    assert got.share_decreased == 0.5


def test_displacement_keeps_the_label_and_drops_the_graph():
    bounds = [likelihood([-1.0], kind=Kind.LOWER_BOUND), likelihood([-2.0], kind=Kind.LOWER_BOUND)]
    got = likelihood_displacement(*bounds)
    assert got.change.kind is Kind.SURROGATE
    assert got.mean.kind is Kind.SURROGATE
    assert got.mean.stderr is None
    value = torch.tensor([-1.0], requires_grad=True)
    trained = LogLikelihood(value, Kind.EXACT, Unit.TOKEN, torch.tensor([2]))
    assert not likelihood_displacement(trained, trained).change.value.requires_grad


def test_displacement_refuses_what_is_not_the_same_data():
    with pytest.raises(InputError, match="got 2 and 1"):
        likelihood_displacement(likelihood([-1.0, -2.0]), likelihood([-1.0]))
    with pytest.raises(InputError, match="row 1 has 3 tokens before and 2 tokens after"):
        likelihood_displacement(likelihood([-1.0, -2.0], [2, 3]), likelihood([-1.0, -2.0]))
    with pytest.raises(RowError, match="row 0: its likelihoods have no difference"):
        likelihood_displacement(likelihood([-math.inf]), likelihood([-math.inf]))
    assert likelihood_displacement(likelihood([-1.0]), likelihood([-math.inf])).share_decreased == 1.0


def test_catastrophic_displacement_of_a_single_prompt():
    """Preferring "No" to "Never" moves the mass to "Yes" where it lies along W_No - W_Never, and not where it does not.

    The claim of the paper in its smallest form, as the sheet sets it up; one seed.
    """
    for along in (True, False):
        g = torch.Generator().manual_seed(11)
        basis = torch.linalg.qr(torch.randn(16, 3, generator=g)).Q.T
        w = 3 * torch.randn(10, 16, generator=g) / 4
        w[0], w[1] = 3 * basis[0], 3 * (0.8 * basis[0] + 0.6 * basis[1])
        direction = w[0] - w[1]
        w[2] = 6 * direction / direction.norm() if along else 6 * basis[2]
        h = 0.3 * basis[0] + 0.1 * torch.randn(16, generator=g) / 4
        w.requires_grad_()
        h.requires_grad_()
        start = torch.log_softmax(w @ h, 0).detach()
        for _ in range(300):
            now = torch.log_softmax(w @ h, 0)
            margin = (now[0] - now[1]) - (start[0] - start[1])
            grads = torch.autograd.grad(-torch.nn.functional.logsigmoid(0.1 * margin), (w, h))
            with torch.no_grad():
                w -= 0.5 * grads[0]
                h -= 0.5 * grads[1]
        end = torch.log_softmax(w @ h, 0).detach()
        moved = likelihood_displacement(likelihood([start[0].item()]), likelihood([end[0].item()]))
        if along:
            assert end[0].exp() < start[0].exp() / 10
            assert end[2].exp() > 0.9
            assert moved.share_decreased == 1.0
        else:
            assert moved.mean.item() > 0
