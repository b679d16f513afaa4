"""Two-part codes against closed forms: Krichevsky-Trofimov regret, the chain rule of divergences, scaling laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize

from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.epiplexity import (
    Epiplexity,
    code_compute,
    epiplexity_frontier,
    prequential_code,
    requential_code,
    step_divergence,
)
from loglik.signals.scaling_law import ScalingLaw, epiplexity_from_scaling_law

LN2 = math.log(2)
CHINCHILLA = ScalingLaw(1.69, 5e7, 0.34, 2e9, 0.28)


def curve_of(losses, tokens=None, kind=Kind.EXACT) -> LogLikelihood:
    """Steps with these mean losses, nats per token."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    tokens = torch.ones(len(losses), dtype=torch.long) if tokens is None else torch.as_tensor(tokens)
    return LogLikelihood(-losses * tokens, kind, Unit.TOKEN, tokens)


def kt_losses(bits) -> np.ndarray:
    """-log of each bit under Krichevsky and Trofimov's predictor of the bits before it."""
    ones = np.concatenate([[0], np.cumsum(bits)[:-1]])
    seen = np.arange(len(bits))
    return -np.log((np.where(bits == 1, ones, seen - ones) + 0.5) / (seen + 1))


# ------------------------------------------------------------------ prequential
@pytest.mark.parametrize(("n", "expected"), [(100, 3.65), (1_000, 5.31), (10_000, 6.97)])
def test_structure_of_a_coin_is_the_regret_of_kt(n, expected):
    """Area above the plug-in loss: log2(n) / 2 + log2(pi / 2) / 2 bits, whatever the order of the bits."""
    r = np.random.default_rng(n)
    bits = r.permutation(np.repeat([0, 1], [n - 3 * n // 10, 3 * n // 10]))
    rate = bits.mean()
    plug_in = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    found = prequential_code(curve_of(kt_losses(bits)), final=curve_of([plug_in]))
    assert found.model.item() == pytest.approx(0.5 * math.log2(n) + 0.5 * math.log2(math.pi / 2), abs=0.02)
    assert found.model.item() == pytest.approx(expected, abs=0.02)
    assert found.stream.item() == pytest.approx(found.model.item() + n * plug_in / LN2, abs=1e-9)
    assert found.model.stderr is None
    assert (found.tokens, found.method) == (n, "prequential")


def test_code_is_its_formula_with_unequal_steps():
    losses, tokens = [3.0, 2.0, 1.5, 1.0, 1.2], [10, 20, 5, 8, 16]
    found = prequential_code(curve_of(losses, tokens), tail=0.4)
    last = (1.0 * 8 + 1.2 * 16) / 24
    area = sum(n * (x - last) for n, x in zip(tokens, losses, strict=True))
    assert found.model.item() == pytest.approx(area / LN2)
    assert found.stream.item() == pytest.approx(sum(n * x for n, x in zip(tokens, losses, strict=True)) / LN2)
    assert found.bits_per_token == pytest.approx(last / LN2)
    assert float(found.final.value) == pytest.approx(-last)
    assert found.tokens == 59
    # The error of a ratio of two rows, times all tokens.
    off = [8 * (1.0 - last), 16 * (1.2 - last)]
    error = math.sqrt(2 * (off[0] ** 2 + off[1] ** 2)) / 24
    assert float(found.model.stderr) == pytest.approx(error * 59 / LN2)


def test_constant_curves_have_no_structure_and_rising_ones_less():
    assert prequential_code(curve_of([0.7] * 50)).model.item() == pytest.approx(0, abs=1e-9)
    assert prequential_code(curve_of([0.5] * 40 + [0.9] * 10), tail=0.2).model.item() < 0


def test_fair_bits_beside_the_data_are_entropy_and_no_structure():
    r = np.random.default_rng(0)
    losses = 1 + 2 * np.exp(-np.arange(100) / 20) + r.normal(0, 0.01, 100)
    tokens = np.full(100, 12)
    plain = prequential_code(curve_of(losses, tokens))
    more = prequential_code(curve_of((12 * losses + 5 * LN2) / 17, tokens + 5))
    assert more.model.item() == pytest.approx(plain.model.item(), abs=1e-6)
    sequences = 1000
    entropies = [
        code.two_part(parameters=10, data_tokens=n * sequences).entropy for code, n in ((plain, 12), (more, 17))
    ]
    assert entropies[1] - entropies[0] == pytest.approx(5 * sequences, abs=1e-6)


def test_standard_error_is_that_of_repeated_runs():
    """2,000 curves with noise of 0.1 per step: the spread of the code is mostly that of the final loss."""
    r = np.random.default_rng(1)
    level = 1 + np.exp(-np.arange(400) / 10)
    found = [prequential_code(curve_of(level + r.normal(0, 0.1, 400), [8] * 400)) for _ in range(2000)]
    spread = np.std([f.model.item() for f in found])
    stated = np.sqrt(np.mean([float(f.model.stderr) ** 2 for f in found]))
    # The tail's noise is in the area as well, 1 of 20 steps: 5 % less.
    assert spread == pytest.approx(stated, rel=0.1)


def test_kinds_of_code_lengths():
    exact = prequential_code(curve_of([2.0, 1.0]))
    assert (exact.model.kind, exact.stream.kind, exact.final.kind) == (Kind.ESTIMATE, Kind.EXACT, Kind.EXACT)
    bound = prequential_code(curve_of([2.0, 1.0], kind=Kind.LOWER_BOUND))
    assert (bound.model.kind, bound.stream.kind) == (Kind.SURROGATE, Kind.UPPER_BOUND)


def test_power_law_has_the_area_of_its_closed_form():
    """Steps of one token along (D / D0)^-beta: their sum against the integral, to the discretisation."""
    law = ScalingLaw(0.5, 1.0, 0.3, 1000.0, 0.4)
    steps = np.arange(1, 200_001)
    losses = law.floor + (steps / law.tokens) ** -law.beta
    found = prequential_code(curve_of(losses), final=curve_of([losses[-1]]))
    # Euler-Maclaurin: the sum to n of t^-beta is the integral, plus zeta(beta), plus half the last term.
    zeta = -1.1347977838669822
    shift = (zeta + 0.5 * 200_000**-law.beta) * law.tokens**law.beta / LN2
    assert found.model.item() == pytest.approx(law.structure(200_000) + shift, rel=1e-6)
    area, _ = integrate.quad(lambda d: d**-law.beta - 200_000**-law.beta, 0, 200_000)
    assert law.structure(200_000) == pytest.approx(area * law.tokens**law.beta / LN2, rel=1e-6)


# ------------------------------------------------------------------ requential
@pytest.mark.parametrize("n", [1, 5, 10])
def test_fixed_teacher_and_bayesian_student_obey_the_chain_rule(n):
    """Sum of expected step divergences = KL(teacher^n || Laplace mixture), over all strings of n bits."""
    p = 0.8
    teacher = torch.tensor([1 - p, p], dtype=torch.float64).log()
    steps = torch.zeros(n, dtype=torch.float64)
    whole = 0.0
    for string in itertools.product((0, 1), repeat=n):
        chance = math.prod(p if b else 1 - p for b in string)
        log_q = 0.0
        for i, bit in enumerate(string):
            one = (sum(string[:i]) + 1) / (i + 2)
            student = torch.tensor([1 - one, one], dtype=torch.float64).log()
            steps[i] += chance * step_divergence(teacher, student)
            log_q += math.log(one if bit else 1 - one)
        whole += chance * (math.log(chance) - log_q)
    found = requential_code(steps, torch.ones(n), curve_of([0.5]))
    assert found.model.item() == pytest.approx(whole / LN2, abs=1e-10)


def test_divergence_of_a_step_is_the_sum_over_its_positions():
    g = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 4, 7, generator=g, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=g) < 0.6
    p, q = teacher.softmax(-1), student.softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1)
    assert float(step_divergence(teacher, student)) == pytest.approx(float(each.sum()), abs=1e-12)
    assert float(step_divergence(teacher, student, mask)) == pytest.approx(float(each[mask].sum()), abs=1e-12)
    assert float(step_divergence(teacher + 3, student - 1)) == pytest.approx(float(each.sum()), abs=1e-12)
    peer = torch.nn.functional.kl_div(q.log(), p.log(), reduction="sum", log_target=True)
    assert float(step_divergence(teacher, student)) == pytest.approx(float(peer), abs=1e-12)
    assert float(step_divergence(teacher.bfloat16(), student.bfloat16())) == pytest.approx(float(each.sum()), rel=0.05)
    assert float(step_divergence(teacher.float(), teacher.float())) == 0.0


def test_impossible_tokens_of_the_teacher_cost_nothing():
    teacher = torch.tensor([0.0, -math.inf, 0.0])
    student = torch.tensor([0.0, 5.0, 1.0])
    q = student.softmax(-1)
    assert float(step_divergence(teacher, student)) == pytest.approx(float(-LN2 - 0.5 * (q[0].log() + q[2].log())))
    with pytest.raises(InputError, match=r"divergence at position \[\] is inf"):
        step_divergence(student, teacher)


def test_equal_teacher_and_student_have_no_structure():
    found = requential_code(torch.zeros(5), torch.full((5,), 7), curve_of([1.3, 1.5]))
    assert found.model.item() == 0.0
    assert (found.tokens, found.stream, found.method) == (35, None, "requential")
    assert found.bits_per_token == pytest.approx(1.4 / LN2)


def test_overhead_makes_a_bound():
    nats = torch.tensor([3.0, 0.5])
    plain = requential_code(nats, torch.ones(2), curve_of([1.0]))
    coded = requential_code(nats, torch.ones(2), curve_of([1.0]), overhead=True, constant=4.0)
    bits = nats.numpy() / LN2
    assert plain.model.item() == pytest.approx(bits.sum())
    assert coded.model.item() == pytest.approx(bits.sum() + np.log2(1 + bits).sum() + 8)
    assert (plain.model.kind, coded.model.kind) == (Kind.ESTIMATE, Kind.UPPER_BOUND)


# ------------------------------------------------------------------ frontier
def test_compute_and_both_parts():
    code = prequential_code(curve_of([2.0, 1.0], [100, 100]), tail=0.5)
    found = code.two_part(parameters=7, data_tokens=1000)
    assert found.compute == code_compute(7, 200, 1000) == 6 * 7 * 200 + 2 * 7 * 1000
    assert found.structure == pytest.approx(100 / LN2)
    assert found.entropy == pytest.approx(1000 / LN2)
    assert found.total == found.structure + found.entropy


def test_frontier_is_the_falling_part_of_the_hull():
    """Against every line that supports the points from below with a negative slope."""
    for seed in range(20):
        r = np.random.default_rng(seed)
        x, y = r.uniform(1, 10, 40), r.uniform(1, 10, 40)
        points = [Epiplexity(0.3 * b, 0.7 * b, a, 1.0, 1.0) for a, b in zip(x, y, strict=True)]
        found = epiplexity_frontier(points)
        slopes = np.tan(np.linspace(1e-6, math.pi / 2 - 1e-6, 20_001))
        touched = {int(np.argmin(y + s * x)) for s in slopes}
        assert {(p.compute, p.total) for p in found} >= {(points[i].compute, points[i].total) for i in touched}
        computes, totals = [p.compute for p in found], [p.total for p in found]
        assert computes == sorted(computes)
        assert totals == sorted(totals, reverse=True)
        assert totals[-1] == pytest.approx(y.min())
        assert computes[0] == x.min()
        bends = np.diff(totals) / np.diff(computes)
        assert (np.diff(bends) > 0).all()  # convex


def test_frontier_of_few_points():
    one, dear = Epiplexity(1, 1, 1, 1, 1), Epiplexity(2, 2, 5, 1, 1)
    assert epiplexity_frontier([one]) == (one,)
    assert epiplexity_frontier([dear, one, one]) == (one,)
    line = [Epiplexity(10 - i, 0, 1 + i, 1, 1) for i in range(4)]
    assert epiplexity_frontier(line) == (line[0], line[3])


# ------------------------------------------------------------------ scaling laws
@pytest.mark.parametrize("compute", [1e17, 1e20, 1e23])
@pytest.mark.parametrize("data", [1e9, 5e12])
def test_best_model_of_a_budget_is_that_of_a_search(compute, data):
    def total(log_tokens):
        d = math.exp(log_tokens)
        n = compute / (2 * (3 * d + data))
        return CHINCHILLA.structure(d) + data * CHINCHILLA.loss(n, d) / LN2

    grid = np.linspace(math.log(1e3), math.log(data), 20_001)
    start = grid[np.argmin([total(g) for g in grid])]
    best = optimize.minimize_scalar(
        total, bounds=(start - 0.01, start + 0.01), method="bounded", options={"xatol": 1e-9}
    )
    found = epiplexity_from_scaling_law(CHINCHILLA, data_tokens=data, compute=compute)
    assert found.total == pytest.approx(best.fun, rel=1e-9)
    assert found.total <= best.fun * (1 + 1e-12)
    assert math.log(found.tokens) == pytest.approx(best.x, abs=1e-3)
    assert code_compute(found.parameters, found.tokens, data) == pytest.approx(compute, rel=1e-9)
    assert found.structure == pytest.approx(CHINCHILLA.structure(found.tokens))


def test_more_compute_costs_no_bits_and_ends_in_the_limit():
    data = 1e12
    budgets = np.geomspace(1e15, 1e40, 60)
    found = [epiplexity_from_scaling_law(CHINCHILLA, data_tokens=data, compute=float(c)) for c in budgets]
    assert (np.diff([f.total for f in found]) < 0).all()
    assert (np.diff([f.structure for f in found]) > 0).all()
    limit = epiplexity_from_scaling_law(CHINCHILLA, data_tokens=data)
    power = CHINCHILLA.tokens**0.28 * data**0.72 / LN2
    assert limit.structure == pytest.approx(0.28 / 0.72 * power)
    assert limit.entropy == pytest.approx(1.69 * data / LN2 + power)
    assert limit.tokens == data
    assert found[-1].structure == pytest.approx(limit.structure, rel=1e-2)
    assert found[-1].entropy == pytest.approx(limit.entropy, rel=1e-2)


# ------------------------------------------------------------------ refusals
def test_codes_refuse_what_is_no_code():
    good = curve_of([1.0, 2.0])
    for tail in (0.0, 1.5, math.nan):
        with pytest.raises(InputError, match="tail must be a share"):
            prequential_code(good, tail=tail)
    with pytest.raises(InputError, match="there are no steps"):
        prequential_code(curve_of([]))
    with pytest.raises(RowError, match="step 1: the log-likelihood is nan"):
        prequential_code(curve_of([1.0, math.nan]))
    with pytest.raises(RowError, match="step 1: has no scored token"):
        prequential_code(curve_of([1.0, 0.0], [3, 0]))
    with pytest.raises(RowError, match="row 0: the log-likelihood is -inf"):
        prequential_code(good, final=curve_of([math.inf]))
    energy = LogLikelihood(good.value, Kind.UNNORMALIZED, Unit.TOKEN, good.num_units, constant=ConstantKey.of("z"))
    with pytest.raises(InputError, match="normalised"):
        prequential_code(energy)
    for divergences, tokens, message in (
        (torch.tensor([1.0, -0.1]), torch.ones(2), "divergence of step 1 is -0.1"),
        (torch.tensor([math.nan]), torch.ones(1), "divergence of step 0 is nan"),
        (torch.tensor([1.0]), torch.zeros(1), "number of tokens of step 0 is 0: it must be positive"),
        (torch.ones(2), torch.ones(3), r"must have shape \(S,\)"),
        (torch.ones(0), torch.ones(0), "a step at least"),
    ):
        with pytest.raises(InputError, match=message):
            requential_code(divergences, tokens, good)
    with pytest.raises(InputError, match="constant must be at least 0 bits"):
        requential_code(torch.ones(1), torch.ones(1), good, constant=-1.0)
    with pytest.raises(InputError, match="same positions"):
        step_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="mask must be bool"):
        step_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(InputError, match="position"):
        step_divergence(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2))


def test_frontier_and_laws_refuse_what_is_out_of_range():
    with pytest.raises(InputError, match="there are no points"):
        epiplexity_frontier([])
    limit = epiplexity_from_scaling_law(CHINCHILLA, data_tokens=1e9)
    with pytest.raises(InputError, match=r"point 0 has .* bits at compute inf"):
        epiplexity_frontier([limit])
    with pytest.raises(InputError, match="beta must be below 1"):
        ScalingLaw(1.0, 1.0, 0.3, 1.0, 1.0)
    with pytest.raises(InputError, match="floor at least 0"):
        ScalingLaw(-1.0, 1.0, 0.3, 1.0, 0.5)
    with pytest.raises(InputError, match="alpha must be positive"):
        ScalingLaw(1.0, 1.0, 0.0, 1.0, 0.5)
    with pytest.raises(InputError, match="data_tokens must be positive"):
        epiplexity_from_scaling_law(CHINCHILLA, data_tokens=0)
    with pytest.raises(InputError, match="compute must be positive"):
        epiplexity_from_scaling_law(CHINCHILLA, data_tokens=1e9, compute=-1)
    with pytest.raises(InputError, match="trains no model"):
        epiplexity_from_scaling_law(ScalingLaw(1.0, 1e12, 3.0, 1e-9, 0.1), data_tokens=1e3, compute=1e-3)
    with pytest.raises(InputError, match="parameters must be positive"):
        code_compute(0, 1, 1)
