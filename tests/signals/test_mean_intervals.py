"""Bootstrap intervals of means: scipy's, paired differences, coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from loglik.errors import InputError, RowError
from loglik.signals.intervals import mean_intervals


def test_means_and_intervals_are_scipys_up_to_the_draws():
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=(2, 200)))
    found = mean_intervals(values, resamples=20_000, seed=1)
    torch.testing.assert_close(found.mean, values.mean(1))
    for row, span in zip(values.numpy(), found.interval.numpy(), strict=True):
        peer = bootstrap((row,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2))
        np.testing.assert_allclose(span, [peer.confidence_interval.low, peer.confidence_interval.high], atol=0.01)


def test_differences_are_paired():
    first = torch.from_numpy(np.random.default_rng(0).normal(size=300)) * 100
    found = mean_intervals(torch.stack([first, first + 1]), seed=0)
    torch.testing.assert_close(found.difference, torch.tensor([0.0, 1.0], dtype=torch.float64))
    # What rows have in common cancels: each mean is uncertain by several units, the difference not at all.
    torch.testing.assert_close(found.difference_interval[1], torch.ones(2, dtype=torch.float64))
    assert float(found.interval[1, 1] - found.interval[1, 0]) > 5


def test_intervals_cover_as_often_as_they_say():
    random = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        span = mean_intervals(torch.from_numpy(random.normal(2.0, 1.0, 60)), resamples=400, seed=seed).interval[0]
        hits += bool(span[0] <= 2.0 <= span[1])
    assert 0.90 <= hits / 300 <= 0.98


def test_one_seed_gives_one_answer():
    values = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean_intervals(values, seed=4).interval, mean_intervals(values, seed=4).interval)
    assert not torch.equal(mean_intervals(values, seed=4).interval, mean_intervals(values, seed=5).interval)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (torch.ones(1), {}),
        (torch.ones(2, 2, 2), {}),
        (torch.ones(0, 3), {}),
        (torch.ones(3), {"level": 1.0}),
        (torch.ones(3), {"resamples": 0}),
        (torch.tensor([1.0, torch.nan]), {}),
        (torch.tensor([1.0, torch.inf]), {}),
    ],
)
def test_bad_input(values, options):
    with pytest.raises((InputError, RowError)):
        mean_intervals(values, **options)
