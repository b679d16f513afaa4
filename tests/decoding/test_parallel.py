"""Parallel decoding of masked diffusion: the rules, the budgets of the bound on rounds, exact sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from diffusion_beds import all_texts, empty_prompt, joint_lm, random_joint
from loglik import InputError
from loglik.decoding.parallel import (
    Choice,
    DynamicThreshold,
    ExploreThenExploit,
    MostConfident,
    RandomPositions,
    StaticThreshold,
    View,
    parallel_decode,
    rounds_lower_bound,
)
from loglik.models.diffusion import infilling


def view(confidence: list[float], block: list[int] | None = None) -> View:
    """Two-valued marginals with these confidences."""
    top = np.array(confidence)
    return View(np.array(block or [0] * len(top)), np.stack([top, 1 - top], 1), top)


def chosen(policy, seen) -> tuple[list[int], list[int]]:
    found = policy.choose(seen, np.random.default_rng(0))
    return np.flatnonzero(found.exploit).tolist(), np.flatnonzero(found.explore).tolist()


def brute_force(confidence: list[float], factor: float) -> int:
    """The largest k whose k most confident tokens satisfy the rule."""
    order = sorted(confidence, reverse=True)
    return max((k for k in range(1, len(order) + 1) if (1 + k) * (1 - order[k - 1]) <= factor), default=0)


def test_the_dynamic_rule():
    rng = np.random.default_rng(0)
    seen_sizes = set()
    for _ in range(300):
        confidence = (1 - 0.9 * rng.random(6) ** 2).tolist()
        factor = float(rng.choice([0.3, 0.9, 1.0]))
        k = brute_force(confidence, factor)
        seen_sizes.add(k)
        got = DynamicThreshold(factor).choose(view(confidence), rng)
        assert int(got.exploit.sum()) == max(k, 1)
        assert got.fallback == (k == 0)
        assert min(np.array(confidence)[got.exploit]) >= max(np.array(confidence)[~got.exploit], default=0)
    assert seen_sizes >= {0, 1, 2, 3, 4}


def test_the_other_rules():
    seen = view([0.95, 0.6, 0.91, 0.99], [0, 0, 1, 1])
    assert chosen(StaticThreshold(0.9), seen) == ([0], [])
    assert chosen(StaticThreshold(0.9, window=2), seen) == ([0, 2, 3], [])
    assert chosen(StaticThreshold(0.999), seen) == ([0], [])  # nothing reaches it: the best of the block
    assert chosen(MostConfident(1), seen) == ([0], [])
    assert chosen(MostConfident(3, window=2), seen) == ([0, 2, 3], [])
    exploit, explore = chosen(RandomPositions(2), seen)
    assert exploit == []
    assert sorted(explore) == [0, 1]


def test_exploration_takes_one_uncertain_token_of_each_idle_block():
    seen = view([0.999, 0.7, 0.5, 0.8, 0.6, 0.95, 0.55, 0.9999], [0, 0, 1, 1, 2, 2, 3, 4])
    policy = ExploreThenExploit(factor=0.01, explore=2)
    assert chosen(policy, seen) == ([0, 7], [2, 4])  # blocks 0 and 4 are served, 1 and 2 come first
    assert chosen(ExploreThenExploit(factor=0.01, explore=0), seen) == ([0, 7], [])
    assert chosen(ExploreThenExploit(factor=0.01, explore=9, window=2), seen) == ([0], [2])
    assert chosen(ExploreThenExploit(0.01, 9, "margin", least_entropy=0.68), seen) == ([0, 7], [2, 6])


def test_no_exploration_in_one_block_is_the_baseline():
    lm = joint_lm(random_joint(3, 4))
    runs = [
        parallel_decode(lm, empty_prompt(), policy, n=6, length=4, block_length=2, seed=3)
        for policy in (DynamicThreshold(0.9), ExploreThenExploit(0.9, explore=0, window=1))
    ]
    assert torch.equal(runs[0].tokens.ids, runs[1].tokens.ids)
    assert runs[0].rounds == runs[1].rounds


def test_one_random_token_a_round_draws_from_the_joint():
    joint = random_joint(3, 4, seed=1)
    lm = joint_lm(joint)
    n = 6000
    drawn = parallel_decode(lm, empty_prompt(), RandomPositions(1), n=n, length=4, seed=1)
    found = np.bincount(drawn.tokens.ids.numpy() @ np.array([27, 9, 3, 1]), minlength=81)
    assert chisquare(found, n * joint.reshape(-1)).pvalue > 1e-3
    likeliest = parallel_decode(lm, empty_prompt(), MostConfident(1), n=3, length=4, commit="argmax")
    assert len({tuple(row) for row in likeliest.tokens.ids.tolist()}) == 1  # argmax commits are no samples
    # -log p(x) is the sum over rounds where one token is committed at a time.
    nll = -np.log(joint.reshape(-1))[drawn.tokens.ids.numpy() @ np.array([27, 9, 3, 1])]
    assert np.allclose(drawn.nats.numpy(), nll, atol=1e-9)


def peaked_joint() -> np.ndarray:
    """Four tokens that follow a hidden one of three values, almost surely: confident after one is known."""
    joint = np.zeros((3,) * 4)
    for value in range(3):
        part = np.ones((3,) * 4)
        for position in range(4):
            table = np.full(3, 0.01)
            table[(value + position) % 3] = 0.98
            shape = [1] * 4
            shape[position] = 3
            part = part * table.reshape(shape)
        joint += part / 3
    return joint


def conditional(joint: np.ndarray, known: dict[int, int], new: dict[int, int]) -> float:
    """log p(new | known)."""

    def mass(values: dict[int, int]) -> float:
        return float(joint[tuple(values.get(i, slice(None)) for i in range(joint.ndim))].sum())

    return math.log(mass(known | new)) - math.log(mass(known))


def test_the_budgets_of_a_round_hold():
    joint = peaked_joint()
    lm = joint_lm(joint)
    factor = 0.9
    decoded = parallel_decode(lm, empty_prompt(), DynamicThreshold(factor), n=40, length=4, commit="sample", seed=2)
    covered = 0
    for rounds in decoded.rounds:
        assert sum(r.committed for r in rounds) == 4
        for r in rounds:
            if not r.within(factor):
                continue
            k, covered = r.committed, covered + 1
            assert r.nats <= k * math.log((k + 1) / (k + 1 - factor)) + 1e-9
            assert k * math.log((k + 1) / (k + 1 - factor)) <= factor + 1e-9
    assert covered > 20


def test_the_joint_budget_holds_for_the_true_joint():
    joint = peaked_joint()
    lm = joint_lm(joint)
    factor = 0.9
    texts = all_texts(3, 4)
    for text in texts[::7]:
        known: dict[int, int] = {}
        while len(known) < 4:
            ids = torch.tensor([[known.get(i, 3) for i in range(4)]])
            probs = lm.masked_log_probs(ids, ids == 3).exp().double()
            places = [i for i in range(4) if i not in known]
            own = {place: float(probs[j, text[place]]) for j, place in enumerate(places)}
            order = sorted(places, key=lambda place: -own[place])
            k = brute_force(list(own.values()), factor)
            new = {place: text[place] for place in order[: max(k, 1)]}
            if k:
                assert -conditional(joint, known, new) <= math.log((k + 1) / ((1 - factor) * k + 1)) + 1e-9
            known |= new


def test_the_bound_on_rounds():
    joint = peaked_joint()
    lm = joint_lm(joint)
    decoded = parallel_decode(lm, empty_prompt(), DynamicThreshold(0.9), n=5, length=4)
    for rounds in decoded.rounds:
        within = [r for r in rounds if r.within(0.9)]
        assert sum(r.nats for r in within) <= 0.9 * len(within) + 1e-9
    assert rounds_lower_bound(10.0, 64, 1.0) == pytest.approx(10.0)
    assert rounds_lower_bound(10.0, 64, 0.5, error=9.9) == pytest.approx(10.0 / math.log(65 / 33))
    for nll, error in ((math.nan, 0.0), (10.0, math.nan)):
        with pytest.raises(InputError, match="nll finite"):
            rounds_lower_bound(nll, 64, 0.5, error)


def test_certain_texts_take_one_round_and_uncertain_ones_one_each():
    joint = np.zeros((3, 3, 3))
    joint[1, 2, 0] = 1.0
    certain = parallel_decode(joint_lm(joint), empty_prompt(), DynamicThreshold(0.9), length=3)
    assert certain.evaluations.tolist() == [1]
    assert certain.tokens.ids.tolist() == [[1, 2, 0]]
    lm = joint_lm(random_joint(3, 4))
    strict = parallel_decode(lm, empty_prompt(), DynamicThreshold(1e-9), length=4)
    assert strict.evaluations.tolist() == [4]
    assert all(r.fallback for r in strict.rounds[0])


def test_rows_do_not_depend_on_the_batch():
    lm = joint_lm(random_joint(3, 4))
    together = parallel_decode(lm, empty_prompt(), RandomPositions(2), n=4, length=4, seed=9)
    alone = parallel_decode(lm, empty_prompt(), RandomPositions(2), n=1, length=4, seed=9)
    assert torch.equal(together.tokens.ids[:1], alone.tokens.ids)


def test_a_canvas_stays_as_it_is():
    lm = joint_lm(random_joint(3, 3))
    canvas = infilling(lm, [[3, 1, 3]])
    first, again = (parallel_decode(lm, canvas, RandomPositions(1), seed=4) for _ in range(2))
    assert first.evaluations.tolist() == again.evaluations.tolist() == [2]
    assert torch.equal(first.tokens.ids, again.tokens.ids)
    assert bool(canvas.hidden.any())


class Idle:
    """A policy that commits nothing."""

    def choose(self, view, rng):
        nothing = np.zeros(len(view.block), dtype=bool)
        return Choice(nothing, nothing, fallback=False)


def test_refusals():
    lm = joint_lm(random_joint(3, 2))
    with pytest.raises(InputError, match="Idle chose no token"):
        parallel_decode(lm, empty_prompt(), Idle(), length=2)
    for make, match in (
        (lambda: StaticThreshold(0.0), "threshold must lie"),
        (lambda: DynamicThreshold(1.1), "factor must lie"),
        (lambda: ExploreThenExploit(explore=-1), "explore must not be negative"),
        (lambda: ExploreThenExploit(uncertainty="variance"), "uncertainty must be"),  # type: ignore[arg-type]
        (lambda: MostConfident(0), "count must be at least 1"),
        (lambda: StaticThreshold(0.9, window=0), "window must be at least 1"),
        (lambda: parallel_decode(lm, empty_prompt(), MostConfident(), length=2, block_length=0), "block_length"),
        (lambda: parallel_decode(lm, empty_prompt(), MostConfident(), length=2, commit="beam"), "commit must be"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=match):
            make()
