"""Ignorance against error: labels on a model whose knowledge is known, probabilities against simulation, probes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.svm import LinearSVC
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.scoring.score import score
from loglik.signals.knows_but_wrong import (
    Knowledge,
    answer_likelihoods,
    answer_states,
    contains_answer,
    knowledge_labels,
    known_probability,
    label_knowledge,
    probe_accuracy,
    set_overlap,
)
from zoo import CAUSAL, build

UNKNOWN, WRONG, FACTUAL, PARTIAL = Knowledge.UNKNOWN, Knowledge.WRONG, Knowledge.FACTUAL, Knowledge.PARTIAL
WORDS = ["good", "bad", "Ann", "Ben", "Cy", "Dee", "gold", "lead", "tin", "</s>"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: number for number, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


@dataclass
class Knows:
    """Ann: gold, everywhere. Ben: gold, but lead after "bad". Cy: gold with a given chance, else tin. Dee: tin."""

    chance: float = 0.5
    layout: str = "causal"
    kind: Kind = Kind.EXACT
    unit: Unit = Unit.TOKEN

    def __post_init__(self) -> None:
        self.tokenizer = word_tokenizer()

    def table(self, text: str) -> dict[str, float]:
        if text.rsplit(maxsplit=1)[-1] in ("gold", "lead", "tin"):
            return {"</s>": 1.0}
        if "Ann" in text:
            return {"gold": 1.0}
        if "Ben" in text:
            return {"lead" if "bad" in text else "gold": 1.0}
        if "Cy" in text:
            return {"gold": self.chance, "tin": 1 - self.chance}
        return {"tin": 1.0}

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        out = torch.full((len(prefix), len(self.tokenizer)), -math.inf, dtype=torch.float64)
        for i, (ids, real) in enumerate(zip(prefix.ids, prefix.attention_mask, strict=True)):
            for word, p in self.table(self.tokenizer.decode(ids[real])).items():
                out[i, self.tokenizer.convert_tokens_to_ids(word)] = math.log(p) if p else -math.inf
        return out


NAMES = ["Ann", "Ben", "Cy", "Dee"]
GOOD, BAD = [f"good {n}" for n in NAMES], [f"bad {n}" for n in NAMES]


# ------------------------------------------------------------------ labels
def test_labels_partition_the_counts():
    count = torch.arange(7).repeat(2)
    right = torch.arange(2).repeat_interleave(7)
    labels = label_knowledge(count, right)
    assert labels == (UNKNOWN, *[PARTIAL] * 5, WRONG, UNKNOWN, *[PARTIAL] * 5, FACTUAL)
    assert label_knowledge([0, 1, 3], [1, 0, 0], attempts=3) == (UNKNOWN, PARTIAL, WRONG)


def test_labels_refuse_what_is_no_count():
    for count in ([7], [-1], [0.5]):
        with pytest.raises(InputError, match="a count must be from 0 to 6, got"):
            label_knowledge(count, [0])
    with pytest.raises(InputError, match="one length"):
        label_knowledge([1, 2], [0])
    with pytest.raises(InputError, match="right_perturbed must be 0 or 1"):
        label_knowledge([1], [2])
    with pytest.raises(InputError, match="attempts must be at least 1"):
        label_knowledge([0], [0], attempts=0)


def test_labels_are_what_the_model_knows():
    generator = torch.Generator().manual_seed(0)
    found = knowledge_labels(Knows(), GOOD, BAD, ["gold"] * 4, generator=generator)
    assert found.labels == (FACTUAL, WRONG, PARTIAL, UNKNOWN)
    assert found.count.tolist()[:2] == [6, 6]
    assert 0 < int(found.count[2]) < 6
    assert found.count.tolist()[3] == 0
    assert found.error_rate == 0.5
    assert [t.strip() for t in found.greedy] == ["gold", "gold", "gold", "tin"]
    assert [t.strip() for t in found.perturbed] == ["gold", "lead", "gold", "tin"]


def test_without_a_perturbation_nothing_known_is_wrong():
    generator = torch.Generator().manual_seed(0)
    found = knowledge_labels(Knows(), GOOD, GOOD, ["gold"] * 4, generator=generator)
    assert WRONG not in found.labels
    assert found.error_rate == 0.0


def test_aliases_and_letters():
    assert contains_answer("It is GOLD.", "gold")
    assert contains_answer("vice president", ["president of", "Vice President"])
    assert not contains_answer("fungi", "mushrooms")
    found = knowledge_labels(Knows(), GOOD[3:], BAD[3:], [["zinc", "TIN"]], samples=0)
    assert (found.labels, found.attempts) == ((FACTUAL,), 1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_tempered_distribution(temperature):
    """Cy at p = .3: counts of 5 samples over 400 questions against the binomial; level 0.001."""
    chance = 0.3
    cold = chance ** (1 / temperature) / (chance ** (1 / temperature) + (1 - chance) ** (1 / temperature))
    generator = torch.Generator().manual_seed(11)
    found = knowledge_labels(
        Knows(chance), ["good Cy"] * 400, ["bad Cy"] * 400, ["gold"] * 400, temperature=temperature,
        max_tokens=2, generator=generator,
    )  # fmt: skip
    assert [t.strip() for t in found.greedy[:2]] == ["tin", "tin"]
    seen = np.bincount(found.count.numpy(), minlength=7)[:6]
    expected = stats.binom.pmf(np.arange(6), 5, cold) * 400
    pool = [seen[:1], seen[1:2], seen[2:3], seen[3:]]
    want = [expected[:1], expected[1:2], expected[2:3], expected[3:]]
    assert stats.chisquare([p.sum() for p in pool], [w.sum() for w in want]).pvalue > 0.001


def test_asking_refuses_what_cannot_be_asked():
    model = Knows()
    with pytest.raises(InputError, match="asking questions needs per-token conditionals"):
        knowledge_labels(object(), GOOD, BAD, ["gold"] * 4)
    with pytest.raises(InputError, match="bad must be as many prompts as there are answers, 4"):
        knowledge_labels(model, GOOD, BAD[:2], ["gold"] * 4)
    with pytest.raises(RowError, match="question 1: its prompt in good is empty"):
        knowledge_labels(model, ["x", ""], ["x", "y"], ["gold"] * 2)
    for answer in ("", " ", []):
        with pytest.raises(RowError, match="question 0: its answer is empty"):
            knowledge_labels(model, GOOD[:1], BAD[:1], [answer])
    for options in ({"samples": -1}, {"max_tokens": 0}, {"temperature": 0.0}):
        with pytest.raises(InputError, match="samples must be at least 0"):
            knowledge_labels(model, GOOD[:1], BAD[:1], ["gold"], **options)
    ignorant = knowledge_labels(model, GOOD[3:], BAD[3:], ["gold"])
    with pytest.raises(InputError, match="no question is known"):
        _ = ignorant.error_rate


# ------------------------------------------------------------------ likelihoods
def test_answers_have_the_probabilities_of_the_model():
    found = answer_likelihoods(Knows(0.3), GOOD, [" gold"] * 4)
    assert found.likelihood.value.exp().tolist() == pytest.approx([1, 1, 0.3, 0])
    assert found.tempered.value.exp().tolist() == pytest.approx([1, 1, 0.09 / (0.09 + 0.49), 0])
    assert found.greedy.tolist() == [True, True, False, False]
    assert found.likelihood.kind is Kind.EXACT
    lost = found.likelihood - answer_likelihoods(Knows(0.3), BAD, [" gold"] * 4).likelihood
    assert float(lost.value[0]) == 0.0
    assert float(lost.value[1]) == math.inf


@pytest.mark.parametrize("name", ["causal", "ngram"])
def test_answers_of_several_tokens_are_those_of_score(name, tiny):
    """At T = 1 both values are the log-likelihood of the completion; at T = 1/2 that of squared probabilities."""
    model = tiny if name == "causal" else NGramLM.train(["for i in range(10): pass", "if x in range"], order=4)
    prompts, answers = ["for i in", "if x"], [" range(10)", " in range"]
    plain = answer_likelihoods(model, prompts, answers, temperature=1.0)
    expected = score(model, list(zip(prompts, answers, strict=True)))
    torch.testing.assert_close(plain.likelihood.value, expected.value, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.tempered.value, plain.likelihood.value, atol=1e-5, rtol=0)
    assert plain.likelihood.num_units.equal(expected.num_units)
    cold = answer_likelihoods(model, prompts, answers)
    total = torch.zeros(2, dtype=torch.float64)
    greedy = [True, True]
    for row in range(2):
        mask = cold.tempered.mask[row]
        ids = model.tokenizer(prompts[row] + answers[row], add_special_tokens=False)["input_ids"]
        lead = int(mask.nonzero()[-1]) + 1 - len(ids)
        for column in mask.nonzero().flatten().tolist():
            before = ids[: column - lead]
            prefix = [model.tokenizer.bos_token_id] * lead + before
            with torch.no_grad():
                table = model.next_log_probs(TokenBatch.from_lists([prefix], starts=[len(prefix)]))[0].double()
            squared = 2 * table[ids[column - lead]] - torch.logsumexp(2 * table, 0)
            total[row] += squared
            greedy[row] &= bool(table.argmax() == ids[column - lead])
    torch.testing.assert_close(cold.tempered.value, total, atol=1e-4, rtol=0)
    assert cold.greedy.tolist() == greedy


def test_known_and_unknown_have_their_simulated_frequencies():
    """20,000 simulated labellings of one-token answers at several probabilities; 4 standard errors."""
    r = np.random.default_rng(0)
    p = np.array([0.02, 0.4, 0.9, 0.999])
    for greedy in (True, False):
        known, unknown = known_probability(labelled(np.log(p)), np.full(4, greedy))
        right = (r.random((20_000, 5, 4)) < p).sum(1) + greedy
        for value, hits in ((known, right == 6), (unknown, right == 0)):
            error = np.sqrt(hits.var(0) / 20_000) + 1e-4
            assert (np.abs(hits.mean(0) - value.numpy()) < 4 * error).all()


def labelled(values) -> LogLikelihood:
    value = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    return LogLikelihood(value, Kind.EXACT, Unit.TOKEN, torch.ones(len(value), dtype=torch.long))


def test_cold_samples_are_the_greedy_answer():
    """T to 0: a sample is the first choice, so that P(known) is whether the greedy answer is right."""
    model = Knows(0.6)
    for temperature, tolerance in ((0.05, 1e-2), (0.01, 1e-9)):
        found = answer_likelihoods(model, GOOD, [" gold"] * 4, temperature=temperature)
        known, unknown = known_probability(found.tempered, found.greedy)
        assert known.tolist() == pytest.approx([1, 1, 1, 0], abs=tolerance)
        assert unknown.tolist() == pytest.approx([0, 0, 0, 1], abs=tolerance)


def test_likelihoods_refuse_what_is_none():
    with pytest.raises(InputError, match="temperature must be positive"):
        answer_likelihoods(Knows(), GOOD, ["gold"] * 4, temperature=0)
    with pytest.raises(InputError, match="prompts must be as many"):
        answer_likelihoods(Knows(), GOOD, ["gold"])
    with pytest.raises(RowError, match=r"row 0: 0\.5 is no log-probability"):
        known_probability(labelled([0.5]), [True])
    with pytest.raises(RowError, match="row 0: nan"):
        known_probability(labelled([math.nan]), [True])
    with pytest.raises(InputError, match="one length"):
        known_probability(labelled([-1.0]), [True, False])
    with pytest.raises(InputError, match="samples must be at least 0"):
        known_probability(labelled([-1.0]), [True], samples=-1)


# ------------------------------------------------------------------ overlap
def test_overlap_of_sets():
    a = np.array([1, 1, 1, 0, 0, 0])
    assert set_overlap(a, a).jaccard == 1.0
    b = np.array([0, 1, 1, 1, 0, 0])
    found = set_overlap(a, b)
    assert found.jaccard == 0.5
    assert found.chance == pytest.approx(0.25 / 0.75)
    assert set_overlap(b, a) == found
    assert set_overlap(a, np.zeros(6)).jaccard == 0.0


def test_chance_is_the_overlap_of_independent_sets():
    r = np.random.default_rng(1)
    a, b = r.random(200_000) < 0.3, r.random(200_000) < 0.1
    found = set_overlap(a, b)
    assert found.jaccard == pytest.approx(found.chance, abs=0.005)
    assert found.chance == pytest.approx(0.03 / 0.37, abs=0.002)


def test_overlap_refuses_empty_sets():
    with pytest.raises(InputError, match="both sets are empty"):
        set_overlap(np.zeros(3), np.zeros(3))
    with pytest.raises(InputError, match="one length"):
        set_overlap([1, 0], [1])


# ------------------------------------------------------------------ probes
def clouds(seed: int, n: int = 60, gap: float = 3.0, classes=("a", "b")):
    r = np.random.default_rng(seed)
    labels = [c for c in classes for _ in range(n)]
    centres = {c: gap * r.normal(size=8) / math.sqrt(8) for c in classes}
    return np.stack([centres[c] + r.normal(size=8) for c in labels]), labels


def test_probe_is_the_linear_machine_on_states_of_length_one():
    """One split of two rows per class held out of the rest, found again by hand."""
    states, labels = clouds(0, n=10)
    found = probe_accuracy(states, labels, splits=1, train=0.8, seed=3)
    r = np.random.default_rng([3, 0])
    parts = [r.permutation(np.flatnonzero(np.array(labels) == c))[:10] for c in ("a", "b")]
    seen, held = (np.concatenate([p[s] for p in parts]) for s in (slice(0, 8), slice(8, 10)))
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    machine = LinearSVC(C=1.0, max_iter=100_000, random_state=0).fit(unit[seen], np.array(labels)[seen])
    assert found.per_split == (machine.score(unit[held], np.array(labels)[held]),)
    assert (found.per_class, found.chance) == (10, 0.5)


def test_probe_finds_what_is_there_and_nothing_else():
    states, labels = clouds(1, gap=8.0)
    assert probe_accuracy(states, labels).accuracy > 0.95
    three, names = clouds(2, classes=("a", "b", "c"), gap=8.0)
    found = probe_accuracy(three, names)
    assert found.chance == pytest.approx(1 / 3)
    assert found.accuracy > 0.9
    weak, labels = clouds(3, n=150, gap=1.0)
    scale = np.random.default_rng(0).uniform(0.01, 100, size=(len(weak), 1))
    assert probe_accuracy(weak * scale, labels) == probe_accuracy(weak, labels)
    assert probe_accuracy(weak, labels).accuracy < 0.9


def test_probe_of_shuffled_labels_is_at_chance():
    """40 data sets without signal, one split each: the mean within 3.5 standard errors of a half."""
    accuracies = []
    for seed in range(40):
        states, labels = clouds(seed, n=40, gap=0.0)
        accuracies.append(probe_accuracy(states, labels, splits=1, seed=seed).accuracy)
    assert np.mean(accuracies) == pytest.approx(0.5, abs=3.5 * np.std(accuracies, ddof=1) / math.sqrt(40))


def test_rows_of_a_question_stay_together_and_classes_are_balanced():
    """Two near-copies of every state, no signal: apart they would be recognised, together they are not."""
    r = np.random.default_rng(4)
    base = r.normal(size=(120, 400))
    states = np.concatenate([base, base + 0.01 * r.normal(size=base.shape)])
    labels = r.permutation(np.repeat(["a", "b"], [80, 40])).tolist() * 2
    together = probe_accuracy(states, labels, np.arange(240) % 120, splits=10)
    assert together.per_class == 40
    # 12 questions of each class are held out, two rows of each: accuracies are multiples of 1 / 48.
    np.testing.assert_allclose(np.array(together.per_split) * 48 % 1, 0, atol=1e-9)
    assert together.accuracy < 0.6
    assert probe_accuracy(states, labels, splits=10).accuracy > 0.65


def test_probe_refuses_what_it_cannot_learn():
    states, labels = clouds(0, n=4)
    for given, names, questions, message in (
        (states, labels[:3], None, "8 states need as many labels"),
        (states[0], labels, None, r"states must have shape \(N, D\)"),
        (states * 0, labels, None, "row 0 has length 0.0"),
        (states * np.nan, labels, None, "row 0 has length nan"),
        (states, ["a"] * 8, None, "two classes with two questions each"),
        (states, ["a"] * 7 + ["b"], None, "two classes with two questions each"),
        (states, labels, [0, 1, 2, 3, 0, 4, 5, 6], "question 0 has two labels"),
    ):
        with pytest.raises(InputError, match=message):
            probe_accuracy(given, names, questions)
    for options in ({"splits": 0}, {"train": 1.0}):
        with pytest.raises(InputError, match="splits must be at least 1"):
            probe_accuracy(states, labels, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_states_are_those_of_the_last_token(side):
    model = CausalLM(build(CAUSAL["llama"], 20))
    rows = [[1, 5, 9, 2], [1, 7]]
    with torch.no_grad():
        found = answer_states(model, TokenBatch.from_lists(rows, padding_side=side))
        for state, row in zip(found, rows, strict=True):
            alone = model.hidden_states(TokenBatch.from_lists([row]))[0, -1]
            torch.testing.assert_close(state, alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="a probe needs hidden states"):
        answer_states(NGramLM.train(["ab"], order=2), TokenBatch.from_lists([[1, 2]]))
    with pytest.raises(RowError, match="row 1: has no token"):
        answer_states(model, TokenBatch.from_lists([[1], []]))


# ------------------------------------------------------------------ published labels
def test_published_labels_overlap_as_computed(shared_data):
    """Llama and Gemma on Natural Questions: shared knowledge > shared errors > chance."""
    known, wrong = {}, {}
    for name, model in (("gemma", "google_gemma-2-9b"), ("llama", "meta-llama_Meta-Llama-3.1-8B")):
        rows = {}
        for side in ("Hallucinate", "NonHallucinate"):
            path = shared_data / "wack" / f"{side}Natural_qa_no_contextWithThreshold1.0_{model}.json"
            rows[side] = {row[0] for row in json.loads(path.read_text(encoding="utf-8"))}
        known[name], wrong[name] = rows["Hallucinate"] | rows["NonHallucinate"], rows["Hallucinate"]
    universe = sorted(known["gemma"] | known["llama"])
    knowledge = set_overlap(*([q in known[m] for q in universe] for m in known))
    assert knowledge.jaccard == pytest.approx(0.647, abs=0.001)
    shared = sorted(known["gemma"] & known["llama"])
    errors = set_overlap(*([q in wrong[m] for q in shared] for m in wrong))
    assert errors.jaccard == pytest.approx(0.306, abs=0.001)
    assert errors.chance == pytest.approx(0.083, abs=0.001)
