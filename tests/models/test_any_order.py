"""Any-order marginals against enumeration: tables that hold a distribution exactly, and random networks."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "reproductions"))

from worlds.enumerable import kl
from worlds.ising import Ising, PartialStates, tabular

from diffusion_beds import whole
from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.models.any_order import AnyOrderMarginals, StateMLP, random_orders
from loglik.models.diffusion import MaskedDiffusionLM, SubsetTable
from loglik.models.protocol import Model

SPACE = PartialStates(3, 3)
ALL = SPACE.x[SPACE.complete]  # 27 vectors


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_log_p(space: PartialStates = SPACE, seed: int = 0) -> torch.Tensor:
    logits = 1.5 * torch.randn(len(space.complete), generator=seeded(seed), dtype=torch.float64)
    return logits.log_softmax(0)


def random_model(dims: int = 3, values: int = 3, *, seed: int = 0, scale: float = 4.0) -> AnyOrderMarginals:
    """Networks far from uniform, far from each other and far from normalised, in float64."""
    model = AnyOrderMarginals(dims, values, layers=2, width=16, dtype=torch.float64, seed=seed)
    with torch.no_grad():
        for network in (model.marginal_network, model.conditional_network):
            for parameter in (network.first.weight, network.last.weight):
                parameter.mul_(scale)
    return model


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def by_enumeration(log_p: torch.Tensor, vectors: torch.Tensor, x: torch.Tensor, known: torch.Tensor) -> float:
    """log p(x_S) as a sum over the vectors that agree with x on S, one by one."""
    total = 0.0
    for vector, value in zip(vectors.tolist(), log_p.tolist(), strict=True):
        if all(vector[d] == x[d] for d in range(len(vector)) if known[d]):
            total += math.exp(value)
    return math.log(total)


def assert_drawn_from(draws: torch.Tensor, log_p: torch.Tensor, space: PartialStates = SPACE) -> None:
    """Chi-square over all vectors at level 1e-3, cells of less than 5 expected draws merged."""
    place = (draws * space.values ** torch.arange(space.dims - 1, -1, -1)).sum(1)
    observed = torch.bincount(place, minlength=len(log_p)).double().numpy()
    expected = len(draws) * log_p.double().exp().numpy()
    assert expected.sum() == pytest.approx(len(draws), rel=1e-9)
    common = expected >= 5
    observed = np.append(observed[common], observed[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    keep = expected > 0
    assert observed[~keep].sum() == 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


# ------------------------------------------------------------------ exact tables
@pytest.mark.parametrize("shift", [0.0, 7.5])
def test_every_marginal_of_an_exact_table(shift):
    """l is log p up to a constant: subtracting l(empty) makes every marginal exact, whatever the constant."""
    log_p = random_log_p()
    model = tabular(SPACE, log_p + shift)
    found = model.marginal(SPACE.x, SPACE.known)
    expected = [by_enumeration(log_p, ALL, x, s) for x, s in zip(SPACE.x.tolist(), SPACE.known.tolist(), strict=True)]
    close(found.value, torch.tensor(expected, dtype=torch.float64))
    assert (found.kind, found.unit) == (Kind.SURROGATE, Unit.DIM)
    assert torch.equal(found.num_units, SPACE.known.sum(1))
    close(model.log_prob(ALL).value, log_p)
    assert model.log_prob(ALL).num_units.tolist() == [3] * 27
    assert model.log_normalizer().item() == pytest.approx(shift, abs=1e-12)
    close(model.log_marginal(SPACE.x, SPACE.known), found.value + shift)


def test_every_conditional_of_an_exact_table():
    """log p(x_A | x_B) for all pairs of sets, overlapping ones too."""
    log_p = random_log_p()
    model = tabular(SPACE, log_p + 2.0)
    sets = torch.tensor(list(itertools.product([False, True], repeat=3)))
    x = ALL[torch.tensor([0, 5, 13, 26])]
    for query, evidence in itertools.product(sets, sets):
        found = model.conditional(x, query, evidence)
        both = (query | evidence).tolist()
        expected = [
            by_enumeration(log_p, ALL, row, both) - by_enumeration(log_p, ALL, row, evidence.tolist())
            for row in x.tolist()
        ]
        close(found.value, torch.tensor(expected, dtype=torch.float64))
        assert found.kind is Kind.SURROGATE
        assert found.num_units.tolist() == [int((query & ~evidence).sum())] * 4
    rows = (sets[[1, 2, 3, 4]], sets[[2, 2, 4, 0]])  # a mask per row
    alone = [model.conditional(x[i : i + 1], rows[0][i], rows[1][i]).value for i in range(4)]
    close(model.conditional(x, *rows).value, torch.cat(alone))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_order_of_an_exact_table_is_the_distribution(order):
    log_p = random_log_p()
    found = tabular(SPACE, log_p).order_log_prob(ALL, torch.tensor(order))
    close(found.value, log_p)
    assert (found.kind, found.unit) == (Kind.EXACT, Unit.DIM)
    known = [False] * 3
    for entry in order:
        after = [k or d == entry for d, k in enumerate(known)]
        terms = [
            by_enumeration(log_p, ALL, row, after) - by_enumeration(log_p, ALL, row, known) for row in ALL.tolist()
        ]
        close(found.per_unit[:, entry], torch.tensor(terms, dtype=torch.float64))
        known = after


def test_independent_entries_add_up():
    """A product of Bernoullis: l(x_S) is a sum of log-probabilities."""
    space = PartialStates(4, 2)
    chances = torch.tensor([0.1, 0.5, 0.75, 0.99], dtype=torch.float64)
    vectors = space.x[space.complete]
    each = torch.where(vectors == 1, chances.log(), (1 - chances).log())
    model = tabular(space, each.sum(1))
    terms = torch.where(space.x == 1, chances.log(), (1 - chances).log()).masked_fill(~space.known, 0.0)
    close(model.marginal(space.x, space.known).value, terms.sum(1))
    conditionals = model.log_conditionals(space.x, space.known)
    for entry in range(4):
        unknown = ~space.known[:, entry]
        expected = torch.stack([(1 - chances[entry]).log(), chances[entry].log()]).expand(int(unknown.sum()), 2)
        close(conditionals[unknown, entry], expected)


# ------------------------------------------------------------------ what the labels promise
def test_the_two_labels_are_earned():
    """Marginals of an untrained network do not sum to one; every order of its conditionals does."""
    model = random_model()
    assert isinstance(model, Model)
    assert abs(model.log_prob(ALL).value.logsumexp(0).item()) > 0.1
    orders = [torch.tensor(order) for order in itertools.permutations(range(3))]
    totals = torch.stack([model.order_log_prob(ALL, order).value for order in orders])
    close(totals.logsumexp(1), torch.zeros(6, dtype=torch.float64), 1e-12)
    assert (totals - totals[0])[1:].abs().amax(1).min() > 1e-2  # and they are different distributions
    conditionals = model.log_conditionals(SPACE.x, SPACE.known)
    assert conditionals.shape == (64, 3, 3)
    close(conditionals.logsumexp(-1), torch.zeros(64, 3, dtype=torch.float64), 1e-12)


def test_an_order_is_a_permutation_not_its_ranks():
    """[2, 0, 1] is no involution: read as ranks it would start with entry 1."""
    model = random_model()
    order = torch.tensor([2, 0, 1])
    known = torch.zeros(3, dtype=torch.bool)
    found = model.order_log_prob(ALL, order)
    rows = torch.arange(27)
    for entry in (2, 0, 1):
        close(found.per_unit[:, entry], model.log_conditionals(ALL, known)[rows, entry, ALL[:, entry]])
        known = known.clone()
        known[entry] = True
    close(found.per_unit.sum(1), found.value)
    assert found.mask.all()
    mixed = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0]])
    together = model.order_log_prob(ALL[[3, 3, 20]], mixed)
    for row, i in enumerate((3, 3, 20)):
        close(together.per_unit[row], model.order_log_prob(ALL[i : i + 1], mixed[row]).per_unit[0])


def test_unknown_entries_are_not_read():
    model = random_model()
    known = torch.tensor([True, False, True])
    x = torch.tensor([[2, 1, 0], [0, 0, 1]])
    for other in (-1, 0, 99):
        changed = x.clone()
        changed[:, 1] = other
        assert torch.equal(model.log_marginal(changed, known), model.log_marginal(x, known))
        assert torch.equal(model.log_conditionals(changed, known), model.log_conditionals(x, known))
    moved = x.clone()
    moved[:, 2] = 2
    assert (model.log_marginal(moved, known) - model.log_marginal(x, known)).abs().min() > 1e-3
    none = torch.zeros(3, dtype=torch.bool)
    close(model.log_marginal(x, none), model.log_normalizer().expand(2), 1e-12)
    assert (model.log_marginal(x, known) - model.log_marginal(x, none)).abs().min() > 1e-3  # unknown is no value


def test_other_rows_change_nothing():
    model = random_model()
    alone = [model.marginal(SPACE.x[i : i + 1], SPACE.known[i : i + 1]).value for i in range(64)]
    close(model.marginal(SPACE.x, SPACE.known).value, torch.cat(alone))
    order = torch.tensor([1, 2, 0])
    one_by_one = torch.cat([model.order_log_prob(ALL[i : i + 1], order).per_unit for i in range(27)])
    close(model.order_log_prob(ALL, order).per_unit, one_by_one)
    nothing = torch.zeros(0, 3, dtype=torch.long)
    assert len(model.log_prob(nothing)) == len(model.order_log_prob(nothing, order)) == 0
    assert model.sample(0).shape == model.gibbs(nothing, 2).shape == (0, 3)


def test_one_entry_of_two_values():
    """D = 1: the conditional network is the whole distribution."""
    model = random_model(1, 2)
    x = torch.tensor([[0], [1]])
    order = torch.tensor([0])
    expected = model.log_conditionals(x, torch.tensor([False]))[0, 0].detach()
    close(model.order_log_prob(x, order).value.detach(), expected)
    counts = model.sample(20_000, generator=seeded()).flatten().bincount(minlength=2)
    assert stats.binomtest(int(counts[1]), 20_000, float(expected[1].exp())).pvalue > 1e-3


def test_gradients_stay_in_their_network():
    model = random_model()
    model.log_prob(ALL).value.sum().backward()
    assert all(p.grad is not None for p in model.marginal_network.parameters())
    assert all(p.grad is None for p in model.conditional_network.parameters())
    model.zero_grad()
    model.order_log_prob(ALL, torch.tensor([0, 1, 2])).value.sum().backward()
    assert all(p.grad is None for p in model.marginal_network.parameters())
    assert all(p.grad is not None for p in model.conditional_network.parameters())


def test_the_gradient_of_an_exact_table():
    """d log p(x) / d l is +1 at x and -1 at the empty set."""
    model = tabular(SPACE, random_log_p())
    model.log_prob(ALL[4:5]).value.sum().backward()
    expected = torch.zeros(64, dtype=torch.float64)
    expected[SPACE.complete[4]], expected[0] = 1, -1
    assert torch.equal(model.marginal_network.entries.grad, expected)


def test_a_masked_diffusion_model_on_the_same_network():
    """The same masks through another scorer: chain rules of all orders, their mean, and the random-order mixture."""
    model = random_model()

    class AsLanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.config = SimpleNamespace(mask_token_id=3, max_position_embeddings=3)

        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            logits = model.log_conditionals(input_ids, input_ids != 3)
            return SimpleNamespace(logits=torch.cat([logits, torch.full_like(logits[..., :1], 5.0)], -1))

    rows = ALL[[0, 7, 19]]
    tables = SubsetTable.of(MaskedDiffusionLM(AsLanguageModel()), whole(rows.tolist()))
    orders = list(itertools.permutations(range(3)))
    for i, table in enumerate(tables):
        ours = torch.cat([model.order_log_prob(rows[i : i + 1], torch.tensor(order)).value for order in orders])
        close(table.all_orders(), ours, 1e-10)
        close(table.mixture(), ours.logsumexp(0) - math.log(6), 1e-10)


# ------------------------------------------------------------------ samples
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_samples_of_one_order(order):
    model = random_model()
    chosen = torch.tensor(order)
    draws = model.sample(20_000, generator=seeded(1), order=chosen)
    assert_drawn_from(draws, model.order_log_prob(ALL, chosen).value.detach())


def mixture(model: AnyOrderMarginals) -> torch.Tensor:
    each = [model.order_log_prob(ALL, torch.tensor(o)).value.detach() for o in itertools.permutations(range(3))]
    return torch.stack(each).logsumexp(0) - math.log(6)


def test_samples_of_random_orders():
    model = random_model()
    assert_drawn_from(model.sample(20_000, generator=seeded(2)), mixture(model))


def test_samples_with_an_order_per_row():
    model = random_model()
    orders = torch.tensor([[0, 1, 2], [2, 0, 1]]).repeat(20_000, 1)
    draws = model.sample(40_000, generator=seeded(3), order=orders)
    for which in range(2):
        assert_drawn_from(draws[which::2], model.order_log_prob(ALL, orders[which]).value.detach())


def test_gibbs_keeps_the_distribution_of_exact_conditionals():
    log_p = random_log_p()
    model = tabular(SPACE, log_p)
    x = ALL[torch.multinomial(log_p.exp(), 20_000, replacement=True, generator=seeded(4))]
    for block in (1, 2, 3):
        before = x.clone()
        moved = model.gibbs(x, block, generator=seeded(5))
        assert torch.equal(x, before)
        assert_drawn_from(moved, log_p)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_gibbs_transitions_from_one_vector(block):
    """P(x' | x): the mean over orders of the chain rule of the last entries, where the first ones are those of x."""
    model = random_model()
    start = ALL[14]
    found = torch.zeros(27, dtype=torch.float64)
    for order in itertools.permutations(range(3)):
        terms = model.order_log_prob(ALL, torch.tensor(order)).per_unit.detach()
        redrawn = terms[:, list(order[3 - block :])].sum(1).exp()
        kept = (ALL[:, list(order[: 3 - block])] == start[list(order[: 3 - block])]).all(1)
        found += redrawn * kept / 6
    draws = model.gibbs(start.expand(20_000, 3), block, generator=seeded(6))
    assert (draws != start).sum(1).max() <= block
    assert_drawn_from(draws, found.log())


def test_generators_decide_the_draws():
    model = random_model()
    assert torch.equal(model.sample(50, generator=seeded(7)), model.sample(50, generator=seeded(7)))
    assert not torch.equal(model.sample(50, generator=seeded(7)), model.sample(50, generator=seeded(8)))
    state = torch.get_rng_state()
    x = model.sample(50, generator=seeded(7))
    assert torch.equal(model.gibbs(x, 2, generator=seeded(7)), model.gibbs(x, 2, generator=seeded(7)))
    AnyOrderMarginals(2, 2, layers=1, width=4, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not x.requires_grad


def test_random_orders_are_uniform():
    orders = random_orders(12_000, 3, generator=seeded())
    counts = (orders * torch.tensor([9, 3, 1])).sum(1).bincount()
    assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-3
    assert (counts > 0).sum() == 6


def test_impossible_values_are_not_drawn():
    """Values of probability zero, at the front, in the middle and at the end."""
    space = PartialStates(1, 4)
    for impossible in range(4):
        model = tabular(space, torch.full((4,), math.log(0.25)))
        with torch.no_grad():
            model.conditional_network.entries[:, :, impossible] = -math.inf
        counts = model.sample(3000, generator=seeded()).flatten().bincount(minlength=4)
        assert counts[impossible] == 0
        assert counts.sort().values[1] > 850


# ------------------------------------------------------------------ networks
def test_the_network_is_what_it_says():
    """A residual block added by hand, and zero blocks that leave the hidden vector alone."""
    torch.manual_seed(0)
    net = StateMLP(2, 3, shape=(2, 3), layers=2, width=8).double()
    states = torch.tensor([[0, 3], [2, 1]])
    one_hot = torch.zeros(2, 8, dtype=torch.float64)
    for row, column in ((0, 0), (0, 7), (1, 2), (1, 5)):
        one_hot[row, column] = 1
    hidden = one_hot @ net.first.weight.T + net.first.bias
    for norm, one, _, two in net.blocks:
        normed = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        inner = (normed * norm.weight + norm.bias) @ one.weight.T + one.bias
        hidden = hidden + (inner * inner.sigmoid()) @ two.weight.T + two.bias
    close(net(states), ((hidden * hidden.sigmoid()) @ net.last.weight.T + net.last.bias).reshape(2, 2, 3))


def test_sizes_seed_and_dtype():
    model = AnyOrderMarginals(2, 3, layers=1, width=4, seed=1)
    again = AnyOrderMarginals(2, 3, layers=1, width=4, seed=1)
    other = AnyOrderMarginals(2, 3, layers=1, width=4, seed=2)
    x = torch.tensor([[0, 2]])
    assert model.log_prob(x).value.dtype == torch.float32
    assert torch.equal(model.log_prob(x).value, again.log_prob(x).value)
    assert not torch.equal(model.log_prob(x).value, other.log_prob(x).value)
    double = AnyOrderMarginals(2, 3, layers=1, width=4, dtype=torch.float64, seed=1)
    assert double.order_log_prob(x, torch.tensor([1, 0])).value.dtype == torch.float64
    assert double.log_prob(x).value.item() == pytest.approx(model.log_prob(x).value.item(), abs=1e-5)


# ------------------------------------------------------------------ files
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_is_the_same_to_the_last_bit(tmp_path, dtype):
    model = AnyOrderMarginals(3, 3, layers=2, width=5, dtype=dtype, seed=4)
    model.save_pretrained(tmp_path / "new" / "model")
    again = AnyOrderMarginals.from_pretrained(tmp_path / "new" / "model")
    assert (again.dims, again.values) == (3, 3)
    assert torch.equal(again.log_prob(ALL).value, model.log_prob(ALL).value)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(again.order_log_prob(ALL, order).per_unit, model.order_log_prob(ALL, order).per_unit)
    again.save_pretrained(tmp_path / "copy")
    for path in (tmp_path / "new" / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "loglik_any_order.json").unlink(), "has no loglik_any_order.json, so it holds no any-order"),
        (lambda d: (d / "loglik_any_order.safetensors").unlink(), "has no loglik_any_order.safetensors; copy the wh"),
        (lambda d: _cut(d / "loglik_any_order.json"), "loglik_any_order.json in .* is damaged or truncated; copy it"),
        (lambda d: _cut(d / "loglik_any_order.safetensors"), "safetensors in .* is damaged or truncated; copy"),
        (lambda d: _edit(d / "loglik_any_order.json", format_version=2), "has format version 2, and .* reads 1; train"),
        (lambda d: _edit(d / "loglik_any_order.json", dims=None), "gives no usable 'dims'; copy it again"),
        (lambda d: _edit(d / "loglik_any_order.json", width=0), "gives no usable 'width'; copy it again"),
        (lambda d: _edit(d / "loglik_any_order.json", dtype="int8"), "gives no usable 'dtype'; copy it again"),
        (lambda d: _edit(d / "loglik_any_order.json", layers=3), "safetensors in .* does not fit loglik_any_order"),
        (lambda d: (d / "loglik_any_order.json").write_text("[]"), "has format version None, and"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, damage, message):
    AnyOrderMarginals(2, 3, layers=2, width=4).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        AnyOrderMarginals.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_saved_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is or lies below a file; give a directory to save to"):
        AnyOrderMarginals(2, 3, layers=1, width=4).save_pretrained(tmp_path / "file" / "model")
    with pytest.raises(InputError, match="only a model on networks of its own can be saved"):
        tabular(SPACE, random_log_p()).save_pretrained(tmp_path / "table")


# ------------------------------------------------------------------ refusals
MODEL = random_model()
X = torch.tensor([[0, 1, 2], [2, 2, 2]])
KNOWN = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AnyOrderMarginals(0, 2), "dims must be at least 1, got 0"),
        (lambda: AnyOrderMarginals(2, 0), "values must be at least 1, got 0"),
        (lambda: AnyOrderMarginals(2, 2, width=0), "width must be at least 1, got 0"),
        (lambda: AnyOrderMarginals(2, 2, dtype=torch.float16), "dtype must be torch.float32 or torch.float64, got"),
        (lambda: MODEL.log_prob(X.double()), r"x must be long of shape \(B, 3\), got torch.float64 of shape \(2, 3\)"),
        (lambda: MODEL.log_prob(X[:, :2]), r"x must be long of shape \(B, 3\), got torch.int64 of shape \(2, 2\)"),
        (lambda: MODEL.log_prob(X[0]), r"x must be long of shape \(B, 3\)"),
        (lambda: MODEL.marginal(X, KNOWN.long()), r"a mask must be bool of shape \(3,\) or \(2, 3\), got torch.int64"),
        (lambda: MODEL.marginal(X, KNOWN[:2]), r"a mask must be bool of shape \(3,\) or \(2, 3\), got torch.bool of"),
        (lambda: MODEL.log_prob(X - 1), "row 0: entry 0 is -1, and values go from 0 to 2: mark it as unknown"),
        (lambda: MODEL.log_prob(X + 1), "row 0: entry 2 is 3, and values go from 0 to 2"),
        (lambda: MODEL.marginal(X + 1, KNOWN), "row 0: entry 2 is 3"),
        (lambda: MODEL.conditional(X, ~KNOWN, KNOWN.float()), "a mask must be bool"),
        (lambda: MODEL.conditional(X, KNOWN.float(), KNOWN), "a mask must be bool"),
        (lambda: MODEL.order_log_prob(X - 1, torch.arange(3)), "row 0: entry 0 is -1"),
        (lambda: MODEL.order_log_prob(X, torch.arange(2)), r"order must be long of shape \(3,\) or \(2, 3\), got"),
        (lambda: MODEL.order_log_prob(X, torch.ones(3)), "order must be long"),
        (lambda: MODEL.order_log_prob(X, torch.tensor([0, 1, 1])), "order must hold each of 0 to 2 once in every row"),
        (lambda: MODEL.order_log_prob(X, torch.tensor([1, 2, 3])), "order must hold each of 0 to 2 once in every row"),
        (lambda: MODEL.sample(4, order=torch.arange(6).reshape(2, 3)), r"order must be long of shape .* \(4, 3\)"),
        (lambda: MODEL.sample(-1), "n must not be negative, got -1"),
        (lambda: MODEL.gibbs(X, 0), "block must lie between 1 and 3, the entries of a vector, got 0"),
        (lambda: MODEL.gibbs(X, 4), "block must lie between 1 and 3, the entries of a vector, got 4"),
        (lambda: MODEL.gibbs(X - 1, 1), "row 0: entry 0 is -1"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(call, message):
    with pytest.raises(InputError, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ the enumerable worlds
def test_partial_states_are_all_there():
    assert SPACE.states.shape == (64, 3)
    assert torch.equal(SPACE.index(SPACE.states), torch.arange(64))
    assert torch.equal(ALL, torch.tensor(list(itertools.product(range(3), repeat=3))))
    assert torch.equal(SPACE.sizes, (SPACE.x >= 0).sum(1))
    found = SPACE.log_marginals(random_log_p())
    for i in range(64):
        expected = by_enumeration(random_log_p(), ALL, SPACE.x[i].tolist(), SPACE.known[i].tolist())
        assert found[i].item() == pytest.approx(expected, abs=1e-12)


def test_what_conditionals_make_of_partial_states():
    """Chain rule, random-order mixture and mean divergence against loops over all orders."""
    model = random_model()
    with torch.no_grad():
        log_c = model.log_conditionals(SPACE.x, SPACE.known)
        orders = [torch.tensor(order) for order in itertools.permutations(range(3))]
        each = torch.stack([model.order_log_prob(ALL, order).value for order in orders])
    log_p = random_log_p(seed=5)
    close(SPACE.chain(log_c)[SPACE.complete], each[0])
    close(SPACE.any_order(log_c)[SPACE.complete], each.logsumexp(0) - math.log(6))
    divergences = torch.stack([kl(one, log_p) for one in each])
    assert divergences.std() > 1e-3
    assert SPACE.mean_order_kl(log_c, log_p).item() == pytest.approx(divergences.mean().item(), abs=1e-12)
    exact = SPACE.log_conditionals(log_p)
    close(SPACE.chain(exact), SPACE.log_marginals(log_p))
    close(SPACE.any_order(exact), SPACE.log_marginals(log_p))
    assert SPACE.mean_order_kl(exact, log_p).item() == pytest.approx(0, abs=1e-12)
    partial = SPACE.index(torch.tensor([2, 0, 3]))  # entries 0 and 2 known
    steps = model.order_log_prob(torch.tensor([[1, 0, 2]]), torch.tensor([0, 2, 1])).per_unit[0, [0, 2]].sum()
    assert SPACE.chain(log_c)[partial].item() == pytest.approx(steps.item(), abs=1e-12)


def test_ising_against_brute_force():
    """Log Z, every log-probability and some marginals by loops over spins and pairs."""
    world = Ising(side=3, coupling=0.4, bias=0.2)
    pairs = set()
    for i, j in itertools.product(range(3), repeat=2):
        for di, dj in ((0, 1), (1, 0)):
            pairs.add(frozenset([(i, j), ((i + di) % 3, (j + dj) % 3)]))
    assert len(pairs) == 18
    weights = {}
    for spins in itertools.product((-1, 1), repeat=9):
        at = {(i, j): spins[3 * i + j] for i in range(3) for j in range(3)}
        coupled = sum(at[a] * at[b] for a, b in map(tuple, pairs))
        weights[spins] = math.exp(0.4 * coupled + 0.2 * sum(spins))
    z = sum(weights.values())
    assert world.log_z == pytest.approx(math.log(z), abs=1e-12)
    assert len(world.configurations) == 512
    for row, value in zip(world.configurations.tolist(), world.log_p.tolist(), strict=True):
        assert value == pytest.approx(math.log(weights[tuple(2 * x - 1 for x in row)] / z), abs=1e-12)
    marginals = world.space.log_marginals(world.log_p)
    assert len(marginals) == 3**9
    up = math.log(sum(w for spins, w in weights.items() if spins[4] == 1 and spins[0] == -1) / z)
    state = torch.tensor([1, 0, 0, 0, 2, 0, 0, 0, 0])
    assert marginals[world.space.index(state)].item() == pytest.approx(up, abs=1e-12)
    with pytest.raises(InputError, match="side must be at least 3, got 2"):
        Ising(side=2)


def test_ising_draws_are_exact():
    world = Ising()
    draws = world.sample(50_000, generator=seeded())
    assert_drawn_from(draws, world.log_p, world.space)
