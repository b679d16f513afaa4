"""The catalogue: one entry per paper; whether it is implemented is read off the code, never typed by hand."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import loglik
from loglik.errors import InputError

__all__ = ["Paper", "Status", "papers", "search", "status", "verdict"]

Status = Literal["implemented", "partial", "planned"]


@dataclass(frozen=True, slots=True)
class Paper:
    """One paper: what it contributes and where it lives here.

    Args:
        id: catalogue number, such as ``P023``.
        title: its title.
        arxiv: arXiv id.
        month: first version, ``YYYY-MM``.
        kind: objective, signal, decoding, density, estimator, evaluation, theory or survey.
        description: one line on what is computed.
        claim: the claim that a reproduction checks.
        surface: public names that implement it here.
        tags: words to find it by.
    """

    id: str
    title: str
    arxiv: str | None
    month: str
    kind: str
    description: str
    claim: str
    surface: tuple[str, ...]
    tags: tuple[str, ...]


@lru_cache(maxsize=1)
def papers() -> tuple[Paper, ...]:
    """All entries, by number."""
    entries = json.loads((resources.files("loglik.papers") / "catalogue.json").read_text(encoding="utf-8"))
    return tuple(Paper(**{**e, "surface": tuple(e["surface"]), "tags": tuple(e["tags"])}) for e in entries)


def status(paper: Paper) -> Status:
    """Whether the named surface can be imported: all of it, some of it, or none."""
    found = [_imports(name) for name in paper.surface]
    if all(found):
        return "implemented"
    return "partial" if any(found) else "planned"


def verdict(paper: Paper, reproductions: str | Path) -> str:
    """What the reproduction found, from ``results.json`` under `reproductions`; ``not run`` where there is none.

    Raises:
        InputError: for a results file that cannot be read.
    """
    for file in sorted(Path(reproductions).glob(f"{paper.id}_*/results.json")):
        try:
            return str(json.loads(file.read_text(encoding="utf-8"))["verdict"])
        except (OSError, KeyError, TypeError, json.JSONDecodeError):
            raise InputError(f"{file} has no readable verdict; run the reproduction again") from None
    return "not run"


def search(text: str, entries: Sequence[Paper] | None = None) -> list[tuple[Paper, float]]:
    r"""Entries that match `text`, most relevant first, with their BM25 score.

    .. math:: \sum_w \text{idf}(w) \frac{f_w (k + 1)}{f_w + k (1 - b + b \, l / \bar l)}, \quad k = 1.2,\ b = 0.75

    Titles and tags count twice; a word also matches as the beginning of a longer one, at half weight.
    """
    pool = list(papers() if entries is None else entries)
    documents = [Counter(_document(paper)) for paper in pool]
    mean_length = sum(d.total() for d in documents) / max(1, len(documents))
    scores = [0.0] * len(pool)
    for word in set(_words(text)):
        counts = [d[word] + 0.5 * sum(n for w, n in d.items() if w != word and w.startswith(word)) for d in documents]
        matching = sum(count > 0 for count in counts)
        idf = math.log(1 + (len(pool) - matching + 0.5) / (matching + 0.5))
        for i, count in enumerate(counts):
            length = documents[i].total() / mean_length
            scores[i] += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length))
    ranked = sorted(zip(pool, scores, strict=True), key=lambda pair: (-pair[1], pair[0].id))
    return [(paper, value) for paper, value in ranked if value > 0]


def _document(paper: Paper) -> list[str]:
    weighty = " ".join([paper.title, *paper.tags])
    names = " ".join(name.rsplit(".", 1)[1] for name in paper.surface)
    plain = " ".join([paper.id, paper.arxiv or "", paper.kind, paper.description, paper.claim, names])
    return 2 * _words(weighty) + _words(plain)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:\.[0-9]+)?", text.lower())


def _imports(name: str) -> bool:
    """Whether ``package.module.attribute`` exists; modules that do not are recognised without importing anything."""
    module, attribute = name.rsplit(".", 1)
    base = Path(loglik.__file__).parent.joinpath(*module.split(".")[1:])
    if not (base.with_suffix(".py").is_file() or (base / "__init__.py").is_file()):
        return False
    return hasattr(importlib.import_module(module), attribute)
