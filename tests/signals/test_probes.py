"""Overlaps of sets against simulation and published labels; probes against scikit-learn, chance and planted classes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.signals.probes import answer_states, component_states, probe_accuracy, probe_transfer, set_overlap
from zoo import CAUSAL, build


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


# ------------------------------------------------------------------ probes of another set
def generic_set(seed: int, n: int = 60, gap: float = 8.0, turn: bool = False):
    """Two classes along one axis, or along another one."""
    r = np.random.default_rng(seed)
    states = r.normal(size=(2 * n, 8))
    states[:, 1 if turn else 0] += np.repeat([gap / 2, -gap / 2], n)
    return states, ["HK+"] * n + ["factual"] * n


def test_transfer_tests_both_probes_on_the_same_rows():
    """One split found again by hand: which rows are held out, and as many generic rows as specific ones train."""
    states, labels = generic_set(0, n=10, gap=1.0)
    other, titles = generic_set(1, n=40, gap=1.0, turn=True)
    found = probe_transfer(states, labels, other, titles, splits=1, train=0.8, seed=3)
    assert found.specific == probe_accuracy(states, labels, splits=1, train=0.8, seed=3)
    r = np.random.default_rng([3, 0])
    names = np.array(labels)
    members = [np.flatnonzero(names == c) for c in ("HK+", "factual")]
    drawn = [r.permutation(m)[:10] for m in members]
    held = np.sort(np.concatenate([d[8:] for d in drawn]))
    kinds = np.array(titles)
    taken = np.concatenate([r.permutation(np.flatnonzero(kinds == c))[:8] for c in ("HK+", "factual")])

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    machine = LinearSVC(C=1.0, max_iter=100_000, random_state=0).fit(unit(other)[taken], kinds[taken])
    assert found.generic.per_split == (machine.score(unit(states)[held], names[held]),)
    assert (found.generic.per_class, found.generic.chance) == (10, 0.5)


def test_transfer_works_along_the_same_axis_only():
    states, labels = generic_set(2, gap=5.0)
    alike, apart = (probe_transfer(states, labels, *generic_set(3, turn=turn)) for turn in (False, True))
    assert alike.specific.accuracy > 0.95
    assert alike.generic.accuracy > 0.95
    assert apart.specific == alike.specific
    assert apart.generic.accuracy < 0.75


def test_transfer_trains_on_questions_that_are_not_held_out():
    """One split found again by hand, with questions in common; the numbers of questions need not be places."""
    states, labels = generic_set(5, n=10, gap=1.0)
    other, titles = generic_set(6, n=12, gap=1.0)
    names, kinds, own = np.array(labels), np.array(titles), 100 + np.arange(20)
    theirs = np.concatenate([own[:12], own[8:20]])
    found = probe_transfer(states, labels, other, titles, own, theirs, splits=1, train=0.7, seed=2)
    r = np.random.default_rng([2, 0])
    drawn = [r.permutation(m)[:10] for m in (np.flatnonzero(names == c) for c in ("HK+", "factual"))]
    held = np.sort(np.concatenate([d[7:] for d in drawn]))
    free = ~np.isin(theirs, own[held])
    assert free.sum() < 24
    taken = np.concatenate([r.permutation(np.flatnonzero(free & (kinds == c)))[:7] for c in ("HK+", "factual")])

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    machine = LinearSVC(C=1.0, max_iter=100_000, random_state=0).fit(unit(other)[taken], kinds[taken])
    assert found.generic.per_split == (machine.score(unit(states)[held], names[held]),)
    # Copies of the held-out rows alone: nothing is left to train on.
    places = np.concatenate([held, held])
    with pytest.raises(InputError, match=r"has 0 rows of HK\+ without held-out questions"):
        probe_transfer(states, labels, states[places], names[places], own, own[places], splits=1, train=0.7, seed=2)


def test_transfer_does_not_train_on_held_out_questions():
    """No signal; the generic set has a near-copy of each row. Under the same questions it must not be recognised."""
    r = np.random.default_rng(4)
    states = r.normal(size=(160, 400))
    labels = ["a", "b"] * 80
    copies = states + 0.01 * r.normal(size=states.shape)
    extra = r.normal(size=(400, 400))
    other, titles = np.concatenate([copies, extra]), [*labels, *["a", "b"] * 200]
    own = np.arange(160)
    named = probe_transfer(states, labels, other, titles, own, np.arange(560), splits=5)
    blind = probe_transfer(states, labels, copies, labels, own, splits=5)  # all are taken for other questions
    assert named.generic.accuracy < 0.62
    assert blind.generic.accuracy > 0.65


def test_transfer_refuses_what_does_not_fit():
    states, labels = generic_set(0, n=10)
    other, titles = generic_set(1, n=10)
    for given, names, message in (
        (other[:, :5], titles, "must have states of width 8"),
        (other, titles[:5], "must have states of width 8"),
        (other, ["right"] * 10 + ["wrong"] * 10, "must have the classes"),
        (other[5:], titles[5:], r"has 5 rows of HK\+ without held-out questions, .* trained on 7"),
        (other * 0, titles, "row 0 has length 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            probe_transfer(states, labels, given, names)
    with pytest.raises(InputError, match="splits must be at least 1"):
        probe_transfer(states, labels, other, titles, splits=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_components_are_those_of_the_last_token(name, side):
    """Of each block, whatever the padding; without the embedding they add up to the stream where nothing norms them."""
    model = CausalLM(build(CAUSAL[name], 20))
    rows = [[1, 5, 9, 2], [1, 7]]
    batch = TokenBatch.from_lists(rows, padding_side=side)
    parts = {kind: component_states(model, batch, kind) for kind in ("mlp", "attention", "residual")}
    for kind, found in parts.items():
        assert found.shape == (2, 2, 16)
        for i, row in enumerate(rows):
            alone = component_states(model, TokenBatch.from_lists([row]), kind)[:, 0]
            torch.testing.assert_close(found[:, i], alone, atol=1e-4, rtol=1e-4)
    if name in ("llama", "gpt_neox"):
        added = parts["mlp"][1] + parts["attention"][1]
        torch.testing.assert_close(parts["residual"][1] - parts["residual"][0], added, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        last = answer_states(model, batch)
    trunk = model.trunk
    assert trunk is not None
    norm = {"llama": "model.norm", "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}.get(name)
    if norm is not None:
        with torch.no_grad():
            normed = model.model.get_submodule(norm)(parts["residual"][-1])
        torch.testing.assert_close(normed, last, atol=1e-4, rtol=1e-4)


def test_components_refuse_what_has_none():
    with pytest.raises(InputError, match="a probe of components needs the blocks"):
        component_states(NGramLM.train(["ab"], order=2), TokenBatch.from_lists([[1, 2]]))
    model = CausalLM(build(CAUSAL["llama"], 20))
    with pytest.raises(RowError, match="row 1: has no token"):
        component_states(model, TokenBatch.from_lists([[1], []]))
    with pytest.raises(InputError, match="kind must be mlp"):
        component_states(model, TokenBatch.from_lists([[1]]), "head")


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
