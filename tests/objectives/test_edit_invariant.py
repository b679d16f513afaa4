"""The edit-invariant loss against enumeration, a double loop, cross-entropy and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.dense import target_logits
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.objectives.edit_invariant import edit_invariant, eisl, ngram_match_log_probs
from zoo import CAUSAL, MASKED, SEQ2SEQ, build

SELECTIONS = ["gumbel", "softmax", "uniform", "logsumexp"]


def problem(seed, rows, positions, length, vocabulary, *, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, positions, vocabulary, generator=generator, dtype=torch.float64)
    return logits.to(dtype).log_softmax(-1), torch.randint(vocabulary, (rows, length), generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ matching
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(7, 5), (5, 8), (5, 5)])
def test_matches_equal_a_double_loop_and_a_convolution(n, shape):
    positions, length = shape
    log_probs, targets = problem(0, 2, positions, length, 4)
    got = ngram_match_log_probs(log_probs, targets, n)
    assert got.shape == (2, positions - n + 1, length - n + 1)
    for b, p, i in itertools.product(range(2), range(positions - n + 1), range(length - n + 1)):
        want = sum(float(log_probs[b, p + j, targets[b, i + j]]) for j in range(n))
        assert got[b, p, i].item() == pytest.approx(want, abs=1e-12)
    gathered = torch.stack([log_probs[b][:, targets[b]] for b in range(2)])[:, None]
    convolved = torch.nn.functional.conv2d(gathered, torch.eye(n, dtype=torch.float64)[None, None])[:, 0]
    torch.testing.assert_close(got, convolved)


def occurrences(gram, sequence) -> int:
    n = len(gram)
    return sum(tuple(sequence[i : i + n]) == gram for i in range(len(sequence) - n + 1))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_enumerated_sequences_give_the_expected_count_and_its_bound(n):
    """Independent positions, V = 3 and T = 4: sums of matches are E[C] exactly, and Jensen's inequality holds."""
    positions, vocabulary = 4, 3
    log_probs, targets = problem(1, 1, positions, 4, vocabulary)
    log_g = ngram_match_log_probs(log_probs, targets, n)[0]
    exact = []
    for i in range(4 - n + 1):
        gram = tuple(targets[0, i : i + n].tolist())
        expected = 0.0
        for sequence in itertools.product(range(vocabulary), repeat=positions):
            probability = math.exp(sum(float(log_probs[0, t, v]) for t, v in enumerate(sequence)))
            expected += probability * occurrences(gram, sequence)
        assert log_g[:, i].exp().sum().item() == pytest.approx(expected, rel=1e-12)
        count = positions - n + 1
        assert -math.log(expected) <= float(-log_g[:, i].mean()) - math.log(count) + 1e-12
        exact.append(-math.log(expected))
    got = eisl(log_probs, targets, ngrams=[n], position_selection="logsumexp")
    assert got.item() == pytest.approx(sum(exact) / len(exact), rel=1e-12)


# ------------------------------------------------------------------ the loss
def reference(log_probs, targets, n, choose):
    """One row by loops: mean over target n-grams of the chosen cost."""
    positions, length = log_probs.shape[0] - n + 1, len(targets) - n + 1
    costs = []
    for i in range(length):
        mean = torch.stack([sum(log_probs[p + j, targets[i + j]] for j in range(n)) / n for p in range(positions)])
        costs.append(choose(mean, i))
    return sum(costs) / length


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("sharpen", [False, True])
def test_choices_of_position_by_loops(tau, sharpen):
    log_probs, targets = problem(2, 1, 6, 5, 4)
    for n in (1, 2, 4):
        factor = n if sharpen else 1

        def soft(mean, _, factor=factor):
            return -((mean * factor / tau).softmax(0) * mean).sum()

        options = {"ngrams": [n], "tau": tau, "sharpen": sharpen}
        got = eisl(log_probs, targets, position_selection="softmax", **options)
        torch.testing.assert_close(got[0], reference(log_probs[0], targets[0], n, soft))
        got = eisl(log_probs, targets, position_selection="uniform", **options)
        torch.testing.assert_close(got[0], reference(log_probs[0], targets[0], n, lambda mean, _: -mean.mean()))
        noise = -torch.empty(1, 6 - n + 1, 5 - n + 1, dtype=torch.float64).exponential_(generator=seeded()).log()

        def noisy(mean, i, factor=factor, noise=noise):
            return -(((mean * factor + noise[0, :, i]) / tau).softmax(0) * mean).sum()

        got = eisl(log_probs, targets, position_selection="gumbel", generator=seeded(), **options)
        torch.testing.assert_close(got[0], reference(log_probs[0], targets[0], n, noisy))


def test_noise_is_gumbels():
    """A hard choice (tau to 0) between two positions falls as the probabilities say: 5 standard errors, one seed."""
    log_probs = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]], dtype=torch.float64).log().expand(20000, 2, 2)
    targets = torch.zeros(20000, 1, dtype=torch.long)
    got = eisl(log_probs, targets, ngrams=[1], tau=1e-4, generator=seeded(3)).exp().reciprocal()
    second = (got - 0.6).abs() < 1e-6
    share = second.double().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 20000)
    assert ((got - 0.2).abs() < 1e-6)[~second].double().mean() > 0.99


@pytest.mark.parametrize("selection", ["gumbel", "softmax", "uniform"])
def test_one_position_is_mean_cross_entropy_whatever_the_noise(selection):
    """n = T = S, asked for as 0 and by number; and n = 1 with one token."""
    log_probs, targets = problem(4, 3, 5, 5, 6, dtype=torch.float32)
    want = torch.nn.functional.cross_entropy(log_probs.transpose(1, 2), targets, reduction="none").mean(1)
    for n in (0, 5):
        got = eisl(log_probs, targets, ngrams=[n], position_selection=selection, generator=seeded())
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    got = eisl(log_probs[:, :1], targets[:, :1], ngrams=[1], position_selection=selection)
    torch.testing.assert_close(got, -log_probs[:, 0].gather(1, targets[:, :1])[:, 0], atol=1e-6, rtol=0)
    exact = eisl(log_probs, targets, ngrams=[5], position_selection="logsumexp")
    torch.testing.assert_close(exact, 5 * want, atol=1e-5, rtol=0)


def test_lengths_from_the_end_and_weights():
    log_probs, targets = problem(5, 2, 6, 5, 4)

    def loss(**options):
        return eisl(log_probs, targets, position_selection="softmax", **options)

    torch.testing.assert_close(loss(ngrams=[-2, 0]), loss(ngrams=[3, 5]))
    two, three = loss(ngrams=[2]), loss(ngrams=[3])
    torch.testing.assert_close(loss(ngrams=[2, 3]), (two + three) / 2)
    torch.testing.assert_close(loss(ngrams=[2, 3], weights=[0.5, 2.0]), 0.5 * two + 2.0 * three)
    # What does not fit is left out, and its weight goes to the others.
    torch.testing.assert_close(loss(ngrams=[2, 6, 9, -7]), two)
    torch.testing.assert_close(loss(ngrams=[2, 3, 6], weights=[1.0, 2.0, 3.0]), (two + 2 * three) / 3 * 6)


@pytest.mark.parametrize("selection", ["softmax", "uniform", "logsumexp"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_padding_changes_nothing(selection, side):
    """A row alone equals the row in a padded batch, in value and gradient, with lengths counted per row."""
    lengths, positions, vocabulary = [4, 7, 2], [6, 5, 8], 5
    options = {"ngrams": [1, 2, 4, 0, -1], "weights": [1.0, 2.0, 0.5, 0.7, 0.3], "position_selection": selection}
    alone, padded, targets = [], [], torch.full((3, 9), 3)
    target_mask, position_mask = torch.zeros(3, 9, dtype=torch.bool), torch.zeros(3, 10, dtype=torch.bool)
    wide = torch.zeros(3, 10, vocabulary, dtype=torch.float64).log_softmax(-1)
    for b, (s, t) in enumerate(zip(lengths, positions, strict=True)):
        log_probs, row = problem(10 + b, 1, t, s, vocabulary)
        log_probs.requires_grad_()
        loss = eisl(log_probs, row, **options)
        alone.append((loss, torch.autograd.grad(loss.sum(), log_probs)[0][0]))
        at_t = slice(10 - t, 10) if side == "left" else slice(0, t)
        at_s = slice(9 - s, 9) if side == "left" else slice(0, s)
        wide[b, at_t] = log_probs.detach()[0]
        targets[b, at_s] = row[0]
        target_mask[b, at_s], position_mask[b, at_t] = True, True
        padded.append(at_t)
    wide.requires_grad_()
    got = eisl(wide, targets, target_mask=target_mask, position_mask=position_mask, **options)
    torch.testing.assert_close(got, torch.cat([loss for loss, _ in alone]))
    gradient = torch.autograd.grad(got.sum(), wide)[0]
    for b, at in enumerate(padded):
        torch.testing.assert_close(gradient[b, at], alone[b][1])
    assert (gradient[~position_mask] == 0).all()


def test_ngrams_across_a_hole_do_not_count():
    log_probs, targets = problem(6, 1, 5, 5, 4)
    mask = torch.tensor([[True, True, False, True, True]])
    got = eisl(log_probs, targets, ngrams=[2], target_mask=mask, position_selection="softmax")
    mean = ngram_match_log_probs(log_probs, targets, 2)[0] / 2
    costs = -(mean.softmax(0) * mean).sum(0)
    torch.testing.assert_close(got[0], (costs[0] + costs[3]) / 2)
    holed = eisl(log_probs, targets, ngrams=[2], position_mask=mask, position_selection="softmax")
    two = mean[[0, 3]]
    torch.testing.assert_close(holed[0], -(two.softmax(0) * two).sum(0).mean())
    # No two positions side by side are left: only single tokens are.
    sparse = torch.tensor([[True, False, True, False, True]])
    got, want = (
        eisl(log_probs, targets, ngrams=ngrams, position_mask=sparse, position_selection="softmax")
        for ngrams in ([1, 2], [1])
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("sharpen", [False, True])
def test_gradients_by_finite_differences(selection, sharpen):
    """With the noise held fixed; the choice of position is differentiated too."""
    generator = seeded(7)
    logits = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(3, (2, 5), generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])

    def function(z):
        return eisl(
            z.log_softmax(-1),
            targets,
            ngrams=[1, 2, 3],
            target_mask=mask,
            position_selection=selection,
            sharpen=sharpen,
            generator=seeded(8),
        )

    assert torch.autograd.gradcheck(function, [logits])


def test_the_floor_bounds_the_loss_and_stops_the_gradient():
    logits = torch.tensor([[[0.0, 1e4, 0.0]] * 4], requires_grad=True)
    targets = torch.tensor([[0, 2, 0, 2]])
    for selection in SELECTIONS:
        loss = eisl(logits.log_softmax(-1), targets, ngrams=[2], position_selection=selection)
        assert loss.isfinite().all()
        assert loss.item() == pytest.approx(40 - math.log(3) if selection == "logsumexp" else 20, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert (gradient == 0).all()
    low = eisl(logits.log_softmax(-1), targets, ngrams=[2], floor=-5.0, position_selection="softmax")
    assert low.item() == pytest.approx(5.0)


def test_edits_cost_cross_entropy_much_more():
    """A perfect model of y, edited targets: cross-entropy rises at least 5 times as much as the bigram loss."""
    length, vocabulary = 10, 20
    y = torch.randperm(vocabulary, generator=seeded(9))[:length]
    probs = torch.full((length, vocabulary), 0.01 / (vocabulary - 1), dtype=torch.float64)
    probs[torch.arange(length), y] = 0.99
    log_probs = probs.log()[None]
    edited = {
        "shifted": y.roll(1),
        "repeated": torch.cat([y[:1], y[:-1]]),
        "swapped": torch.cat([y[5:], y[:5]]),
    }

    def losses(target):
        return [eisl(log_probs, target[None], ngrams=[n], position_selection="softmax").item() for n in (0, 2)]

    clean = losses(y)
    for target in edited.values():
        entropy, edit = (now - before for now, before in zip(losses(target), clean, strict=True))
        assert entropy > 5
        assert entropy >= 5 * edit > 0


# ------------------------------------------------------------------ in the training loop
ROWS = [[5, 9, 4, 12, 17, 3, 8], [6, 11, 19, 4], [7, 3, 3, 14, 11, 9]]
STARTS = [3, 1, 2]


@pytest.mark.parametrize("family", ["causal", "seq2seq"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_form_is_the_loss_of_each_rows_scored_tokens(family, side):
    vocabulary = 20
    table, wrap, name = (CAUSAL, CausalLM, "llama") if family == "causal" else (SEQ2SEQ, Seq2SeqLM, "t5")
    model = wrap(build(table[name], vocabulary, gain=2.0))
    batch = TokenBatch.from_lists(ROWS, starts=STARTS, padding_side=side, pad_id=9)
    options = {"ngrams": (1, 2, 0), "weights": (0.2, 0.3, 0.5), "position_selection": "softmax", "tau": 0.7}
    options["floor"] = -3.0
    terms = edit_invariant(model, batch, weight=0.6, ce_weight=0.25, **options)
    logits = target_logits(model, batch)
    want, nll, count = [], [], 0
    for b in range(len(batch)):
        scored = batch.scored_mask[b]
        log_probs, targets = logits[b, scored].log_softmax(-1), batch.ids[b, scored]
        want.append(eisl(log_probs[None], targets[None], **options))
        nll.append(-log_probs.gather(1, targets[:, None]).sum())
        count += len(targets)
    expected = 0.6 * torch.cat(want).mean() + 0.25 * sum(nll) / count
    torch.testing.assert_close(terms.mean(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.metrics["eisl"], torch.cat(want), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        terms.metrics["nats_per_unit"], -model.log_prob(batch).mean_per_unit().value.detach() * 1
    )
    parameter = next(model.model.parameters())
    got, ref = (torch.autograd.grad(value, parameter)[0] for value in (terms.mean(), expected))
    torch.testing.assert_close(got, ref, atol=1e-5, rtol=1e-4)


def test_training_form_without_cross_entropy_has_one_mean():
    model = CausalLM(build(CAUSAL["gpt2"], 20))
    batch = TokenBatch.from_lists(ROWS, starts=STARTS)
    terms = edit_invariant(model, batch, ngrams=[0], ce_weight=0.0)
    assert len(list(terms.parts())) == 1
    torch.testing.assert_close(terms.loss, -model.log_prob(batch).mean_per_unit().value, atol=1e-4, rtol=1e-5)
    assert terms.weight.tolist() == [1.0] * 3
    both = edit_invariant(model, batch, ngrams=[0])
    assert [part.weight.tolist() for part in both.parts()] == [[1.0] * 3, [4.0, 3.0, 4.0]]
    assert not any(part.weight.requires_grad for part in both.parts())


def test_training_form_knows_an_unscored_token_inside():
    """N-grams across it are left out: only single tokens are left of a row that is scored at every second place."""
    model = CausalLM(build(CAUSAL["gpt2"], 20))
    whole = TokenBatch.from_lists(ROWS[:1], starts=[2])
    scored = whole.scored_mask & (torch.arange(7) % 2 == 0)
    batch = TokenBatch(whole.ids, whole.attention_mask, scored, whole.starts)
    one = edit_invariant(model, batch, ngrams=[1], position_selection="softmax", ce_weight=0.0).loss
    torch.testing.assert_close(
        edit_invariant(model, batch, ngrams=[1, 2], position_selection="softmax", ce_weight=0.0).loss, one
    )
    with pytest.raises(InputError, match="row 0 has 3 target tokens at 3 positions, too few for n-grams of 2"):
        edit_invariant(model, batch, ngrams=[2])


# ------------------------------------------------------------------ refusals
def test_refusals():
    log_probs, targets = problem(11, 2, 5, 4, 6)
    cases = [
        ({"log_probs": log_probs + 3}, "row 0 has a log-probability of .*; give log_softmax outputs"),
        ({"log_probs": log_probs * math.nan}, "log-probability of nan"),
        ({"log_probs": log_probs.bfloat16()}, "needs float32 or float64"),
        ({"log_probs": log_probs[0]}, r"needs log_probs \(B, T, V\)"),
        ({"log_probs": log_probs[:, :0]}, "at least one row, position and target"),
        ({"targets": targets - 9}, "no token of the vocabulary of 6"),
        ({"ngrams": []}, "ngrams must be whole numbers"),
        ({"ngrams": [2.0]}, "ngrams must be whole numbers"),
        ({"ngrams": [5]}, "row 0 has 4 target tokens at 5 positions, too few for n-grams of 5: add 1 to ngrams"),
        ({"weights": [1.0]}, "3 lengths of n-grams need as many weights, got 1"),
        ({"weights": [1.0, 0.0, 1.0]}, "weights must be positive"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"floor": 0.0}, "floor must be negative and finite"),
        ({"floor": -math.inf}, "floor must be negative and finite"),
        ({"position_selection": "hard"}, "position_selection must be one of gumbel"),
        ({"target_mask": torch.ones(2, 5, dtype=torch.bool)}, "target_mask must be bool of shape"),
        ({"position_mask": torch.ones(2, 5)}, "position_mask must be bool of shape"),
    ]
    for change, match in cases:
        given = {"log_probs": log_probs, "targets": targets} | change
        with pytest.raises(InputError, match=match):
            eisl(given.pop("log_probs"), given.pop("targets"), **given)
    for n in (0, 5):
        with pytest.raises(InputError, match="n must lie between 1 and 4"):
            ngram_match_log_probs(log_probs, targets, n)


def test_refusals_in_training():
    model, batch = CausalLM(build(CAUSAL["gpt2"], 20)), TokenBatch.from_lists(ROWS, starts=STARTS)
    for options in ({"weight": 0.0}, {"ce_weight": -1.0}, {"ce_weight": math.inf}):
        with pytest.raises(InputError, match="weight must be positive and ce_weight at least 0"):
            edit_invariant(model, batch, **options)
    with pytest.raises(InputError, match="row 1 has no scored token"):
        edit_invariant(model, TokenBatch.from_lists([[5, 6], [7, 8]], starts=[1, 2]), ngrams=[1])
    with pytest.raises(InputError, match="floor must be negative"):
        edit_invariant(model, batch, floor=1.0)
    masked = MaskedLM(build(MASKED["bert"], 20), mask_token_id=1)
    with pytest.raises(InputError, match=r"the edit-invariant loss needs a logit.*MaskedLM"):
        edit_invariant(masked, batch)
