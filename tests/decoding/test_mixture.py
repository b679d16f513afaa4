"""The geometric mixture against its formula on logits, enumeration and its own samples."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from loglik.decoding.mixture import GeometricMixture, MixtureLogitsProcessor, geometric_mixture
from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.protocol import ChainRule, Model, Sampler
from loglik.models.seq2seq import Seq2SeqLM
from zoo import CAUSAL, MASKED, SEQ2SEQ, build

VOCABULARY, EOS, LONGEST = 5, 2, 3
ENDS = SimpleNamespace(eos_token_id=EOS, bos_token_id=1)


def pair(name: str = "llama"):
    if name in CAUSAL:
        return [CausalLM(build(CAUSAL[name], VOCABULARY, seed=seed), ENDS) for seed in (0, 1)]
    return [Seq2SeqLM(build(SEQ2SEQ[name], VOCABULARY, seed=seed), ENDS) for seed in (0, 1)]


def strings() -> list[tuple[int, ...]]:
    others = [token for token in range(VOCABULARY) if token != EOS]
    ended = [(*s, EOS) for n in range(LONGEST) for s in product(others, repeat=n)]
    return ended + list(product(others, repeat=LONGEST))


def completions(prompt: list[int]) -> TokenBatch:
    rows = [[*prompt, *s] for s in strings()]
    return TokenBatch.from_lists(rows, starts=[len(prompt)] * len(rows))


class Fixed:
    """The same distribution after everything."""

    def __init__(self, *probabilities: float) -> None:
        self.table = torch.tensor(probabilities, dtype=torch.float64).log()
        self.tokenizer = ENDS

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        return self.table.expand(len(prefix), -1)


@pytest.mark.parametrize("beta", [0.0, 0.125, 0.5, 1.0])
@torch.no_grad()
def test_next_tokens_are_those_of_mixed_logits(beta):
    """softmax((1 - b) z + b z_ref) of the raw networks: mixing logits or log-probabilities is the same."""
    policy, reference = pair()
    ids = torch.tensor([[1, 3, 4], [1, 0, 0]])
    z, z_ref = (model.model(input_ids=ids).logits[:, -1] for model in (policy, reference))
    got = geometric_mixture(policy, reference, beta=beta).next_log_probs(TokenBatch.from_lists(ids.tolist()))
    torch.testing.assert_close(got, ((1 - beta) * z + beta * z_ref).log_softmax(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2))


def test_the_ends_are_the_models_themselves():
    """To the last bit, and where a token is impossible under the other one; the same seed draws the same samples."""
    a, b = Fixed(0.5, 0.5, 0.0), Fixed(0.0, 0.25, 0.75)
    prefix = TokenBatch.from_lists([[1]])
    assert geometric_mixture(a, b, beta=0).next_log_probs(prefix).equal(a.next_log_probs(prefix))
    assert geometric_mixture(a, b, beta=1).next_log_probs(prefix).equal(b.next_log_probs(prefix))
    # In between only what both allow is left.
    assert geometric_mixture(a, b, beta=0.3).next_log_probs(prefix).exp().tolist() == [[0.0, 1.0, 0.0]]
    policy, reference = pair()
    prompt = TokenBatch.from_lists([[1, 3]])
    for beta, model in ((0.0, policy), (1.0, reference)):
        mixture = geometric_mixture(policy, reference, beta=beta)
        one = mixture.sample(20, prompt=prompt, generator=torch.Generator().manual_seed(0), max_tokens=4)
        other = model.sample(20, prompt=prompt, generator=torch.Generator().manual_seed(0), max_tokens=4)
        assert one.ids.equal(other.ids)
        x = completions([1, 3])
        with torch.no_grad():
            torch.testing.assert_close(mixture.log_prob(x).value, model.log_prob(x).value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_log_prob_is_that_of_the_chain(name):
    """All strings sum to one; terms are the mixture's own next-token values; the label says exact."""
    mixture = geometric_mixture(*pair(name), beta=0.4)
    x = completions([1, 3])
    value = mixture.log_prob(x)
    assert value.kind is Kind.EXACT
    assert float(value.value.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert value.value.std() > 0.5
    assert not value.value.requires_grad
    row = strings().index((3, 0, 4))
    wanted = []
    for t, token in enumerate((3, 0, 4)):
        prefix = TokenBatch.from_lists([[1, 3, *(3, 0, 4)[:t]]], starts=[2])
        wanted.append(float(mixture.next_log_probs(prefix)[0, token]))
    assert value.per_unit is not None
    assert value.per_unit[row].tolist() == pytest.approx([0, 0, *wanted], abs=1e-5)


def test_padding_and_unscored_tokens_change_nothing():
    mixture = geometric_mixture(*pair(), beta=0.4)
    rows, starts = [[1, 3, 4, 0, 2], [1, 3]], [2, 1]
    left = mixture.log_prob(TokenBatch.from_lists(rows, starts=starts, padding_side="left", pad_id=4))
    right = mixture.log_prob(TokenBatch.from_lists(rows, starts=starts, pad_id=3))
    torch.testing.assert_close(left.value, right.value)
    assert left.num_units.tolist() == [3, 1]
    alone = mixture.log_prob(TokenBatch.from_lists(rows[1:], starts=starts[1:]))
    torch.testing.assert_close(alone.value, right.value[1:], atol=1e-5, rtol=0)
    part = mixture.log_prob(TokenBatch.from_lists(rows[:1], starts=[2], scored_from=[4]))
    assert right.per_unit is not None
    torch.testing.assert_close(part.value[0], right.per_unit[0, 4], atol=1e-5, rtol=0)
    nothing = mixture.log_prob(TokenBatch.from_lists(rows, starts=starts, scored_from=[5, 2]))
    assert nothing.value.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="the first token cannot be scored"):
        mixture.log_prob(TokenBatch.from_lists([[1, 3]], starts=[0], scored_from=[0]))
    short = TokenBatch.from_lists([[1, 3], [1, 3, 4]], starts=[0, 1], scored_from=[0, 1], padding_side="left")
    with pytest.raises(ValueError, match="row 0: the first token cannot be scored"):
        mixture.log_prob(short)


def test_samples_follow_log_prob():
    """Chi-square of 5,000 samples against the enumerated distribution at level 1e-3, fixed seed."""
    mixture = geometric_mixture(*pair(), beta=0.4)
    draws = mixture.sample(
        5000, prompt=TokenBatch.from_lists([[1, 3]]), max_tokens=LONGEST, generator=torch.Generator().manual_seed(0)
    )
    counts = dict.fromkeys(strings(), 0)
    for ids, scored in zip(draws.ids, draws.scored_mask, strict=True):
        counts[tuple(ids[scored].tolist())] += 1
    expected = mixture.log_prob(completions([1, 3])).value.double().softmax(0) * 5000
    observed, order = torch.tensor(list(counts.values()), dtype=torch.float64), expected.argsort()
    pooled = int((expected < 5).sum()) + 1
    observed, expected = (
        torch.cat([x[order[:pooled]].sum().reshape(1), x[order[pooled:]]]) for x in (observed, expected)
    )
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@torch.no_grad()
def test_it_is_not_the_mixture_of_whole_sequences():
    """The sequence-level mixture lacks the normalisers of the steps: another distribution, far beyond rounding."""
    policy, reference = pair()
    x = completions([1, 3])
    whole = (0.6 * policy.log_prob(x).value + 0.4 * reference.log_prob(x).value).softmax(0)
    stepwise = geometric_mixture(policy, reference, beta=0.4).log_prob(x).value.exp()
    assert (whole - stepwise).abs().sum() / 2 > 5e-3


def test_mixtures_of_mixtures():
    """a^(1/4) b^(3/4) is what half of (a^(1/2) b^(1/2)) and half of b make; it is a model like any other."""
    a, b = pair()
    half = geometric_mixture(a, b, beta=0.5)
    prefix = TokenBatch.from_lists([[1, 3, 4]])
    torch.testing.assert_close(
        geometric_mixture(half, b, beta=0.5).next_log_probs(prefix),
        geometric_mixture(a, b, beta=0.75).next_log_probs(prefix),
    )
    for capability in (Model, Sampler, ChainRule):
        assert isinstance(half, capability)
    assert half.tokenizer is ENDS
    assert half.max_length == 64
    assert geometric_mixture(Fixed(0.5, 0.5), Fixed(0.5, 0.5), beta=0.5).max_length is None
    assert "beta=0.5" in repr(half)


@torch.no_grad()
def test_inside_generate():
    """Greedy decoding by transformers with the processor is greedy decoding of the mixture, padded prompts too."""
    policy, reference = pair()
    mixture = geometric_mixture(policy, reference, beta=0.5)
    processor = MixtureLogitsProcessor(reference, beta=0.5, pad_id=0)
    prompts = [[1, 3, 4, 1], [1, 3]]
    batch = TokenBatch.from_lists(prompts, padding_side="left", pad_id=0)
    out = policy.model.generate(
        input_ids=batch.ids,
        attention_mask=batch.attention_mask.long(),
        logits_processor=[processor],
        do_sample=False,
        max_new_tokens=5,
        eos_token_id=None,
        pad_token_id=0,
    )
    for row, prompt in zip(out[:, 4:].tolist(), prompts, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            tokens.append(int(mixture.next_log_probs(TokenBatch.from_lists([tokens])).argmax()))
        assert row == tokens[len(prompt) :]
    # A pad token inside the text is text.
    ids = torch.tensor([[0, 1, 0, 3]])
    logits = policy.model(input_ids=torch.tensor([[1, 0, 3]])).logits[:, -1]
    torch.testing.assert_close(
        processor(ids, logits), mixture.next_log_probs(TokenBatch.from_lists([[1, 0, 3]])), atol=1e-5, rtol=0
    )
    assert processor(ids, logits.bfloat16()).dtype == torch.bfloat16
    other = reference.next_log_probs(TokenBatch.from_lists([[1, 0, 3]]))
    for beta, wanted in ((0.0, logits.log_softmax(-1)), (1.0, other)):
        torch.testing.assert_close(MixtureLogitsProcessor(reference, beta=beta, pad_id=0)(ids, logits), wanted)


def test_refusals():
    a = Fixed(0.5, 0.5)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
            geometric_mixture(a, a, beta=beta)
        with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
            MixtureLogitsProcessor(a, beta=beta)
    masked = MaskedLM(build(MASKED["bert"], VOCABULARY), mask_token_id=4)
    with pytest.raises(InputError, match="a geometric mixture needs per-token conditionals"):
        GeometricMixture(a, masked, beta=0.5)
    prefix = TokenBatch.from_lists([[1], [1]])
    with pytest.raises(InputError, match="predict 2 and 3 tokens"):
        geometric_mixture(a, Fixed(0.2, 0.3, 0.5), beta=0.5).next_log_probs(prefix)
    with pytest.raises(InputError, match="row 0: no token is possible under both"):
        geometric_mixture(Fixed(1.0, 0.0), Fixed(0.0, 1.0), beta=0.5).next_log_probs(prefix)
