"""Swaps of subjects and agreement of templates: enumeration, Jensen-Shannon by hand, planted kinds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.scenarios import Scenario
from loglik.signals.swaps import likelihood_scenarios, name_specificity, swap_dependence, template_consistency

RECALL, GUESS, SHORTCUT = Scenario.EXACT_RECALL, Scenario.GUESSWORK, Scenario.HEURISTICS


def labelled(values, kind=Kind.EXACT) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    return LogLikelihood(value, kind, Unit.TOKEN, torch.ones(len(value), dtype=torch.long))


# ------------------------------------------------------------------ swaps
def population(seed: int = 0, subjects: int = 6, answers: int = 4) -> torch.Tensor:
    """(S, A) log p(a | subject)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(subjects, answers, generator=g, dtype=torch.float64).mul(2).log_softmax(-1)


def test_dependence_over_the_population_is_mutual_information():
    """With every subject among the swaps, the mean of the second form under p(s, a) is I(S; A), and exp(-D) is 1."""
    table = population()
    s, a = table.shape
    own = labelled(table.reshape(-1))
    swapped = labelled(table.T.repeat(s, 1, 1).reshape(-1))  # for each (s, a) the column of a
    found = swap_dependence(own, swapped, average="probability").value.reshape(s, a)
    p, mixture = table.exp() / s, table.exp().mean(0)
    information = (p * (table - mixture.log())).sum()
    assert float((p * found).sum()) == pytest.approx(float(information), abs=1e-12)
    assert float((p * (-found).exp()).sum()) == pytest.approx(1.0, abs=1e-12)
    logs = swap_dependence(own, swapped).value.reshape(s, a)
    torch.testing.assert_close(logs, table - table.mean(0), atol=1e-12, rtol=0)
    assert bool((logs >= found - 1e-12).all())  # Jensen


def test_a_model_that_ignores_the_subject_depends_on_nothing():
    table = population(1, subjects=1).expand(5, -1)
    for average in ("log", "probability"):
        found = swap_dependence(labelled(table[:, 0]), labelled(table[:, 0].repeat(3)), average=average)
        torch.testing.assert_close(found.value, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
        assert found.kind is Kind.EXACT
    bound = labelled([-1.0], Kind.LOWER_BOUND)
    assert swap_dependence(bound, bound).kind is Kind.SURROGATE


def test_swaps_of_probability_zero_can_be_averaged_as_probabilities():
    own, swapped = labelled([-1.0]), labelled([-math.inf, math.log(0.5)])
    assert float(swap_dependence(own, swapped, average="probability").value) == pytest.approx(-1 - math.log(0.25))
    with pytest.raises(RowError, match=r"prediction 0: .*average probabilities"):
        swap_dependence(own, swapped)
    with pytest.raises(RowError, match="prediction 0"):
        swap_dependence(own, labelled([-math.inf]), average="probability")
    with pytest.raises(RowError, match="prediction 1: log p"):
        swap_dependence(labelled([-1.0, math.nan]), labelled([-1.0, -1.0]))


def test_swaps_must_pair():
    with pytest.raises(InputError, match="each of 2 predictions needs equally many swapped prompts, got 3"):
        swap_dependence(labelled([-1.0, -2.0]), labelled([-1.0] * 3))
    with pytest.raises(InputError, match="got 0 in all"):
        swap_dependence(labelled([-1.0]), labelled([]))
    with pytest.raises(InputError, match="average must be log or probability"):
        swap_dependence(labelled([-1.0]), labelled([-1.0]), average="mean")


def test_specificity_is_the_weakest_part_over_the_strongest():
    parts = torch.tensor([[4.0, 4.0], [1.0, 4.0], [-3.0, 2.0], [0.0, 0.0], [-1.0, -2.0], [2.0, 8.0]])
    torch.testing.assert_close(name_specificity(parts), torch.tensor([1.0, 0.25, 0.0, 0.0, 0.0, 0.25]))
    torch.testing.assert_close(name_specificity(parts.flip(1)), name_specificity(parts))
    three = torch.tensor([[2.0, 1.0, 4.0]])
    assert name_specificity(three).tolist() == [0.25]
    with pytest.raises(InputError, match="at least two parts"):
        name_specificity(torch.ones(3, 1))
    with pytest.raises(RowError, match="row 0: the dependence on part 1 is nan"):
        name_specificity(torch.tensor([[1.0, math.nan]]))


def test_likelihoods_alone_recover_the_planted_kinds():
    """p(a) from 0.2 or 0.95; dependence on both parts, on the surname alone, on none."""
    own = labelled(np.log([0.95, 0.95, 0.95, 0.2, 0.5]))
    parts = torch.tensor([[4.5, 4.1], [1.4, 4.0], [0.0, 0.0], [3.0, 3.0], [2.0, 4.0]])
    expected = (RECALL, SHORTCUT, SHORTCUT, GUESS, RECALL)
    assert likelihood_scenarios(own, parts) == expected
    assert likelihood_scenarios(own, parts, confident=0.1)[3] is RECALL
    assert likelihood_scenarios(own, parts, specific=0.2)[1] is RECALL
    with pytest.raises(InputError, match="there are 2 predictions and dependences of 5"):
        likelihood_scenarios(own[:2], parts)
    for options in ({"confident": 0.0}, {"specific": 1.0}):
        with pytest.raises(InputError, match="must lie between 0 and 1"):
            likelihood_scenarios(own, parts, **options)
    with pytest.raises(RowError, match="row 0: the log-likelihood is nan"):
        likelihood_scenarios(labelled([math.nan]), parts[:1])


# ------------------------------------------------------------------ templates
def test_identical_templates_agree():
    table = population(2).unsqueeze(1).expand(-1, 5, -1)
    found = template_consistency(table)
    assert found.agreement.tolist() == [1.0] * 6
    assert found.answer.equal(table[:, 0].argmax(-1))
    torch.testing.assert_close(found.divergence, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_divergence_is_that_of_jensen_and_shannon():
    table = population(3, subjects=8).reshape(2, 4, 4)
    p = table.exp()
    mixture = p.mean(1, keepdim=True)
    expected = (p * (table - mixture.log())).sum(-1).mean(1)  # mean divergence to the mixture
    torch.testing.assert_close(template_consistency(table).divergence, expected, atol=1e-12, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(template_consistency(table[:, order]).divergence, expected, atol=1e-12, rtol=0)


def test_opposed_templates_diverge_by_the_logarithm_of_their_number():
    table = torch.eye(3, dtype=torch.float64).log()[None]
    found = template_consistency(table)
    assert float(found.divergence) == pytest.approx(math.log(3))
    assert float(found.agreement) == pytest.approx(1 / 3)
    assert found.answer.tolist() == [0]
    two = torch.eye(3, dtype=torch.float64).log()[[0, 1, 1]][None]
    assert template_consistency(two).answer.tolist() == [1]
    assert float(template_consistency(two).agreement) == pytest.approx(2 / 3)


def test_templates_must_be_distributions():
    with pytest.raises(InputError, match=r"shape \(N, P, V\)"):
        template_consistency(torch.zeros(2, 3))
    with pytest.raises(InputError, match="fact 0 under template 0 do not sum to 1"):
        template_consistency(torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="do not sum to 1"):
        template_consistency(torch.full((1, 1, 2), math.nan))
