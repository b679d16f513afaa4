"""Masked diffusion's bounds against full enumeration: every mask, every order."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion_beds import all_texts, joint_lm, random_joint, random_lm, whole
from loglik import InputError, Kind, TokenBatch
from loglik.kinds import DrawsKey
from loglik.models.diffusion import (
    Bernoulli,
    Canonical,
    Counts,
    Enumeration,
    FixedOrder,
    Geometric,
    LogLinear,
    MaskedDiffusionLM,
    OneStep,
    Orders,
    Quadrature,
    ScoreEntropy,
    SubsetTable,
    Times,
)
from loglik.models.diffusion.streams import row_streams

ROWS = [[2, 0, 3, 1, 1], [1, 3, 2], [0, 0, 1, 2]]  # the first token is a prompt
UNBIASED = [
    Counts(),
    Counts(3),
    Bernoulli(1, "uniform"),
    Bernoulli(4, "stratified"),
    Bernoulli(4, "offset"),
    Bernoulli(2, "antithetic"),
    Times(),
    ScoreEntropy(2),
    Orders(),
    Canonical(),
    Quadrature(2, "bernoulli"),
    Quadrature(3, "size-biased"),
]


@pytest.fixture(scope="module")
def lm():
    return random_lm()


@pytest.fixture(scope="module")
def tables(lm):
    with torch.no_grad():
        return SubsetTable.of(lm, whole(ROWS, prompt=1))


def test_one_bound_has_many_forms(tables):
    for table in tables:
        bound = float(table.elbo())
        assert float(table.lambda_form()) == pytest.approx(bound, abs=1e-12)
        assert float(table.time_form(LogLinear())) == pytest.approx(bound, abs=1e-10)
        assert float(table.all_orders().mean()) == pytest.approx(bound, abs=1e-12)


def test_quadrature_in_the_noise_level_is_exact_from_half_the_length_on(lm):
    with torch.no_grad():
        (table,) = SubsetTable.of(lm, whole([[0, 1, 2, 3, 3, 2, 0]], prompt=1))  # L = 6
    bound = float(table.elbo())
    assert float(table.lambda_form(3)) == pytest.approx(bound, abs=1e-12)
    assert abs(float(table.lambda_form(2)) - bound) > 1e-6
    assert abs(float(table.lambda_form(1)) - bound) > abs(float(table.lambda_form(2)) - bound)


def test_the_geometric_schedule_leaves_part_of_the_integral_out(tables):
    gap = [float(table.time_form(Geometric(1e-9, 40.0), nodes=400) - table.elbo()) for table in tables]
    assert max(map(abs, gap)) < 1e-6
    short = [float(table.time_form(Geometric(1e-9, 1.0), nodes=400) - table.elbo()) for table in tables]
    assert min(short) > 0.1  # above the bound: no bound
    assert Times(schedule=Geometric()).kind is Kind.SURROGATE


def test_the_bound_lies_below_the_mixture_over_orders(tables):
    for table in tables:
        orders = table.all_orders()
        mixture = float(orders.logsumexp(0) - math.log(len(orders)))
        assert float(table.mixture()) == pytest.approx(mixture, abs=1e-12)
        assert float(table.elbo()) < mixture - 1e-3


def test_the_mixture_over_orders_is_a_distribution(lm):
    texts = all_texts(4, 3)
    with torch.no_grad():
        values = SubsetTable.likelihoods(SubsetTable.of(lm, whole([[2, *text] for text in texts], prompt=1)))
    assert values.kind is Kind.EXACT
    assert float(values.value.exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("estimator", UNBIASED, ids=str)
def test_estimators_have_the_bound_as_their_mean(lm, tables, estimator):
    # Every row may be 4 standard errors off: a false alarm in 1 of 5,000 runs over all of them. Seeds are fixed.
    count = 2500 if isinstance(estimator, Counts | Orders | Canonical) else 6000
    with torch.no_grad():
        found = lm.evidence(whole(ROWS, prompt=1), estimator=estimator, num_samples=count).likelihood
    want = torch.stack([table.elbo() for table in tables])
    assert found.stderr is not None
    assert bool(((found.value - want).abs() < 4 * found.stderr).all())
    assert bool((found.stderr < 1).all())  # so that 4 of them tell something
    assert found.num_units.tolist() == [4, 2, 3]
    assert found.kind is (Kind.SURROGATE if isinstance(estimator, Quadrature) else Kind.LOWER_BOUND)


def test_quadrature_variance_splits_into_nodes(tables):
    """For exact quadrature all variance is that of masks; size-biased counts have less of it."""
    lm = random_lm()
    x = whole(ROWS, prompt=1)
    with torch.no_grad():
        spread = {
            masks: lm.evidence(x, estimator=Quadrature(2, masks), num_samples=3000).likelihood.stderr
            for masks in ("bernoulli", "size-biased")
        }
    assert bool((spread["size-biased"] < spread["bernoulli"]).all())


def test_enumeration_is_the_bound_and_one_step_is_not(lm, tables):
    x = whole(ROWS, prompt=1)
    with torch.no_grad():
        exact = lm.evidence(x, estimator=Enumeration())
        step = lm.evidence(x, estimator=OneStep())
    assert exact.likelihood.value.tolist() == pytest.approx([float(t.elbo()) for t in tables], abs=1e-12)
    assert exact.likelihood.kind is Kind.LOWER_BOUND
    assert exact.likelihood.stderr is None
    assert exact.evaluations.tolist() == [15, 3, 7]
    mean_field = [float(t.log_c[-1].sum()) for t in tables]
    assert step.likelihood.value.tolist() == pytest.approx(mean_field, abs=1e-12)
    assert step.likelihood.kind is Kind.SURROGATE
    assert step.evaluations.tolist() == [1, 1, 1]


def test_an_order_is_an_exact_chain_rule(lm, tables):
    for order, positions in (
        ("left_to_right", (0, 1, 2, 3)),
        ("right_to_left", (3, 2, 1, 0)),
        ((2, 0, 3, 1), (2, 0, 3, 1)),
    ):
        with torch.no_grad():
            found = lm.evidence(whole(ROWS[:1], prompt=1), estimator=FixedOrder(order))
        assert float(found.likelihood.value) == pytest.approx(float(tables[0].in_order(positions)), abs=1e-12)
        assert found.likelihood.kind is Kind.EXACT
        assert float(found.likelihood.per_unit.sum()) == pytest.approx(float(found.likelihood.value))
        assert found.evaluations.tolist() == [4]
    texts = all_texts(4, 3)
    with torch.no_grad():
        values = lm.evidence(whole([[1, *t] for t in texts], prompt=1), estimator="right_to_left").likelihood.value
    assert float(values.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_score_entropy_is_the_time_form_draw_by_draw(lm):
    x = whole(ROWS, prompt=1)
    for schedule in (LogLinear(), LogLinear(1e-3), Geometric()):
        one, other = Times(3, schedule=schedule), ScoreEntropy(3, schedule=schedule)
        with torch.no_grad():
            for seed in range(5):
                points = [e.draw(np.random.default_rng(seed), 4) for e in (one, other)]
                assert (points[0].hidden == points[1].hidden).all()
                sums = [
                    float(lm.passes.sums(x.packed_left()[0], [np.arange(1, 5)], [0], [p], max_tokens=64)[0])
                    for p in points
                ]
                assert sums[0] == pytest.approx(sums[1], abs=1e-9)


def test_exact_conditionals_make_the_bound_the_likelihood():
    joint = random_joint(3, 4)
    lm = joint_lm(joint)
    texts = all_texts(3, 4)
    with torch.no_grad():
        found = lm.evidence(whole(texts), estimator="enumeration").likelihood.value
        orders = lm.evidence(whole(texts[:9]), estimator="order", num_samples=4).likelihood
    truth = torch.from_numpy(np.log(joint.reshape(-1)))
    assert torch.allclose(found, truth, atol=1e-10)
    assert torch.allclose(orders.value, truth[:9], atol=1e-10)  # every order gives it: no variance
    assert float(orders.stderr.max()) < 1e-10


def test_independent_tokens():
    table = np.array([0.2, 0.5, 0.3])
    lm = joint_lm(np.einsum("i,j,k->ijk", table, table, table))
    x = whole([[0, 1, 2], [1, 1, 1]])
    with torch.no_grad():
        found = lm.evidence(x, estimator="count", num_samples=50).likelihood
        exact = lm.evidence(x, estimator="enumeration").likelihood.value
    want = [math.log(0.2 * 0.5 * 0.3), 3 * math.log(0.5)]
    assert exact.tolist() == pytest.approx(want)
    assert float(found.stderr[1]) < 1e-12  # equally likely tokens: every draw is the same
    assert float(found.stderr[0]) > 0.01
    one = joint_lm(table)
    with torch.no_grad():
        assert float(one.log_prob(whole([[2]])).value) == pytest.approx(math.log(0.3))


@torch.no_grad()
def test_a_value_depends_neither_on_the_batch_nor_on_padding(lm):
    together = lm.log_prob(whole(ROWS, prompt=1))
    left = TokenBatch.from_lists(ROWS, starts=[1] * 3, padding_side="left", pad_id=3)
    for i, row in enumerate(ROWS):
        alone = lm.log_prob(whole([row], prompt=1))
        assert float(alone.value) == pytest.approx(float(together.value[i]), abs=1e-10)
        assert float(lm.log_prob(left).value[i]) == pytest.approx(float(alone.value), abs=1e-10)
    small = random_lm(max_batch_tokens=5)
    assert torch.allclose(small.log_prob(whole(ROWS, prompt=1)).value, together.value, atol=1e-10)
    contributions = lm.evidence(left).contributions
    assert torch.allclose(contributions.sum(1), together.value, atol=1e-10)
    assert bool((contributions[~left.scored_mask] == 0).all())


def test_draws_are_named_and_shared(lm):
    x = whole(ROWS, prompt=1)
    first, again = lm.log_prob(x, draws=DrawsKey.of("a")), lm.log_prob(x, draws=DrawsKey.of("a"))
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, lm.log_prob(x, draws=DrawsKey.of("b")).value)
    near = random_lm()
    with torch.no_grad():
        near.model.lm_head.weight.add_(0.01)
    with torch.no_grad():
        shared = lm.log_prob(x) - near.log_prob(x)
        apart = lm.log_prob(x) - near.log_prob(x, draws=DrawsKey.of("other"))
    assert shared.kind is Kind.SURROGATE
    assert bool((shared.stderr < 0.2 * apart.stderr).all())  # common random numbers


def test_rows_draw_numbers_of_their_own(lm):
    """So that their errors average out; equal rows draw equal numbers."""
    packed, _ = whole([[2, 0, 3, 1], [2, 0, 3, 2], [2, 0, 3, 1]], prompt=1).packed_left()
    first, other, equal = (stream.random(4).tolist() for stream in row_streams(DrawsKey.of("a"), packed))
    assert first == equal
    assert first != other
    (scored_later,) = row_streams(DrawsKey.of("a"), whole([[2, 0, 3, 1]], prompt=2).packed_left()[0])
    assert scored_later.random(4).tolist() != first


def test_a_budget_by_standard_error(lm, tables):
    x = whole(ROWS, prompt=1)
    with torch.no_grad():
        found = lm.evidence(x, num_samples=8, target_stderr=0.25)
        capped = lm.evidence(x, num_samples=8, target_stderr=1e-6, max_samples=40)
        plain = lm.evidence(x, num_samples=40)
    assert bool((found.likelihood.stderr <= 0.25).all())
    assert len(set(found.evaluations.tolist())) > 1  # rows stop when they may
    assert capped.evaluations.tolist() == [40, 40, 40]
    assert torch.allclose(capped.likelihood.value, plain.likelihood.value, atol=1e-12)  # more of the same draws
    want = torch.stack([t.elbo() for t in tables])
    assert bool(((found.likelihood.value - want).abs() < 5 * found.likelihood.stderr).all())


def test_terms_average_to_the_value(lm):
    x = whole(ROWS, prompt=1)
    terms = list(lm.terms(x, num_samples=5))
    assert len(terms) == 5
    whole_value = lm.evidence(x, num_samples=5).likelihood
    assert torch.allclose(torch.stack([t.value for t in terms]).mean(0), whole_value.value, atol=1e-12)
    assert torch.allclose(torch.stack([t.value for t in terms]), whole_value.samples, atol=1e-12)


def test_gradients_are_those_of_the_enumerated_bound():
    lm = random_lm()
    x = whole([[2, 0, 3, 1]], prompt=1)
    (table,) = SubsetTable.of(lm, x)
    weights = [p for p in lm.model.parameters() if p.requires_grad]
    want = torch.autograd.grad(table.elbo(), weights)
    got = torch.autograd.grad(lm.evidence(x, estimator="enumeration").likelihood.value.sum(), weights)
    for a, b in zip(want, got, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_the_mask_tokens_logit_is_out_of_it():
    lm = random_lm()
    x = whole(ROWS, prompt=1)
    before = lm.log_prob(x).value
    with torch.no_grad():
        lm.model.lm_head.weight[lm.mask_token_id] += 5.0
    assert torch.allclose(lm.log_prob(x).value, before, atol=1e-10)
    lm.log_prob(x).value.sum().backward()
    assert float(lm.model.lm_head.weight.grad[lm.mask_token_id].abs().max()) == 0.0
    log_probs = lm.masked_log_probs(x.ids, x.scored_mask & x.attention_mask, x.attention_mask)
    assert bool((log_probs[:, lm.mask_token_id] == -torch.inf).all())
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(len(log_probs), dtype=torch.float64))


def test_refusals(lm):
    x = whole(ROWS, prompt=1)
    with pytest.raises(InputError, match="estimator must be one of"):
        lm.evidence(x, estimator="elbo")
    with pytest.raises(InputError, match="no points to choose"):
        lm.evidence(x, estimator="one_step", points=3)
    with pytest.raises(InputError, match="name it"):
        lm.evidence(x, points=3)
    with pytest.raises(InputError, match="num_samples"):
        lm.evidence(x, num_samples=0)
    with pytest.raises(InputError, match="target_stderr"):
        lm.evidence(x, target_stderr=-1.0)
    with pytest.raises(InputError, match="come in pairs"):
        Bernoulli(3, "antithetic")
    with pytest.raises(InputError, match="each position from 0 once"):
        FixedOrder((0, 0))
    with pytest.raises(InputError, match="has 2 positions and a row has 4"):
        lm.evidence(x, estimator=FixedOrder((1, 0)))
    with pytest.raises(InputError, match="at most 16"):
        lm.evidence(whole([[0] * 18]), estimator="enumeration")
    with pytest.raises(InputError, match="masks must be"):
        Quadrature(masks="poisson")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a mask token"):
        MaskedDiffusionLM(SimpleNamespace(config=SimpleNamespace()))  # type: ignore[arg-type]
