"""Ignorance against error: labels on a model whose knowledge is known, probabilities against simulation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.ngram import NGramLM
from loglik.scoring.score import score
from loglik.signals.answer_likelihoods import answer_likelihoods, known_probability
from loglik.signals.knows_but_wrong import (
    Knowledge,
    contains_answer,
    knowledge_labels,
    label_knowledge,
    likely_knowledge,
    shot_prompts,
)

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


# ------------------------------------------------------------------ aliases, labels and prompts
def test_aliases_add_up_and_beginnings_count_once(tiny):
    """An answer of two aliases has the sum of their probabilities; "tin gold" begins with "tin" and adds nothing."""
    both = answer_likelihoods(Knows(0.3), GOOD, [[" gold", " tin"]] * 4)
    torch.testing.assert_close(both.likelihood.value, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert both.greedy.tolist() == [True] * 4
    assert both.likelihood.per_unit is None
    longer = answer_likelihoods(Knows(0.3), GOOD, [[" tin gold", " tin", " tin"]] * 4)
    single = answer_likelihoods(Knows(0.3), GOOD, [" tin"] * 4)
    torch.testing.assert_close(longer.likelihood.value, single.likelihood.value)
    assert longer.greedy.equal(single.greedy)
    begun, longer = (tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("os.join", "os.join("))
    assert longer[: len(begun)] == begun
    nested = answer_likelihoods(tiny, ["import os\nos."], [["join(", "join"]])
    torch.testing.assert_close(
        nested.likelihood.value, answer_likelihoods(tiny, ["import os\nos."], ["join"]).likelihood.value
    )
    prompts, names = ["import os\nos.path."] * 3, ["join", "exists", "isdir"]
    apart = answer_likelihoods(tiny, prompts, names)
    together = answer_likelihoods(tiny, prompts[:2], [names, "join"])
    for kind in ("likelihood", "tempered"):
        values = getattr(apart, kind).value
        assert float(getattr(together, kind).value[0]) == pytest.approx(float(values.logsumexp(0)), abs=1e-5)
        assert float(getattr(together, kind).value[1]) == pytest.approx(float(values[0]), abs=1e-5)
    assert together.likelihood.kind is Kind.EXACT
    best = int(apart.likelihood.value.argmax())
    assert int(together.likelihood.num_units[0]) == int(apart.likelihood.num_units[best])
    assert bool(together.greedy[0]) == bool(apart.greedy.any())


def test_likely_labels_are_those_of_sampling():
    good, bad = (answer_likelihoods(Knows(0.5), prompts, [" gold"] * 4) for prompts in (GOOD, BAD))
    assert likely_knowledge(good, bad) == (FACTUAL, WRONG, PARTIAL, UNKNOWN)
    assert likely_knowledge(good, good) == (FACTUAL, FACTUAL, PARTIAL, UNKNOWN)
    rare = answer_likelihoods(Knows(0.1), GOOD, [" gold"] * 4)  # sampled with 1 / 82
    assert likely_knowledge(rare, rare)[2] is UNKNOWN
    assert likely_knowledge(rare, rare, samples=100)[2] is PARTIAL
    # The most frequent label of 120 samplings.
    for chance in (0.2, 0.35, 0.8, 0.95):
        g = torch.Generator().manual_seed(3)
        labels = knowledge_labels(
            Knows(chance), *([p] * 120 for p in ("good Cy", "bad Cy", "gold")), max_tokens=1, generator=g
        )
        names, times = np.unique([str(label) for label in labels.labels], return_counts=True)
        alone = answer_likelihoods(Knows(chance), ["good Cy"], [" gold"])
        assert str(likely_knowledge(alone, alone)[0]) == names[times.argmax()]
    with pytest.raises(InputError, match="4 answers and 1 under the perturbing prompt"):
        likely_knowledge(good, answer_likelihoods(Knows(), BAD[:1], [" gold"]))


def test_prompts_with_examples():
    right, wrong = [("q1", "a1"), ("q2", "a2"), ("q3", "a3")], [("q1", "w1"), ("q2", "w2"), ("q3", "w3")]
    good, bad = (shot_prompts(["x", "q2"], shots, number=2, seed=4) for shots in (right, wrong))
    assert good[0].endswith("question: x\nanswer:")
    assert good[0].count("question:") == 3
    assert bad[0] == good[0].replace(" a", " w").replace("\nwnswer", "\nanswer")
    assert "q2" not in good[1].rsplit("question", 1)[0]  # an example that is asked is not shown
    assert good == shot_prompts(["x", "q2"], right, number=2, seed=4)
    many = {shot_prompts(["x"], right, number=1, seed=s) for s in range(20)}
    assert len(many) == 3
    assert shot_prompts(["x"], [], number=0, prefix="Bob: ", template="{question}?") == ("Bob: x?",)
    with pytest.raises(InputError, match="3 examples are to be shown before 'q2', and there are 2"):
        shot_prompts(["q2"], right)
    for options in ({"template": "none"}, {"number": -1}):
        with pytest.raises(InputError, match="a template needs"):
            shot_prompts(["x"], right, **options)
