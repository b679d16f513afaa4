"""P038: the likelihood of what users write next ranks answers where their own likelihood does not (2409.13948)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from worlds.enumerable import GRULM

from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.feedback import Message, follow_up_likelihood, mine_pairs

NUMBERS, DETOUR, RIGHT = 5, 3, 0.3
WIDTH, LAYERS, STEPS, BATCH, LR = 64, 2, 300, 256, 3e-3
POSITIVE = ("yes thanks", "yes right", "good answer")
NEGATIVE = ("no wrong", "no sorry", "bad answer")
# Dialogues in the training data, and the probability that a follow-up has the wrong sign.
RUNS = {"2000": (2000, 0.3), "500": (500, 0.3), "2000, noise 0.5": (2000, 0.5), "500, noise 0.5": (500, 0.5)}
SIDES = {"": (POSITIVE, NEGATIVE), " positive only": (POSITIVE, ()), " negative only": ((), NEGATIVE)}
PAIRS = tuple(product(range(NUMBERS), repeat=2))

CLAIM = Claim(
    paper="P038",
    text=(
        "The likelihood of positive against negative follow-ups ranks responses by correctness even where the "
        "likelihood of the response prefers the wrong one."
    ),
    setup=(
        'Dialogues "a + b ; answer ; follow-up" with a, b in 0..4. The answer is right with probability 0.3, else '
        "always a + b + 3 mod 10; the follow-up is one of 3 positive or 3 negative phrases of two words by "
        "correctness, flipped with probability 0.3. A GRU of 2 layers and width 64 learns 500 or 2000 dialogues by "
        "next-token likelihood: 300 Adam steps of 256 rows, learning rate 3e-3. Test: right against wrong answer for "
        "all 25 (a, b), follow-ups averaged over their tokens."
    ),
    checks=(
        Check(
            "follow-ups rank, 500 dialogues",
            "follow-up likelihood prefers the right answer in >= 0.9 of the 25 pairs, in every seed",
            lambda m: m["500: follow-ups"] >= 0.9,
            ("500: follow-ups",),
        ),
        Check(
            "responses do not, 500 dialogues",
            "the answer's own log-likelihood prefers the right one in <= 0.5 of the pairs, in every seed",
            lambda m: m["500: response"] <= 0.5,
            ("500: response",),
        ),
        Check(
            "both hold with 2000 dialogues",
            "follow-ups >= 0.9 and response <= 0.5, in every seed",
            lambda m: m["2000: follow-ups"] >= 0.9 and m["2000: response"] <= 0.5,
            ("2000: follow-ups", "2000: response"),
            main=False,
        ),
        Check(
            "control: feedback that says nothing",
            "flipped with probability 0.5, mean over seeds of the follow-up accuracy within 0.15 of 0.5, for 500 and "
            "for 2000 dialogues",
            lambda m: max(abs(m[f"{n}, noise 0.5: follow-ups"] - 0.5) for n in (500, 2000)) <= 0.15,
            ("500, noise 0.5: follow-ups", "2000, noise 0.5: follow-ups"),
            main=False,
            on_mean=True,
        ),
    ),
    seeds=5,
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    numbers = [str(n) for n in range(10)]
    words = dict.fromkeys([*numbers, "+", ";", *" ".join(POSITIVE + NEGATIVE).split()])
    model = models.WordLevel({word: number for number, word in enumerate(["<unk>", *words])}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@dataclass
class ScoringModel:
    """The GRU as a text model: what `follow_up_likelihood` asks for."""

    network: GRULM
    tokenizer: Any
    kind: Kind = Kind.EXACT
    unit: Unit = Unit.TOKEN
    layout: str = "causal"
    max_length: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Of the scored tokens; rows have their padding on the right, where the GRU cannot see it."""
        return self.score_tokens(x)[0]

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor]:
        """`log_prob`, and whether each scored token is the first choice."""
        packed, origin = x.packed_left()
        conditionals = self.network.conditionals(packed.ids)
        chosen = conditionals.gather(-1, packed.ids[..., None])[..., 0]
        first = (chosen == conditionals.amax(-1)) & packed.scored_mask
        terms = x.unpack(chosen.masked_fill(~packed.scored_mask, 0.0), origin, packed)
        return LogLikelihood.from_per_unit(terms, x.scored_mask), x.unpack(first.int(), origin, packed).bool()


def answers(a: int, b: int) -> tuple[int, int]:
    """The right one and the wrong one."""
    return (a + b) % 10, (a + b + DETOUR) % 10


def template(messages: Sequence[Message]) -> str:
    """Question and answer; the follow-up stands behind."""
    question, answer = messages
    return f"{question['content']} ; {answer['content']} ; "


def dialogues(n: int, noise: float, tokenizer: Any, generator: torch.Generator) -> Tensor:
    """(n, 8) token ids."""
    drawn = torch.randint(len(PAIRS), (n,), generator=generator).tolist()
    right = (torch.rand(n, generator=generator) < RIGHT).tolist()
    flipped = (torch.rand(n, generator=generator) < noise).tolist()
    phrase = torch.randint(len(POSITIVE), (n,), generator=generator).tolist()
    texts = []
    for pair, is_right, is_flipped, which in zip(drawn, right, flipped, phrase, strict=True):
        a, b = PAIRS[pair]
        follow_up = (POSITIVE if is_right != is_flipped else NEGATIVE)[which]
        messages = [{"content": f"{a} + {b}"}, {"content": str(answers(a, b)[0 if is_right else 1])}]
        texts.append(template(messages) + follow_up)
    return torch.tensor(tokenizer(texts)["input_ids"])


def train(rows: Tensor, vocabulary: int, generator: torch.Generator) -> GRULM:
    network = GRULM(vocabulary, WIDTH, layers=LAYERS)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = objective(network.log_prob(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


def accuracy(scores: Tensor) -> float:
    """Share of the questions whose right answer (even rows) outscores the wrong one; ties count as failures."""
    chosen, _ = mine_pairs(scores, torch.arange(len(PAIRS)).repeat_interleave(2))
    return ((chosen % 2 == 0).sum() / len(PAIRS)).item()


def measure(seed: int) -> Measured:
    tokenizer = word_tokenizer()
    questions = [f"{a} + {b}" for a, b in PAIRS for _ in range(2)]
    responses = [str(answer) for a, b in PAIRS for answer in answers(a, b)]
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for name, (count, noise) in RUNS.items():
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        rows = dialogues(count, noise, tokenizer, generator)
        model = ScoringModel(train(rows, len(tokenizer), generator), tokenizer)
        for side, (positive, negative) in SIDES.items():
            scores = follow_up_likelihood(
                model, questions, responses, positive=positive, negative=negative, template=template
            )
            values[f"{name}: follow-ups{side}"] = accuracy(scores.reward.value)
            if not side:
                reward = scores.reward.value.reshape(-1, 2)
                values[f"{name}: mean gap of follow-ups"] = (reward[:, 0] - reward[:, 1]).mean().item()
                curves[f"{name}: gaps"] = (reward[:, 0] - reward[:, 1]).tolist()
        own = [tokenizer(f"{q} ; {r}")["input_ids"] for q, r in zip(questions, responses, strict=True)]
        response = model.log_prob(TokenBatch.from_lists(own, starts=[len(row) - 1 for row in own])).value
        values[f"{name}: response"] = accuracy(response)
        curves[f"{name}: response gaps"] = (response[::2] - response[1::2]).tolist()
    return Measured(values, curves)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    kinds = [*(f"follow-ups{side}" for side in SIDES), "response"]
    for number, kind in enumerate(kinds):
        for at, name in enumerate(RUNS):
            points = report.per_seed(f"{name}: {kind}")
            places = [at + 0.18 * (number - 1.5)] * len(points)
            left.plot(places, points, "o", ms=4, alpha=0.6, color=f"C{number}", label=None if at else kind)
    left.axhline(0.9, color="black", ls=":", lw=0.8)
    left.axhline(0.5, color="black", ls=":", lw=0.8)
    left.set_xticks(range(len(RUNS)), [name.replace(", ", "\n") for name in RUNS])
    left.set(title="right answer preferred (a point per seed)", xlabel="training dialogues", ylim=(-0.05, 1.05))
    left.legend(fontsize=7, loc="center left")
    for number, name in enumerate(("500", "500, noise 0.5")):
        for first, m in enumerate(report.measured):
            right.plot(
                m.curves[f"{name}: response gaps"],
                m.curves[f"{name}: gaps"],
                ".",
                ms=4,
                color=f"C{number}",
                alpha=0.5,
                label=None if first else f"{name} dialogues",
            )
    right.axhline(0, color="black", lw=0.6)
    right.axvline(0, color="black", lw=0.6)
    right.set(
        title="right minus wrong answer, each question",
        xlabel="log-likelihood of the answer (nats)",
        ylabel="follow-up likelihood (nats per token)",
    )
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"Without a signal (flips with probability 0.5) follow-ups prefer the right answer in "
        f"{report.range('500, noise 0.5: follow-ups', '.2f')} of the pairs with 500 dialogues and in "
        f"{report.range('2000, noise 0.5: follow-ups', '.2f')} with 2000; single seeds scatter widely, since 25 pairs "
        "share one model's chance preferences.",
        f"With 500 dialogues positive follow-ups alone reach {report.range('500: follow-ups positive only', '.2f')}, "
        f"negative ones alone {report.range('500: follow-ups negative only', '.2f')}.",
        "The test questions are those of training: the feedback of about 20 dialogues per question, of which 30 % is "
        "flipped, is what the model has to average.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
