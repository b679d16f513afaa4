r"""Parallel decoding of masked-diffusion models: several tokens a round, and how few rounds there can be.

A policy decides which hidden tokens a round commits. Those of one round are drawn from their marginals, as if they were
independent: what that costs is the round's approximation error. A rule that commits only confident tokens can reveal
few nats a round (From Bits to Rounds, arXiv 2511.21103), so that its rounds grow with :math:`-\log p(x)`;
`ExploreThenExploit` also commits a few uncertain tokens, far apart, that make the others confident.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.diffusion.sampling import Canvas, MaskedConditionals, canvas_of

__all__ = [
    "DynamicThreshold",
    "ExploreThenExploit",
    "MostConfident",
    "ParallelDecoding",
    "ParallelPolicy",
    "RandomPositions",
    "Round",
    "StaticThreshold",
    "parallel_decode",
    "rounds_lower_bound",
]


class View(NamedTuple):
    """What a policy sees of one row in one round, hidden tokens in the order of their positions.

    Attributes:
        block: (M,) number of each token's block.
        probs: (M, V) marginals.
        confidence: (M,) largest probability of each.
    """

    block: NDArray[np.int64]
    probs: NDArray[np.float64]
    confidence: NDArray[np.float64]


class Choice(NamedTuple):
    """What a policy commits: `exploit` and `explore` (M,) bool; `fallback` if the rule itself admitted nothing."""

    exploit: NDArray[np.bool_]
    explore: NDArray[np.bool_]
    fallback: bool


class ParallelPolicy(Protocol):
    """Decides which hidden tokens a round commits; at least one."""

    def choose(self, view: View, rng: np.random.Generator) -> Choice:
        """The commits of one round."""


@dataclass(frozen=True)
class StaticThreshold:
    """Every token whose confidence reaches `threshold`; else the most confident one (Fast-dLLM, arXiv 2505.22618).

    Args:
        threshold: in (0, 1].
        window: blocks that may receive tokens, from the first unfinished one on.
    """

    threshold: float = 0.9
    window: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold must lie in (0, 1], got {self.threshold}")
        _check_window(self.window)

    def choose(self, view: View, rng: np.random.Generator) -> Choice:
        """The commits of one round."""
        inside = _window(view.block, self.window)
        return _or_best(inside & (view.confidence >= self.threshold), view, inside)


@dataclass(frozen=True)
class DynamicThreshold:
    r"""The largest set of k most confident tokens with :math:`(1 + k)(1 - c_{(k)}) \le f`; else the most confident one.

    The condition need not be monotone in k: the largest k that satisfies it is taken.

    Args:
        factor: f in (0, 1].
        window: blocks that may receive tokens.
    """

    factor: float = 0.9
    window: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise InputError(f"factor must lie in (0, 1], got {self.factor}")
        _check_window(self.window)

    def choose(self, view: View, rng: np.random.Generator) -> Choice:
        """The commits of one round."""
        inside = _window(view.block, self.window)
        return _or_best(_confident(view, inside, self.factor), view, inside)


@dataclass(frozen=True)
class ExploreThenExploit:
    """`DynamicThreshold` over many blocks, and a few uncertain tokens in blocks that receive nothing else.

    Per round at most `explore` tokens, the most uncertain of a block, at most one per block and only in blocks without
    other commits, early blocks first, each drawn from its marginal. The published description leaves the rule open;
    this is ours.

    Args:
        factor: of the rule.
        explore: uncertain tokens per round.
        uncertainty: ``entropy`` of the marginal, ``confidence`` (one minus the largest probability) or ``margin``
            (minus the gap between the two largest).
        least_entropy: nats; tokens below are not worth exploring.
        window: blocks that may receive tokens; None: all.
    """

    factor: float = 0.9
    explore: int = 4
    uncertainty: Literal["entropy", "confidence", "margin"] = "entropy"
    least_entropy: float = 0.1
    window: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise InputError(f"factor must lie in (0, 1], got {self.factor}")
        if self.explore < 0:
            raise InputError(f"explore must not be negative, got {self.explore}")
        if self.uncertainty not in ("entropy", "confidence", "margin"):
            raise InputError(f"uncertainty must be 'entropy', 'confidence' or 'margin', got {self.uncertainty!r}")
        _check_window(self.window)

    def choose(self, view: View, rng: np.random.Generator) -> Choice:
        """The commits of one round."""
        inside = _window(view.block, self.window)
        exploit = _confident(view, inside, self.factor)
        explore = np.zeros_like(exploit)
        entropy = _entropy(view.probs)
        uncertain = {
            "entropy": entropy,
            "confidence": 1 - view.confidence,
            "margin": -_margin(view.probs) if self.uncertainty == "margin" else entropy,
        }[self.uncertainty]
        taken = set(view.block[exploit].tolist())
        for block in dict.fromkeys(view.block[inside].tolist()):
            if explore.sum() == self.explore:
                break
            own = np.flatnonzero(inside & (view.block == block) & (entropy >= self.least_entropy))
            if block not in taken and len(own):
                explore[own[uncertain[own].argmax()]] = True
        if exploit.any() or explore.any():
            return Choice(exploit, explore, fallback=not exploit.any())
        return _or_best(exploit, view, inside)


@dataclass(frozen=True)
class MostConfident:
    """The `count` most confident tokens of the current block (LLaDA's low-confidence remasking).

    Args:
        count: tokens per round.
        window: blocks that may receive tokens.
    """

    count: int = 1
    window: int = 1

    def __post_init__(self) -> None:
        _check_count(self.count)
        _check_window(self.window)

    def choose(self, view: View, rng: np.random.Generator) -> Choice:
        """The commits of one round."""
        return _highest(view.confidence, self.count, _window(view.block, self.window))


@dataclass(frozen=True)
class RandomPositions:
    """`count` tokens of the current block at random, drawn; with one of them a round the samples are exact.

    Args:
        count: tokens per round.
        window: blocks that may receive tokens.
    """

    count: int = 1
    window: int = 1

    def __post_init__(self) -> None:
        _check_count(self.count)
        _check_window(self.window)

    def choose(self, view: View, rng: np.random.Generator) -> Choice:
        """The commits of one round."""
        chosen = _highest(rng.random(len(view.block)), self.count, _window(view.block, self.window)).exploit
        return Choice(np.zeros_like(chosen), chosen, fallback=False)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one row.

    Attributes:
        committed: tokens.
        explored: how many of them the policy explored, drawn whatever ``commit`` says.
        nats: sum of -log p of the committed values under their marginals.
        least: the lowest of those probabilities.
        fallback: the rule admitted nothing.
    """

    committed: int
    explored: int
    nats: float
    least: float
    fallback: bool

    def within(self, factor: float) -> bool:
        """Whether every committed value satisfies the dynamic rule, as the bound on rounds assumes."""
        return (1 + self.committed) * (1 - self.least) <= factor + 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class ParallelDecoding:
    """What was decoded, and how.

    Attributes:
        tokens: prompts and what was generated, which is scored.
        rounds: the rounds of each row, each one network evaluation.
    """

    tokens: TokenBatch
    rounds: tuple[tuple[Round, ...], ...]

    @property
    def evaluations(self) -> Tensor:
        """(B,) long, rounds of each row."""
        return torch.tensor([len(row) for row in self.rounds])

    @property
    def nats(self) -> Tensor:
        """(B,) float64, -log p of what was committed, summed as if the tokens of a round were independent."""
        return torch.tensor([math.fsum(r.nats for r in row) for row in self.rounds], dtype=torch.float64)


@torch.no_grad()
def parallel_decode(
    model: MaskedConditionals,
    prompt: TokenBatch | Canvas,
    policy: ParallelPolicy,
    *,
    n: int = 1,
    length: int = 64,
    block_length: int | None = None,
    commit: Literal["argmax", "sample"] = "argmax",
    seed: int = 0,
) -> ParallelDecoding:
    """Fill in hidden tokens, several a round, as `policy` decides.

    Args:
        model: gives the marginals of hidden tokens.
        prompt: rows to continue, or a canvas with gaps (which stays as it is; `n` and `length` are not for it).
        policy: which tokens a round commits.
        n: decodings per prompt row.
        length: tokens to generate.
        block_length: tokens per block (semi-autoregressive decoding); everything is one block by default.
        commit: confident tokens take their likeliest value, or are drawn; those that a policy explores are always
            drawn.
        seed: of the random numbers; a row's are its own, whatever else is in the batch.

    Raises:
        InputError: for options out of range.
    """
    if commit not in ("argmax", "sample"):
        raise InputError(f"commit must be 'argmax' or 'sample', got {commit!r}")
    canvas = prompt.copy() if isinstance(prompt, Canvas) else canvas_of(model, prompt, n=n, length=length)
    size = int(canvas.generated.sum(1).max()) if block_length is None else block_length
    if size < 1:
        raise InputError(f"block_length must be at least 1, got {block_length}")
    blocks = (canvas.generated.cumsum(1) - 1) // size
    streams = [np.random.default_rng((seed, row)) for row in range(len(canvas.ids))]
    trace: list[list[Round]] = [[] for _ in streams]
    while bool(canvas.hidden.any()):
        live = canvas.hidden.any(1).nonzero()[:, 0]
        probs, rows, columns = canvas.conditionals(model, live)
        for row in live.tolist():
            own = rows == row
            place = columns[own]
            marginals = probs[own].numpy()
            view = View(blocks[row, place].numpy(), marginals, marginals.max(1))
            choice = policy.choose(view, streams[row])
            picked = np.flatnonzero(choice.exploit | choice.explore)
            if not len(picked):
                raise InputError(f"{type(policy).__name__} chose no token in a round: a policy commits at least one")
            draw = choice.explore[picked] | (commit == "sample")
            tokens = _values(marginals[picked], draw, streams[row])
            canvas.reveal(torch.full((len(picked),), row), place[picked], torch.from_numpy(tokens))
            chances = marginals[picked, tokens]
            trace[row].append(
                Round(
                    len(picked),
                    int(choice.explore.sum()),
                    float(-np.log(chances).sum()),
                    float(chances.min()),
                    choice.fallback,
                )
            )
    filled = TokenBatch(canvas.ids, canvas.real, canvas.generated, canvas.starts)
    return ParallelDecoding(filled, tuple(tuple(row) for row in trace))


def rounds_lower_bound(nll: float, length: int, factor: float, error: float = 0.0) -> float:
    r"""Least rounds of a decoder that commits only by the dynamic rule with factor f (arXiv 2511.21103, theorem 3.2).

    .. math:: R \ge \max\Big\{ \frac{-\log p(x)}{\log\frac{n + 1}{(1 - f) n + 1}},\;
       \frac{-\log p(x) - \epsilon}{f} \Big\}

    Args:
        nll: :math:`-\log p(x)`, nats.
        length: n, tokens of the text.
        factor: f in (0, 1].
        error: total approximation error :math:`\epsilon`, nats; 0 where tokens of a round are independent.

    Raises:
        InputError: for arguments out of range.
    """
    if not 0 < factor <= 1 or length < 1 or not (math.isfinite(nll) and math.isfinite(error)) or nll < 0:
        raise InputError(
            "factor must lie in (0, 1], length be positive, nll finite and not negative and error finite; got "
            f"{factor}, {length}, {nll} and {error}"
        )
    return max(nll / math.log((length + 1) / ((1 - factor) * length + 1)), (nll - error) / factor)


def _values(marginals: NDArray[np.float64], draw: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """A token from each marginal: drawn, or the likeliest."""
    edges = marginals.cumsum(1)
    uniform = rng.random(len(marginals)) * edges[:, -1]
    drawn = np.array([np.searchsorted(row, u, side="right") for row, u in zip(edges, uniform, strict=True)])
    drawn = np.minimum(drawn, marginals.shape[1] - 1)
    return np.asarray(np.where(draw, drawn, marginals.argmax(1)), dtype=np.int64)


def _confident(view: View, inside: NDArray[np.bool_], factor: float) -> NDArray[np.bool_]:
    """The largest set that satisfies the dynamic rule."""
    order = np.flatnonzero(inside)
    order = order[np.argsort(-view.confidence[order], kind="stable")]
    counts = np.arange(1, len(order) + 1)
    fits = np.flatnonzero((1 + counts) * (1 - view.confidence[order]) <= factor)
    chosen = np.zeros(len(view.block), dtype=bool)
    if len(fits):
        chosen[order[: fits[-1] + 1]] = True
    return chosen


def _or_best(chosen: NDArray[np.bool_], view: View, inside: NDArray[np.bool_]) -> Choice:
    """The chosen tokens, or the most confident one where there are none."""
    if chosen.any():
        return Choice(chosen, np.zeros_like(chosen), fallback=False)
    return _highest(view.confidence, 1, inside)._replace(fallback=True)


def _highest(score: NDArray[np.float64], count: int, inside: NDArray[np.bool_]) -> Choice:
    order = np.flatnonzero(inside)
    order = order[np.argsort(-score[order], kind="stable")][:count]
    chosen = np.zeros(len(score), dtype=bool)
    chosen[order] = True
    return Choice(chosen, np.zeros_like(chosen), fallback=False)


def _window(block: NDArray[np.int64], window: int | None) -> NDArray[np.bool_]:
    """Tokens of the first `window` unfinished blocks."""
    if window is None:
        return np.ones(len(block), dtype=bool)
    return np.isin(block, np.unique(block)[:window])


def _entropy(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    logs = np.log(np.where(probs > 0, probs, 1.0))
    return np.asarray(-(probs * logs).sum(1))


def _margin(probs: NDArray[np.float64]) -> NDArray[np.float64]:
    top = np.sort(probs, axis=1)[:, -2:]
    return np.asarray(top[:, -1] - top[:, 0])


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise InputError(f"window must be at least 1 block, got {window}")


def _check_count(count: int) -> None:
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
