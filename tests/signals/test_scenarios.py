"""Scenario labels on hand-made tables and on a model whose knowledge is known; swaps and templates by enumeration."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.ngram import NGramLM
from loglik.signals.scenarios import (
    Fact,
    Prediction,
    Scenario,
    fact_predictions,
    is_generic_prompt,
    label_scenarios,
    likelihood_scenarios,
    name_specificity,
    prompt_tokens,
    swap_dependence,
    template_consistency,
)

RECALL, GUESS, SHORTCUT, NONE = Scenario.EXACT_RECALL, Scenario.GUESSWORK, Scenario.HEURISTICS, Scenario.NONE


def labelled(values, kind=Kind.EXACT) -> LogLikelihood:
    value = torch.as_tensor(values, dtype=torch.float64)
    return LogLikelihood(value, kind, Unit.TOKEN, torch.ones(len(value), dtype=torch.long))


# ------------------------------------------------------------------ rules
FACTS = (
    Fact("born", "Ada Lovelace", "London", 5000.0),
    Fact("born", "Tom Unknown", "Paris", 10.0),
    Fact("born", "Zorb Kimura"),
    Fact("born", "Old Paris Man", "Paris", 9000.0),
)


def row(fact: int, template: int, answer: str, *, rank: int = 0, correct=False, string=False, name=False, prompt=False):
    return Prediction(fact, template, rank, 0, answer, -1.0, correct, string, name, prompt)


def test_rules_on_a_hand_made_table():
    """Six templates say London of Ada; her other answers, a rare subject's and an invented one's by their counts."""
    table = [row(0, t, "London", correct=True) for t in range(6)]
    table += [row(0, 0, "Rome", rank=1)]  # wrong, popular: none
    table += [row(1, 0, "London")]  # once, unpopular, an object of the relation: guess
    table += [row(1, 1, "the")]  # once, but no object: none
    table += [row(1, t, "Paris", correct=True) for t in (0, 1)]  # twice: no guess, unpopular: no recall
    table += [row(2, t, "Tokyo", name=True) for t in range(5)]  # five, by the name
    table += [row(2, t, "Osaka", name=True) for t in range(4)]  # four: too few
    table += [row(2, t, "Kyoto") for t in range(5)]  # five, unexplained
    table += [row(3, t, "Paris", correct=True, string=True) for t in range(6)]  # right by its own string: none
    expected = [RECALL] * 6 + [NONE, GUESS, NONE] + [NONE] * 2 + [SHORTCUT] * 5 + [NONE] * 4 + [NONE] * 5 + [NONE] * 6
    assert list(label_scenarios(table, FACTS)) == expected


def test_counts_are_within_answer_and_surface_flag():
    """Six equal answers, of which one is a prompt's own: five are left, and five are not more than five."""
    table = [row(0, t, "London", correct=True) for t in range(6)]
    assert set(label_scenarios(table, FACTS)) == {RECALL}
    flagged = [*table[:5], replace(table[5], prompt_bias=True)]
    assert set(label_scenarios(flagged, FACTS)) == {NONE}
    assert set(label_scenarios(flagged, FACTS, recall_count=4)) == {RECALL, NONE}
    # The same answer at several ranks counts each time.
    ranks = [row(0, t, "London", rank=r, correct=True) for t in range(3) for r in range(2)]
    assert set(label_scenarios(ranks, FACTS)) == {RECALL}


def test_thresholds_are_strict():
    facts = [Fact("born", "A B", "London", 1000.0)]
    table = [row(0, t, "London", correct=True) for t in range(6)]
    assert set(label_scenarios(table, facts)) == {NONE}
    assert set(label_scenarios(table, facts, popularity=999.0)) == {RECALL}
    assert label_scenarios(table[:1], facts) == (NONE,)
    assert label_scenarios(table[:1], facts, popularity=1001.0) == (GUESS,)
    assert label_scenarios(table[:2], facts, popularity=1001.0) == (NONE, NONE)
    assert label_scenarios(table[:2], facts, popularity=1001.0, guess_count=3) == (GUESS, GUESS)
    synthetic = [Fact("born", "A B")]
    named = [replace(p, name_bias=True) for p in table[:3]]
    assert set(label_scenarios(named, synthetic)) == {NONE}
    assert set(label_scenarios(named, synthetic, heuristics_count=2)) == {SHORTCUT}


def test_candidates_may_be_given():
    table = [row(1, 0, "Lima"), row(1, 1, "Lon"), row(1, 2, "Lo")]
    assert label_scenarios(table, FACTS) == (NONE, GUESS, NONE)  # a beginning of three characters counts
    assert label_scenarios(table, FACTS, candidates={"born": {"Lima"}}) == (GUESS, NONE, NONE)
    assert set(label_scenarios(table, FACTS, candidates={})) == {NONE}


def test_labels_refuse_what_cannot_be_judged():
    with pytest.raises(RowError, match="fact 1: a real subject needs its popularity"):
        label_scenarios([], [FACTS[0], Fact("born", "A", "B")])
    with pytest.raises(RowError, match="fact 0: a real subject needs"):
        label_scenarios([], [Fact("born", "A", "B", math.nan)])
    with pytest.raises(InputError, match="is given twice"):
        label_scenarios([], [FACTS[0], FACTS[1], FACTS[0]])
    with pytest.raises(InputError, match="about fact 4, and there are 4 facts"):
        label_scenarios([row(4, 0, "x")], FACTS)


@pytest.mark.parametrize(
    ("prompt", "following", "title", "expected"),
    [
        ("Whales are large animals that", "live", "Blue whales", True),
        ("Whales are large animals that", "Live", "Blue whales", False),
        ("Fish are large animals that", "live", "Blue whales", False),
        ("Whales " + "w " * 10, "live", "whales", False),
        ("Whales A B C are", "live", "whales", False),
    ],
)
def test_generic_prompts(prompt, following, title, expected):
    assert is_generic_prompt(prompt, following, title=title) is expected


def test_generic_prompts_must_not_be_empty():
    with pytest.raises(InputError, match="must not be empty"):
        is_generic_prompt("", "x", title="t")
    with pytest.raises(InputError, match="must not be empty"):
        is_generic_prompt("x", " ", title="t")


# ------------------------------------------------------------------ a model whose knowledge is known
WORDS = [
    "Ada",
    "Kei",
    "Bo",
    "Hill",
    "Mori",
    "Rome",
    "Tokyo",
    "Oslo",
    "was",
    "born",
    "in",
    "comes",
    "from",
    "She",
    "name",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: number for number, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@dataclass
class Knows:
    """Ada Hill: Rome, by heart. Mori: Tokyo, by the name. She: Oslo, by the prompt "comes from". Else flat."""

    tokenizer: PreTrainedTokenizerFast
    layout: str = "causal"
    calls: int = 0

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        rows = []
        for ids, real in zip(prefix.ids, prefix.attention_mask, strict=True):
            self.calls += 1
            text = self.tokenizer.decode(ids[real])
            logits = torch.zeros(len(self.tokenizer), dtype=torch.float64)
            logits[self.tokenizer.convert_tokens_to_ids("Bo")] = 0.1
            if "Ada Hill" in text:
                logits[self.tokenizer.convert_tokens_to_ids("Rome")] = 8
            elif "Mori" in text:
                logits[self.tokenizer.convert_tokens_to_ids("Tokyo")] = 8
            if "comes from" in text:
                logits[self.tokenizer.convert_tokens_to_ids("Oslo")] = 6
            rows.append(logits.log_softmax(-1))
        return torch.stack(rows)


def asked(**options):
    model = Knows(word_tokenizer())
    facts = [Fact("born", "Ada Hill", "Rome", 5.0), Fact("born", "Kei Mori")]
    templates = {"born": ["[X] was born in", "[X] comes from"]}
    found = fact_predictions(model, facts, templates, **options)
    return model, facts, found


def test_predictions_and_flags_are_those_of_the_model():
    model, facts, found = asked(neutral={"born": ["She"]}, name_prompts={"born": ["name [X] in"]}, top=2, flag_top=1)
    assert [(p.fact, p.template, p.rank) for p in found] == list(itertools.product((0, 1), (0, 1), (0, 1)))
    first = {(p.fact, p.template): p for p in found if p.rank == 0}
    assert [p.answer for p in first.values()] == ["Rome", "Rome", "Tokyo", "Tokyo"]
    assert [p.correct for p in first.values()] == [True, True, False, False]
    assert [p.name_bias for p in first.values()] == [False, False, True, True]
    assert [p.prompt_bias for p in first.values()] == [False] * 4
    second = [p for p in found if p.rank == 1 and p.template == 1]
    assert [(p.answer, p.prompt_bias, p.surface) for p in second] == [("Oslo", True, True)] * 2
    exact = torch.log_softmax(torch.tensor([8.0, 0.1] + [0.0] * (len(model.tokenizer) - 2)).double(), 0)[0]
    assert first[0, 0].log_prob == pytest.approx(float(exact))
    assert first[0, 0].token == model.tokenizer.convert_tokens_to_ids("Rome")
    # 4 prompts, 2 with a neutral noun, 4 name parts: each asked once.
    assert model.calls == 10
    labels = label_scenarios(found, facts, recall_count=1, heuristics_count=1, popularity=1.0)
    kinds = {(p.fact, p.template): label for p, label in zip(found, labels, strict=True) if p.rank == 0}
    assert list(kinds.values()) == [RECALL, RECALL, SHORTCUT, SHORTCUT]


def test_without_shortcut_prompts_no_flag_but_the_string():
    model, _, found = asked(top=3)
    assert not any(p.surface for p in found)
    assert model.calls == 4
    ranked = fact_predictions(model, [Fact("born", "Bo Hill", "Oslo", 1.0)], {"born": ["[X] was born in"]}, top=1)
    assert (ranked[0].answer, ranked[0].string_match) == ("Bo", True)


def test_an_object_is_met_by_its_beginning_of_three_characters():
    for answer, known, expected in (
        ("New", "New York", True),
        ("Ne", "New York", False),
        ("York", "New York", False),
        ("new", "New York", False),
    ):
        model = Knows(word_tokenizer())
        model.tokenizer.decode = lambda ids, a=answer: f" {a}" if ids != [] and len(ids) == 1 else ""
        (found,) = fact_predictions(model, [Fact("r", "Hill", known, 1.0)], {"r": ["[X] in"]}, top=1)
        assert (found.answer, found.correct) == (answer, expected)


def test_an_empty_token_matches_no_subject():
    model = Knows(word_tokenizer())
    model.tokenizer.decode = lambda ids: "  "
    (found,) = fact_predictions(model, [Fact("r", "Hill", "Rome", 1.0)], {"r": ["[X] in"]}, top=1)
    assert (found.answer, found.string_match, found.correct) == ("", False, False)


def test_any_model_with_next_tokens_will_do(tiny):
    ngram = NGramLM.train(["abc abd abc"] * 3, order=3)
    for model in (tiny, ngram):
        found = fact_predictions(model, [Fact("r", "def", "x", 1.0)], {"r": ["[X] a", "[X] b"]}, top=2)
        assert len(found) == 4
        prefix = TokenBatch.from_lists(prompt_tokens(model, ["def a"]), starts=[1])
        with torch.no_grad():
            table = model.next_log_probs(prefix)[0]
        assert found[0].token == int(table.argmax())
        assert found[0].log_prob == pytest.approx(float(table.max()), abs=1e-4)


def test_asking_refuses_what_cannot_be_asked():
    model, fact = Knows(word_tokenizer()), Fact("born", "Ada Hill", "Rome", 1.0)
    good = {"born": ["[X] was born in"]}
    with pytest.raises(
        InputError, match=r"labelling predictions needs per-token conditionals.*object does not have it"
    ):
        fact_predictions(object(), [fact], good)
    for templates, message in (
        ({}, "relation 'born' of fact 0 has no template"),
        ({"born": ["was born in"]}, r"texts with \[X\] in them, got 'was born in'"),
        ({"born": "[X] was born in"}, "must be lists of texts"),
    ):
        with pytest.raises(InputError, match=message):
            fact_predictions(model, [fact], templates)
    with pytest.raises(RowError, match="fact 0: has no subject"):
        fact_predictions(model, [Fact("born", " ", "Rome", 1.0)], good)
    for options in ({"top": 0}, {"flag_top": 0}, {"top": True}):
        with pytest.raises(InputError, match="must be at least 1 token"):
            fact_predictions(model, [fact], good, **options)
    with pytest.raises(InputError, match="the vocabulary has 16 tokens"):
        fact_predictions(model, [fact], good, top=99)
    with pytest.raises(InputError, match="no tokenizer"):
        fact_predictions(Knows(None), [fact], good)


# ------------------------------------------------------------------ swaps
def population(seed: int = 0, subjects: int = 6, answers: int = 4) -> torch.Tensor:
    """(S, A) log p(a | subject)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(subjects, answers, generator=g, dtype=torch.float64).mul(2).log_softmax(-1)


def test_dependence_over_the_population_is_mutual_information():
    """With every subject among the swaps, the mean of the second form under p(s, a) is I(S; A), and exp(-D) is 1."""
    table = population()
    s, a = table.shape
    own = labelled(table.reshape(-1))
    swapped = labelled(table.T.repeat(s, 1, 1).reshape(-1))  # for each (s, a) the column of a
    found = swap_dependence(own, swapped, average="probability").value.reshape(s, a)
    p, mixture = table.exp() / s, table.exp().mean(0)
    information = (p * (table - mixture.log())).sum()
    assert float((p * found).sum()) == pytest.approx(float(information), abs=1e-12)
    assert float((p * (-found).exp()).sum()) == pytest.approx(1.0, abs=1e-12)
    logs = swap_dependence(own, swapped).value.reshape(s, a)
    torch.testing.assert_close(logs, table - table.mean(0), atol=1e-12, rtol=0)
    assert bool((logs >= found - 1e-12).all())  # Jensen


def test_a_model_that_ignores_the_subject_depends_on_nothing():
    table = population(1, subjects=1).expand(5, -1)
    for average in ("log", "probability"):
        found = swap_dependence(labelled(table[:, 0]), labelled(table[:, 0].repeat(3)), average=average)
        torch.testing.assert_close(found.value, torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
        assert found.kind is Kind.EXACT
    bound = labelled([-1.0], Kind.LOWER_BOUND)
    assert swap_dependence(bound, bound).kind is Kind.SURROGATE


def test_swaps_of_probability_zero_can_be_averaged_as_probabilities():
    own, swapped = labelled([-1.0]), labelled([-math.inf, math.log(0.5)])
    assert float(swap_dependence(own, swapped, average="probability").value) == pytest.approx(-1 - math.log(0.25))
    with pytest.raises(RowError, match=r"prediction 0: .*average probabilities"):
        swap_dependence(own, swapped)
    with pytest.raises(RowError, match="prediction 0"):
        swap_dependence(own, labelled([-math.inf]), average="probability")
    with pytest.raises(RowError, match="prediction 1: log p"):
        swap_dependence(labelled([-1.0, math.nan]), labelled([-1.0, -1.0]))


def test_swaps_must_pair():
    with pytest.raises(InputError, match="each of 2 predictions needs equally many swapped prompts, got 3"):
        swap_dependence(labelled([-1.0, -2.0]), labelled([-1.0] * 3))
    with pytest.raises(InputError, match="got 0 in all"):
        swap_dependence(labelled([-1.0]), labelled([]))
    with pytest.raises(InputError, match="average must be log or probability"):
        swap_dependence(labelled([-1.0]), labelled([-1.0]), average="mean")


def test_specificity_is_the_weakest_part_over_the_strongest():
    parts = torch.tensor([[4.0, 4.0], [1.0, 4.0], [-3.0, 2.0], [0.0, 0.0], [-1.0, -2.0], [2.0, 8.0]])
    torch.testing.assert_close(name_specificity(parts), torch.tensor([1.0, 0.25, 0.0, 0.0, 0.0, 0.25]))
    torch.testing.assert_close(name_specificity(parts.flip(1)), name_specificity(parts))
    three = torch.tensor([[2.0, 1.0, 4.0]])
    assert name_specificity(three).tolist() == [0.25]
    with pytest.raises(InputError, match="at least two parts"):
        name_specificity(torch.ones(3, 1))
    with pytest.raises(RowError, match="row 0: the dependence on part 1 is nan"):
        name_specificity(torch.tensor([[1.0, math.nan]]))


def test_likelihoods_alone_recover_the_planted_kinds():
    """p(a) from 0.2 or 0.95; dependence on both parts, on the surname alone, on none."""
    own = labelled(np.log([0.95, 0.95, 0.95, 0.2, 0.5]))
    parts = torch.tensor([[4.5, 4.1], [1.4, 4.0], [0.0, 0.0], [3.0, 3.0], [2.0, 4.0]])
    expected = (RECALL, SHORTCUT, SHORTCUT, GUESS, RECALL)
    assert likelihood_scenarios(own, parts) == expected
    assert likelihood_scenarios(own, parts, confident=0.1)[3] is RECALL
    assert likelihood_scenarios(own, parts, specific=0.2)[1] is RECALL
    with pytest.raises(InputError, match="there are 2 predictions and dependences of 5"):
        likelihood_scenarios(own[:2], parts)
    for options in ({"confident": 0.0}, {"specific": 1.0}):
        with pytest.raises(InputError, match="must lie between 0 and 1"):
            likelihood_scenarios(own, parts, **options)
    with pytest.raises(RowError, match="row 0: the log-likelihood is nan"):
        likelihood_scenarios(labelled([math.nan]), parts[:1])


# ------------------------------------------------------------------ templates
def test_identical_templates_agree():
    table = population(2).unsqueeze(1).expand(-1, 5, -1)
    found = template_consistency(table)
    assert found.agreement.tolist() == [1.0] * 6
    assert found.answer.equal(table[:, 0].argmax(-1))
    torch.testing.assert_close(found.divergence, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_divergence_is_that_of_jensen_and_shannon():
    table = population(3, subjects=8).reshape(2, 4, 4)
    p = table.exp()
    mixture = p.mean(1, keepdim=True)
    expected = (p * (table - mixture.log())).sum(-1).mean(1)  # mean divergence to the mixture
    torch.testing.assert_close(template_consistency(table).divergence, expected, atol=1e-12, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(template_consistency(table[:, order]).divergence, expected, atol=1e-12, rtol=0)


def test_opposed_templates_diverge_by_the_logarithm_of_their_number():
    table = torch.eye(3, dtype=torch.float64).log()[None]
    found = template_consistency(table)
    assert float(found.divergence) == pytest.approx(math.log(3))
    assert float(found.agreement) == pytest.approx(1 / 3)
    assert found.answer.tolist() == [0]
    two = torch.eye(3, dtype=torch.float64).log()[[0, 1, 1]][None]
    assert template_consistency(two).answer.tolist() == [1]
    assert float(template_consistency(two).agreement) == pytest.approx(2 / 3)


def test_templates_must_be_distributions():
    with pytest.raises(InputError, match=r"shape \(N, P, V\)"):
        template_consistency(torch.zeros(2, 3))
    with pytest.raises(InputError, match="fact 0 under template 0 do not sum to 1"):
        template_consistency(torch.zeros(1, 2, 3))
    with pytest.raises(InputError, match="do not sum to 1"):
        template_consistency(torch.full((1, 1, 2), math.nan))
