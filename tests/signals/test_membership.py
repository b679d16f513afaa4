"""Membership scores against closed forms, plain loops over logits, and enumeration of the vocabulary."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from loglik.errors import InputError, LoglikError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.signals import membership
from loglik.signals.detection import auroc
from loglik.signals.membership import (
    loss_score,
    lowercase_score,
    membership_scores,
    min_k,
    min_k_plus_plus,
    next_token_moments,
    reference_score,
    zlib_score,
)
from zoo import CAUSAL, MASKED, SEQ2SEQ, build

V = 50
ROWS = [[5, 9, 2, 40, 11, 7, 3], [8, 8, 1], [30, 4, 4, 4, 4, 21]]


def likelihood(rows: list[list[float]], *, kind: Kind = Kind.EXACT) -> LogLikelihood:
    """Rows of terms, padded on the left so that nothing may rely on where they stand."""
    width = max(map(len, rows)) + 1
    terms = torch.zeros(len(rows), width, dtype=torch.float64)
    for row, values in zip(terms, rows, strict=True):
        if values:
            row[-len(values) :] = torch.tensor(values, dtype=torch.float64)
    counts = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) >= width - counts[:, None]
    return LogLikelihood.from_per_unit(terms, mask, kind=kind)


def random_rows(seed: int, count: int = 30) -> LogLikelihood:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return likelihood([(-torch.rand(n, generator=generator) * 5).tolist() for n in lengths])


def causal(name: str = "gpt2", seed: int = 0) -> CausalLM:
    return CausalLM(build(CAUSAL[name], V, seed=seed))


@dataclass
class TableModel:
    """One next-token distribution after any prefix."""

    table: Tensor
    kind: Kind = Kind.EXACT
    unit: Unit = Unit.TOKEN

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        return self.table.expand(len(prefix), -1)


@dataclass
class Hidden:
    """A model that shows nothing but the protocol."""

    inner: CausalLM
    kind: Kind = Kind.EXACT
    unit: Unit = Unit.TOKEN

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        assert bool(prefix.attention_mask.all())  # worlds and tables take prefixes without padding
        with torch.no_grad():
            return self.inner.next_log_probs(prefix)

    def log_prob(self, x: TokenBatch, *, draws: object = None) -> LogLikelihood:
        return self.inner.log_prob(x)


# ---------------------------------------------------------------------- scores
def test_closed_forms():
    ll = likelihood([[-1.0, -4.0, -2.0, -3.0, -5.0], [-0.5]])
    assert loss_score(ll).value.tolist() == [-3.0, -0.5]
    assert min_k(ll, 0.2).value.tolist() == [-5.0, -0.5]
    assert min_k(ll, 0.4).value.tolist() == [-4.5, -0.5]
    assert min_k(ll, 0.59).value.tolist() == [-4.5, -0.5]
    assert min_k(ll, 0.6).value.tolist() == [-4.0, -0.5]
    reference = likelihood([[-2.0, -4.0], [-1.5, -0.5, -1.0]])
    assert reference_score(ll, reference).value.tolist() == [0.0, 0.5]
    texts = ["abcabcabcabcabcabc" * 9, "q"]
    sizes = [len(zlib.compress(t.encode())) for t in texts]
    assert zlib_score(ll, texts).value.tolist() == [-3.0 / sizes[0], -0.5 / sizes[1]]
    assert lowercase_score(ll, reference).value.tolist() == [1.0, 2.0]


def test_zlib_counts_bytes_not_characters():
    ll = likelihood([[-1.0]])
    assert zlib_score(ll, ["漢字"]).item() == -1.0 / len(zlib.compress("漢字".encode()))


def test_ratio_is_the_log_of_the_quotient_of_perplexities():
    a, b = random_rows(0), random_rows(1)
    expected = torch.log(b.perplexity().value / a.perplexity().value)
    torch.testing.assert_close(reference_score(a, b).value, expected)


@pytest.mark.parametrize("seed", range(5))
def test_min_k_is_the_loss_at_1_and_never_above_it(seed):
    ll = random_rows(seed)
    torch.testing.assert_close(min_k(ll, 1.0).value, loss_score(ll).value)
    shares = [0.05, 0.1, 0.2, 0.29, 0.5, 0.8, 1.0]
    columns = torch.stack([min_k(ll, k).value for k in shares])
    assert bool((columns.diff(dim=0) >= -1e-12).all())
    for k in shares:
        for got, terms, mask in zip(min_k(ll, k).value, ll.per_unit, ll.mask, strict=True):
            ordered = sorted(terms[mask].tolist())
            count = max(1, int(round(k * 100) * len(ordered) // 100))  # in whole percent, without rounding
            assert got.item() == pytest.approx(sum(ordered[:count]) / count)


def test_a_single_token_makes_all_three_one():
    ll = likelihood([[-1.5], [-0.1]])
    for k in (0.01, 0.2, 1.0):
        assert min_k(ll, k).value.tolist() == loss_score(ll).value.tolist()
    z = min_k_plus_plus(ll, torch.full((2, 2), -1.0), torch.full((2, 2), 0.5), 0.2)
    torch.testing.assert_close(z.value, (ll.value + 1.0) / 0.5)


def test_same_model_as_reference_says_nothing():
    ll = random_rows(0)
    score = reference_score(ll, ll).value
    assert score.tolist() == [0.0] * 30
    assert auroc(score, torch.arange(30) < 10) == 0.5


def test_kinds():
    exact, bound = random_rows(0), likelihood([[-1.0]] * 30, kind=Kind.LOWER_BOUND)
    assert loss_score(bound).kind is Kind.LOWER_BOUND
    assert reference_score(exact, exact).kind is Kind.EXACT
    assert reference_score(exact, bound).kind is Kind.UPPER_BOUND
    assert reference_score(bound, bound).kind is Kind.SURROGATE
    assert lowercase_score(exact, exact).kind is Kind.EXACT
    assert lowercase_score(bound, exact).kind is Kind.SURROGATE
    assert zlib_score(bound, ["a"] * 30).kind is Kind.LOWER_BOUND


def test_standard_errors_go_with_the_mean():
    ll = LogLikelihood(
        torch.tensor([-4.0]), Kind.LOWER_BOUND, Unit.TOKEN, torch.tensor([4]), stderr=torch.tensor([0.8])
    )
    assert loss_score(ll).stderr.item() == pytest.approx(0.2)
    assert reference_score(ll, ll).stderr.item() == pytest.approx(math.hypot(0.2, 0.2))


# ---------------------------------------------------------------------- moments
def naive_moments(logits: Tensor, target: int) -> tuple[float, float, float]:
    p = [math.exp(x) for x in logits.double().log_softmax(-1).tolist()]
    mean = math.fsum(x * math.log(x) for x in p if x > 0)
    square = math.fsum(x * math.log(x) ** 2 for x in p if x > 0)
    return math.log(p[target]), mean, math.sqrt(max(square - mean**2, 0))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mamba", "mistral"])
def test_moments_are_those_of_the_logits(name):
    model = causal(name)
    read = next_token_moments(model, TokenBatch.from_lists(ROWS))
    for number, row in enumerate(ROWS):
        logits = model.model(input_ids=torch.tensor([row])).logits[0].detach()
        for column in range(1, len(row)):
            want = naive_moments(logits[column - 1], row[column])
            got = (read.likelihood.per_unit[number, column], read.mean[number, column], read.std[number, column])
            assert [x.item() for x in got] == pytest.approx(want, abs=2e-5)
        assert read.mean[number, 0] == read.std[number, 0] == 0.0
    torch.testing.assert_close(
        read.likelihood.value.float(), model.log_prob(TokenBatch.from_lists(ROWS)).value, atol=1e-4, rtol=0
    )


def test_loss_is_that_of_transformers():
    model = causal()
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            loss = model.model(input_ids=ids, labels=ids).loss.item()
        got = membership_scores(model, TokenBatch.from_lists([row]))["loss"].item()
        assert math.exp(-got) == pytest.approx(math.exp(loss), rel=1e-5)


def test_standardised_terms_have_mean_0_and_variance_1():
    """Over all tokens at the last place of a row, weighted by the model's own distribution."""
    model = causal()
    prefix = [5, 9, 2, 40]
    batch = TokenBatch.from_lists([[*prefix, v] for v in range(V)], starts=[len(prefix)] * V)
    read = next_token_moments(model, batch)
    z = min_k_plus_plus(read.likelihood, read.mean, read.std).value
    p = read.likelihood.value.exp()
    assert p.sum().item() == pytest.approx(1.0)
    assert (p * z).sum().item() == pytest.approx(0.0, abs=1e-9)
    assert (p * z.square()).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_uniform_distribution_gives_0(dtype):
    network = build(CAUSAL["gpt2"], V)
    with torch.no_grad():
        network.lm_head.weight.zero_()
    model = CausalLM(network.to(dtype))
    scores = membership_scores(model, TokenBatch.from_lists(ROWS))
    assert scores["min_k_plus_plus"].value.tolist() == [0.0] * 3
    torch.testing.assert_close(scores["min_k"].value, torch.full((3,), -math.log(V), dtype=torch.float64))


def test_flat_on_part_of_the_vocabulary_gives_0():
    """Tokens of probability 0 count nothing; the others are all alike."""
    table = torch.log(torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25]))
    read = next_token_moments(TableModel(table), TokenBatch.from_lists([[1, 2, 3]]))
    torch.testing.assert_close(read.mean[0, 1:], torch.full((2,), -math.log(4), dtype=torch.float64))
    assert min_k_plus_plus(read.likelihood, read.mean, read.std).item() == 0.0


def test_rounded_moments_of_a_flat_distribution_give_0():
    terms = likelihood([[-math.log(V)] * 5])
    mean = torch.full((1, 6), -math.log(V), dtype=torch.float64) + 3e-7
    assert min_k_plus_plus(terms, mean, torch.full((1, 6), 2e-7)).item() == 0.0


def test_nearly_certain_distribution_keeps_its_scores():
    """A small spread that is real is divided by."""
    rare = 1e-8
    table = torch.log(torch.tensor([1 - rare, rare], dtype=torch.float64))
    read = next_token_moments(TableModel(table), TokenBatch.from_lists([[0, 1], [0, 0]]))
    z = min_k_plus_plus(read.likelihood, read.mean, read.std).value
    assert z[0].item() == pytest.approx(-math.sqrt((1 - rare) / rare), rel=1e-6)
    assert z[1].item() == pytest.approx(math.sqrt(rare / (1 - rare)), rel=1e-6)


# ---------------------------------------------------------------------- the driver
def padded(side: str) -> TokenBatch:
    return TokenBatch.from_lists(ROWS, padding_side=side, pad_id=7)


def together(model: object, batch: TokenBatch, **options: object) -> Tensor:
    return torch.stack([m.value.double() for m in membership_scores(model, batch, **options).values()])


@pytest.mark.parametrize("make", [lambda: causal("gpt2"), lambda: causal("mamba"), lambda: Hidden(causal("llama"))])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_change_nothing(make, side):
    model, reference = make(), causal(seed=5)
    alone = torch.cat([together(model, TokenBatch.from_lists([row]), reference=reference) for row in ROWS], dim=1)
    torch.testing.assert_close(together(model, padded(side), reference=reference), alone, atol=2e-5, rtol=2e-5)


def test_network_and_prefix_by_prefix_agree(monkeypatch):
    model = causal("llama")
    want = together(model, padded("left"))
    torch.testing.assert_close(together(Hidden(model), padded("left")), want, atol=2e-5, rtol=2e-5)
    monkeypatch.setattr(membership, "_CHUNK_ROWS", 1)
    torch.testing.assert_close(together(Hidden(model), padded("left")), want, atol=2e-5, rtol=2e-5)
    monkeypatch.setattr(membership, "_CHUNK_VALUES", 2 * V)  # two positions at a time
    torch.testing.assert_close(together(model, padded("left")), want, atol=2e-5, rtol=2e-5)
    whole = causal("llama")
    whole.__dict__["trunk"] = None  # a network that cannot be taken apart
    torch.testing.assert_close(together(whole, padded("left")), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder(name):
    model = Seq2SeqLM(build(SEQ2SEQ[name], V))
    batch = TokenBatch.from_lists(ROWS, starts=[3, 1, 2])
    read = next_token_moments(model, batch)
    torch.testing.assert_close(read.likelihood.value.float(), model.log_prob(batch).value, atol=1e-4, rtol=0)
    row = TokenBatch.from_lists([ROWS[0][:5]], starts=[3])
    with torch.no_grad():
        table = model.next_log_probs(row)[0]
    want = naive_moments(table, ROWS[0][5])
    got = (read.likelihood.per_unit[0, 5], read.mean[0, 5], read.std[0, 5])
    assert [x.item() for x in got] == pytest.approx(want, abs=2e-5)


def test_ngram_model():
    model = NGramLM.train(["abab", "abba", "bab"] * 5, order=3)
    ids = [model.tokenizer(text)["input_ids"] for text in ("abab", "bbbb")]
    batch = TokenBatch.from_lists([[model.tokenizer.bos_token_id, *row] for row in ids])
    scores = membership_scores(model, batch)
    torch.testing.assert_close(scores["loss"].value, model.log_prob(batch).mean_per_unit().value)
    assert scores["loss"].value[0] > scores["loss"].value[1]
    assert scores["min_k"].value[0] > scores["min_k"].value[1]


def test_all_scores_are_their_functions():
    model, reference = causal(), causal(seed=3)
    batch, lowered = TokenBatch.from_lists(ROWS), TokenBatch.from_lists([row[::-1] for row in ROWS])
    other = TokenBatch.from_lists([[*row, 1] for row in ROWS])
    texts = ["one", "two two", "three"]
    found = membership_scores(
        model, batch, texts=texts, lowered=lowered, reference=reference, reference_batch=other, k=0.5
    )
    assert list(found) == ["loss", "min_k", "min_k_plus_plus", "zlib", "lowercase", "ratio"]
    with torch.no_grad():
        ll = model.log_prob(batch)
        want = {
            "loss": loss_score(ll),
            "min_k": min_k(ll, 0.5),
            "zlib": zlib_score(ll, texts),
            "lowercase": lowercase_score(ll, model.log_prob(lowered)),
            "ratio": reference_score(ll, reference.log_prob(other)),
        }
    for name, score in want.items():
        torch.testing.assert_close(found[name].value.float(), score.value, atol=1e-4, rtol=1e-4)
        assert found[name].name == score.name
    assert not any(m.value.requires_grad for m in found.values())


def test_dropout_is_off_and_the_mode_is_kept():
    model, reference = causal(), causal(seed=3)
    want = together(model, padded("right"), reference=reference)
    model.model.train()
    reference.model.train()
    torch.testing.assert_close(together(model, padded("right"), reference=reference), want)
    assert model.model.training
    assert reference.model.training


def test_only_scored_tokens_count():
    """Context before a trap is read and not scored."""
    model = causal()
    batch = TokenBatch.from_lists([ROWS[0]], scored_from=[4])
    got = membership_scores(model, batch)["loss"].item()
    with torch.no_grad():
        terms = model.log_prob(TokenBatch.from_lists([ROWS[0]])).per_unit[0]
    assert got == pytest.approx(terms[4:].mean().item(), abs=1e-5)


# ---------------------------------------------------------------------- refusals
def without_terms(kind: Kind = Kind.LOWER_BOUND) -> LogLikelihood:
    return LogLikelihood(torch.tensor([-1.0]), kind, Unit.TOKEN, torch.tensor([3]))


ONE = likelihood([[-1.0, -2.0]])
MOMENT = torch.full((1, 3), -1.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: min_k(without_terms()), "needs a term per token, and this likelihood is a sum alone"),
        (lambda: min_k_plus_plus(without_terms(), MOMENT, MOMENT), r"Min-K%\+\+ needs a term per token"),
        (lambda: min_k(ONE, 0.0), "k must be a share"),
        (lambda: min_k(ONE, 1.01), "k must be a share"),
        (lambda: min_k(ONE, 20), "k must be a share"),
        (lambda: min_k(ONE, math.nan), "k must be a share"),
        (lambda: min_k(ONE, True), "k must be a share"),
        (lambda: loss_score(likelihood([[-1.0], []])), "row 1: has no scored token"),
        (lambda: min_k(likelihood([[-1.0], []])), "row 1: has no scored token"),
        (lambda: loss_score(likelihood([[-1.0], [-math.inf]])), "row 1: its log-likelihood under the model is -inf"),
        (lambda: min_k(likelihood([[-1.0, -math.inf]])), "row 0: its log-likelihood under the model is -inf"),
        (lambda: loss_score(likelihood([[math.nan]])), "row 0: .* is nan"),
        (lambda: reference_score(ONE, likelihood([[-math.inf]])), "row 0: .* under the reference is -inf"),
        (lambda: reference_score(ONE, likelihood([[-1.0], [-1.0]])), "1 rows and the reference 2"),
        (lambda: reference_score(ONE, ONE.per(Unit.BYTE, torch.tensor([4]))), "per token and the reference per byte"),
        (lambda: lowercase_score(ONE, likelihood([[-1.0]] * 3)), "1 rows and the lower-case texts 3"),
        (lambda: lowercase_score(likelihood([[0.0]]), likelihood([[0.0]])), "row 0: has probability 1"),
        (lambda: zlib_score(ONE, ["a", "b"]), "1 rows need as many texts, got 2 texts"),
        (lambda: zlib_score(ONE, "a"), "1 rows need as many texts, got one string"),
        (lambda: min_k_plus_plus(ONE, MOMENT[:, :2], MOMENT), "must be .* like the terms"),
        (lambda: min_k_plus_plus(ONE, MOMENT, -MOMENT[:, :1]), "must be .* like the terms"),
        (lambda: min_k_plus_plus(ONE, MOMENT, MOMENT), "row 0: .* does not fit"),
        (lambda: min_k_plus_plus(ONE, MOMENT * math.nan, -MOMENT), "row 0: .* does not fit"),
        (lambda: min_k_plus_plus(ONE, MOMENT, MOMENT * 0), "row 0: .* does not fit"),
    ],
)
def test_refusals_of_scores(call, says):
    with pytest.raises(LoglikError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_refusals_of_the_driver():
    batch = TokenBatch.from_lists(ROWS)
    with pytest.raises(InputError, match=r"needs per-token conditionals .* MaskedLM does not have it"):
        membership_scores(MaskedLM(build(MASKED["bert"], V), mask_token_id=3), batch)
    with pytest.raises(InputError, match="reference_batch is given without a reference"):
        membership_scores(causal(), batch, reference_batch=batch)
    first = TokenBatch.from_lists(ROWS, scored_from=[1, 0, 1])
    for model in (causal(), Hidden(causal())):
        with pytest.raises(RowError, match=r"row 1: .* cannot be scored, nothing"):
            membership_scores(model, first)
    with pytest.raises(RowError, match=r"row 0: .* cannot be scored"):
        membership_scores(
            Seq2SeqLM(build(SEQ2SEQ["t5"], V)), TokenBatch.from_lists(ROWS, starts=[2] * 3, scored_from=[1] * 3)
        )
    for table in (torch.zeros(5), torch.full((5,), math.nan)):
        with pytest.raises(RowError, match=r"row 0: .* does not sum to 1"):
            membership_scores(TableModel(table), TokenBatch.from_lists([[1, 2]]))
    nothing = TokenBatch.from_lists([[1], [2, 3]])
    with pytest.raises(RowError, match="row 0: has no scored token"):
        membership_scores(causal(), nothing)
    for model in (causal(), TableModel(torch.tensor([0.0]))):
        with pytest.raises(RowError, match="row 0: has no scored token"):
            membership_scores(model, TokenBatch.from_lists([[1]]))
