"""LAME against grids and optimisers on tiny problems, its fixed points, and what its steps never do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.neighbors import NearestNeighbors

from loglik.errors import InputError
from loglik.signals.adaptation import knn_affinity, lame, lame_objective, linear_affinity, rbf_affinity


def batch(seed: int, n: int = 30, k: int = 4, d: int = 3):
    """Log-probabilities and features that know a little of the same labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=g)
    centres = torch.randn(k, d, generator=g, dtype=torch.float64) * 2
    features = centres[labels] + torch.randn(n, d, generator=g, dtype=torch.float64)
    logits = torch.randn(n, k, generator=g, dtype=torch.float64)
    logits[torch.arange(n), labels] += 1
    return logits.log_softmax(1), features


def symmetric(seed: int, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, n, generator=g, dtype=torch.float64)
    return (w + w.T) / 2


# ------------------------------------------------------------------ ground truth
@pytest.mark.parametrize("seed", range(3))
def test_two_rows_and_two_classes_reach_the_minimum_of_the_grid(seed):
    q, _ = batch(seed, n=2, k=2)
    w = torch.tensor([[0.3, 0.5], [0.5, 0.2]], dtype=torch.float64)  # norm 0.75 < 1: one minimum
    found = lame(q, affinity=w)
    p = torch.arange(1, 2000, dtype=torch.float64) / 2000
    z = torch.stack([1 - p, p], 1)
    divergence = (z[None] * (z.log()[None] - q[:, None])).sum(2)  # (2, G)
    own = torch.diagonal(w)[:, None] * (z**2).sum(1)
    grid = (divergence - own / 2)[0][:, None] + (divergence - own / 2)[1] - w[0, 1] * (z @ z.T)
    assert found.objective[-1] <= float(grid.min()) + 1e-12
    assert found.objective[-1] == pytest.approx(float(grid.min()), abs=1e-5)
    a, b = divmod(int(grid.argmin()), len(p))
    np.testing.assert_allclose(found.log_probs.exp()[:, 1], [p[a], p[b]], atol=1 / 2000)


def test_three_rows_reach_the_minimum_of_the_grid():
    q, features = batch(4, n=3, k=2)
    w = rbf_affinity(features) / 3.5  # norm below 1
    found = lame(q, features, affinity=w)
    p = torch.arange(1, 120, dtype=torch.float64) / 120
    z = torch.stack([1 - p, p], 1)
    own = (z[None] * (z.log()[None] - q[:, None])).sum(2) - torch.diagonal(w)[:, None] * (z**2).sum(1) / 2
    agree = z @ z.T
    grid = own[0][:, None, None] + own[1][None, :, None] + own[2][None, None, :]
    grid = grid - w[0, 1] * agree[:, :, None] - w[0, 2] * agree[:, None, :] - w[1, 2] * agree[None]
    assert found.objective[-1] <= float(grid.min()) + 1e-12
    place = np.unravel_index(int(grid.argmin()), grid.shape)
    np.testing.assert_allclose(found.log_probs.exp()[:, 1], p[list(place)], atol=1 / 120)


def test_three_classes_reach_the_minimum_of_an_optimiser():
    q, features = batch(5, n=4, k=3)
    w = linear_affinity(features) / 5
    found = lame(q, affinity=w)

    def objective(x):
        z = torch.from_numpy(x).reshape(4, 3).log_softmax(1)
        return lame_objective(z, q, w)

    starts = np.random.default_rng(0).normal(size=(3, 12)) * 2
    best = min(minimize(objective, start, method="BFGS").fun for start in starts)
    assert found.objective[-1] == pytest.approx(best, abs=1e-8)


def test_objective_by_hand():
    q = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64))
    z = torch.tensor([[0.9, 0.1], [0.4, 0.6]], dtype=torch.float64)
    w = torch.tensor([[1.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    divergence = 0.9 * math.log(1.8) + 0.1 * math.log(0.2) + 0.4 * math.log(1.6) + 0.6 * math.log(0.8)
    pairs = 1.0 * (0.81 + 0.01) + 2 * 2.0 * (0.36 + 0.06)
    assert lame_objective(z.log(), q, w, lam=0.5) == pytest.approx(divergence - 0.25 * pairs, abs=1e-12)


# ------------------------------------------------------------------ what steps never do
@pytest.mark.parametrize("affinity", ["rbf", "linear"])
@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_objective_never_rises_for_definite_affinities(seed, lam, affinity):
    found = lame(*batch(seed), affinity=affinity, lam=lam)
    assert len(found.objective) == found.steps + 1
    scale = 1 + max(map(abs, found.objective))
    assert max(np.diff(found.objective)) <= 1e-12 * scale
    assert found.objective[-1] < found.objective[0]


@pytest.mark.parametrize("seed", range(5))
def test_energy_never_rises_for_any_symmetric_affinity(seed):
    q, features = batch(seed)
    for weights in (symmetric(seed, len(q)), (knn_affinity(features) + knn_affinity(features).T) / 2):
        found = lame(q, affinity=weights, max_steps=300)
        assert max(np.diff(found.energy), default=0.0) <= 1e-11 * (1 + max(map(abs, found.energy)))
        if found.converged:
            assert found.energy[-1] == pytest.approx(found.objective[-1], abs=1e-6)


def test_rows_that_repel_each_other_end_in_a_cycle_of_two():
    """Parallel steps flip both rows for ever; F goes up and down, G does not, and the result says so."""
    q = torch.log(torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64))
    w = torch.tensor([[0.0, -8.0], [-8.0, 0.0]], dtype=torch.float64)
    even, odd = lame(q, affinity=w, max_steps=60), lame(q, affinity=w, max_steps=61)
    assert not even.converged
    assert float((even.log_probs.exp() - odd.log_probs.exp()).abs().max()) > 0.5
    assert max(np.diff(even.energy)) <= 1e-12
    assert max(np.diff(even.objective)) > 0.1


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
def test_fixed_point_is_stationary(affinity):
    q, features = batch(7)
    found = lame(q, features, affinity=affinity, max_steps=2000, tolerance=1e-12)
    assert found.converged
    made = {"knn": knn_affinity, "rbf": rbf_affinity, "linear": linear_affinity}[affinity](features)
    w = (made + made.T) / 2
    z = found.log_probs.exp()
    np.testing.assert_allclose((q + w @ z).softmax(1), z, atol=1e-9)
    # The gradient of F along the simplex vanishes: log z - log q + 1 - W z is the same for all classes of a row.
    slope = found.log_probs - q - w @ z
    assert float((slope - slope.mean(1, keepdim=True)).abs().max()) < 1e-6
    assert found.objective[-1] == pytest.approx(lame_objective(found.log_probs, q, w), abs=1e-9)


# ------------------------------------------------------------------ limits and invariances
def test_no_neighbours_change_nothing():
    q, features = batch(8)
    for found in (
        lame(q, affinity=torch.zeros(len(q), len(q))),
        lame(q, features, lam=0.0),
        lame(q[:1], features[:1]),  # one row has no neighbours
    ):
        assert found.steps == 1
        assert found.converged
        torch.testing.assert_close(found.log_probs, q[: len(found.log_probs)], atol=1e-12, rtol=0)


def test_own_weight_sharpens_and_keeps_the_class():
    q, _ = batch(9)
    found = lame(q, affinity=5 * torch.eye(len(q)))
    assert bool((found.log_probs.argmax(1) == q.argmax(1)).all())
    assert bool((found.log_probs.amax(1) >= q.amax(1)).all())


def test_full_weight_pulls_all_rows_to_one_label():
    q, _ = batch(10)
    found = lame(q, affinity=50 * torch.ones(len(q), len(q)))
    assert len(found.log_probs.argmax(1).unique()) == 1


def test_little_weight_moves_little():
    q, features = batch(11)
    w = rbf_affinity(features)
    moved = [float((lame(q, affinity=c * w).log_probs.exp() - q.exp()).abs().max()) for c in (1e-3, 1e-4, 1e-5)]
    assert moved[0] < 0.02
    np.testing.assert_allclose(np.divide(moved[:-1], moved[1:]), 10, rtol=0.1)


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
def test_order_of_rows_and_classes_changes_nothing(affinity):
    q, features = batch(12)
    found = lame(q, features, affinity=affinity).log_probs
    rows = torch.randperm(len(q), generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(lame(q[rows], features[rows], affinity=affinity).log_probs, found[rows])
    torch.testing.assert_close(lame(q[:, columns], features, affinity=affinity).log_probs, found[:, columns])
    torch.testing.assert_close(lame(q, 7 * features, affinity=affinity).log_probs, found)


def test_impossible_classes_stay_impossible():
    q = torch.log(torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.3, 0.7]], dtype=torch.float64))
    found = lame(q, affinity=2 * torch.ones(2, 2))
    assert bool(((found.log_probs == -torch.inf) == (q == -torch.inf)).all())
    assert all(map(math.isfinite, [*found.objective, *found.energy]))
    assert lame_objective(torch.log(torch.full((2, 3), 1 / 3)), q, torch.eye(2)) == math.inf


def test_half_precision_and_arrays():
    q, features = batch(13)
    found = lame(q, features).log_probs
    torch.testing.assert_close(lame(q.numpy(), features.numpy()).log_probs, found)
    rough = lame(q.bfloat16().float().log_softmax(1), features.float())
    torch.testing.assert_close(rough.log_probs.exp(), found.exp(), atol=0.05, rtol=0)


def test_it_helps_on_a_sorted_stream_and_not_by_chance():
    """Blobs with labels in order: a frozen classifier that is right in 60 % gets better with its neighbours."""
    g = torch.Generator().manual_seed(14)
    labels = torch.arange(4).repeat_interleave(16)
    features = (
        torch.eye(8, dtype=torch.float64)[labels] * 3 + torch.randn(64, 8, generator=g, dtype=torch.float64) * 0.5
    )
    logits = torch.randn(64, 4, generator=g, dtype=torch.float64) * 1.2
    logits[torch.arange(64), labels] += 1.5
    q = logits.log_softmax(1)
    before = float((q.argmax(1) == labels).double().mean())
    after = {
        name: float((lame(q, f).log_probs.argmax(1) == labels).double().mean())
        for name, f in (("own", features), ("shuffled", features[torch.randperm(64, generator=g)]))
    }
    assert after["own"] >= before + 0.1
    assert after["shuffled"] < after["own"] - 0.1


# ------------------------------------------------------------------ affinities
@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_are_those_of_scikit_learn(k):
    _, features = batch(15)
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    expected = NearestNeighbors(n_neighbors=k).fit(unit).kneighbors_graph().toarray()  # without the row itself
    np.testing.assert_array_equal(knn_affinity(features, k).numpy(), expected)


def test_duplicates_are_neighbours_and_a_row_is_never_its_own():
    features = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    w = knn_affinity(features, 2)
    assert w[:3, :3].tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert float(w.diagonal().sum()) == 0.0
    assert knn_affinity(features, 10).sum(1).tolist() == [3.0] * 4  # as many as there are


def test_rbf_width_counts_the_row_itself():
    _, features = batch(16, n=6)
    unit = features / features.norm(dim=1, keepdim=True)
    distances = (unit[:, None] - unit[None]).norm(dim=2)
    width = distances.sort(1).values[:, 2].mean()
    torch.testing.assert_close(rbf_affinity(features, 3), torch.exp(-(distances**2) / (2 * width**2)))
    torch.testing.assert_close(rbf_affinity(features, 99), rbf_affinity(features, 6))
    assert float(torch.linalg.eigvalsh(rbf_affinity(features)).min()) > -1e-12
    same = rbf_affinity(torch.ones(3, 2))
    assert same.tolist() == [[1.0] * 3] * 3


def test_linear_is_the_cosine():
    w = linear_affinity([[3.0, 4.0], [4.0, -3.0], [-3.0, -4.0]])
    np.testing.assert_allclose(w, [[1, 0, -1], [0, 1, 0], [-1, 0, 1]], atol=1e-15)


def test_neighbours_that_are_not_mutual_count_half():
    q, features = batch(17)
    w = knn_affinity(features)
    assert not torch.equal(w, w.T)
    torch.testing.assert_close(lame(q, features).log_probs, lame(q, affinity=(w + w.T) / 2).log_probs)
    one_sided = lame(q, features, symmetrize=False).log_probs
    torch.testing.assert_close(one_sided, lame(q, affinity=w, symmetrize=False).log_probs)
    assert not torch.allclose(one_sided, lame(q, features).log_probs)


# ------------------------------------------------------------------ bad input
HALF = np.log([[0.5, 0.5], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: lame([[1.0, 2.0]], [[1.0]]), "sum to"),
        (lambda: lame([[math.nan, 0.0]], [[1.0]]), "row 0 are no distribution"),
        (lambda: lame([0.0], [[1.0]]), "shape"),
        (lambda: lame(HALF), "needs features"),
        (lambda: lame(HALF, [[1.0]]), "each of 2 rows needs its features"),
        (lambda: lame(HALF, [1.0, 2.0]), "shape"),
        (lambda: lame(HALF, [[1.0], [math.nan]]), "features of row 1 have norm nan"),
        (lambda: lame(HALF, [[1.0], [0.0]]), "features of row 1 have norm 0"),
        (lambda: lame(HALF, [[1.0], [math.inf]]), "features of row 1 have norm inf"),
        (lambda: lame(HALF, [[1.0], [1.0]], affinity="cosine"), "affinity must be knn, rbf, linear"),
        (lambda: lame(HALF, affinity=torch.ones(3, 3)), r"of shape \(2, 2\)"),
        (lambda: lame(HALF, affinity=torch.tensor([[0.0, math.nan], [0.0, 0.0]])), "finite"),
        (lambda: lame(HALF, [[1.0], [1.0]], k=0), "k must be"),
        (lambda: lame(HALF, [[1.0], [1.0]], affinity="rbf", k=1), "k must be at least 2"),
        (lambda: lame(HALF, [[1.0], [1.0]], lam=-1.0), "lam"),
        (lambda: lame(HALF, [[1.0], [1.0]], lam=math.inf), "lam"),
        (lambda: lame(HALF, [[1.0], [1.0]], max_steps=0), "max_steps"),
        (lambda: lame(HALF, [[1.0], [1.0]], tolerance=-1.0), "tolerance"),
        (lambda: lame_objective(HALF[:1], HALF, torch.eye(2)), "must have the shape"),
        (lambda: lame_objective(HALF, HALF, torch.eye(3)), "affinity"),
    ],
)
def test_what_has_no_answer_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()
