"""P048: the likelihood of a question given one sentence finds the sentence that caused it (2403.03956)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor

import loglik
from loglik.errors import InputError
from loglik.signals.retrieval import (
    RetrievalMetrics,
    backtracing_scores,
    query_likelihood,
    retrieval_metrics,
    unigram_likelihood,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "backtracing_inquisitive"
K1, B, MU, MIX = 1.5, 0.75, 100.0, 0.7
RESAMPLES = 10_000
TINY_ARTICLES = 4
SMOOTHED = {"Dirichlet": {"mu": MU}, "Jelinek-Mercer": {"smoothing": "jelinek_mercer", "mix": MIX}}

CLAIM = Claim(
    paper="P048",
    text=(
        "On real news the likelihood of a reader's question given one sentence finds the sentence that caused the "
        "question far above chance and above BM25, and the leave-one-out change of the likelihood does less well."
    ),
    setup=(
        "INQUISITIVE: 112 articles, 1382 questions, each with the sentence it was asked at. Tokens are [a-z0-9]+ in "
        "lower case. Query likelihood of a smoothed unigram model of each sentence (Dirichlet, mu 100; Jelinek-Mercer, "
        "weight 0.7 on the collection) against the pooled sentences of all articles, each count raised by one; BM25 "
        "with k1 1.5, b 0.75 within the article. Equal scores count as in random order. The data are fixed: the seed "
        "draws only the 10,000 paired bootstrap resamples of questions. Beside the claim: the embedded model tiny (of "
        "Python code) on 4 articles."
    ),
    checks=(
        Check(
            "query likelihood finds the cause",
            "top-1 accuracy of query likelihood (Dirichlet) >= 0.60",
            lambda m: m["Dirichlet: top-1"] >= 0.60,
            ("Dirichlet: top-1",),
        ),
        Check(
            "better than BM25",
            "its top-1 accuracy >= that of BM25 + 0.03, and the 95 % interval of the difference excludes 0",
            lambda m: m["Dirichlet - BM25"] >= 0.03 and m["Dirichlet - BM25, lower"] > 0,
            ("Dirichlet - BM25", "Dirichlet - BM25, lower"),
        ),
        Check(
            "leave-one-out does less well",
            "top-1 accuracy of the leave-one-out score < that of query likelihood",
            lambda m: m["leave-one-out: top-1"] < m["Dirichlet: top-1"],
            ("leave-one-out: top-1", "Dirichlet: top-1"),
        ),
        Check(
            "the same with Jelinek-Mercer smoothing",
            "top-1 >= 0.60 and >= BM25 + 0.03",
            lambda m: m["Jelinek-Mercer: top-1"] >= max(0.60, m["BM25: top-1"] + 0.03),
            ("Jelinek-Mercer: top-1", "BM25: top-1"),
            main=False,
        ),
    ),
    seeds=1,
)


@dataclass(frozen=True)
class Article:
    """Sentences, and questions with the number of their sentence."""

    sentences: tuple[str, ...]
    questions: tuple[tuple[str, int], ...]


def tokens(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


@cache
def articles() -> tuple[Article, ...]:
    if not DATA.is_dir():
        raise InputError(f"P048 needs the INQUISITIVE articles at {DATA}, which are not there")
    found = []
    for source in sorted((DATA / "sources").rglob("*.json")):
        sentences = tuple(row["text"] for row in json.loads(source.read_text(encoding="utf-8")))
        asked = json.loads((DATA / "query" / source.parent.name / source.name).read_text(encoding="utf-8"))
        questions = [(row["text"], row["sentence_id"] - 1) for row in asked]  # ids count from 1
        valid = [(text, target) for text, target in questions if 0 <= target < len(sentences) and tokens(text)]
        found.append(Article(sentences, tuple(valid)))
    return tuple(found)


def bm25(query: Sequence[str], documents: Sequence[Sequence[str]]) -> Tensor:
    """(T,) Robertson's score with the idf that is never negative."""
    counts = [Counter(document) for document in documents]
    mean = sum(map(len, documents)) / len(documents)
    total = np.zeros(len(documents))
    for word in query:
        frequency = np.array([count[word] for count in counts], dtype=float)
        having = int((frequency > 0).sum())
        idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        length = np.array([len(document) for document in documents]) / mean
        total += idf * frequency * (K1 + 1) / (frequency + K1 * (1 - B + B * length))
    return torch.from_numpy(total)


def evaluate(scores: dict[str, list[Tensor]], targets: list[Tensor]) -> dict[str, RetrievalMetrics]:
    return {name: retrieval_metrics(rows, targets, k=(1, 3)) for name, rows in scores.items()}


def with_words() -> dict[str, RetrievalMetrics]:
    """Scores of all questions by models of words."""
    collection = Counter(token for article in articles() for text in article.sentences for token in tokens(text))
    scores: dict[str, list[Tensor]] = {
        name: [] for name in ("chance", "first sentences", "BM25", *SMOOTHED, "leave-one-out")
    }
    targets = []
    for article in articles():
        documents = [tokens(text) for text in article.sentences]
        texts = [" ".join(document) for document in documents]
        for question, target in article.questions:
            query = tokens(question)
            scores["chance"].append(torch.zeros(len(documents)))
            scores["first sentences"].append(-torch.arange(len(documents)).double())
            scores["BM25"].append(bm25(query, documents))
            for name, options in SMOOTHED.items():
                found = unigram_likelihood(query, documents, collection, **options)
                scores[name].append(found.mean_per_unit().value)

            def whole(contexts: Sequence[str], query: Sequence[str] = query) -> loglik.LogLikelihood:
                return unigram_likelihood(query, [text.split() for text in contexts], collection, mu=MU)

            scores["leave-one-out"].append(backtracing_scores(whole, texts, how="leave_one_out").value)
            targets.append(torch.arange(len(documents)) == target)
    return evaluate(scores, targets)


def with_tiny() -> dict[str, RetrievalMetrics]:
    """The three likelihood scores of the paper by the embedded model, on a few articles."""
    model = loglik.load("tiny")
    scores: dict[str, list[Tensor]] = {name: [] for name in ("single", "autoregressive", "leave_one_out")}
    targets = []
    short = [a for a in articles() if len(model.tokenizer(" ".join(a.sentences), verbose=False)["input_ids"]) < 900]
    for article in short[:TINY_ARTICLES]:
        for question, target in article.questions:
            likelihood = partial(query_likelihood, model, question)
            for how, rows in scores.items():
                rows.append(backtracing_scores(likelihood, article.sentences, how=how).value)
            targets.append(torch.arange(len(article.sentences)) == target)
    return evaluate({f"tiny {name}": rows for name, rows in scores.items()}, targets)


def measure(seed: int) -> Measured:
    found = with_words()
    values = {}
    for name, metrics in (found | with_tiny()).items():
        values |= {
            f"{name}: top-1": metrics.accuracy[1],
            f"{name}: top-3": metrics.accuracy[3],
            f"{name}: MRR": metrics.mrr,
        }
    difference = (found["Dirichlet"].hits[1] - found["BM25"].hits[1]).numpy()
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(difference, len(difference)).mean() for _ in range(RESAMPLES)]
    lower, upper = np.quantile(drawn, [0.025, 0.975])
    values |= {
        "Dirichlet - BM25": float(difference.mean()),
        "Dirichlet - BM25, lower": float(lower),
        "Dirichlet - BM25, upper": float(upper),
        "questions": float(len(difference)),
    }
    return Measured(values, {"differences": drawn})


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    names = [name.removesuffix(": top-1") for name in report.measured[0].values if name.endswith(": top-1")]
    for offset, k in ((-0.2, "top-1"), (0.2, "top-3")):
        left.barh(np.arange(len(names)) + offset, [report.mean(f"{n}: {k}") for n in names], 0.4, label=k)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.invert_yaxis()
    left.set(title="accuracy", xlabel="share of questions")
    left.legend(fontsize=7)
    right.hist(report.measured[0].curves["differences"], bins=40)
    right.axvline(0, color="black", lw=0.8)
    right.set(title="top-1, Dirichlet minus BM25", xlabel="difference", ylabel="resamples")


def notes(report: Report) -> list[str]:
    return [
        f"The first sentences alone reach {report.mean('first sentences: top-1'):.3f} (top-3 "
        f"{report.mean('first sentences: top-3'):.3f}): questions are asked early in an article.",
        f"tiny is a model of Python code; its single-sentence score reaches "
        f"{report.mean('tiny single: top-1'):.2f} on {TINY_ARTICLES} articles.",
        "BM25 with this tokenisation is far better than in the paper (0.43 there).",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
