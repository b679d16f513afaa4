"""Effects of probability: regressions against scikit-learn and closed forms, contrasts against exact tests."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from sklearn.linear_model import LogisticRegression

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.scoring.score import score
from loglik.signals.detection import auroc, auroc_stderr
from loglik.signals.probability_effects import map_accuracy, probability_effects
from loglik.signals.stimuli import accuracy_by_band, matched_bands, paired_contrast


def labelled(values, units=None) -> LogLikelihood:
    value = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    units = torch.ones(len(value), dtype=torch.long) if units is None else torch.as_tensor(np.asarray(units))
    return LogLikelihood(value, Kind.EXACT, Unit.TOKEN, units)


def simulated(seed: int, n: int = 400, effects=(1.0, -0.5, 0.3), intercept: float = 0.4):
    """Correctness, outputs with lengths, and one covariate; logits from standardised predictors."""
    r = np.random.default_rng(seed)
    units = r.integers(5, 20, size=n)
    log_p = -3.0 * units + r.normal(0, 6, n)
    extra = r.exponential(2, n)
    columns = np.stack([log_p, units, extra], 1).astype(float)
    z = (columns - columns.mean(0)) / columns.std(0, ddof=1)
    right = r.random(n) < special.expit(intercept + z @ np.array(effects))
    return right, labelled(log_p, units), {"rarity": extra}, z


# ------------------------------------------------------------------ regression
@pytest.mark.parametrize("seed", range(4))
def test_maximum_likelihood_is_that_of_scikit_learn(seed):
    right, output, extra, z = simulated(seed)
    found = probability_effects(right, output, covariates=extra)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(z, right)
    assert [e.name for e in found.effects] == ["output log-probability", "output tokens", "rarity"]
    np.testing.assert_allclose([e.estimate for e in found.effects], peer.coef_[0], atol=2e-5)
    assert found.intercept.estimate == pytest.approx(peer.intercept_[0], abs=2e-5)
    eta = np.column_stack([np.ones(len(z)), z])
    p = special.expit(eta @ [found.intercept.estimate, *(e.estimate for e in found.effects)])
    errors = np.sqrt(np.diag(np.linalg.inv((eta * (p * (1 - p))[:, None]).T @ eta)))
    np.testing.assert_allclose([found.intercept.stderr, *(e.stderr for e in found.effects)], errors, rtol=1e-8)
    assert found.log_likelihood == pytest.approx(np.log(np.where(right, p, 1 - p)).sum(), abs=1e-8)
    for effect in found.effects:
        assert effect.low == pytest.approx(effect.estimate - stats.norm.ppf(0.975) * effect.stderr)
        assert effect.p_value == pytest.approx(2 * stats.norm.sf(abs(effect.estimate) / effect.stderr))
    assert found.auroc == auroc(output.value, right)
    assert found.auroc_stderr == auroc_stderr(output.value, right)


@pytest.mark.parametrize("strength", [0.1, 1.0, 30.0])
def test_ridge_is_that_of_scikit_learn(strength):
    right, output, extra, z = simulated(5, n=120)
    found = probability_effects(right, output, covariates=extra, prior="ridge", strength=strength)
    peer = LogisticRegression(C=1 / strength, tol=1e-10, max_iter=10_000).fit(z, right)
    np.testing.assert_allclose([e.estimate for e in found.effects], peer.coef_[0], atol=2e-5)
    assert found.intercept.estimate == pytest.approx(peer.intercept_[0], abs=2e-5)


def test_firth_maximises_the_likelihood_times_jeffreys_prior():
    right, output, extra, z = simulated(6, n=40)
    found = probability_effects(right, output, covariates=extra, prior="firth")
    x = np.column_stack([np.ones(len(z)), z])

    def loss(beta):
        eta = x @ beta
        p = special.expit(eta)
        information = (x * (p * (1 - p))[:, None]).T @ x
        return -special.log_expit(np.where(right, eta, -eta)).sum() - 0.5 * np.linalg.slogdet(information)[1]

    best = optimize.minimize(
        loss, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20_000}
    )
    np.testing.assert_allclose([found.intercept.estimate, *(e.estimate for e in found.effects)], best.x, atol=1e-5)


def test_firth_of_one_group_adds_a_half_to_each_count():
    """Two values of the predictor: each group's log-odds is log((k + 1/2) / (n - k + 1/2)), even for k = n."""
    log_p = np.repeat([-2.0, -1.0], [6, 9])
    right = np.array([1, 0, 0, 0, 0, 0] + [1] * 9)
    found = probability_effects(right, labelled(log_p), prior="firth")
    z = (log_p - log_p.mean()) / log_p.std(ddof=1)
    odds = [found.intercept.estimate + found["output log-probability"].estimate * v for v in (z[0], z[-1])]
    np.testing.assert_allclose(odds, [math.log(1.5 / 5.5), math.log(9.5 / 0.5)], atol=1e-8)


def test_separated_answers_need_a_prior():
    log_p = np.arange(10.0) - 20
    right = np.arange(10) > 5
    with pytest.raises(InputError, match=r"separate right from wrong.*set prior to firth or ridge"):
        probability_effects(right, labelled(log_p))
    for prior in ("firth", "ridge"):
        found = probability_effects(right, labelled(log_p), prior=prior)["output log-probability"]
        assert 0 < found.estimate < 10
        assert math.isfinite(found.high)
    # Separated up to a tie (quasi-separation) has no finite optimum either; one crossing has.
    tied = np.where(np.arange(10) == 6, log_p[5], log_p)
    with pytest.raises(InputError, match="separate"):
        probability_effects(right, labelled(tied))
    crossed = np.where(np.arange(10) == 9, -30.0, log_p)
    assert math.isfinite(probability_effects(right, labelled(crossed)).effects[0].estimate)


def test_scale_and_place_of_predictors_change_nothing():
    right, output, extra, _ = simulated(7)
    plain = probability_effects(right, output, covariates=extra)
    moved = labelled(output.value.numpy() / math.log(2) - 7, output.num_units)
    again = probability_effects(right, moved, covariates={"rarity": 100 - 3 * extra["rarity"]})
    for one, other, sign in zip(plain.effects, again.effects, (1, 1, -1), strict=True):
        assert other.estimate == pytest.approx(sign * one.estimate, abs=1e-9)
        assert other.stderr == pytest.approx(one.stderr, abs=1e-9)
    order = np.random.default_rng(0).permutation(len(right))
    shuffled = probability_effects(right[order], output[order], covariates={"rarity": extra["rarity"][order]})
    assert shuffled.effects[0].estimate == pytest.approx(plain.effects[0].estimate, abs=1e-9)


def test_p_values_are_uniform_where_probability_has_no_effect():
    """500 data sets whose answers follow length alone; level 0.001 for Kolmogorov-Smirnov, 3.5 errors for coverage."""
    p_values, covered = [], []
    for seed in range(1000, 1500):
        right, output, _, _ = simulated(seed, n=300, effects=(0.0, 0.8, 0.0))
        found = probability_effects(right, output)["output log-probability"]
        p_values.append(found.p_value)
        covered.append(found.low <= 0 <= found.high)
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    assert np.mean(covered) == pytest.approx(0.95, abs=3.5 * math.sqrt(0.95 * 0.05 / 500))


def test_inputs_and_their_lengths_are_predictors():
    r = np.random.default_rng(8)
    right, output, _, _ = simulated(8)
    given = labelled(r.normal(-50, 10, len(right)), np.full(len(right), 9))
    found = probability_effects(right, output, given)
    assert [e.name for e in found.effects] == ["output log-probability", "output tokens", "input log-probability"]
    assert found.dropped == ("input tokens",)
    bare = probability_effects(right, output, given, lengths=False)
    assert [e.name for e in bare.effects] == ["output log-probability", "input log-probability"]
    assert [row["name"] for row in bare.record()] == ["intercept", *(e.name for e in bare.effects)]
    with pytest.raises(InputError, match=r"no effect of 'input tokens' \(it is the same for all items\)"):
        found["input tokens"]


def test_regression_refuses_what_it_cannot_tell():
    right, output, extra, _ = simulated(9, n=60)
    for options, message in (
        ({"covariates": {"twice": 2 * output.value - 1}}, "'twice' is determined by output log-probability"),
        ({"covariates": {"output tokens": extra["rarity"]}}, "is already a predictor"),
        ({"covariates": {"short": [1.0, 2.0]}}, r"'short' must have shape \(60,\), got \(2,\)"),
        ({"input": output[:5]}, "there are 5 inputs for 60 answers"),
        ({"prior": "cauchy"}, "prior must be one of none, firth, ridge"),
        ({"level": 1.0}, "level must lie between 0 and 1"),
        ({"prior": "ridge", "strength": 0.0}, "strength must be positive"),
    ):
        with pytest.raises(InputError, match=message):
            probability_effects(right, output, **options)
    with pytest.raises(InputError, match="one class only"):
        probability_effects(np.ones(60), output)
    with pytest.raises(InputError, match="must be of one length"):
        probability_effects(right[:10], output)
    with pytest.raises(InputError, match="same log-probability"):
        probability_effects(right, labelled(np.full(60, -3.0), output.num_units))
    with pytest.raises(InputError, match="3 items cannot tell 3 coefficients"):
        probability_effects([1, 0, 1], labelled([-1.0, -2.0, -4.0], [1, 2, 4]))
    with pytest.raises(RowError, match="row 1: the log-likelihood of the output is -inf"):
        probability_effects([1, 0, 1], labelled([-1.0, -math.inf, -4.0]))
    with pytest.raises(RowError, match="row 0: the covariate 'x' is nan"):
        probability_effects(right, output, covariates={"x": [math.nan, *range(59)]})


# ------------------------------------------------------------------ bands
def test_bands_by_rank_and_by_name():
    log_p = np.array([-5.0, -1.0, -3.0, -2.0, -4.0, -6.0])
    right = [0, 1, 1, 1, 0, 0]
    low, middle, high = accuracy_by_band(right, labelled(log_p, [1, 2, 3, 4, 5, 6]), 3)
    assert [b.accuracy.value for b in (low, middle, high)] == [0.0, 0.5, 1.0]
    assert [b.log_prob for b in (low, middle, high)] == [-5.5, -3.5, -1.5]
    assert [b.num_units for b in (low, middle, high)] == [3.5, 4.0, 3.0]
    assert high.accuracy.low == pytest.approx(0.025 ** (1 / 2))  # Clopper-Pearson at k = n
    assert high.accuracy.high == 1.0
    (only,) = accuracy_by_band(right, labelled(log_p), [4, 4, -1, -1, 4, 4])
    assert (only.label, only.count, only.accuracy.value) == (4, 4, 0.25)


def test_equal_values_share_a_band():
    found = accuracy_by_band([1, 0, 1, 0], labelled([-1.0, -1.0, -1.0, -2.0]), 2)
    assert [(b.label, b.count) for b in found] == [(0, 1), (1, 3)]


def test_matched_bands_have_the_same_lengths_and_ordered_probabilities():
    r = np.random.default_rng(0)
    units = r.integers(3, 9, size=200)
    ll = labelled(-4.0 * units + r.normal(0, 5, 200), units)
    for bands in (2, 3, 5):
        labels = matched_bands(ll, bands).numpy()
        for size in np.unique(units):
            own = units == size
            counts = [int((labels[own] == b).sum()) for b in range(bands)]
            assert counts == [own.sum() // bands] * bands
            values = [ll.value.numpy()[own & (labels == b)] for b in range(bands)]
            assert all(a.max() <= b.min() for a, b in itertools.pairwise(values))
            # The ends of the ranking are in the outer bands.
            assert labels[own][ll.value.numpy()[own].argmin()] == 0
            assert labels[own][ll.value.numpy()[own].argmax()] == bands - 1
    by_other = matched_bands(ll, 2, lengths=np.zeros(200))
    assert int((by_other >= 0).sum()) == 200
    low, high = accuracy_by_band(np.arange(200) % 2, ll, matched_bands(ll, 2))
    assert low.num_units == high.num_units


def test_bands_refuse_what_is_no_band():
    ll = labelled([-1.0, -2.0, -3.0])
    for bands, message in (
        (4, "from 1 to the number of items, 3"),
        (0, "from 1 to the number of items"),
        ([0, 1], "must be 3 whole numbers"),
        ([0.5, 1, 2], "must be 3 whole numbers"),
        ([-1, -1, -1], "no item is in a band"),
    ):
        with pytest.raises(InputError, match=message):
            accuracy_by_band([0, 1, 0], ll, bands)
    with pytest.raises(InputError, match="bands must be at least 2"):
        matched_bands(ll, 1)
    with pytest.raises(InputError, match="no length has 2 items"):
        matched_bands(labelled([-1.0, -2.0], [1, 2]), 2)


# ------------------------------------------------------------------ paired contrasts
@pytest.mark.parametrize(("b", "c", "both", "neither"), [(9, 2, 20, 5), (3, 3, 0, 0), (0, 7, 1, 1), (51, 0, 0, 49)])
def test_contrast_is_the_exact_test_of_discordant_pairs(b, c, both, neither):
    first = [1] * b + [0] * c + [1] * both + [0] * neither
    second = [0] * b + [1] * c + [1] * both + [0] * neither
    found = paired_contrast(first, second)
    assert found.p_value == pytest.approx(stats.binomtest(b, b + c).pvalue)
    n = len(first)
    assert (found.only_first, found.only_second, found.count) == (b, c, n)
    assert found.difference.value == pytest.approx(found.first - found.second) == pytest.approx((b - c) / n)
    assert -1 <= found.difference.low <= found.difference.value <= found.difference.high <= 1
    back = paired_contrast(second, first)
    assert back.p_value == pytest.approx(found.p_value)
    assert back.difference.low == pytest.approx(-found.difference.high)


def test_interval_of_a_contrast_is_that_of_agresti_and_min():
    """9 and 2 discordant of 36: the Wald interval of the table with a half more in each cell."""
    found = paired_contrast([1] * 9 + [0] * 2 + [1] * 25, [0] * 9 + [1] * 2 + [1] * 25).difference
    b, c, n = 9.5, 2.5, 38.0
    width = stats.norm.ppf(0.975) * math.sqrt((b + c - (b - c) ** 2 / n) / n**2)
    assert (found.low, found.high) == pytest.approx(((b - c) / n - width, (b - c) / n + width))


def test_contrast_of_equal_answers_says_nothing():
    found = paired_contrast([1, 0, 1], [1, 0, 1])
    assert (found.p_value, found.difference.value) == (1.0, 0.0)


def test_interval_of_a_contrast_covers():
    """1,000 simulated tables: the 90 % interval misses 10 % of the time, within 3.5 errors (a little less is fine)."""
    r = np.random.default_rng(3)
    cells = r.multinomial(60, [0.2, 0.1, 0.4, 0.3], size=1000)
    missed = 0
    for b, c, both, neither in cells:
        first = np.repeat([1, 0, 1, 0], [b, c, both, neither])
        second = np.repeat([0, 1, 1, 0], [b, c, both, neither])
        found = paired_contrast(first, second, level=0.9).difference
        missed += not found.low <= 0.1 <= found.high
    assert 0.06 < missed / 1000 < 0.1 + 3.5 * math.sqrt(0.1 * 0.9 / 1000)


def test_contrast_refuses_what_is_no_pair():
    with pytest.raises(InputError, match="one length"):
        paired_contrast([1, 0], [1])
    with pytest.raises(InputError, match="first must be 0 or 1"):
        paired_contrast([2, 0], [1, 0])
    with pytest.raises(InputError, match="no items"):
        paired_contrast(np.zeros(0), np.zeros(0))
    with pytest.raises(InputError, match="level must lie"):
        paired_contrast([1], [0], level=0)


# ------------------------------------------------------------------ the Bayesian reading
def test_two_outputs_and_a_symmetric_error():
    """pi_1 eps < pi_2 (1 - eps): both are read, else the probable one is always said."""
    for prior, error in itertools.product((0.55, 0.8, 0.95), (0.01, 0.1, 0.3)):
        found = map_accuracy(np.log([prior, 1 - prior]), np.log([[1 - error, error], [error, 1 - error]]))
        read = prior * error < (1 - prior) * (1 - error)
        np.testing.assert_allclose(found, [1 - error, 1 - error] if read else [1, 0], atol=1e-12)


def test_letter_noise_on_a_markov_language_favours_probable_strings():
    """All strings of two letters out of three: accuracy against the enumeration, and 1 without noise."""
    r = np.random.default_rng(0)
    start, step = r.dirichlet(np.full(3, 0.5)), r.dirichlet(np.full(3, 0.5), size=3)
    strings = list(itertools.product(range(3), repeat=2))
    log_p = np.log([start[a] * step[a, b] for a, b in strings])

    def channel(error):
        letter = np.full((3, 3), error / 2) + np.eye(3) * (1 - 1.5 * error)
        return np.log([[letter[a, c] * letter[b, d] for c, d in strings] for a, b in strings])

    noisy = channel(0.4)
    found = map_accuracy(log_p, noisy)
    expected = [
        sum(
            math.exp(noisy[y, x])
            for x in range(9)
            if max(range(9), key=lambda other: log_p[other] + noisy[other, x]) == y
        )
        for y in range(9)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(map_accuracy(log_p, channel(1e-9)), np.ones(9), atol=1e-6)
    assert np.exp(log_p) @ found > found.mean() + 0.1  # probable strings are right more often
    # The prior's own accuracy is the largest that any decoder has.
    flat = (np.exp(noisy) * (noisy.argmax(0) == np.arange(9)[:, None])).sum(1)
    assert np.exp(log_p) @ found >= np.exp(log_p) @ flat - 1e-12


def test_the_regression_finds_the_leaking_prior():
    """Answers of that decoder: the effect of the output's probability is positive; of a blind one there is none."""
    r = np.random.default_rng(5)
    letters, error = 4, 0.45
    strings = list(itertools.product(range(letters), repeat=3))
    step = r.dirichlet(np.full(letters, 0.4), size=letters)
    log_p = np.log([step[0, a] * step[a, b] * step[b, c] for a, b, c in strings])
    letter = np.full((letters, letters), error / 3) + np.eye(letters) * (1 - error - error / 3)
    reading = np.log([[np.prod([letter[i, j] for i, j in zip(s, t, strict=True)]) for t in strings] for s in strings])
    accuracy = map_accuracy(log_p - special.logsumexp(log_p), reading)
    items = r.integers(len(strings), size=600)
    right = r.random(600) < accuracy[items]
    effect = probability_effects(right, labelled(log_p[items]))["output log-probability"]
    assert effect.low > 0
    blind = r.random(600) < accuracy.mean()
    assert probability_effects(blind, labelled(log_p[items]))["output log-probability"].p_value > 0.001


def test_decoder_refuses_what_is_no_distribution():
    for prior, channel, message in (
        ([0.0], [[0.0, 0.0]], "log_channel in row 0 sum to 2"),
        ([math.log(0.4), math.log(0.5)], np.log(np.full((2, 2), 0.5)), "log_prior in row 0 sum to 0.9"),
        ([0.0], np.log(np.full((2, 2), 0.5)), "do not fit"),
        ([math.nan], [[0.0]], "log_prior in row 0 sum to nan"),
    ):
        with pytest.raises(InputError, match=message):
            map_accuracy(prior, channel)


# ------------------------------------------------------------------ the scores that go in
def test_log_probability_of_a_text_is_the_loss_times_its_tokens_but_one(tiny):
    """Without BOS the first token is unscored; with it, its log-probability after BOS is added."""
    text = "for i in range(10):\n    print(i)"
    ids = torch.tensor([tiny.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        loss = tiny.model(input_ids=ids, labels=ids).loss
        first = tiny.model(input_ids=torch.tensor([[tiny.tokenizer.bos_token_id]])).logits[0, -1].log_softmax(-1)
        led = torch.cat([torch.tensor([[tiny.tokenizer.bos_token_id]]), ids], 1)
        rest = tiny.model(input_ids=led).logits[0, 1:-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    bare = score(tiny, [text], bos="never")
    assert float(bare.value) == pytest.approx(-float(loss) * (ids.shape[1] - 1), abs=1e-3)
    assert bare.num_units.tolist() == [ids.shape[1] - 1]
    whole = score(tiny, [text], bos="always")
    assert float(whole.value) == pytest.approx(float(first[ids[0, 0]] + rest), abs=1e-3)


# ------------------------------------------------------------------ published items
def test_published_cipher_items(shared_data):
    """GPT-4 decoding rot-13: accuracies by level, the regression and the AUROC of the output's probability."""
    table = np.genfromtxt(shared_data / "embers" / "table_rot13dec_gpt-4-0613.tsv", names=True, delimiter="\t")
    output = labelled(table["output_logprob"], table["output_ntokens"].astype(int))
    given = labelled(table["input_logprob"], table["input_ntokens"].astype(int))
    found = probability_effects(table["correct"], output, given, covariates={"input characters": table["input_nchars"]})
    effect = found["output log-probability"]
    assert effect.estimate == pytest.approx(1.93, abs=0.02)
    assert effect.stderr == pytest.approx(0.34, abs=0.02)
    assert found.auroc == pytest.approx(0.778, abs=0.001)
    level = np.repeat([2, 1, 0], 100)
    assert [b.accuracy.value for b in accuracy_by_band(table["correct"], output, level)] == [0.13, 0.22, 0.51]
