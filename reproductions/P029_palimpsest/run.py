"""P029: the order of its training data exposes a model and its fine-tunes, and no other model (2510.19796)."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from scipy.stats import kstest
from torch import Tensor, nn
from worlds.enumerable import LanguageModel

from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.provenance import OrderTest, partition_counts, partition_test, query_test, reshuffle_test

V, EMBEDDING, HIDDEN = 64, 64, 256
DOCUMENTS, LENGTH, BATCH, LR = 2000, 18, 4, 0.5
EXTRA = 200  # steps of Bob's fine-tuning, on as many new batches
NULLS = 100
TEXTS, TEXT_LENGTH, BUCKETS, MAX_N = 2000, 16, 50, 3
SHORT, SHORT_LR, REDONE, ORDERS = 1000, 1.0, 0.3, 10
LEVEL = 0.01 / 5  # five seeds are tested at 0.01 together
FRESH_ORDERS, ORDER_SEED = 1000, 10_000

CLAIM = Claim(
    paper="P029",
    text=(
        "The order of its training data exposes a model that was trained in one pass, and a fine-tune of it; a model "
        "trained on the same data in another order is not exposed."
    ),
    setup=(
        "2000 documents of 18 uniform random symbols out of 64; a perceptron over the last two symbols (embedding 64, "
        "hidden 256), plain SGD, batches of 4, learning rate 0.5, one pass in order. Bob: 200 more steps on new random "
        "documents at half the rate. Null: the same initial weights and data in another random order, 100 times. Query "
        "test by Student's t on mean log-likelihoods. Beside it, from 2000 samples of 16 symbols: the partition test "
        "(50 buckets, n-grams up to 3), and the reshuffle test (1000 documents, rate 1, the last 30 % in 10 random "
        "orders)."
    ),
    checks=(
        Check(
            "Bob is exposed",
            "p of the query test of the fine-tuned model < 1e-8, in every seed",
            lambda m: m["Bob: p"] < 1e-8,
            ("Bob: p", "Bob: rho"),
        ),
        Check(
            "others are not",
            "p-values of the 100 nulls are uniform by Kolmogorov-Smirnov at 0.01 over the five seeds (0.002 each)",
            lambda m: m["nulls: Kolmogorov-Smirnov p"] >= LEVEL,
            ("nulls: Kolmogorov-Smirnov p", "nulls: share of p < 0.05"),
        ),
        Check(
            "others are not, over orders",
            "p-values of one null under 1000 random orders of the documents are uniform by Kolmogorov-Smirnov at 0.01 "
            "over the five seeds (0.002 each)",
            lambda m: m["orders: Kolmogorov-Smirnov p"] >= LEVEL,
            ("orders: Kolmogorov-Smirnov p",),
            main=False,
        ),
        Check(
            "a reference does not hide it",
            "p of the query test with a null model as the reference < 1e-8, in every seed",
            lambda m: m["Bob, reference: p"] < 1e-8,
            ("Bob, reference: p", "Bob, reference: rho"),
            main=False,
        ),
        Check(
            "Bob's text, partition",
            "p of the partition test < 0.01 for Bob's samples and >= 0.01 for a null's, in 4 of 5 seeds",
            lambda m: m["partition, Bob: p"] < 0.01 <= m["partition, null: p"],
            ("partition, Bob: p", "partition, Bob: rho", "partition, null: p", "partition, null: rho"),
            share=(4, 5),
            main=False,
        ),
        Check(
            "Bob's text, reshuffle",
            "the true order comes first of 11, in every seed",
            lambda m: m["reshuffle, Bob: rank p"] <= 1 / (ORDERS + 1) + 1e-9,
            ("reshuffle, Bob: rank p", "reshuffle, Bob: z", "reshuffle, other order: z"),
            main=False,
        ),
    ),
    seeds=5,
)


class TwoSymbols(LanguageModel):
    """A perceptron over the last two symbols; a start symbol stands before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = V
        self.embedding = nn.Embedding(V + 1, EMBEDDING)
        self.layers = nn.Sequential(nn.Linear(2 * EMBEDDING, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, V))

    def conditionals(self, ids: Tensor) -> Tensor:
        """Log-softmax of the perceptron."""
        before = nn.functional.pad(ids, (2, 0), value=V)
        context = torch.cat([self.embedding(before[:, :-2]), self.embedding(before[:, 1:-1])], -1)
        return self.layers(context).log_softmax(-1)


def train(start: TwoSymbols, documents: Tensor, lr: float) -> TwoSymbols:
    """A copy after one pass in this order."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    objective = MaximumLikelihood("token_mean")
    for rows in documents.split(BATCH):
        optimizer.zero_grad()
        objective(model.log_prob(rows)).mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def query(model: TwoSymbols, documents: Tensor, reference: TwoSymbols | None = None) -> OrderTest:
    other = None if reference is None else reference.log_prob(documents)
    return query_test(model.log_prob(documents), torch.arange(len(documents)), reference=other, method="asymptotic")


@torch.no_grad()
def over_orders(model: TwoSymbols, documents: Tensor, seed: int) -> float:
    """How uniform the p-values of one model are where chance orders the documents anew each time."""
    generator = torch.Generator().manual_seed(ORDER_SEED + seed)  # its own: the other draws stay what they are
    likelihood = model.log_prob(documents)
    found = [
        query_test(likelihood, torch.randperm(len(documents), generator=generator), method="asymptotic").p_value
        for _ in range(FRESH_ORDERS)
    ]
    return float(kstest(found, "uniform").pvalue)


def uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(V, (n, LENGTH), generator=generator)


def shuffled(documents: Tensor, generator: torch.Generator) -> Tensor:
    return documents[torch.randperm(len(documents), generator=generator)]


def fine_tuned(model: TwoSymbols, lr: float, generator: torch.Generator) -> TwoSymbols:
    return train(model, uniform(BATCH * EXTRA, generator), lr / 2)


def partition(model: TwoSymbols, documents: Tensor, generator: torch.Generator, seed: int) -> OrderTest:
    texts = model.sample(TEXTS, length=TEXT_LENGTH, generator=generator)
    counts = partition_counts(documents.tolist(), texts.tolist(), order=range(len(documents)), max_n=MAX_N)
    return partition_test(counts, buckets=BUCKETS, permutations=4999, seed=seed)


def reshuffle(start: TwoSymbols, generator: torch.Generator) -> dict[str, float]:
    """Text of Bob, and text of a model whose last documents came in yet another order."""
    documents = uniform(SHORT, generator)
    cut = int(SHORT * (1 - REDONE))
    checkpoint, last = train(start, documents[:cut], SHORT_LR), documents[cut:]
    alice = train(checkpoint, last, SHORT_LR)
    redone = [train(checkpoint, shuffled(last, generator), SHORT_LR) for _ in range(ORDERS)]
    other = train(checkpoint, shuffled(last, generator), SHORT_LR)
    out: dict[str, float] = {}
    for name, writer in (("Bob", fine_tuned(alice, SHORT_LR, generator)), ("other order", other)):
        text = writer.sample(TEXTS, length=TEXT_LENGTH, generator=generator)
        with torch.no_grad():
            test = reshuffle_test(alice.log_prob(text), [model.log_prob(text) for model in redone])
        out[f"reshuffle, {name}: z"] = test.statistic
        out[f"reshuffle, {name}: rank p"] = test.p_value
        out[f"reshuffle, {name}: Student p"] = test.p_student
    return out


def measure(seed: int) -> Measured:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    start, documents = TwoSymbols(), uniform(DOCUMENTS, generator)
    alice = train(start, documents, LR)
    bob = fine_tuned(alice, LR, generator)
    values: dict[str, float] = {}

    def note(name: str, test: OrderTest) -> None:
        values[f"{name}: rho"], values[f"{name}: p"] = test.statistic, test.p_value

    note("Alice", query(alice, documents))
    note("Bob", query(bob, documents))
    nulls = []
    for number in range(NULLS):
        null = train(start, shuffled(documents, generator), LR)
        nulls.append(query(null, documents).p_value)
        if number == 0:
            note("Bob, reference", query(bob, documents, null))
            values["orders: Kolmogorov-Smirnov p"] = over_orders(null, documents, seed)
            note("partition, null", partition(null, documents, generator, seed))
    values["nulls: Kolmogorov-Smirnov p"] = float(kstest(nulls, "uniform").pvalue)
    values["nulls: share of p < 0.05"] = sum(p < 0.05 for p in nulls) / NULLS
    note("partition, Bob", partition(bob, documents, generator, seed))
    values |= reshuffle(start, generator)
    return Measured(values, {"nulls": sorted(nulls)})


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    names = ("Alice", "Bob", "Bob, reference", "partition, Bob", "partition, null")
    for number, name in enumerate(names):
        left.plot([number] * len(report.seeds), report.per_seed(f"{name}: rho"), "o", ms=4, alpha=0.6)
    left.axhline(0, color="black", lw=0.6)
    left.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=7)
    left.set(title="correlation with training order", ylabel="Spearman's rho")
    for measured in report.measured:
        right.plot([(i + 0.5) / NULLS for i in range(NULLS)], measured.curves["nulls"], lw=0.9)
    right.plot([0, 1], [0, 1], "k:", lw=0.8)
    right.set(title="models in another order (a line per seed)", xlabel="uniform quantile", ylabel="p-value")


def notes(report: Report) -> list[str]:
    return [
        f"Spearman's rho of Alice's model is {report.range('Alice: rho', '.2f')}, of Bob's "
        f"{report.range('Bob: rho', '.2f')} and with a null model as the reference "
        f"{report.range('Bob, reference: rho', '.2f')}.",
        f"Of the nulls {report.range('nulls: share of p < 0.05', '.2f')} have p < 0.05. Nulls of one seed share "
        "Alice's first weights, her documents and her one order, and agree on which documents are likely: their "
        "p-values move together, and 100 of them are no sample of 100. The test promises uniform p-values over random "
        "orders, which is the other check: Kolmogorov-Smirnov p "
        f"{report.range('orders: Kolmogorov-Smirnov p', '.2f')}.",
        f"Reshuffle: z {report.range('reshuffle, Bob: z', '.1f')} for Bob, "
        f"{report.range('reshuffle, other order: z', '.1f')} for text of another order.",
        "p-values of the query test are Student's t: no permutation reaches 1e-8.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
