"""Scenario labels on hand-made tables and on a model whose knowledge is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.ngram import NGramLM
from loglik.signals.scenarios import (
    Fact,
    Prediction,
    Scenario,
    fact_predictions,
    is_generic_prompt,
    label_scenarios,
    prompt_tokens,
    scenario_shares,
)

RECALL, GUESS, SHORTCUT, NONE = Scenario.EXACT_RECALL, Scenario.GUESSWORK, Scenario.HEURISTICS, Scenario.NONE


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


def test_shares_count_kinds_and_right_answers():
    table = [row(0, 0, "London", correct=True), row(0, 1, "Rome"), row(2, 0, "Tokyo"), row(1, 0, "Rome")]
    table[1] = replace(table[1], log_prob=-2.0)
    found = scenario_shares(table, [RECALL, RECALL, SHORTCUT, RECALL], FACTS)
    assert list(found) == [RECALL, SHORTCUT]
    assert (found[RECALL].count, found[RECALL].share) == (3, 0.75)
    assert found[RECALL].accuracy == pytest.approx(1 / 3)
    assert found[RECALL].probability == pytest.approx((2 * math.exp(-1) + math.exp(-2)) / 3)
    assert found[SHORTCUT].accuracy is None  # an invented subject has no right answer
    with pytest.raises(InputError, match="4 predictions need as many labels"):
        scenario_shares(table, [RECALL], FACTS)
    with pytest.raises(InputError, match="0 predictions"):
        scenario_shares([], [], FACTS)


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
