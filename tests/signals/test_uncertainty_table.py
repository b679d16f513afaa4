"""The table of uncertainties against enumeration of a small language, and against transformers."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import scipy.stats
import torch

from loglik.decoding.beam import beam_search
from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.signals.drawing import greedy_completions, prompt_tokens
from loglik.signals.equivalence import exact_match
from loglik.signals.uncertainty_table import sequence_uncertainty
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
def test_the_driver_refuses_with_a_sentence():
    model, batch = Tree(1), TokenBatch.from_lists([[3]], starts=[1])
    with pytest.raises(InputError, match="equivalence must give a class for each of"):
        sequence_uncertainty(model, batch, num_samples=9, max_tokens=3, equivalence=lambda p, t: [0] * (len(t) + 1))
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
