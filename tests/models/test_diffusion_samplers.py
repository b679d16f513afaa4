"""Samplers of masked diffusion against exact distributions; chi-square at level 1e-3 with fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from diffusion_beds import all_texts, empty_prompt, joint_lm, random_joint, random_lm, whole
from loglik import InputError
from loglik.models.diffusion import Geometric, LogLinear, SubsetTable, ancestral, first_hitting, in_order, infilling
from loglik.models.diffusion.sampling import expected_evaluations

LEVEL = 1e-3
TEXTS = all_texts(3, 3)


@pytest.fixture(scope="module")
def lm():
    return random_lm(3, scale=1.0)


def law(lm, estimator=None):
    """Probabilities of all texts after the prompt [1]."""
    rows = whole([[1, *text] for text in TEXTS], prompt=1)
    with torch.no_grad():
        if estimator is None:
            return SubsetTable.likelihoods(SubsetTable.of(lm, rows)).value.exp().numpy()
        return lm.evidence(rows, estimator=estimator).likelihood.value.exp().numpy()


def counts(tokens, length=3):
    texts = tokens.ids[:, -length:].numpy()
    return np.bincount(texts @ (3 ** np.arange(length)[::-1]), minlength=3**length)


def test_first_hitting_draws_from_the_mixture_over_orders(lm):
    n = 6000
    drawn = first_hitting(lm, whole([[1]], prompt=1), n=n, length=3, generator=torch.Generator().manual_seed(0))
    assert drawn.evaluations.tolist() == [3] * n
    assert chisquare(counts(drawn.tokens), n * law(lm)).pvalue > LEVEL
    assert chisquare(counts(drawn.tokens), n * law(lm, "left_to_right")).pvalue < LEVEL  # the test can tell


def test_the_models_own_sampler_is_that_one(lm):
    one = lm.sample(5, prompt=whole([[1]], prompt=1), generator=torch.Generator().manual_seed(3), max_tokens=3)
    same = first_hitting(lm, whole([[1]], prompt=1), n=5, length=3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one.ids, same.tokens.ids)
    assert one.scored_mask.sum(1).tolist() == [3] * 5


@pytest.mark.parametrize("order", ["left_to_right", "right_to_left"])
def test_an_order_draws_from_its_chain_rule(lm, order):
    n = 6000
    drawn = in_order(lm, whole([[1]], prompt=1), n=n, length=3, order=order, generator=torch.Generator().manual_seed(1))
    assert chisquare(counts(drawn.tokens), n * law(lm, order)).pvalue > LEVEL


def one_step_law(lm):
    """All tokens drawn from their own marginals."""
    rows = whole([[1, *text] for text in TEXTS], prompt=1)
    with torch.no_grad():
        return lm.evidence(rows, estimator="one_step").likelihood.value.exp().numpy()


@pytest.mark.parametrize("method", ["tweedie", "euler"])
def test_many_steps_approach_the_mixture_and_one_step_is_the_mean_field(lm, method):
    n = 5000
    fine = ancestral(
        lm, whole([[1]], prompt=1), n=n, length=3, steps=300, method=method, generator=torch.Generator().manual_seed(2)
    )
    assert chisquare(counts(fine.tokens), n * law(lm)).pvalue > LEVEL
    coarse = ancestral(
        lm, whole([[1]], prompt=1), n=n, length=3, steps=1, method=method, generator=torch.Generator().manual_seed(2)
    )
    assert chisquare(counts(coarse.tokens), n * one_step_law(lm)).pvalue > LEVEL
    assert chisquare(counts(coarse.tokens), n * law(lm)).pvalue < LEVEL


def two_step_law(lm):
    """Two log-linear steps: each token appears in the first with probability one half."""
    with torch.no_grad():
        tables = SubsetTable.of(lm, whole([[1, *text] for text in TEXTS], prompt=1))
    out = []
    for table in tables:
        log_c = table.log_c.numpy()
        total = 0.0
        for first in range(8):
            here = [i for i in range(3) if first >> i & 1]
            rest = 7 & ~first
            later = [i for i in range(3) if rest >> i & 1]
            total += 0.125 * np.exp(log_c[7, here].sum() + log_c[rest, later].sum())
        out.append(total)
    return np.array(out)


def test_two_steps_have_their_own_enumerable_law(lm):
    n = 6000
    drawn = ancestral(lm, whole([[1]], prompt=1), n=n, length=3, steps=2, generator=torch.Generator().manual_seed(5))
    want = two_step_law(lm)
    assert want.sum() == pytest.approx(1.0)
    assert chisquare(counts(drawn.tokens), n * want).pvalue > LEVEL


def test_the_cache_changes_the_cost_and_nothing_else():
    lm = joint_lm(random_joint(3, 4))
    runs = [
        ancestral(
            lm, empty_prompt(), n=200, length=4, steps=12, cache=cache, generator=torch.Generator().manual_seed(4)
        )
        for cache in (True, False)
    ]
    assert torch.equal(runs[0].tokens.ids, runs[1].tokens.ids)
    assert bool((runs[0].evaluations <= runs[1].evaluations).all())
    assert float(runs[0].evaluations.float().mean()) < 0.6 * float(runs[1].evaluations.float().mean())


def test_expected_evaluations():
    lm = joint_lm(random_joint(2, 4))
    drawn = ancestral(lm, empty_prompt(), n=4000, length=4, steps=6, generator=torch.Generator().manual_seed(6))
    found = drawn.evaluations.double()
    error = float(found.std() / len(found) ** 0.5)
    assert float(found.mean()) == pytest.approx(expected_evaluations(4, 6), abs=4 * error)
    assert expected_evaluations(16, 16) == pytest.approx(10.30, abs=0.005)
    assert expected_evaluations(7, 1) == 1.0


@pytest.mark.parametrize("schedule", [LogLinear(1e-3), Geometric()])
def test_other_schedules_fill_every_gap(lm, schedule):
    drawn = ancestral(lm, whole([[1]], prompt=1), n=20, length=5, steps=7, schedule=schedule)
    assert bool((drawn.tokens.ids[drawn.tokens.attention_mask] < lm.mask_token_id).all())


def test_infilling_keeps_what_is_there(lm):
    gap = lm.mask_token_id
    rows = [[gap, 1, gap, 2], [0, gap, 1]]
    canvas = infilling(lm, rows)
    drawn = first_hitting(lm, canvas, generator=torch.Generator().manual_seed(0)).tokens
    assert drawn.ids[0, [1, 3]].tolist() == [1, 2]
    assert drawn.ids[1, [0, 2]].tolist() == [0, 1]
    assert drawn.scored_mask.sum(1).tolist() == [2, 1]
    assert bool((drawn.ids[drawn.scored_mask] < gap).all())
    with pytest.raises(InputError, match="row 1 has no gap"):
        infilling(lm, [[gap], [1, 2]])


def test_infilling_draws_from_the_conditional():
    joint = random_joint(3, 3, seed=2)
    lm = joint_lm(joint)
    gap = lm.mask_token_id
    n = 4000
    drawn = first_hitting(lm, infilling(lm, [[gap, 1, gap]] * n), generator=torch.Generator().manual_seed(8)).tokens.ids
    want = joint[:, 1, :] / joint[:, 1, :].sum()
    assert (
        chisquare(np.bincount((drawn[:, 0] * 3 + drawn[:, 2]).numpy(), minlength=9), n * want.reshape(-1)).pvalue
        > LEVEL
    )


def test_prompts_of_different_lengths_stay(lm):
    prompts = whole([[1, 2], [0]], prompt=0)
    drawn = ancestral(lm, prompts, n=2, length=3, steps=3).tokens
    rows = [ids[real].tolist() for ids, real in zip(drawn.ids, drawn.attention_mask, strict=True)]
    assert [row[:-3] for row in rows] == [[1, 2], [1, 2], [0], [0]]


def test_refusals(lm):
    prompt = whole([[1]], prompt=1)
    with pytest.raises(InputError, match="length must be at least 1"):
        first_hitting(lm, prompt, length=0)
    with pytest.raises(InputError, match="steps must be at least 1"):
        ancestral(lm, prompt, steps=0)
    with pytest.raises(InputError, match="method must be"):
        ancestral(lm, prompt, method="ddim")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="order must be"):
        in_order(lm, prompt, order="random")  # type: ignore[arg-type]
