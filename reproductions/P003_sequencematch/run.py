"""P003: with a backspace, errors that would compound are taken back (2306.05426)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import GRULM

from loglik.decoding.backspace import generate_with_backspace, visible_states
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.objectives.imitation import Trajectories, insert_backspaces, sequence_match
from loglik.objectives.supervised import MaximumLikelihood

SYMBOLS, HALF = 5, 3
EOS, BACKSPACE = SYMBOLS, SYMBOLS + 1
VOCABULARY, WIDTH = SYMBOLS + 2, 48
STEPS, BATCH, LR, INSERT = 1500, 64, 2e-3, 0.15
GAMMA, BUFFER, REFRESH, CAP = 0.98, 128, 10, 40
ALPHAS = (0.1, 1.0)
NOISE, TEST = (0.0, 0.1, 0.2), 1000
ARMS = ("mle", "mle + backspace", *(f"chi2 + backspace, alpha {alpha:g}" for alpha in ALPHAS))
PLAIN, MLE, CHI2 = ARMS[:3]

CLAIM = Claim(
    paper="P003",
    text="Demonstrations of a backspace turn compounding errors into recoverable ones.",
    setup=(
        "Palindromes of length 6 over 5 symbols and EOS; a GRU of width 48 over the visible prefix; 1500 Adam steps "
        "of 64 sequences, learning rate 2e-3. Three models: likelihood of the data; likelihood of the data with wrong "
        "symbols and backspaces inserted at rate 0.15; and the latter with the SequenceMatch loss (chi-square to the "
        "mixture, alpha 0.1, gamma 0.98, 128 noise-free rollouts refreshed every 10 steps) in the second half of "
        "training. In the test the environment replaces each appended symbol by a uniform one with probability 0, 0.1 "
        "or 0.2; a sample is valid if it is a palindrome of length 6 when EOS comes within 40 actions; 1000 samples. "
        "Beside it alpha 1."
    ),
    checks=(
        Check(
            "backspace data make errors recoverable",
            "noise 0.2: validity of likelihood with backspaces >= that of plain likelihood + 0.2, in every seed",
            lambda m: m[f"{MLE}: valid at 0.2"] >= m[f"{PLAIN}: valid at 0.2"] + 0.2,
            (f"{MLE}: valid at 0.2", f"{PLAIN}: valid at 0.2"),
        ),
        Check(
            "under SequenceMatch too",
            "noise 0.2: validity of SequenceMatch (alpha 0.1) >= that of plain likelihood + 0.2, in every seed",
            lambda m: m[f"{CHI2}: valid at 0.2"] >= m[f"{PLAIN}: valid at 0.2"] + 0.2,
            (f"{CHI2}: valid at 0.2", f"{PLAIN}: valid at 0.2"),
        ),
        *(
            Check(
                f"noise costs little: {arm}",
                "validity at noise 0.2 at most 0.03 below that without noise, in every seed",
                lambda m, arm=arm: m[f"{arm}: valid at 0"] - m[f"{arm}: valid at 0.2"] <= 0.03,
                (f"{arm}: valid at 0", f"{arm}: valid at 0.2"),
            )
            for arm in (MLE, CHI2)
        ),
        Check(
            "SequenceMatch beats likelihood on the same data",
            "noise 0.2: validity of SequenceMatch (alpha 0.1) > that of likelihood with backspaces, mean over seeds",
            lambda m: m[f"{CHI2}: valid at 0.2"] > m[f"{MLE}: valid at 0.2"],
            (f"{CHI2}: valid at 0.2", f"{MLE}: valid at 0.2"),
            main=False,
            on_mean=True,
        ),
    ),
    seeds=3,
)


class Writer(GRULM):
    """A GRU over the visible prefix; what is deleted has left no trace in its state."""

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) after each row; rows may be empty and of different lengths."""
        packed, _ = prefix.packed_left()
        longer = torch.nn.functional.pad(packed.ids, (0, 1))
        return self.conditionals(longer)[torch.arange(len(prefix)), packed.attention_mask.sum(1)]

    def action_logits(self, x: TokenBatch, top: Tensor) -> Tensor:
        """(B, T, V) raw logits in the state in which each action is taken.

        Args:
            x: left-aligned actions.
            top: (B, T) column of the last visible token after each column, -1 for none.
        """
        before = torch.nn.functional.pad(top[:, :-1], (1, 0), value=-1)
        appended = x.attention_mask & (x.ids != BACKSPACE) & (x.ids != EOS)
        depth = torch.where(x.ids == BACKSPACE, -1, 1).cumsum(1).masked_fill(~appended, 0)
        start = torch.full((1, 1), self.vocabulary)
        level = self.gru(self.embedding(start))[0][:, 0]
        levels, begin = [level], 0
        # Number of each column's state among all that were computed; the last column stands for the empty prefix.
        place = torch.zeros(len(x), x.ids.shape[1] + 1, dtype=torch.long)
        for d in range(1, int(depth.max()) + 1):
            row, column = (depth == d).nonzero(as_tuple=True)
            below = level[place[row, before[row, column]] - begin]
            begin += len(level)
            level = self.gru(self.embedding(x.ids[row, column])[:, None], below[None])[0][:, 0]
            levels.append(level)
            place[row, column] = begin + torch.arange(len(row))
        every = self.head(torch.cat(levels))
        logits = every[place.gather(1, before % (x.ids.shape[1] + 1))]
        stuck = (before < 0)[..., None] & (torch.arange(VOCABULARY) == BACKSPACE)
        return logits.masked_fill(stuck, -torch.inf)


@dataclass(frozen=True)
class Noisy:
    """The writer in an environment that replaces each appended symbol by a uniform one with probability `noise`."""

    writer: Writer
    noise: float

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """What is appended (or deleted), not what was chosen."""
        p = self.writer.next_log_probs(prefix).exp()
        symbols = p[:, :SYMBOLS]
        mixed = (1 - self.noise) * symbols + self.noise * symbols.sum(1, keepdim=True) / SYMBOLS
        return torch.cat([mixed, p[:, SYMBOLS:]], 1).log()


def palindromes(n: int, generator: torch.Generator) -> TokenBatch:
    half = torch.randint(SYMBOLS, (n, HALF), generator=generator)
    rows = torch.cat([half, half.flip(1), torch.full((n, 1), EOS)], 1)
    every = torch.ones_like(rows, dtype=torch.bool)
    return TokenBatch(rows, every, every, torch.zeros(n, dtype=torch.long))


def top_of(x: TokenBatch) -> Tensor:
    """`VisibleStates.top` of demonstrations, in which a backspace deletes the token before it, and never two."""
    columns = torch.arange(x.ids.shape[1])
    return torch.where(x.ids == BACKSPACE, columns - 2, columns).masked_fill(~x.attention_mask, -1)


def likelihood(model: Writer, x: TokenBatch) -> LogLikelihood:
    log_p = model.action_logits(x, top_of(x)).log_softmax(-1)
    terms = log_p.gather(-1, x.ids[..., None])[..., 0].masked_fill(~x.scored_mask, 0.0)
    return LogLikelihood.from_per_unit(terms, x.scored_mask)


def trajectories(model: Writer, x: TokenBatch, top: Tensor) -> Trajectories:
    return Trajectories.from_logits(model.action_logits(x, top), x.ids, x.scored_mask)


def rollouts(model: Writer | Noisy, n: int, generator: torch.Generator) -> tuple[TokenBatch, TokenBatch]:
    """Actions, and what they leave visible."""
    nothing = TokenBatch.from_lists([[] for _ in range(n)], starts=[0] * n)
    found = generate_with_backspace(
        model, nothing, backspace_id=BACKSPACE, max_actions=CAP, eos_id=EOS, generator=generator
    )
    return found.actions, found.visible


def validity(model: Writer, noise: float, generator: torch.Generator) -> tuple[float, float]:
    """Share of samples that are palindromes of length 6, and backspaces per sample."""
    actions, visible = rollouts(Noisy(model, noise), TEST, generator)
    good = 0
    for ids, real in zip(visible.ids, visible.attention_mask, strict=True):
        row = ids[real].tolist()
        good += len(row) == 2 * HALF + 1 and row[-1] == EOS and row[:-1] == row[-2::-1]
    return good / TEST, ((actions.ids == BACKSPACE) & actions.attention_mask).sum().item() / TEST


def train(model: Writer, steps: int, seed: int, *, insert: float, alpha: float | None = None) -> Writer:
    """More steps of likelihood, or of SequenceMatch where alpha is given."""
    model = copy.deepcopy(model)
    data, noise, own = (torch.Generator().manual_seed(1000 * k + seed) for k in (1, 2, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    buffer: tuple[TokenBatch, Tensor]
    for step in range(steps):
        x = palindromes(BATCH, data)
        if insert:
            x = insert_backspaces(x, backspace_id=BACKSPACE, tokens=range(SYMBOLS), rate=insert, generator=noise)
        if alpha is None:
            terms = objective(likelihood(model, x))
        else:
            if step % REFRESH == 0:
                drawn = rollouts(model, BUFFER, own)[0]
                buffer = (drawn, visible_states(drawn, backspace_id=BACKSPACE).top)
            terms = sequence_match(
                trajectories(model, x, top_of(x)), trajectories(model, *buffer), alpha=alpha, gamma=GAMMA
            )
        optimizer.zero_grad()
        terms.mean().backward()
        optimizer.step()
    return model


def measure(seed: int) -> Measured:
    torch.manual_seed(seed)
    start = Writer(VOCABULARY, WIDTH)
    half = train(start, STEPS // 2, seed, insert=INSERT)
    later = 100 + seed  # other data in the second half, the same for all arms
    models = {
        PLAIN: train(train(start, STEPS // 2, seed, insert=0.0), STEPS // 2, later, insert=0.0),
        MLE: train(half, STEPS // 2, later, insert=INSERT),
    }
    for alpha in ALPHAS:
        models[f"chi2 + backspace, alpha {alpha:g}"] = train(half, STEPS // 2, later, insert=INSERT, alpha=alpha)
    values: dict[str, float] = {}
    for arm, model in models.items():
        for noise in NOISE:
            valid, backspaces = validity(model, noise, torch.Generator().manual_seed(seed))
            values[f"{arm}: valid at {noise:g}"] = valid
            values[f"{arm}: backspaces at {noise:g}"] = backspaces
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for axes, what, label in (
        (left, "valid", "share of valid palindromes"),
        (right, "backspaces", "backspaces per sample"),
    ):
        for number, arm in enumerate(ARMS):
            for first in range(len(report.seeds)):
                curve = [report.per_seed(f"{arm}: {what} at {noise:g}")[first] for noise in NOISE]
                axes.plot(NOISE, curve, "o-", ms=3, color=f"C{number}", alpha=0.7, label=None if first else arm)
        axes.set(xlabel="probability that a symbol is replaced", ylabel=label)
    left.set(title="validity", ylim=(0, 1.03))
    right.set(title="corrections")
    left.legend(fontsize=7, loc="lower left")


def notes(report: Report) -> list[str]:
    def shown(arm: str) -> str:
        return ", ".join(report.range(f"{arm}: valid at {noise:g}", ".2f") for noise in NOISE)

    return [
        "Validity without noise, at 0.1 and at 0.2: " + "; ".join(f"{arm} {shown(arm)}" for arm in ARMS) + ".",
        "A wrong symbol in the first half breaks nothing, since any symbols may be mirrored: plain likelihood could do "
        "no better than (1 - 0.8 p)^3, 0.78 at 0.1 and 0.59 at 0.2, if it cannot take anything back.",
        "The recovery comes from the demonstrations: SequenceMatch is judged against likelihood on the same data, and "
        "its gain or loss is the last check.",
        "A wrong symbol that was inserted is a state and no target; rollouts have no noise, as the data's inserted "
        "symbols are no actions either. Behind EOS and behind the cap of 40 actions the value is 0.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
