"""Traps: perplexities recomputed by the model, injection that can be undone, tests that are exact under the null."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Tensor

from loglik.errors import InputError, LoglikError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.signals.traps import (
    Traps,
    _draw,
    assign_repetitions,
    generate_traps,
    inject,
    inject_tokens,
    jaccard,
    repetition_curve,
    trap_test,
)
from zoo import CAUSAL, MASKED, build

V = 40
START = TokenBatch.from_lists([[1]])
WIDE = (1.0, 10.0, 30.0, 100.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Chain:
    """A first-order Markov chain."""

    table: Tensor
    kind: Kind = Kind.EXACT
    unit: Unit = Unit.TOKEN

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        return self.table[prefix.ids[:, -1]]

    def log_prob(self, x: TokenBatch, *, draws: object = None) -> LogLikelihood:
        terms = torch.nn.functional.pad(self.table[x.ids[:, :-1], x.ids[:, 1:]], (1, 0))
        return LogLikelihood.from_per_unit(terms, x.scored_mask)


def chain(scale: float = 2.0, seed: int = 0, size: int = V) -> Chain:
    return Chain((scale * torch.randn(size, size, dtype=torch.float64, generator=seeded(seed))).log_softmax(-1))


def draw(model: object, **options: object) -> Traps:
    given: dict = {
        "per_bucket": 4,
        "edges": WIDE,
        "max_similarity": 1.0,
        "exclude": [0],
        "prompt": START,
        "generator": seeded(),
        "batch_size": 16,
    }
    return generate_traps(model, 8, **{**given, **options})


# ---------------------------------------------------------------------- generation
@pytest.mark.parametrize("make", [chain, lambda: CausalLM(build(CAUSAL["gpt2"], V, gain=3.0))])
def test_traps_have_the_perplexity_that_they_say(make):
    model = make()
    edges = WIDE if isinstance(model, Chain) else (1.0, 40.0, 4000.0)
    traps = draw(model, edges=edges)
    assert len(traps) == 4 * (len(edges) - 1)
    assert traps.bucket.tolist() == sorted(traps.bucket.tolist())
    assert torch.bincount(traps.bucket).tolist() == [4] * (len(edges) - 1)
    with torch.no_grad():
        ll = model.log_prob(TokenBatch.from_lists([[1, *row] for row in traps.ids]))
    torch.testing.assert_close(traps.perplexity, ll.perplexity().value.double(), rtol=1e-4, atol=0)
    low, high = torch.tensor(edges[:-1]), torch.tensor(edges[1:])
    assert bool((traps.perplexity > low[traps.bucket]).all())
    assert bool((traps.perplexity <= high[traps.bucket]).all())
    assert all(len(row) == 8 and 0 not in row for row in traps.ids)
    assert traps.edges == edges
    assert traps.drawn % 16 == 0


def test_higher_temperatures_give_higher_perplexities():
    found = [
        draw(chain(), edges=(1, 1e6), per_bucket=64, temperatures=[t]).perplexity.log().mean() for t in (0.5, 1, 3)
    ]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_token_has_the_tempered_distribution(temperature):
    """Chi-squared at 1e-4 with a fixed seed; the excluded token's share goes to the others in proportion."""
    model = chain(1.0, size=6)
    prompts = START.ids.expand(4000, -1)
    ids, log_p = _draw(model, prompts, 2, temperature, torch.tensor([0]), seeded(3))
    p = torch.softmax(model.table[1] / temperature, -1)
    p[0] = 0
    expected = 4000 * (p / p.sum())[1:]
    counts = torch.bincount(ids[:, 0], minlength=6)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy(), expected.numpy()).pvalue > 1e-4
    torch.testing.assert_close(log_p, model.table[1, ids[:, 0]] + model.table[ids[:, 0], ids[:, 1]])


def test_similar_traps_are_dropped():
    traps = draw(chain(), max_similarity=0.2, edges=(1, 100), per_bucket=6)
    for a, b in itertools.combinations(traps.ids, 2):
        assert len({*a} & {*b}) / len({*a} | {*b}) <= 0.2
    same = draw(chain(8.0), edges=(1, 100), per_bucket=30, temperatures=[1.0])
    assert len({tuple(row) for row in same.ids}) == 30  # no trap twice, even where all sets are allowed


def test_accept_and_seed():
    even = draw(chain(), accept=lambda row: row[0] % 2 == 0)
    assert all(row[0] % 2 == 0 for row in even.ids)
    assert draw(chain()).ids == draw(chain()).ids
    assert draw(chain()).ids != draw(chain(), generator=seeded(1)).ids


def test_special_tokens_of_the_tokenizer_are_not_drawn(tiny):
    traps = generate_traps(tiny, 4, per_bucket=2, edges=(1, 1e9), max_similarity=1.0, generator=seeded(), batch_size=4)
    special = set(tiny.tokenizer.all_special_ids)
    assert special
    assert not any(special & set(row) for row in traps.ids)
    with torch.no_grad():
        batch = TokenBatch.from_lists([[tiny.tokenizer.bos_token_id, *row] for row in traps.ids])
        torch.testing.assert_close(
            traps.perplexity, tiny.log_prob(batch).perplexity().value.double(), rtol=1e-3, atol=0
        )


def test_a_perplexity_on_an_edge_belongs_to_the_range_below():
    """Halving probabilities are exact: every sequence has perplexity 2."""
    even = Chain(torch.full((4, 4), math.log(0.5), dtype=torch.float64))
    perplexity = math.exp(-math.log(0.5))  # as it is computed
    assert draw(even, edges=(1, perplexity), per_bucket=3, exclude=[]).bucket.tolist() == [0] * 3
    with pytest.raises(InputError, match="from 2 to 3 short of 3"):
        draw(even, edges=(perplexity, 3), per_bucket=3, exclude=[], max_draws=64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"per_bucket": 0}, "per_bucket must be a whole number"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"edges": (1,)}, "edges must be"),
        ({"edges": (5, 5)}, "edges must be"),
        ({"edges": (0.5, 5)}, "edges must be"),
        ({"edges": (math.nan, 5)}, "edges must be"),
        ({"temperatures": []}, "temperatures must be"),
        ({"temperatures": [0.0]}, "temperatures must be"),
        ({"temperatures": [math.inf]}, "temperatures must be"),
        ({"max_similarity": 1.5}, "max_similarity must be"),
        ({"max_similarity": math.nan}, "max_similarity must be"),
        ({"prompt": TokenBatch.from_lists([[1], [2]])}, "after one prompt, got 2 rows"),
        ({"exclude": list(range(V))}, "every token that the model allows is excluded"),
        ({"max_draws": 32, "edges": (1, 2, 1e6)}, "32 draws left the perplexities from 1 to 2 short of 4 traps"),
    ],
)
def test_refusals_of_generation(options, says):
    with pytest.raises(InputError, match=says):
        draw(chain(), **options)


def test_refusals_of_models():
    with pytest.raises(InputError, match="drawing traps at a temperature needs per-token conditionals"):
        draw(MaskedLM(build(MASKED["bert"], V), mask_token_id=3))
    with pytest.raises(ValueError, match="BOS"):
        draw(chain(), prompt=None)


def test_jaccard():
    assert jaccard([1, 1, 2], [2, 3]) == 1 / 3
    assert jaccard([1], [1, 1]) == 1.0
    assert jaccard([], []) == 1.0
    assert jaccard([], [1]) == 0.0


# ---------------------------------------------------------------------- injection
DOCUMENT = "one two  three\nfour five six seven"


@pytest.mark.parametrize("times", [1, 3, 6])
def test_injection_can_be_undone(times):
    text, starts = inject(DOCUMENT, "a trap", times, generator=seeded(times))
    assert len(starts) == times == text.count("a trap")
    assert starts == sorted(starts)
    assert all(text[start:].startswith("a trap ") and text[start - 1] == " " for start in starts)
    assert re.sub("a trap ", "", text) == DOCUMENT
    tokens, places = inject_tokens(list(range(9)), [50, 51], times, generator=seeded(times))
    assert [tokens[p : p + 2] for p in places] == [[50, 51]] * times
    assert [t for t in tokens if t < 50] == list(range(9))


def test_every_place_is_as_likely():
    """Chi-squared at 1e-4: one copy among 6 spaces, and among the 4 places of 3 tokens."""
    generator = seeded()
    spaces = [inject(DOCUMENT, "x", 1, generator=generator)[1][0] for _ in range(1200)]
    assert stats.chisquare(np.unique(spaces, return_counts=True)[1]).pvalue > 1e-4
    assert len(set(spaces)) == DOCUMENT.count(" ")
    places = [inject_tokens([7, 8, 9], [0], 1, generator=generator)[1][0] for _ in range(800)]
    assert sorted(set(places)) == [0, 1, 2, 3]
    assert stats.chisquare(np.unique(places, return_counts=True)[1]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda g: inject(DOCUMENT, " ", 1, generator=g), "the trap is empty"),
        (lambda g: inject_tokens([1], [], 1, generator=g), "the trap is empty"),
        (
            lambda g: inject(DOCUMENT, "a", 7, generator=g),
            "times must be from 1 to the 6 spaces of the document, got 7",
        ),
        (lambda g: inject(DOCUMENT, "a", 0, generator=g), "times must be from 1"),
        (lambda g: inject("word", "a", 1, generator=g), "the 0 spaces"),
        (lambda g: inject_tokens([1, 2], [3], 4, generator=g), "the 3 places of the document, got 4"),
    ],
)
def test_refusals_of_injection(call, says):
    with pytest.raises(InputError, match=says):
        call(seeded())


def test_repetitions_are_shared_evenly_within_buckets():
    bucket = torch.arange(3).repeat_interleave(8)
    found = assign_repetitions(bucket, [0, 1, 10, 100], generator=seeded())
    for b in range(3):
        assert sorted(found[bucket == b].tolist()) == [0, 0, 1, 1, 10, 10, 100, 100]
    other = assign_repetitions(bucket, [0, 1, 10, 100], generator=seeded(1))
    assert found.tolist() != other.tolist()


@pytest.mark.parametrize("numbers", [[1, 10], [0], [0, 0, 1], [0, -1], []])
def test_refusals_of_repetitions(numbers):
    with pytest.raises(LoglikError, match="repetitions must be different"):
        assign_repetitions(torch.zeros(4), numbers, generator=seeded())


def test_buckets_that_do_not_divide():
    with pytest.raises(InputError, match="bucket 1 has 3 traps, which 2 numbers"):
        assign_repetitions(torch.tensor([0, 0, 1, 1, 1]), [0, 1], generator=seeded())


# ---------------------------------------------------------------------- tests
def test_closed_form():
    found = trap_test(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.5, -1.0]))
    assert found.p_values.tolist() == [1 / 5, 3 / 5, 2 / 5]
    assert found.auroc == pytest.approx((4 + 2.5 + 3) / 12)


def test_auc_and_p_value_are_those_of_the_libraries():
    a = torch.randn(15, generator=seeded(0)) + 1
    b = torch.randn(25, generator=seeded(1))
    found = trap_test(a, b)
    labels = [1] * 15 + [0] * 25
    assert found.auroc == pytest.approx(roc_auc_score(labels, torch.cat([a, b]).numpy()))
    u = stats.mannwhitneyu(a.numpy(), b.numpy(), alternative="greater")
    assert found.p_value == pytest.approx(u.pvalue)
    assert found.auroc == pytest.approx(u.statistic / (15 * 25))


def test_p_values_are_uniform_where_labels_are_swapped_at_random():
    """One trap has p-values 1/100 to 1, spread over their steps here; Kolmogorov-Smirnov at 0.01."""
    random = np.random.default_rng(0)
    alone, together = [], []
    for _ in range(500):
        scores = torch.from_numpy(random.gumbel(size=119))
        found = trap_test(scores[:20], scores[20:])
        alone.append(found.p_values[0].item() - random.random() / 100)
        together.append(found.p_value)
    assert stats.kstest(alone, "uniform").pvalue > 0.01
    assert stats.kstest(together, "uniform").pvalue > 0.01


def test_ties_never_make_a_p_value_too_small():
    scores = torch.zeros(10)
    found = trap_test(scores[:3], scores[3:])
    assert found.p_values.tolist() == [1.0] * 3
    assert found.auroc == 0.5
    assert found.p_value >= 0.5


def test_curve_is_the_auc_of_each_number():
    generator = seeded()
    repetitions = torch.tensor([0, 1, 10]).repeat(30)
    scores = torch.randn(90, generator=generator) + repetitions.double().sqrt()
    curve = repetition_curve(scores, repetitions, bootstrap=50)
    assert list(curve) == [1, 10]
    for count, report in curve.items():
        rows = (repetitions == 0) | (repetitions == count)
        want = roc_auc_score((repetitions[rows] > 0).numpy(), scores[rows].numpy())
        assert report.auroc.value == pytest.approx(want)
        assert report.auroc.low <= want <= report.auroc.high
    assert curve[1].auroc.value < curve[10].auroc.value


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: trap_test(torch.tensor([]), torch.tensor([1.0])), "injected must be one or more scores"),
        (lambda: trap_test(torch.tensor([1.0]), torch.zeros(2, 2)), "unused must be one or more scores"),
        (lambda: trap_test(torch.tensor([math.nan]), torch.tensor([1.0])), "NaN"),
        (lambda: repetition_curve(torch.zeros(2), torch.zeros(3)), r"must both have shape \(N,\)"),
        (lambda: repetition_curve(torch.zeros(2), torch.tensor([0, -1])), "must not be negative"),
        (lambda: repetition_curve(torch.zeros(2), torch.tensor([1, 1])), "injected traps and unused ones"),
        (lambda: repetition_curve(torch.zeros(2), torch.tensor([0, 0])), "injected traps and unused ones"),
    ],
)
def test_refusals_of_tests(call, says):
    with pytest.raises(InputError, match=says):
        call()
