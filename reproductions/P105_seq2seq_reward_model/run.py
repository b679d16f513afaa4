"""P105: a reward model that rewrites answers sees content where a scalar one has learned length (2409.00162)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from worlds.arithmetic import PROMPT, Chain

from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.objectives.preference import bradley_terry
from loglik.objectives.rewards import Seq2SeqReward, correction_pairs
from loglik.objectives.supervised import MaximumLikelihood

TASK = Chain(transitions=5)
FILLER, EOS, START = TASK.vocabulary, TASK.vocabulary + 1, TASK.vocabulary + 2
VOCABULARY, WIDTH = TASK.vocabulary + 3, 64
BATCH, LR, TEST = 128, 2e-3, 1000
# Share of the pairs in which the better answer is the longer one, and training steps.
RUNS = {"1.0": (1.0, 400), "0.9": (0.9, 700)}
TESTS = {"conflict": 0.0, "in distribution": 1.0}

CLAIM = Claim(
    paper="P105",
    text=(
        "Where preferences are confounded with length, a scalar reward model learns length; a sequence-to-sequence "
        "reward model trained on the same pairs still sees content."
    ),
    setup=(
        "A prompt is a start s and a step k, a right answer the digits s + k t mod 10 for t = 1..5; the rejected "
        "answer has one wrong digit. Fillers and EOS follow: 2-4 after the chosen answer, 0-1 after the rejected one, "
        "always. Scalar model: bidirectional GRU of width 64 over prompt and answer, mean, MLP, Bradley-Terry. "
        "Sequence-to-sequence model: the same encoder, a GRU decoder with attention, likelihood of the correction and "
        "of the identity. 400 Adam steps of 128 fresh pairs, learning rate 2e-3. Conflict test: 1000 pairs of a right "
        "short answer and a wrong long one; a tie is a failure. Beside it: one pair in ten with the lengths exchanged, "
        "700 steps."
    ),
    checks=(
        Check(
            "the scalar model prefers the long answer",
            "confounding 1.0, conflict test: accuracy of the scalar model <= 0.2, in every seed",
            lambda m: m["1.0 conflict: scalar"] <= 0.2,
            ("1.0 conflict: scalar",),
        ),
        Check(
            "the rewriting model prefers the right one",
            "confounding 1.0, conflict test: accuracy of the summed token rewards >= 0.65, in every seed",
            lambda m: m["1.0 conflict: seq2seq sum"] >= 0.65,
            ("1.0 conflict: seq2seq sum",),
        ),
        Check(
            "both are right where they were trained",
            "confounding 1.0, pairs like those of training: both >= 0.95, in every seed",
            lambda m: min(m["1.0 in distribution: scalar"], m["1.0 in distribution: seq2seq sum"]) >= 0.95,
            ("1.0 in distribution: scalar", "1.0 in distribution: seq2seq sum"),
            main=False,
        ),
        Check(
            "boundary: a tenth of counter-examples is enough for both",
            "confounding 0.9, conflict test: both >= 0.95, in every seed",
            lambda m: min(m["0.9 conflict: scalar"], m["0.9 conflict: seq2seq sum"]) >= 0.95,
            ("0.9 conflict: scalar", "0.9 conflict: seq2seq sum"),
            main=False,
        ),
        Check(
            "the wrong digit is found",
            "confounding 0.9, conflict test: the wrong digit has a negative reward in >= 90 % of the answers, in every "
            "seed",
            lambda m: m["0.9: wrong digit marked"] >= 0.9,
            ("0.9: wrong digit marked", "0.9: other digits marked"),
            main=False,
        ),
    ),
    seeds=3,
)


class Encoder(nn.Module):
    """A bidirectional GRU that does not see padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, bidirectional=True, batch_first=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, S, 2 D), zero at padding, and the last ones of both directions (B, 2 D)."""
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        states, last = self.gru(packed)
        return pad_packed_sequence(states, batch_first=True)[0], torch.cat([last[0], last[1]], 1)


class ScalarReward(nn.Module):
    """One number for prompt and answer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def forward(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """(B,) rewards."""
        x = TokenBatch.from_lists([p + y for p, y in zip(prompts, responses, strict=True)])
        lengths = x.attention_mask.sum(1)
        return self.head(self.encoder(x.ids, lengths)[0].sum(1) / lengths[:, None])[:, 0]


class Rewriter(nn.Module):
    """An encoder-decoder: a GRU over the output so far, and attention from its states to the source."""

    kind = Kind.EXACT
    unit = Unit.TOKEN
    layout = "seq2seq"
    tokenizer: Any = None
    max_length: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.bridge = nn.Linear(2 * WIDTH, WIDTH)
        self.decoder = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.key = nn.Linear(2 * WIDTH, WIDTH)
        self.mix = nn.Linear(3 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def conditionals(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """(B, T, V) log-probabilities of each target token after those before it."""
        states, last = self.encoder(source, lengths)
        shifted = torch.nn.functional.pad(target[:, :-1], (1, 0), value=START)
        queries = self.decoder(self.embedding(shifted), self.bridge(last)[None])[0]
        scores = queries @ self.key(states).transpose(1, 2) / WIDTH**0.5
        absent = torch.arange(states.shape[1]) >= lengths[:, None]
        read = scores.masked_fill(absent[:, None], -torch.inf).softmax(-1) @ states
        return self.head(torch.tanh(self.mix(torch.cat([queries, read], -1)))).log_softmax(-1)

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Of the scored tokens given what stands before `starts`."""
        return self.score_tokens(x)[0]

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor]:
        """`log_prob`, and whether each scored token is the first choice; rows are padded on the right."""
        starts = x.completion_starts()
        lengths = x.attention_mask.sum(1) - starts
        columns = torch.arange(int(lengths.max()))
        real = columns < lengths[:, None]
        place = (starts[:, None] + columns).masked_fill(~real, 0)
        target = x.ids.gather(1, place).masked_fill(~real, EOS)
        log_p = self.conditionals(x.ids[:, : int(starts.max())], starts, target)
        chosen = log_p.gather(-1, target[..., None])[..., 0]
        row, slot = real.nonzero(as_tuple=True)
        at = (row, place[row, slot])
        terms = torch.zeros(x.ids.shape).index_put(at, chosen[row, slot])
        first = torch.zeros_like(x.scored_mask).index_put(at, (chosen == log_p.amax(-1))[row, slot])
        return LogLikelihood.from_per_unit(terms, x.scored_mask), first & x.scored_mask


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as token ids, and the column of the wrong digit in each rejected answer."""

    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    wrong: Tensor


def pairs(n: int, confounding: float, generator: torch.Generator) -> Pairs:
    """Right and wrong answers; the right one is the longer with probability `confounding`."""
    rows = TASK.data(n, generator=generator, wrong=0.0)
    right = rows[:, PROMPT:]
    wrong = torch.randint(TASK.transitions, (n,), generator=generator)
    off = torch.randint(1, TASK.symbols, (n,), generator=generator)
    spoiled = right.clone()
    spoiled[torch.arange(n), wrong] = (right[torch.arange(n), wrong] + off) % TASK.symbols
    long = torch.randint(2, 5, (n,), generator=generator)
    short = torch.randint(2, (n,), generator=generator)
    plain = torch.rand(n, generator=generator) < confounding

    def ended(digits: Tensor, fillers: Tensor) -> list[list[int]]:
        return [[*y, *[FILLER] * f, EOS] for y, f in zip(digits.tolist(), fillers.tolist(), strict=True)]

    return Pairs(
        rows[:, :PROMPT].tolist(),
        ended(right, torch.where(plain, long, short)),
        ended(spoiled, torch.where(plain, short, long)),
        wrong,
    )


def train_scalar(confounding: float, steps: int, generator: torch.Generator) -> ScalarReward:
    model = ScalarReward()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for _ in range(steps):
        p = pairs(BATCH, confounding, generator)
        rewards = model(p.prompts * 2, p.chosen + p.rejected)
        loss = bradley_terry(rewards[:BATCH], rewards[BATCH:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def train_rewriter(confounding: float, steps: int, generator: torch.Generator) -> Rewriter:
    model = Rewriter()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    for _ in range(steps):
        p = pairs(BATCH, confounding, generator)
        rows = correction_pairs(
            {"prompt": x, "chosen": good, "rejected": bad}
            for x, good, bad in zip(p.prompts, p.chosen, p.rejected, strict=True)
        )
        batch = TokenBatch.from_lists(
            [row["prompt"] + row["completion"] for row in rows], starts=[len(row["prompt"]) for row in rows]
        )
        loss = objective(model.log_prob(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def compare(chosen: Tensor, rejected: Tensor) -> float:
    return (chosen > rejected).float().mean().item()


def measure(seed: int) -> Measured:
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, (confounding, steps) in RUNS.items():
        torch.manual_seed(seed)
        scalar = train_scalar(confounding, steps, torch.Generator().manual_seed(seed))
        rewriter = train_rewriter(confounding, steps, torch.Generator().manual_seed(seed))
        rewards = {
            "sum": (Seq2SeqReward(rewriter), "sum"),
            "mean": (Seq2SeqReward(rewriter), "mean"),
            "negative phase only": (Seq2SeqReward(rewriter, pos=0.0), "sum"),
            "positive phase only": (Seq2SeqReward(rewriter, neg=0.0), "sum"),
        }
        for test, share in TESTS.items():
            p = pairs(TEST, share, torch.Generator().manual_seed(1000 + seed))
            values[f"{name} {test}: scalar"] = compare(scalar(p.prompts, p.chosen), scalar(p.prompts, p.rejected))
            for label, (reward, aggregate) in rewards.items():
                sides = [reward.score(p.prompts, side, aggregate=aggregate) for side in (p.chosen, p.rejected)]
                values[f"{name} {test}: seq2seq {label}"] = compare(*sides)
            if test == "conflict":
                given = Seq2SeqReward(rewriter).token_rewards(p.prompts, p.rejected)
                digits = given.value[:, : TASK.transitions] < 0
                here = torch.nn.functional.one_hot(p.wrong, TASK.transitions).bool()
                values[f"{name}: wrong digit marked"] = digits[here].float().mean().item()
                values[f"{name}: other digits marked"] = digits[~here].float().mean().item()
                for at in range(TASK.transitions):
                    of = given.value[p.wrong == at, : TASK.transitions]
                    curves[f"{name}: wrong digit {at}"] = of.mean(0).tolist()
                own = Seq2SeqReward(rewriter).token_rewards(p.prompts, p.chosen).value[:, : TASK.transitions]
                values[f"{name}: digits of right answers marked"] = (own < 0).float().mean().item()
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    labels = {
        "scalar": "scalar",
        "seq2seq sum": "sum",
        "seq2seq mean": "mean",
        "seq2seq positive phase only": "positive\nphase",
        "seq2seq negative phase only": "negative\nphase",
    }
    for number, name in enumerate(RUNS):
        for at, kind in enumerate(labels):
            points = report.per_seed(f"{name} conflict: {kind}")
            label = None if at else f"confounding {name}"
            left.plot(
                [at + 0.2 * (number - 0.5)] * len(points), points, "o", ms=4, alpha=0.6, color=f"C{number}", label=label
            )
    left.axhline(0.65, color="black", ls=":", lw=0.8)
    left.axhline(0.2, color="black", ls=":", lw=0.8)
    left.set_xticks(range(len(labels)), list(labels.values()), fontsize=8)
    left.set(title="right and short against wrong and long", ylabel="accuracy (a point per seed)", ylim=(-0.05, 1.05))
    left.legend(fontsize=7, loc="lower right")
    table = [
        [sum(m.curves[f"1.0: wrong digit {at}"][t] for m in report.measured) / len(report.seeds) for t in range(5)]
        for at in range(TASK.transitions)
    ]
    image = right.imshow(table, vmin=-1, vmax=1, cmap="RdBu")
    for at, row in enumerate(table):
        for t, value in enumerate(row):
            right.text(
                t,
                at,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(value) > 0.6 else "black",
            )
    right.set(title="mean token reward, confounding 1.0", xlabel="digit", ylabel="which digit is wrong")
    figure.colorbar(image, ax=right, shrink=0.8)


def notes(report: Report) -> list[str]:
    return [
        "The boundary of the claim: with one pair in ten whose lengths are exchanged the scalar model reaches "
        f"{report.range('0.9 conflict: scalar', '.2f')} and the rewriting one "
        f"{report.range('0.9 conflict: seq2seq sum', '.2f')} on the conflict test.",
        "By phases, confounding 1.0: positive phase alone "
        f"{report.range('1.0 conflict: seq2seq positive phase only', '.2f')}, negative phase alone "
        f"{report.range('1.0 conflict: seq2seq negative phase only', '.2f')}, mean in place of sum "
        f"{report.range('1.0 conflict: seq2seq mean', '.2f')}.",
        f"The wrong digit has a negative reward in {report.range('1.0: wrong digit marked', '.2f')} of the wrong long "
        f"answers (other digits in {report.range('1.0: other digits marked', '.2f')}) with confounding 1.0, and in "
        f"{report.range('0.9: wrong digit marked', '.2f')} ({report.range('0.9: other digits marked', '.2f')}) with "
        f"0.9; digits of right short answers in {report.range('1.0: digits of right answers marked', '.2f')} and "
        f"{report.range('0.9: digits of right answers marked', '.2f')}. "
        "Marks on other digits lie behind the wrong one (right panel): the decoder has been given the wrong digit and "
        "expects others after it. A mark says that something was wrong here or before.",
        "The run with counter-examples also has 700 steps in place of 400, as the claim's boundary was stated.",
        "The 90 prompts of training are those of the test: what is new in the conflict test is the combination of "
        "content and length. The scalar model's pairs and the rewriting model's are the same draws.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
