"""P058: summing over the readings of statements solves order puzzles where the best reading fails (2210.01293)."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import TransformerLM, categorical

from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.thinksum import Constraint, aggregate, order_posterior

# (a) order puzzles
OBJECTS, PUZZLES, SHARPNESS, FLOOR = 5, 600, 1.5, 1e-3
ORDERS = list(itertools.permutations(range(OBJECTS)))
BONUSES = {"0.55": 1.0, "0.70": 1.5, "0.83": 2.0, "0.96": 3.0, "1.0": 1e3}  # by the translator's accuracy, about
# (b) odd one out
ITEMS, PROPERTIES, CLASSES, KEPT = 40, 12, 4, 0.9
WIDTH, STEPS, TOKENS, LR = 64, 600, 768, 3e-3
ASKED = ITEMS + PROPERTIES  # the token before the odd item
SETS = 500

CLAIM = Claim(
    paper="P058",
    text=(
        "Thinking in many small likelihoods and summing them outside the model solves order puzzles that the likeliest "
        "readings do not, and finds the odd one out better than asking for it."
    ),
    setup=(
        "(a) 600 puzzles of 5 objects: statements 'i before j' and 'i is at k', true of a hidden order and kept if "
        "they shrink the set of consistent orders, until one is left. A simulated translator gives each statement a "
        "softmax (inverse temperature 1.5) over the true reading and 3 confusions, logits N(0, 1) plus a bonus for the "
        "true one; floor 1e-3. Baseline: the likeliest readings, majority over consistent orders, a random guess if "
        "there are none. (b) A transformer (2 layers, width 64) learns 'item has property' (40 items in 4 classes, 12 "
        "properties, 3 of each class; 90 % of the facts are of the item's class), 600 AdamW steps of 768 tokens, "
        "learning rate 3e-3. ThinkSum: p(property | item) normalised over 4 items, mean over the 12 properties "
        "weighted by how likely the items find them, odd is the least. Direct: another one of the same size learns "
        "sequences 'a b c d odd' of half of the sets of items with as many tokens, and is asked about 500 others."
    ),
    checks=(
        Check(
            "summing beats the best reading",
            "at translator accuracy about 0.83 Sum - baseline >= 15 points, in every seed",
            lambda m: m["0.83: Sum"] - m["0.83: baseline"] >= 0.15,
            ("0.83: Sum", "0.83: baseline", "0.83: translator"),
        ),
        Check(
            "both are right with a perfect translator",
            "both accuracies are 1 where the translator's is 1, in every seed",
            lambda m: m["1.0: Sum"] == 1.0 and m["1.0: baseline"] == 1.0,
            ("1.0: Sum", "1.0: baseline"),
        ),
        Check(
            "odd one out",
            "accuracy of ThinkSum (better of mixture and product) >= direct + 20 points on unseen sets, in every seed",
            lambda m: max(m["odd: mixture"], m["odd: product"]) >= m["odd: direct"] + 0.20,
            ("odd: mixture", "odd: product", "odd: direct"),
        ),
    ),
    seeds=5,
)


def before(i: int, j: int) -> Constraint:
    return lambda position: position[i] < position[j]


def at(i: int, place: int) -> Constraint:
    return lambda position: position[i] == place


def statement(generator: np.random.Generator, position: tuple[int, ...]) -> list[Constraint]:
    """A true statement and three confusions of it."""
    i, j, other = generator.permutation(OBJECTS)[:3].tolist()
    if generator.random() < 0.5:
        i, j = (i, j) if position[i] < position[j] else (j, i)
        return [before(i, j), before(j, i), before(other, j), before(i, other)]
    place = position[i]
    elsewhere = int(generator.choice([p for p in range(OBJECTS) if p != place]))
    return [at(i, place), at(other, place), at(i, elsewhere), at(other, elsewhere)]


def puzzle(generator: np.random.Generator) -> tuple[tuple[int, ...], list[list[Constraint]]]:
    position = tuple(generator.permutation(OBJECTS).tolist())
    left, statements = ORDERS, []
    while len(left) > 1:
        readings = statement(generator, position)
        consistent = [order for order in left if readings[0](order)]
        if len(consistent) < len(left):
            left, statements = consistent, [*statements, readings]
    return position, statements


def deduction(seed: int, bonus: float) -> tuple[float, float, float]:
    """Accuracy of the translator, of Sum and of the baseline."""
    generator = np.random.default_rng(seed)
    translated, summed, guessed = [], [], []
    for _ in range(PUZZLES):
        position, statements = puzzle(generator)
        logits = generator.normal(size=(len(statements), 4))
        logits[:, 0] += bonus
        wanted = int(generator.integers(OBJECTS))
        translated.extend(logits.argmax(1) == 0)
        found = order_posterior(statements, list(torch.from_numpy(SHARPNESS * logits)), OBJECTS, floor=FLOOR)
        summed.append(int(found.marginal()[wanted].argmax()) == position[wanted])
        taken = [readings[best] for readings, best in zip(statements, logits.argmax(1), strict=True)]
        consistent = [order[wanted] for order in ORDERS if all(reading(order) for reading in taken)]
        guess = int(np.bincount(consistent).argmax()) if consistent else int(generator.integers(OBJECTS))
        guessed.append(guess == position[wanted])
    return float(np.mean(translated)), float(np.mean(summed)), float(np.mean(guessed))


def train(draw: object, length: int, scored: int, generator: torch.Generator) -> TransformerLM:
    """A model of rows (N, length) from `draw(N)`, of which the last `scored` tokens are learned."""
    network = TransformerLM(ASKED + 1, WIDTH, length=length)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    objective = MaximumLikelihood()
    for _ in range(STEPS):
        loss = objective(network.log_prob(draw(TOKENS // length, generator), start=length - scored)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False).eval()


def odd_sets(classes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(count, 4) items, and which of them is of another class than the rest."""
    keys = torch.rand(count, ITEMS, generator=generator)
    kinds = torch.rand(count, CLASSES, generator=generator).argsort(1)
    main = keys.masked_fill(classes != kinds[:, :1], -1).topk(3).indices
    other = keys.masked_fill(classes != kinds[:, 1:2], -1).topk(1).indices
    order = torch.rand(count, 4, generator=generator).argsort(1)
    return torch.cat([main, other], 1).gather(1, order), (order == 3).int().argmax(1)


def is_seen(items: Tensor) -> Tensor:
    """Half of the sets of items, whatever their order: those with this parity of a fixed mixture of numbers."""
    mixed = (items * items * 7919 + items * 104729 + 31).remainder(10007)
    return mixed.sum(1).remainder(97) < 48


def odd_one_out(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(ITEMS).remainder(CLASSES)[torch.randperm(ITEMS, generator=generator)]

    def facts(count: int, generator: torch.Generator) -> Tensor:
        item = torch.randint(ITEMS, (count,), generator=generator)
        own = classes[item] * 3 + torch.randint(3, (count,), generator=generator)
        any_ = torch.randint(PROPERTIES, (count,), generator=generator)
        kept = torch.rand(count, generator=generator) < KEPT
        return torch.stack([item, ITEMS + torch.where(kept, own, any_)], 1)

    def direct(count: int, generator: torch.Generator, *, seen: bool = True) -> Tensor:
        items, odd = odd_sets(classes, 4 * count + 50, generator)
        keep = is_seen(items) == seen
        items, odd = items[keep][:count], odd[keep][:count]
        ask = torch.full((len(items), 1), ASKED)
        return torch.cat([items, ask, items.gather(1, odd[:, None])], 1)

    knows, asked = train(facts, 2, 1, generator), train(direct, 6, 1, generator)
    test = direct(SETS, generator, seen=False)
    items, answer = test[:, :4], test[:, 5]
    log_p = knows.conditionals(torch.stack([torch.arange(ITEMS)] * 2, 1))[:, 1, ITEMS : ITEMS + PROPERTIES].double()
    right: dict[str, list[bool]] = {"mixture": [], "product": []}
    for row, odd in zip(items, answer, strict=True):
        table = log_p[row]
        weights = table.exp().mean(0)  # facts as the items themselves would bring them up
        for how, hits in right.items():
            found = aggregate(categorical(table.flatten()), PROPERTIES, how=how, weights=weights)
            hits.append(int(row[found.odd]) == int(odd))
    choices = asked.conditionals(test)[:, 5].gather(1, items)
    trained = direct(SETS, generator)
    again = asked.conditionals(trained)[:, 5].gather(1, trained[:, :4])
    return {f"odd: {how}": float(np.mean(hits)) for how, hits in right.items()} | {
        "odd: direct": (items.gather(1, choices.argmax(1, keepdim=True))[:, 0] == answer).double().mean().item(),
        "odd: direct, seen sets": (trained[:, :4].gather(1, again.argmax(1, keepdim=True))[:, 0] == trained[:, 5])
        .double()
        .mean()
        .item(),
    }


def measure(seed: int) -> Measured:
    values: dict[str, float] = {}
    for name, bonus in BONUSES.items():
        found = deduction(seed, bonus)
        values |= dict(zip((f"{name}: translator", f"{name}: Sum", f"{name}: baseline"), found, strict=True))
    return Measured(values | odd_one_out(seed))


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    places = [report.mean(f"{name}: translator") for name in BONUSES]
    for number, name in enumerate(("Sum", "baseline")):
        for first, measured in enumerate(report.measured):
            points = [measured.values[f"{b}: {name}"] for b in BONUSES]
            left.plot(places, points, "o-", ms=3, color=f"C{number}", alpha=0.6, label=None if first else name)
    left.set(title="order puzzles", xlabel="translator's accuracy", ylabel="accuracy")
    left.legend(fontsize=7)
    names = ("mixture", "product", "direct", "direct, seen sets")
    for at_, name in enumerate(names):
        right.plot([at_] * len(report.seeds), report.per_seed(f"odd: {name}"), "o", ms=4)
    right.axhline(0.25, color="black", ls=":", lw=0.8)
    right.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
    right.set(title="odd one out (a point per seed)", ylim=(0, 1.02))


def notes(report: Report) -> list[str]:
    return [
        f"Asked directly, a model trained on odd ones out is right in {report.range('odd: direct', '.2f')} of unseen "
        f"sets and {report.range('odd: direct, seen sets', '.2f')} of the sort it was trained on.",
        "The translator is simulated: (a) is about the aggregation alone.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
