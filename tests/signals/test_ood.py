"""Out-of-distribution scores by enumeration, closed forms, and what a change of measure must give."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import Tensor, nn

from loglik.errors import InputError, LoglikError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.signals.detection import auroc
from loglik.signals.ood import (
    likelihood_ratio,
    likelihood_regret,
    likelihood_score,
    ood_scores,
    ood_threshold,
    perplexity_score,
    question_answer_ratios,
    typicality,
    typicality_test,
)
from zoo import CAUSAL, build

V = 30
ROWS = [[5, 9, 2, 11, 7, 3], [8, 8, 1], [20, 4, 4, 21]]


def likelihood(rows: list[list[float]], *, kind: Kind = Kind.EXACT) -> LogLikelihood:
    width = max(map(len, rows)) + 1
    terms = torch.zeros(len(rows), width, dtype=torch.float64)
    for row, values in zip(terms, rows, strict=True):
        if values:
            row[1 : len(values) + 1] = torch.tensor(values, dtype=torch.float64)
    mask = (torch.arange(width) >= 1) & (torch.arange(width) <= torch.tensor([len(row) for row in rows])[:, None])
    return LogLikelihood.from_per_unit(terms, mask, kind=kind)


def causal(seed: int = 0) -> CausalLM:
    return CausalLM(build(CAUSAL["gpt2"], V, seed=seed))


# ---------------------------------------------------------------------- a world of 81 sequences
SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=4)))


def markov(seed: int) -> LogLikelihood:
    """All 81 sequences under a random first-order chain, from its tables."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(3, dtype=torch.float64, generator=generator).log_softmax(-1)
    step = torch.randn(3, 3, dtype=torch.float64, generator=generator).log_softmax(-1)
    terms = torch.cat([first[SEQUENCES[:, :1]], step[SEQUENCES[:, :-1], SEQUENCES[:, 1:]]], 1)
    return LogLikelihood.from_per_unit(terms, torch.ones_like(SEQUENCES, dtype=torch.bool))


def table(log_p: Tensor) -> LogLikelihood:
    count = torch.full((len(log_p),), 4)
    return LogLikelihood(log_p, Kind.EXACT, Unit.TOKEN, count)


def test_ratio_by_enumeration():
    inside, outside = markov(0), markov(1)
    s = likelihood_ratio(inside, outside)
    p, q = inside.value.exp(), outside.value.exp()
    assert p.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(s.value, outside.value - inside.value)
    assert s.kind is Kind.EXACT
    assert (p * s.value).sum().item() == pytest.approx(-stats.entropy(p.numpy(), q.numpy()))
    assert (q * s.value).sum().item() == pytest.approx(stats.entropy(q.numpy(), p.numpy()))
    assert (p * s.value.exp()).sum().item() == pytest.approx(1.0)  # change of measure


def test_base_that_is_a_mixture_ranks_as_the_optimal_test():
    inside, outside = markov(0), markov(1)
    base = table(torch.logaddexp(inside.value, outside.value) - math.log(2))
    s = likelihood_ratio(table(inside.value), base).value
    optimal = outside.value - inside.value
    assert bool((s[optimal.argsort()].diff() >= -1e-12).all())
    assert bool((optimal[s.argsort()].diff() >= -1e-12).all())
    drawn = torch.cat(
        [torch.multinomial(ll.value.exp(), 400, replacement=True, generator=torch.Generator().manual_seed(i))
         for i, ll in enumerate((outside, inside))]
    )  # fmt: skip
    labels = torch.arange(800) < 400
    best = auroc(optimal[drawn].round(decimals=9), labels)
    assert auroc(s[drawn].round(decimals=9), labels) == pytest.approx(best)
    assert best > auroc(-inside.value[drawn], labels)


def test_same_model_says_nothing():
    s = likelihood_ratio(markov(0), markov(0)).value
    assert s.tolist() == [0.0] * 81
    assert auroc(s, torch.arange(81) < 40) == 0.5


def test_closed_forms():
    finetuned, base = likelihood([[-1.0, -2.0, -3.0], [-4.0]]), likelihood([[-2.0, -2.0, -5.0], [-1.0]])
    assert likelihood_ratio(finetuned, base).value.tolist() == [-3.0, 3.0]
    assert likelihood_ratio(finetuned, base, normalise="token").value.tolist() == [-1.0, 3.0]
    assert likelihood_score(finetuned).value.tolist() == [6.0, 4.0]
    assert likelihood_score(finetuned, normalise="token").value.tolist() == [2.0, 4.0]
    torch.testing.assert_close(
        perplexity_score(finetuned).value.log(), likelihood_score(finetuned, normalise="token").value
    )


def test_kinds():
    exact, bound = likelihood([[-1.0]]), likelihood([[-2.0]], kind=Kind.LOWER_BOUND)
    assert likelihood_ratio(exact, bound).kind is Kind.LOWER_BOUND
    assert likelihood_ratio(bound, exact).kind is Kind.UPPER_BOUND
    assert likelihood_ratio(bound, bound).kind is Kind.SURROGATE
    assert likelihood_score(bound).kind is Kind.UPPER_BOUND
    assert typicality(exact, exact).kind is Kind.ESTIMATE
    assert typicality(exact, bound).kind is Kind.SURROGATE


def test_loss_of_transformers_times_its_tokens():
    """T - 1 tokens are scored, not T."""
    model = causal()
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            loss = model.model(input_ids=ids, labels=ids).loss.item()
            ll = model.log_prob(TokenBatch.from_lists([row]))
        assert likelihood_score(ll).item() == pytest.approx(loss * (len(row) - 1), rel=1e-5)
        assert likelihood_score(ll, normalise="token").item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("normalise", ["sum", "token"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_change_nothing(normalise, side):
    model, base = causal(), causal(1)
    together = ood_scores(model, TokenBatch.from_lists(ROWS, padding_side=side), base=base, normalise=normalise)
    for number, row in enumerate(ROWS):
        alone = ood_scores(model, TokenBatch.from_lists([row]), base=base, normalise=normalise)
        for name, score in alone.items():
            assert together[name].value[number].item() == pytest.approx(score.item(), rel=1e-4, abs=1e-4)


# ---------------------------------------------------------------------- question and answer
def test_conditional_ratio_is_that_of_the_answer_given_the_question():
    model, base = causal(), causal(1)
    starts = [3, 1, 2]
    batch = TokenBatch.from_lists(ROWS)
    answer = (torch.arange(batch.ids.shape[1]) >= torch.tensor(starts)[:, None]) & batch.attention_mask
    with torch.no_grad():
        found = question_answer_ratios(model.log_prob(batch)[[0, 2]], base.log_prob(batch)[[0, 2]], answer[[0, 2]])
        given = TokenBatch.from_lists([ROWS[0], ROWS[2]], starts=[3, 2])
        conditional = likelihood_ratio(model.log_prob(given), base.log_prob(given))
        questions = TokenBatch.from_lists([ROWS[0][:3], ROWS[2][:2]])
        question = likelihood_ratio(model.log_prob(questions), base.log_prob(questions))
    torch.testing.assert_close(found["a|q"].value, conditional.value, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["q"].value, question.value, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["qa"].value, found["q"].value + found["a|q"].value, atol=1e-4, rtol=0)


def test_forms_per_token_count_their_own_tokens():
    finetuned, base = likelihood([[-1.0, -2.0, -3.0, -4.0]]), likelihood([[-2.0, -2.0, -3.0, -1.0]])
    answer = torch.tensor([[False, False, True, True, True]])
    found = question_answer_ratios(finetuned, base, answer, normalise="token")
    assert {name: score.item() for name, score in found.items()} == {"qa": 0.5, "q": -1.0, "a|q": 1.0}


# ---------------------------------------------------------------------- typicality
def test_typicality_is_the_distance_from_the_entropy_rate():
    held_out = likelihood([[-1.0, -1.0, -1.0], [-5.0]])  # 8 nats in 4 tokens
    rows = likelihood([[-2.0, -2.0], [-0.5], [-3.0]])
    assert typicality(rows, held_out).value.tolist() == [0.0, 1.5, 1.0]
    assert typicality(rows, held_out, normalise="sum").value.tolist() == [0.0, 3.5, 1.0]  # 4 nats a row


def test_typicality_of_a_known_source_is_small_for_its_samples():
    """A chain's samples against the constant sequence, which is likelier than any of them."""
    p = torch.tensor([0.6, 0.4], dtype=torch.float64)
    draws = torch.multinomial(p.expand(300, -1), 200, replacement=True, generator=torch.Generator().manual_seed(0))
    samples, constant = p.log()[draws], p.log()[torch.zeros(1, 200, dtype=torch.long)]

    def ll(terms: Tensor) -> LogLikelihood:
        return LogLikelihood.from_per_unit(terms, torch.ones_like(terms, dtype=torch.bool))

    held_out, rows = ll(samples[:150]), ll(samples[150:])
    entropy = -(p * p.log()).sum()
    assert typicality(ll(constant), held_out).item() == pytest.approx((entropy + p[0].log()).abs().item(), abs=0.01)
    assert typicality(ll(constant), held_out).item() > typicality(rows, held_out).value.max()
    assert likelihood_score(ll(constant)).item() < likelihood_score(rows).value.min()  # the likelihood is misled


def test_typicality_test_compares_all_groupings():
    """Few rows: the random groupings come near all of them."""
    group, held = [-1.0, -4.0], [-1.5, -2.0, -2.5, -0.5]
    statistic, p = typicality_test(
        likelihood([[x] for x in group]), likelihood([[x] for x in held]), permutations=20_000
    )
    every = group + held
    distances = [abs(np.mean(chosen) - (sum(every) - sum(chosen)) / 4) for chosen in itertools.combinations(every, 2)]
    want = np.mean(np.array(distances) >= statistic - 1e-9)
    assert statistic == pytest.approx(abs(np.mean(group) - np.mean(held)))
    assert p == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / 20_000))


def test_typicality_p_values_are_uniform_under_the_null():
    """Kolmogorov-Smirnov at 0.01 over 500 groups from where the held-out rows come from."""
    random = np.random.default_rng(5)
    p = []
    for seed in range(500):
        rows = [[x] for x in -random.gamma(2.0, size=35)]
        found = typicality_test(likelihood(rows[:5]), likelihood(rows[5:]), permutations=99, seed=seed)[1]
        p.append(found - random.random() / 100)
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_groups_that_are_too_likely_are_rejected_too():
    random = np.random.default_rng(6)
    held_out = likelihood([[x] for x in -random.gamma(4.0, size=100)])
    for shift in (-3.0, 3.0):
        group = likelihood([[x + shift] for x in -random.gamma(4.0, size=20)])
        assert typicality_test(group, held_out, permutations=199)[1] == 1 / 200


# ---------------------------------------------------------------------- regret
class Unigram(nn.Module):
    """One free distribution over tokens: its best fit to a row is the row's own frequencies."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(2))


@dataclass
class UnigramModel:
    model: Unigram
    kind: Kind = Kind.EXACT
    unit: Unit = Unit.TOKEN
    seen: list[bool] = field(default_factory=list)

    def log_prob(self, x: TokenBatch, *, draws: object = None) -> LogLikelihood:
        self.seen.append(self.model.training)
        terms = self.model.logits.log_softmax(-1)[x.ids]
        return LogLikelihood.from_per_unit(terms, x.scored_mask & x.attention_mask, kind=self.kind)


LOGITS = [0.5, -0.5, 0.0, 1.0]


def test_regret_reaches_the_best_fit():
    model = UnigramModel(Unigram(LOGITS))
    rows = [[0, 1, 1, 2], [3, 3, 0, 3, 1, 3]]
    batch = TokenBatch.from_lists(rows, scored_from=[0, 0])
    before = model.log_prob(batch).value.detach()
    best = torch.tensor(
        [sum(n * math.log(n / len(row)) for n in (row.count(v) for v in set(row))) for row in rows],
        dtype=torch.float64,
    )
    regrets = [likelihood_regret(model, batch, steps=s, learning_rate=0.1).value for s in (1, 10, 400)]
    for fewer, more in itertools.pairwise(regrets):
        assert bool((fewer <= more + 1e-12).all())
    assert bool((regrets[0] > 0).all())
    assert bool((regrets[-1] <= best - before + 1e-9).all())
    torch.testing.assert_close(regrets[-1], best - before, atol=1e-2, rtol=0)
    tokens = likelihood_regret(model, batch, steps=10, learning_rate=0.1, normalise="token").value
    torch.testing.assert_close(tokens * torch.tensor([4, 6]), regrets[1])


def test_regret_leaves_the_model_as_it_was():
    model = UnigramModel(Unigram(LOGITS).train())
    model.model.unused.requires_grad_(False)
    model.model.logits.grad = torch.ones(4, dtype=torch.float64)
    batch = TokenBatch.from_lists([[0, 1, 1, 2]], scored_from=[0])
    found = likelihood_regret(model, batch)
    assert found.kind is Kind.LOWER_BOUND
    assert model.model.logits.tolist() == LOGITS
    assert model.model.logits.grad.tolist() == [1.0] * 4
    assert model.model.logits.requires_grad
    assert not model.model.unused.requires_grad
    assert model.model.training
    assert not any(model.seen)
    bounded = UnigramModel(Unigram(LOGITS), kind=Kind.LOWER_BOUND)
    assert likelihood_regret(bounded, batch).kind is Kind.SURROGATE


def test_regret_of_a_row_does_not_depend_on_the_others():
    model = causal()
    batch = TokenBatch.from_lists(ROWS)
    whole = likelihood_regret(model, batch, steps=3).value
    alone = torch.cat([likelihood_regret(model, TokenBatch.from_lists([row]), steps=3).value for row in ROWS])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-4)
    head = [model.model.lm_head.weight]
    some = likelihood_regret(model, batch, steps=3, parameters=head).value
    assert bool((some > 0).all())
    assert bool((some < whole).all())


# ---------------------------------------------------------------------- threshold
@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (9, 0.1), (50, 0.05), (100, 0.3)])
def test_threshold_keeps_the_false_alarm_rate(n, rate):
    """The new score's rank among all n + 1 is uniform, so that the rate over all n + 1 positions is exact."""
    values = np.random.default_rng(n).normal(size=n + 1)
    alarms = [values[i] > ood_threshold(torch.from_numpy(np.delete(values, i)), rate=rate) for i in range(n + 1)]
    assert np.mean(alarms) <= rate + 1e-12
    assert np.mean(alarms) > rate - 1 / (n + 1)


# ---------------------------------------------------------------------- the driver
def test_all_scores_are_their_functions():
    model, base = causal(), causal(1)
    model.model.train()
    batch, held = TokenBatch.from_lists(ROWS), TokenBatch.from_lists([row[::-1] for row in ROWS])
    model.model.eval()
    with torch.no_grad():
        ll, before, usual = model.log_prob(batch), base.log_prob(batch), model.log_prob(held)
    model.model.train()
    found = ood_scores(model, batch, base=base, held_out=usual, normalise="token")
    assert model.model.training
    want = {
        "likelihood_ratio": likelihood_ratio(ll, before, normalise="token"),
        "likelihood": likelihood_score(ll, normalise="token"),
        "perplexity": perplexity_score(ll),
        "typicality": typicality(ll, usual),
    }
    assert list(found) == list(want)
    for name, score in want.items():
        torch.testing.assert_close(found[name].value, score.value)
        assert (found[name].name, found[name].kind) == (name, score.kind)
        assert not found[name].value.requires_grad
    assert "typicality" not in ood_scores(model, batch, base=base)


def test_adapter_is_switched_off_for_the_base():
    plain = causal()
    torch.manual_seed(0)
    adapted = CausalLM(
        get_peft_model(
            build(CAUSAL["gpt2"], V),
            LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True),
        )
    )
    batch = TokenBatch.from_lists(ROWS)
    own = ood_scores(adapted, batch)
    other = ood_scores(adapted, batch, base=plain)
    for name, score in own.items():
        torch.testing.assert_close(score.value, other[name].value, atol=1e-5, rtol=1e-5)
    assert own["likelihood_ratio"].value.abs().min() > 1e-3


def test_any_model_with_a_likelihood():
    model, base = NGramLM.train(["abab"] * 9, order=3), NGramLM.train(["abab", "cdcd"] * 9, order=3)
    ids = [[model.tokenizer.bos_token_id, *model.tokenizer(text)["input_ids"]] for text in ("abab", "cdcd")]
    inside, outside = ood_scores(model, TokenBatch.from_lists(ids), base=base)["likelihood_ratio"].value.tolist()
    assert inside < 0 < outside


# ---------------------------------------------------------------------- refusals
TWO = likelihood([[-1.0, -2.0], [-3.0]])
BATCH = TokenBatch.from_lists([[0, 1]], scored_from=[0])


def no_terms() -> LogLikelihood:
    return LogLikelihood(torch.tensor([-1.0, -2.0]), Kind.EXACT, Unit.TOKEN, torch.tensor([2, 1]))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: likelihood_ratio(TWO, likelihood([[-1.0]])), "2 rows per token against 1 rows per token"),
        (lambda: likelihood_ratio(TWO, TWO.per(Unit.BYTE, torch.tensor([1, 2]))), "per token against 2 rows per byte"),
        (lambda: likelihood_ratio(TWO, likelihood([[-1.0, -2.0], [-1.0, -1.0]])), "row 1: its scored tokens differ"),
        (
            lambda: likelihood_ratio(likelihood([[-math.inf]]), likelihood([[0.0]])),
            "under the fine-tuned model is -inf",
        ),
        (
            lambda: likelihood_ratio(likelihood([[0.0]]), likelihood([[math.nan]])),
            "row 0: .* under the base model is nan",
        ),
        (lambda: likelihood_ratio(TWO, TWO, normalise="mean"), "normalise must be sum or token, got 'mean'"),
        (lambda: likelihood_score(TWO, normalise="byte"), "normalise must be sum or token"),
        (lambda: likelihood_score(likelihood([[-1.0], []])), "row 1: has no scored token"),
        (lambda: perplexity_score(likelihood([[-1.0], []])), "row 1: has no scored token"),
        (lambda: question_answer_ratios(no_terms(), no_terms(), torch.ones(2, 3).bool()), "needs a term per token"),
        (lambda: question_answer_ratios(TWO, TWO, torch.ones(2, 2).bool()), r"answer must be bool of shape \(2, 3\)"),
        (lambda: question_answer_ratios(TWO, TWO, torch.ones(2, 3)), "answer must be bool"),
        (lambda: question_answer_ratios(TWO, TWO, torch.ones(2, 3).bool()), "row 0: has no scored token"),
        (lambda: question_answer_ratios(TWO, TWO, torch.zeros(2, 3).bool()), "row 0: has no scored token"),
        (lambda: typicality(TWO, TWO[[]]), "needs rows and in-distribution rows"),
        (lambda: typicality(TWO, TWO.per(Unit.BYTE, torch.tensor([1, 2]))), "per token cannot be held against"),
        (lambda: typicality_test(TWO, TWO, permutations=0), "permutations must be a whole number"),
        (lambda: typicality_test(TWO, TWO, normalise="x"), "normalise must be sum or token"),
        (lambda: likelihood_regret(NGramLM.train(["ab"]), BATCH), "NGramLM has no network"),
        (lambda: likelihood_regret(UnigramModel(Unigram(LOGITS)), BATCH, steps=0), "steps must be at least 1"),
        (
            lambda: likelihood_regret(UnigramModel(Unigram(LOGITS)), BATCH, learning_rate=math.inf),
            "learning_rate positive",
        ),
        (lambda: likelihood_regret(UnigramModel(Unigram(LOGITS)), BATCH, parameters=[]), "no parameters to adapt"),
        (lambda: likelihood_regret(UnigramModel(Unigram(LOGITS)), BATCH, normalise="mean"), "normalise must be"),
        (lambda: likelihood_regret(UnigramModel(Unigram([math.nan] * 4)), BATCH), "row 0: .* is nan after 0 steps"),
        (lambda: ood_threshold(torch.tensor([1.0, math.nan])), "scores must be finite"),
        (lambda: ood_threshold(torch.zeros(2, 2)), "scores must be finite numbers"),
        (lambda: ood_threshold(torch.zeros(18)), "18 scores cannot show .* 0.05: give at least 19"),
        (lambda: ood_threshold(torch.zeros(0)), "0 scores cannot show"),
        (lambda: ood_threshold(torch.zeros(9), rate=1.0), "rate must lie between 0 and 1"),
        (lambda: ood_scores(causal(), TokenBatch.from_lists(ROWS)), "needs the model before fine-tuning"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(LoglikError, match=says) as caught:
        call()
    assert isinstance(caught.value, InputError | RowError)
    assert "\n" not in str(caught.value)


def test_a_learning_rate_that_breaks_the_row_says_so_and_restores():
    class Steep(UnigramModel):
        def log_prob(self, x: TokenBatch, *, draws: object = None) -> LogLikelihood:
            found = super().log_prob(x)
            broken = self.model.logits[0] != LOGITS[0]
            return LogLikelihood(found.value * (math.nan if broken else 1.0), found.kind, found.unit, found.num_units)

    model = Steep(Unigram(LOGITS))
    with pytest.raises(RowError, match=r"row 0: .* nan after 1 steps: lower the learning rate"):
        likelihood_regret(model, BATCH)
    assert model.model.logits.tolist() == LOGITS


def test_ratio_of_masks_that_differ_at_equal_counts():
    one = LogLikelihood.from_per_unit(torch.zeros(1, 3), torch.tensor([[True, False, True]]))
    other = LogLikelihood.from_per_unit(torch.zeros(1, 3), torch.tensor([[False, True, True]]))
    with pytest.raises(RowError, match="row 0: its scored tokens differ"):
        likelihood_ratio(one, other)
