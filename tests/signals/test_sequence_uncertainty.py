"""Uncertainty of generated sequences against enumeration of a small language, exact expectations, and transformers."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from loglik.decoding.beam import beam_search
from loglik.errors import InputError, RowError
from loglik.kinds import ConstantKey, DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.signals.sequence_uncertainty import (
    by_embedding,
    by_judge,
    discrete_semantic_entropy,
    exact_match,
    greedy_completions,
    greedy_nll,
    length_normalised_log_prob,
    maximum_sequence_probability,
    mode_nll,
    num_semantic_sets,
    predictive_entropy,
    prompt_tokens,
    semantic_entropy,
    sequence_uncertainty,
)
from zoo import CAUSAL, build, byte_level_tokenizer, llama_tokenizer

EOS, LIMIT = 2, 3  # symbols 0 and 1 and EOS; tokens from 3 on only stand in prompts
V = 8


class Tree:
    """A language with one free conditional per prefix; outputs end with EOS or after three tokens."""

    kind, unit, layout, max_length = Kind.EXACT, Unit.TOKEN, "causal", None
    tokenizer = SimpleNamespace(eos_token_id=EOS, bos_token_id=None)

    def __init__(self, seed=0, scale=1.5, tables=None):
        self.seed, self.scale, self.tables = seed, scale, dict(tables or {})

    def row(self, prefix):
        if prefix not in self.tables:
            g = torch.Generator().manual_seed(hash((self.seed, *prefix)) % 2**31)
            logits = torch.full((V,), -torch.inf, dtype=torch.float64)
            logits[:3] = self.scale * torch.randn(3, generator=g, dtype=torch.float64)
            self.tables[prefix] = logits.log_softmax(0)
        return self.tables[prefix]

    def next_log_probs(self, prefix):
        rows = zip(prefix.ids, prefix.attention_mask, strict=True)
        return torch.stack([self.row(tuple(ids[real].tolist())) for ids, real in rows])

    def log_prob(self, x, *, draws=None):
        terms = torch.zeros(x.ids.shape, dtype=torch.float64)
        for i, (ids, real) in enumerate(zip(x.ids.tolist(), x.attention_mask.tolist(), strict=True)):
            assert all(real[: sum(real)])
            for t in range(sum(real)):
                if x.scored_mask[i, t]:
                    terms[i, t] = self.row(tuple(ids[:t]))[ids[t]]
        return LogLikelihood.from_per_unit(terms, x.scored_mask)

    def outcomes(self, prompt):
        """Every output with its log-probability."""
        found, open_ = {}, {(): 0.0}
        for step in range(LIMIT):
            longer = {}
            for prefix, value in open_.items():
                for token, term in enumerate(self.row((*prompt, *prefix))[:3].tolist()):
                    (found if token == EOS or step == LIMIT - 1 else longer)[(*prefix, token)] = value + term
            open_ = longer
        return found


def ll(values, lengths=None, kind=Kind.EXACT, **more) -> LogLikelihood:
    values = torch.as_tensor(values, dtype=torch.float64)
    count = torch.ones(len(values), dtype=torch.long) if lengths is None else torch.as_tensor(lengths)
    constant = ConstantKey.of("z") if kind is Kind.UNNORMALIZED else None
    return LogLikelihood(values, kind, Unit.TOKEN, count, constant=constant, **more)


def entropy(probabilities) -> float:
    return float(scipy.stats.entropy(list(probabilities)))


def first_symbol(prompt, texts):
    """Outputs mean the same if they begin alike."""
    return [int(text.split()[0]) for text in texts]


# ------------------------------------------------------------------------------------------ against enumeration
@pytest.mark.parametrize("seed", range(6))
def test_decode_against_the_true_mode(seed):
    """G-NLL is M-NLL where greedy finds the mode and above it elsewhere; an exhaustive beam finds it always."""
    model, prompts = Tree(seed), [[3], [4], [5]]
    batch = TokenBatch.from_lists(prompts, starts=[1] * 3)
    greedy = sequence_uncertainty(model, batch, num_samples=0, max_tokens=LIMIT)
    beam = sequence_uncertainty(
        model,
        batch,
        num_samples=0,
        max_tokens=LIMIT,
        search=lambda p: beam_search(model, p, width=V**LIMIT, max_tokens=LIMIT).best(),
    )
    assert (greedy.decode, beam.decode) == ("greedy", "search")
    for i, prompt in enumerate(prompts):
        outcomes = model.outcomes(prompt)
        assert sum(map(math.exp, outcomes.values())) == pytest.approx(1, abs=1e-12)
        best = max(outcomes, key=outcomes.get)
        decoded = tuple(map(int, greedy.outputs[i].split()))
        g_nll = greedy.measures["g_nll"].value[i].item()
        assert g_nll == pytest.approx(-outcomes[decoded], abs=1e-12)
        if decoded == best:
            assert g_nll == pytest.approx(-outcomes[best], abs=1e-12)
        else:
            assert g_nll > -outcomes[best]
        assert beam.measures["g_nll"].value[i].item() == pytest.approx(-outcomes[best], abs=1e-12)
        assert beam.measures["mode_nll"].value[i].item() == pytest.approx(-outcomes[best], abs=1e-12)
        msp = greedy.measures["sequence_probability"].value[i].item()
        assert msp == pytest.approx(math.exp(outcomes[decoded]), abs=1e-12)
        assert greedy.ended[i].item() == (decoded[-1] == EOS)
    assert greedy.measures["g_nll"].kind is Kind.EXACT
    assert greedy.measures["mode_nll"].kind is Kind.UPPER_BOUND


def test_both_cases_of_greedy_occur_among_the_seeds():
    hits = set()
    for seed in range(6):
        for prompt in ([3], [4], [5]):
            model = Tree(seed)
            outcomes = model.outcomes(prompt)
            rows = greedy_completions(model, TokenBatch.from_lists([prompt], starts=[1]), max_tokens=LIMIT)
            hits.add(tuple(rows.ids[0, 1:].tolist()) == max(outcomes, key=outcomes.get))
    assert hits == {True, False}


def test_greedy_is_not_the_mode():
    """0.55 and then one of three against 0.45 and then 0.99; the samples find what greedy misses."""
    log = torch.tensor

    def row(*p):
        return log([*p, *[0.0] * (V - 3)], dtype=torch.float64).log()

    tables = {(3,): row(0.55, 0.45, 0.0), (3, 0): row(1 / 3, 1 / 3, 1 / 3), (3, 1): row(0.005, 0.005, 0.99)}
    table = sequence_uncertainty(
        Tree(tables=tables), TokenBatch.from_lists([[3]], starts=[1]), num_samples=50, max_tokens=2
    )
    assert table.measures["g_nll"].item() == pytest.approx(-math.log(0.55 / 3))
    assert table.measures["mode_nll"].item() == pytest.approx(-math.log(0.45 * 0.99))


def test_entropies_of_samples_are_within_four_standard_errors():
    model, prompts, n = Tree(1), [[3], [4]], 4000
    table = sequence_uncertainty(
        model,
        TokenBatch.from_lists(prompts, starts=[1, 1]),
        num_samples=n,
        max_tokens=LIMIT,
        equivalence=first_symbol,
    )
    for i, prompt in enumerate(prompts):
        outcomes = model.outcomes(prompt)
        p = {y: math.exp(v) for y, v in outcomes.items()}
        pe, ln = table.measures["predictive_entropy"], table.measures["length_normalised_entropy"]
        assert abs(pe.value[i].item() - entropy(p.values())) < 4 * pe.stderr[i].item()
        per_token = sum(-p[y] * outcomes[y] / len(y) for y in p)
        assert abs(ln.value[i].item() - per_token) < 4 * ln.stderr[i].item()
        classes = Counter()
        for y, share in p.items():
            classes[y[0]] += share
        truth = entropy(classes.values())
        # Nothing is left to estimate but for the sequences that were not found.
        found = Counter()
        for y in {tuple(map(int, text.split())) for text in table.samples[i]}:
            found[y[0]] += p[y]
        assert sum(found.values()) > 0.995
        semantic = table.measures["semantic_entropy"].value[i].item()
        assert semantic == pytest.approx(entropy(found.values()), abs=1e-9)
        assert semantic == pytest.approx(truth, abs=0.02)
        spread = math.sqrt(sum(s * math.log(s) ** 2 for s in classes.values()) - truth**2) / math.sqrt(n)
        assert abs(table.measures["discrete_semantic_entropy"].value[i].item() - truth) < 4 * spread
        assert table.num_semantic_sets[i] == len(classes)
        ended = sum(share for y, share in p.items() if y[-1] == EOS)
        assert abs(table.sample_ended[i] - ended) < 4 * math.sqrt(ended * (1 - ended) / n)


def test_predictive_entropy_is_unbiased_and_its_standard_error_is_its_spread():
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    drawn = np.random.default_rng(0).choice(5, size=(4000, 8), p=p)
    question = np.arange(4000).repeat(8)
    found = predictive_entropy(ll(np.log(p)[drawn].ravel()), question)
    spread = found.value.std().item()
    assert abs(found.value.mean().item() - entropy(p)) < 4 * spread / math.sqrt(4000)
    assert found.stderr.square().mean().sqrt().item() == pytest.approx(spread, rel=0.05)
    assert found.kind is Kind.ESTIMATE


STRINGS = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
MEANING = [0, 1, 0, 2, 2]
TRUTH = entropy([0.6, 0.25, 0.15])


def every_outcome(n=4):
    """All draws of n strings, a question each, with their probabilities."""
    draws = np.array(list(product(range(5), repeat=n)))
    return draws, STRINGS[draws].prod(1)


def naive_semantic(draw, form, power=1.0):
    mass = {}
    for s in set(draw):
        mass[MEANING[s]] = mass.get(MEANING[s], 0.0) + STRINGS[s] ** power
    if form == "normalised":
        return entropy(mass.values())
    if form == "sample_mean":
        return -np.mean([math.log(mass[MEANING[s]]) for s in draw])
    return -np.mean([math.log(m) for m in mass.values()])


@pytest.mark.parametrize("form", ["normalised", "sample_mean", "class_mean"])
def test_semantic_entropy_of_every_possible_draw(form):
    """Equal to a loop over dictionaries; what the kinds promise holds in exact expectation."""
    draws, weight = every_outcome()
    question = np.arange(len(draws)).repeat(4)
    likelihood = ll(np.log(STRINGS)[draws].ravel(), np.full(draws.size, 2))
    found = semantic_entropy(likelihood, question, np.array(MEANING)[draws].ravel(), draws.ravel(), form=form)
    expected = [naive_semantic(draw, form) for draw in draws]
    np.testing.assert_allclose(found.value.numpy(), expected, atol=1e-12)
    mean = float(weight @ found.value.numpy())
    if form == "sample_mean":
        assert found.kind is Kind.UPPER_BOUND
        assert mean > TRUTH
    assert (found.kind is Kind.ESTIMATE) == (form == "normalised")
    halved = semantic_entropy(
        likelihood, question, np.array(MEANING)[draws].ravel(), draws.ravel(), form=form, length_normalised=True
    )
    np.testing.assert_allclose(halved.value.numpy(), [naive_semantic(d, form, 0.5) for d in draws], atol=1e-12)
    assert halved.kind is Kind.SURROGATE


def test_discrete_semantic_entropy_of_every_possible_draw():
    """A lower bound in exact expectation, closer with more samples."""
    below = []
    for n in (2, 3, 4):
        draws, weight = every_outcome(n)
        meaning = np.array(MEANING)[draws]
        question = np.arange(len(draws)).repeat(n)
        found = discrete_semantic_entropy(question, meaning.ravel())
        expected = [entropy(np.array(list(Counter(row).values())) / n) for row in meaning.tolist()]
        np.testing.assert_allclose(found.value.numpy(), expected, atol=1e-12)
        assert found.kind is Kind.LOWER_BOUND
        assert num_semantic_sets(question, meaning.ravel()).tolist() == [len(set(row)) for row in meaning.tolist()]
        below.append(TRUTH - float(weight @ found.value.numpy()))
    assert below[0] > below[1] > below[2] > 0


def test_limits_of_semantic_entropy():
    """One meaning: 0. A meaning per string, all found: the entropy of strings. Duplicates change nothing."""
    values, zeros = np.log(STRINGS), [0] * 5
    for repeat in (1, 3):
        question, sequence = zeros * repeat, list(range(5)) * repeat
        likelihood = ll(np.tile(values, repeat))
        assert semantic_entropy(likelihood, question, zeros * repeat, sequence).item() == pytest.approx(0, abs=1e-12)
        own = semantic_entropy(likelihood, question, sequence, sequence).item()
        assert own == pytest.approx(entropy(STRINGS), abs=1e-12)
    # Sequences that differ but mean and weigh the same are not duplicates.
    twins = semantic_entropy(ll(np.log([0.25, 0.25, 0.5])), [0] * 3, [0, 0, 1], [0, 1, 2]).item()
    assert twins == pytest.approx(math.log(2))


def test_uniform_and_deterministic_outputs():
    k = 7
    likelihood, question = ll([-math.log(k)] * k), [0] * k
    numbers = list(range(k))
    measured = [
        predictive_entropy(likelihood, question),
        mode_nll(likelihood, question),
        semantic_entropy(likelihood, question, numbers, numbers),
        discrete_semantic_entropy(question, numbers),
    ]
    for found in measured:
        assert found.item() == pytest.approx(math.log(k), abs=1e-12)
    assert greedy_nll(likelihood).value.tolist() == pytest.approx([math.log(k)] * k)
    sure = ll([0.0] * 3)
    assert [predictive_entropy(sure, [0] * 3).item(), mode_nll(sure, [0] * 3).item()] == [0.0, 0.0]
    assert predictive_entropy(sure, [0] * 3).stderr.item() == 0.0
    assert semantic_entropy(sure, [0] * 3, [4] * 3, [1] * 3).item() == 0.0
    assert discrete_semantic_entropy([0] * 3, [4] * 3).item() == 0.0


def test_order_and_numbers_of_questions_do_not_matter():
    g = np.random.default_rng(3)
    question, meaning, sequence = g.integers(5, size=60), g.integers(3, size=60), np.arange(60)
    likelihood = ll(-g.exponential(size=60) - 1)
    order = g.permutation(60)
    for fn in (
        lambda ll_, q, m, s: predictive_entropy(ll_, q).value,
        lambda ll_, q, m, s: predictive_entropy(ll_, q).stderr,
        lambda ll_, q, m, s: mode_nll(ll_, q).value,
        lambda ll_, q, m, s: semantic_entropy(ll_, q, m, s).value,
        lambda ll_, q, m, s: discrete_semantic_entropy(q, m).value,
    ):
        plain = fn(likelihood, question, meaning, sequence)
        shuffled = fn(likelihood[order], question[order] * 7 - 3, 9 - meaning[order], sequence[order] + 5)
        torch.testing.assert_close(plain, shuffled, atol=1e-12, rtol=0)
        for q in range(5):
            own = question == q
            alone = fn(likelihood[own.nonzero()[0]], question[own], meaning[own], sequence[own])
            torch.testing.assert_close(alone, plain[q : q + 1], atol=1e-12, rtol=0)


def test_length_normalised_values_by_hand():
    likelihood = ll([-2.0, -6.0, -3.0], [1, 3, 2])
    assert length_normalised_log_prob(likelihood).value.tolist() == [-2.0, -2.0, -1.5]
    found = predictive_entropy(likelihood, [0, 0, 1], length_normalised=True)
    assert found.value.tolist() == [2.0, 1.5]
    assert found.stderr.tolist() == [0.0, math.inf]
    assert predictive_entropy(likelihood, [0, 0, 1]).value.tolist() == [4.0, 3.0]
    assert predictive_entropy(likelihood, [0, 0, 1]).stderr[0].item() == pytest.approx(2.0)


# ---------------------------------------------------------------------------------------------------------- labels
def test_kinds():
    question, numbers = [0, 0], [0, 1]
    noise = {"stderr": torch.ones(2, dtype=torch.float64), "draws": DrawsKey.of("a")}

    def kinds(kind, **more):
        likelihood = ll([-1.0, -2.0], kind=kind, **more)
        return (
            greedy_nll(likelihood).kind,
            mode_nll(likelihood, question).kind,
            maximum_sequence_probability(likelihood).kind,
            predictive_entropy(likelihood, question).kind,
            semantic_entropy(likelihood, question, numbers, numbers).kind,
            semantic_entropy(likelihood, question, numbers, numbers, form="sample_mean").kind,
        )

    exact, lower, upper, estimate, odd = (
        Kind.EXACT,
        Kind.LOWER_BOUND,
        Kind.UPPER_BOUND,
        Kind.ESTIMATE,
        Kind.SURROGATE,
    )
    assert kinds(exact) == (exact, upper, exact, estimate, estimate, upper)
    assert kinds(lower) == (upper, upper, lower, upper, odd, odd)
    assert kinds(lower, **noise) == (upper, odd, odd, upper, odd, odd)
    assert kinds(upper) == (lower, odd, upper, lower, odd, odd)
    assert kinds(estimate, **noise) == (estimate, odd, estimate, estimate, estimate, odd)
    unnormalised = Kind.UNNORMALIZED
    assert kinds(unnormalised) == (unnormalised, odd, odd, odd, estimate, odd)


def test_an_unknown_constant_cancels_in_semantic_entropy():
    values, question, meaning = np.log(STRINGS), [0] * 5, MEANING
    plain = semantic_entropy(ll(values), question, meaning, range(5)).item()
    moved = semantic_entropy(ll(values + 11, kind=Kind.UNNORMALIZED), question, meaning, range(5)).item()
    assert moved == pytest.approx(plain, abs=1e-12)


def test_errors_that_samples_share_are_added_and_others_are_in_the_spread():
    stderr = torch.tensor([0.1, 0.3], dtype=torch.float64)
    shared = ll([-1.0, -1.0], kind=Kind.LOWER_BOUND, stderr=stderr, draws=DrawsKey.of("a", shared_by_rows=True))
    apart = ll([-1.0, -1.0], kind=Kind.LOWER_BOUND, stderr=stderr, draws=DrawsKey.of("a"))
    assert predictive_entropy(shared, [0, 0]).stderr.item() == pytest.approx(0.2)
    assert predictive_entropy(apart, [0, 0]).stderr.item() == 0.0
    found = maximum_sequence_probability(shared)
    torch.testing.assert_close(found.stderr, found.value * stderr)


# -------------------------------------------------------------------------------------------------------- meanings
def test_exact_match_forgives_form_and_no_content():
    same = ["The answer.", "answer", "  ANSWER!", "an 'answer'", "(answer)"]
    assert exact_match("", same) == [0] * 5
    apart = ["5", "-5", "3.5", "35", "$5", ".5", "A", "?", "!", "a b", "b"]
    assert exact_match("", apart)[:9] == list(range(9))
    assert exact_match("", ["the b", "b", "a b"]) == [0] * 3
    assert exact_match("", ["ﬁne", "fine", "x  y", "x y"]) == [0, 0, 1, 1]


def test_judges_and_embeddings():
    asked = []

    def entails(prompt, first, second):
        asked.append((prompt, first, second))
        return set(second) <= set(first)

    texts = ["ab", "ba", "abc", "c"]
    assert by_judge(entails)("q", texts) == [0, 0, 1, 2]
    assert set(asked) >= {("q", "ab", "ba"), ("q", "ba", "ab")}
    assert by_judge(entails, both_ways=False)("q", ["abc", "ab", "c"]) == [0, 0, 0]

    angles = {"e": 0.0, "f": 20.0, "g": 40.0, "h": 180.0}

    def embed(given):
        return [[7 * math.cos(math.radians(angles[t])), 7 * math.sin(math.radians(angles[t]))] for t in given]

    near = math.cos(math.radians(25))
    assert by_embedding(embed, threshold=near)("", ["e", "f", "g", "h"]) == [0, 0, 1, 2]
    assert by_embedding(embed, threshold=near)("", ["f", "e", "g", "h"]) == [0, 0, 0, 1]
    assert by_embedding(embed, threshold=1)("", ["g", "g", "f"]) == [0, 0, 1]
    assert by_embedding(lambda t: np.array(embed(t)), threshold=-1)("", ["e", "h"]) == [0, 0]


def test_an_equivalence_sees_distinct_texts_and_their_prompt():
    seen = []

    def watched(prompt, texts):
        seen.append((prompt, list(texts)))
        return exact_match(prompt, texts)

    model = Tree(1)
    table = sequence_uncertainty(
        model, TokenBatch.from_lists([[3], [4]], starts=[1, 1]), num_samples=30, max_tokens=3, equivalence=watched
    )
    assert [prompt for prompt, _ in seen] == ["3", "4"] == list(table.prompts)
    assert all(len(texts) == len(set(texts)) < 30 for _, texts in seen)
    assert [set(texts) for _, texts in seen] == [set(texts) for texts in table.samples]


# ---------------------------------------------------------------------------------------------------------- driver
def test_g_nll_is_the_loss_of_a_teacher_forced_pass(tiny):
    """And the greedy decode is that of transformers; prompts of different lengths do not disturb one another."""
    prompts = ["def add(a, b):\n    return", "import os\nimport", "for"]
    table = sequence_uncertainty(tiny, prompts, num_samples=0, max_tokens=6)
    for i, prompt in enumerate(prompts):
        ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = tiny.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
            )
            labels = out.clone()
            labels[:, : ids.shape[1]] = -100
            loss = tiny.model(input_ids=out, labels=labels).loss.item()
        assert table.outputs[i] == tiny.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        count = int(table.likelihood.num_units[i])
        assert count == out.shape[1] - ids.shape[1]
        assert table.measures["g_nll"].value[i].item() == pytest.approx(loss * count, abs=1e-3)
    rows = table.rows()
    assert [row["prompt"] for row in rows] == prompts
    assert rows[0]["log_prob_per_token"] == pytest.approx(-rows[0]["g_nll"] / rows[0]["num_tokens"])


def test_rows_are_plain_and_finite():
    model = Tree(2)
    batch = TokenBatch.from_lists([[3], [4, 5]], starts=[1, 2])
    for n in (0, 1, 5):
        rows = sequence_uncertainty(model, batch, num_samples=n, max_tokens=3).rows()
        assert len(rows) == 2
        json.dumps(rows, allow_nan=False)
        assert ("predictive_entropy" in rows[0]) == (n > 0)
        if n == 1:
            assert rows[0]["predictive_entropy_stderr"] is None
        if n:
            assert len(rows[1]["samples"]) == n


def test_samples_of_a_prompt_depend_on_the_seed_and_on_the_prompt_alone():
    model = Tree(1)

    def samples(prompts, seed=0):
        batch = TokenBatch.from_lists(prompts, starts=[len(p) for p in prompts])
        return sequence_uncertainty(model, batch, num_samples=20, max_tokens=3, seed=seed).samples

    both = samples([[3], [4]])
    assert samples([[4]])[0] == both[1]
    assert samples([[4, 4, 4], [3]])[1] == both[0]
    assert samples([[3]], seed=1)[0] != both[0]


class Unordered:
    """A model with a sampler and a likelihood, and no order to decode in."""

    kind, unit, layout, max_length = Kind.EXACT, Unit.TOKEN, "causal", None
    tokenizer = SimpleNamespace(eos_token_id=EOS)

    def __init__(self, inner):
        self.inner = inner

    def log_prob(self, x, *, draws=None):
        return self.inner.log_prob(x)

    def sample(self, n, *, prompt=None, generator=None, max_tokens=64):
        from loglik.models.sampling import ancestral_samples

        return ancestral_samples(self.inner, n, prompt=prompt, generator=generator, max_tokens=max_tokens)


def test_a_model_that_can_only_be_sampled_is_judged_by_its_likeliest_sample():
    batch = TokenBatch.from_lists([[3], [4]], starts=[1, 1])
    table = sequence_uncertainty(Unordered(Tree(1)), batch, num_samples=6, max_tokens=3)
    assert table.decode == "sample"
    for i in range(2):
        best = table.sample_likelihood.value.reshape(2, 6)[i].max().item()
        assert table.likelihood.value[i].item() == pytest.approx(best)
        assert table.outputs[i] in table.samples[i]
    with pytest.raises(InputError, match="Unordered cannot be decoded greedily: set num_samples above 0"):
        sequence_uncertainty(Unordered(Tree(1)), batch, num_samples=0)


def test_models_of_other_families():
    """An n-gram model has exact likelihoods and a sampler of its own."""
    model = NGramLM.train(["ab ab ab", "ab ac", "ab"], order=3)
    table = sequence_uncertainty(model, ["a", "ab "], num_samples=4, max_tokens=5)
    assert table.measures["predictive_entropy"].kind is Kind.ESTIMATE
    assert all(math.isfinite(v) for m in table.measures.values() for v in m.value.tolist())
    assert table.prompts == ("a", "ab ")


def test_prompts_get_the_special_tokens_of_their_tokenizer():
    adds = CausalLM(build(CAUSAL["llama"], 330), llama_tokenizer())
    own = adds.tokenizer
    assert prompt_tokens(adds, ["hello"]).ids[0].tolist() == own("hello")["input_ids"]
    assert prompt_tokens(adds, ["<s>hello"]).ids[0].tolist().count(own.bos_token_id) == 1
    bare = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer())
    batch = prompt_tokens(bare, ["hello world", ""])
    assert batch.ids[0].tolist() == bare.tokenizer("hello world")["input_ids"]
    assert batch.attention_mask.sum(1).tolist() == [len(batch.ids[0]), 1]
    assert batch.ids[1, 0].item() == bare.tokenizer.bos_token_id
    assert not batch.scored_mask.any()


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_log_likelihood_of_an_output_are_refused(value):
    likelihood, two = ll([-1.0, value]), [0, 1]
    for call in (
        lambda: greedy_nll(likelihood),
        lambda: mode_nll(likelihood, two),
        lambda: maximum_sequence_probability(likelihood),
        lambda: length_normalised_log_prob(likelihood),
        lambda: predictive_entropy(likelihood, two),
        lambda: semantic_entropy(likelihood, two, two, two),
    ):
        with pytest.raises(RowError, match=r"row 1: its log-likelihood is .*: score it with the model"):
            call()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ([0], r"question must be 2 whole numbers"),
        ([0.0, 1.0], r"question must be 2 whole numbers"),
        ([True, False], r"question must be 2 whole numbers"),
        ([[0, 1]], r"question must be 2 whole numbers"),
    ],
)
def test_questions_that_do_not_fit_are_refused(question, message):
    likelihood = ll([-1.0, -2.0])
    for call in (predictive_entropy, mode_nll):
        with pytest.raises(InputError, match=message):
            call(likelihood, question)
    with pytest.raises(InputError, match=message.replace("question", "meaning")):
        semantic_entropy(likelihood, [0, 0], question, [0, 1])
    with pytest.raises(InputError, match=message.replace("question", "meaning")):
        discrete_semantic_entropy([0, 0], question)


def test_nothing_to_measure_is_refused():
    empty = ll([])
    for call in (
        lambda: predictive_entropy(empty, []),
        lambda: mode_nll(empty, []),
        lambda: discrete_semantic_entropy([], []),
        lambda: num_semantic_sets([], []),
    ):
        with pytest.raises(InputError, match="there is no sample"):
            call()
    with pytest.raises(RowError, match="row 0: has no scored token to divide by"):
        length_normalised_log_prob(ll([-1.0], [0]))
    with pytest.raises(InputError, match="form must be one of normalised, sample_mean, class_mean, got 'kuhn'"):
        semantic_entropy(ll([-1.0]), [0], [0], [0], form="kuhn")


def test_one_sequence_cannot_have_two_meanings_or_likelihoods():
    with pytest.raises(RowError, match="row 2: has the sequence of row 0 and another meaning"):
        semantic_entropy(ll([-1.0, -2.0, -1.0]), [0] * 3, [0, 1, 1], [5, 6, 5])
    with pytest.raises(RowError, match="row 2: has the sequence of row 0 and another meaning or log-likelihood"):
        semantic_entropy(ll([-1.0, -2.0, -1.5]), [0] * 3, [0, 1, 0], [5, 6, 5])
    # In another question it may, and noisy values of one sequence differ.
    semantic_entropy(ll([-1.0, -2.0, -1.5]), [0, 0, 1], [0, 1, 1], [5, 6, 5])
    noisy = ll([-1.0, -1.5], kind=Kind.ESTIMATE, stderr=torch.ones(2, dtype=torch.float64))
    semantic_entropy(noisy, [0, 0], [0, 0], [5, 5])


def test_equivalences_that_go_wrong_are_refused():
    with pytest.raises(InputError, match=r"threshold must lie in \[-1, 1\], got 1.5"):
        by_embedding(lambda t: [[1.0]] * len(t), threshold=1.5)
    with pytest.raises(InputError, match=r"embed must give \(2, D\) numbers"):
        by_embedding(lambda t: [[1.0]])("", ["a", "b"])
    for bad in (0.0, math.nan, math.inf):
        with pytest.raises(InputError, match="the embedding of 'b' is 0 or not finite"):
            by_embedding(lambda t, bad=bad: [[1.0], [bad]])("", ["a", "b"])
    batch = TokenBatch.from_lists([[3]], starts=[1])
    with pytest.raises(InputError, match="equivalence must give a class for each of"):
        sequence_uncertainty(Tree(1), batch, num_samples=9, max_tokens=3, equivalence=lambda p, t: [0] * (len(t) + 1))


def test_the_driver_refuses_with_a_sentence():
    model, batch = Tree(1), TokenBatch.from_lists([[3]], starts=[1])
    with pytest.raises(InputError, match="num_samples must be at least 0 and max_tokens at least 1, got -1, 4"):
        sequence_uncertainty(model, batch, num_samples=-1, max_tokens=4)
    with pytest.raises(InputError, match="num_samples must be at least 0 and max_tokens at least 1, got 1, 0"):
        sequence_uncertainty(model, batch, num_samples=1, max_tokens=0)
    with pytest.raises(InputError, match="prompts must be several texts"):
        sequence_uncertainty(model, "abc")
    with pytest.raises(InputError, match="prompts must be several texts"):
        sequence_uncertainty(model, [])
    with pytest.raises(InputError, match="there is no prompt"):
        sequence_uncertainty(model, TokenBatch.from_lists([]))
    with pytest.raises(RowError, match="prompt 1: is empty"):
        sequence_uncertainty(model, TokenBatch.from_lists([[3], []], starts=[1, 0]))
    with pytest.raises(InputError, match="sequence uncertainty needs log_prob"):
        sequence_uncertainty(object(), batch)
    for found in ([], [[]]):
        with pytest.raises(InputError, match="search must give a completion that is not empty for each of the 1"):
            sequence_uncertainty(model, batch, search=lambda p, found=found: found)
    broken = Tree(tables={(3,): torch.full((V,), math.nan, dtype=torch.float64)})
    with pytest.raises(RowError, match="prompt 0: the model gives NaN after it"):
        sequence_uncertainty(broken, batch, num_samples=0)

    class Mute:
        kind, unit = Kind.EXACT, Unit.TOKEN

        def log_prob(self, x, *, draws=None):
            return model.log_prob(x)

    with pytest.raises(InputError, match="sampling without a sampler needs per-token conditionals"):
        sequence_uncertainty(Mute(), batch)


def test_prompts_that_do_not_fit_are_refused(tiny):
    limit = tiny.max_length
    with pytest.raises(RowError, match=rf"prompt 1: has 3 tokens, and {limit} more do not fit into the model's"):
        sequence_uncertainty(
            tiny, TokenBatch.from_lists([[3], [3, 4, 5]], starts=[1, 3]), num_samples=0, max_tokens=limit
        )
    with pytest.raises(RowError, match="prompt 1: the prompt has a NUL"):
        prompt_tokens(tiny, ["a", "\0"])
    with pytest.raises(InputError, match="the model has no tokenizer"):
        prompt_tokens(CausalLM(build(CAUSAL["llama"], 30)), ["a"])
    without = CausalLM(build(CAUSAL["gpt2"], 330), byte_level_tokenizer(bos=False))
    with pytest.raises(RowError, match="prompt 0: is empty and the tokenizer has no BOS"):
        prompt_tokens(without, [""])
