r"""Languages small enough to enumerate, and models of them whose likelihoods are `LogLikelihood`s.

A `Language` is the set of the :math:`V^T` sequences of length `T` over `V` symbols. Distributions on it are vectors
(V^T,) of log-probabilities in the order of `Language.sequences`, so that expectations, KL divergences and total
variations are exact sums. Every model is a `LanguageModel`: `log_prob` gives exact log-likelihoods with chain-rule
terms, and `sample` draws from the same distribution.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from loglik.errors import InputError
from loglik.likelihood import Kind, LogLikelihood, Unit
from loglik.models.batch import TokenBatch

__all__ = [
    "GRULM",
    "Language",
    "LanguageModel",
    "Markov",
    "NeuralLM",
    "Tabular",
    "TransformerLM",
    "categorical",
    "entropy",
    "expectation",
    "kl",
    "random_language",
    "total_variation",
]


@dataclass(frozen=True)
class Language:
    """All sequences of `length` symbols out of `vocabulary`."""

    vocabulary: int
    length: int

    @cached_property
    def sequences(self) -> Tensor:
        """(V^T, T) long, in lexicographic order."""
        return torch.tensor(list(itertools.product(range(self.vocabulary), repeat=self.length)))

    def index(self, ids: Tensor) -> Tensor:
        """(B,) rows of `sequences` that `ids` (B, T) are."""
        powers = self.vocabulary ** torch.arange(self.length - 1, -1, -1, device=ids.device)
        return (ids * powers).sum(1)

    def log_probs(self, model: LanguageModel) -> Tensor:
        """(V^T,) log-probability of every sequence under `model`, nats; differentiable."""
        return model.log_prob(self.sequences).value

    def __len__(self) -> int:
        return self.vocabulary**self.length


# ---------------------------------------------------------------------- exact sums
def expectation(log_p: Tensor, values: Tensor) -> Tensor:
    r""":math:`\sum_x p(x) f(x)`, with :math:`0 \cdot f = 0`."""
    p = log_p.exp()
    return torch.where(p > 0, p * values, 0.0).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    r""":math:`\sum_x p(x) (\log p(x) - \log q(x))`, nats."""
    return expectation(log_p, log_p - log_q)


def entropy(log_p: Tensor) -> Tensor:
    r""":math:`-\sum_x p(x) \log p(x)`, nats."""
    return -expectation(log_p, log_p)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    r""":math:`\frac12 \sum_x |p(x) - q(x)|`."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def categorical(log_p: Tensor, index: Tensor | None = None) -> LogLikelihood:
    """Outcomes `index` (B,) of a distribution (N,) over single symbols, one token each; all N by default."""
    values = log_p if index is None else log_p[index]
    return LogLikelihood.from_per_unit(values[:, None], torch.ones_like(values[:, None], dtype=torch.bool))


# ---------------------------------------------------------------------- models
class LanguageModel(nn.Module):
    """A distribution over sequences by its conditionals; subclasses give `conditionals`."""

    kind = Kind.EXACT
    unit = Unit.TOKEN
    vocabulary: int

    def conditionals(self, ids: Tensor) -> Tensor:
        r"""(B, T, V) normalised :math:`\log p(\cdot \mid x_{<t})`; column t does not see ``ids[:, t:]``."""
        raise TypeError(f"{type(self).__name__} does not say what its conditionals are")

    def log_prob(self, x: Tensor, *, start: int = 0) -> LogLikelihood:
        """Log-likelihoods of the rows of `x` (B, T) from column `start` on, given what stands before it; nats."""
        terms = self.conditionals(x)[:, start:].gather(-1, x[:, start:, None]).squeeze(-1)
        mask = torch.arange(x.shape[1], device=x.device).expand(x.shape) >= start
        return LogLikelihood.from_per_unit(nn.functional.pad(terms, (start, 0)), mask)

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) log-probabilities of the symbol after each row of `prefix`, whose rows have no padding."""
        if not bool(prefix.attention_mask.all()):
            raise InputError("these models take prefixes of one length: pad nothing")
        blank = torch.zeros(len(prefix), 1, dtype=torch.long)
        return self.conditionals(torch.cat([prefix.ids, blank], 1))[:, -1]

    @torch.no_grad()
    def sample(
        self, n: int, *, length: int, prompt: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """(n, P + length) draws; `prompt` (n, P) is kept in front."""
        ids = prompt if prompt is not None else torch.zeros(n, 0, dtype=torch.long)
        for _ in range(length):
            blank = torch.cat([ids, torch.zeros(n, 1, dtype=torch.long)], 1)
            chances = self.conditionals(blank)[:, -1].exp()
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        return ids


class Tabular(LanguageModel):
    """One free conditional per prefix: any distribution over sequences of `length` symbols."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(vocabulary**t, vocabulary)) for t in range(length))

    @classmethod
    def of(cls, log_p: Tensor, language: Language) -> Tabular:
        """The model whose sequence distribution is `log_p` (V^T,); normalised here."""
        model = cls(language.vocabulary, language.length)
        left = log_p
        with torch.no_grad():
            for t in reversed(range(language.length)):
                table = left.reshape(-1, language.vocabulary)
                model.tables[t].copy_(table.log_softmax(-1))
                left = table.logsumexp(-1)
        return model

    def conditionals(self, ids: Tensor) -> Tensor:
        """By looking the prefix up."""
        prefix = torch.zeros(len(ids), dtype=torch.long)
        columns = []
        for t in range(ids.shape[1]):
            columns.append(self.tables[t].log_softmax(-1)[prefix])
            prefix = prefix * self.vocabulary + ids[:, t]
        return torch.stack(columns, 1)


class Markov(LanguageModel):
    """A symbol depends on the last `order` ones: rows of ``softmax(scale * N(0, 1))``; before the start stand zeros."""

    def __init__(self, vocabulary: int, order: int, *, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.order = order
        logits = scale * torch.randn(vocabulary**order, vocabulary, generator=generator)
        self.register_buffer("table", logits.log_softmax(-1))

    def conditionals(self, ids: Tensor) -> Tensor:
        """By looking the last symbols up."""
        padded = torch.cat([torch.zeros(len(ids), self.order, dtype=torch.long), ids], 1)
        powers = self.vocabulary ** torch.arange(self.order - 1, -1, -1)
        context = (padded.unfold(1, self.order, 1)[:, : ids.shape[1]] * powers).sum(-1)
        return self.table[context]


class NeuralLM(LanguageModel):
    """A network whose state before each symbol goes through an untied linear head; subclasses give `states`."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, width)  # the last row stands before the first symbol
        self.head = nn.Linear(width, vocabulary)

    def states(self, ids: Tensor) -> Tensor:
        """(B, T, D): column t is the state that predicts ``ids[:, t]``."""
        raise TypeError(f"{type(self).__name__} does not say what its states are")

    def shifted(self, ids: Tensor) -> Tensor:
        """The inputs: a start symbol, then all but the last column."""
        start = torch.full((len(ids), 1), self.vocabulary, dtype=torch.long, device=ids.device)
        return torch.cat([start, ids[:, :-1]], 1)

    def conditionals(self, ids: Tensor) -> Tensor:
        """Log-softmax of the head."""
        return self.head(self.states(ids)).log_softmax(-1)


class GRULM(NeuralLM):
    """A GRU of one layer by default."""

    def __init__(self, vocabulary: int, width: int, *, layers: int = 1) -> None:
        super().__init__(vocabulary, width)
        self.gru = nn.GRU(width, width, num_layers=layers, batch_first=True)

    def states(self, ids: Tensor) -> Tensor:
        """The top layer's states."""
        return self.gru(self.embedding(self.shifted(ids)))[0]


class TransformerLM(NeuralLM):
    """A pre-norm causal transformer with learned positions; its states are those after the final norm."""

    def __init__(self, vocabulary: int, width: int, *, length: int, layers: int = 2, heads: int = 4) -> None:
        super().__init__(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def states(self, ids: Tensor) -> Tensor:
        """The last layer's states, normalised."""
        width = ids.shape[1]
        hidden = self.embedding(self.shifted(ids)) + self.positions[:width]
        later = torch.ones(width, width, dtype=torch.bool, device=ids.device).triu(1)
        for block in self.blocks:
            hidden = block(hidden, src_mask=later)
        return self.norm(hidden)


def random_language(language: Language, *, generator: torch.Generator) -> Tabular:
    """A known distribution: every conditional is drawn from a flat Dirichlet."""
    model = Tabular(language.vocabulary, language.length)
    with torch.no_grad():
        for table in model.tables:
            # Normalised exponential draws are flat Dirichlet ones; the table's log-softmax normalises.
            table.copy_(torch.empty_like(table).exponential_(generator=generator).log())
    return model
