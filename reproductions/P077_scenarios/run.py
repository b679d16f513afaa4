"""P077: correct, confident predictions come in kinds that accuracy cannot tell apart (2410.14405)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import TransformerLM

from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.scenarios import Scenario
from loglik.signals.swaps import likelihood_scenarios, name_specificity, swap_dependence, template_consistency

FIRST, SURNAMES, COUNTRIES, PER_COUNTRY, TEMPLATES = 40, 32, 8, 3, 6
ETHNIC = COUNTRIES * PER_COUNTRY
MEMORISED, HELD_OUT, OWN = 200, 400, 0.95
WIDTH, LAYERS, HEADS, STEPS, BATCH, LR = 64, 3, 4, 1200, 256, 2e-3
NAME_PROMPTS, BARE_PROMPTS = 0.05, 0.05  # shares of the training rows
SWAPS, DRAWS, NOISE = 20, 10, 3.0
KINDS = {"recall": Scenario.EXACT_RECALL, "heuristic": Scenario.HEURISTICS, "guess": Scenario.GUESSWORK}
# Tokens: first names, surnames, templates, the question about a name, "in", nobody, countries.
SURNAME_0, TEMPLATE_0 = FIRST, FIRST + SURNAMES
ASK_NAME, IN, NOBODY = (TEMPLATE_0 + TEMPLATES + i for i in range(3))
COUNTRY_0 = NOBODY + 1
VOCABULARY = COUNTRY_0 + COUNTRIES

CLAIM = Claim(
    paper="P077",
    text=(
        "Correct, confident predictions come in kinds that accuracy cannot tell apart, and checks of shortcuts and of "
        "the dependence on parts of the subject recover the kind that was planted."
    ),
    setup=(
        "40 first names, 32 surnames (24 ethnic, 3 per country; 8 neutral), 8 countries, 6 equivalent templates. 200 "
        "memorised pairs have a country that is independent of the name; of the others 400 are held out, the rest have "
        "the surname's country with probability .95, and any if it is neutral, drawn anew each time. 5 % of the rows "
        "ask about a surname alone and 5 % have no subject. A pre-norm transformer of 3 layers, width 64 and 4 heads "
        "reads [first, surname, template, in] and predicts the country: 1200 AdamW steps of 256 rows, learning rate "
        "2e-3. Sets: memorised pairs whose country is not the surname's (recall), held-out ethnic pairs (heuristic), "
        "held-out neutral pairs (guess). Dependence: 20 swaps of a part; name flag: the answer is the first choice "
        "after the surname alone; total effect: p(a) less its mean over 10 corruptions of the subject's embeddings "
        "(3 standard deviations). Means over pairs and templates."
    ),
    checks=(
        Check(
            "recall needs the first name",
            "dependence on the first name: recall >= 2 x heuristic, in every seed",
            lambda m: m["recall: dependence on first"] >= 2 * m["heuristic: dependence on first"],
            ("recall: dependence on first", "heuristic: dependence on first"),
        ),
        Check(
            "both need the surname",
            "dependence on the surname: recall and heuristic less than 1 nat apart, in every seed",
            lambda m: abs(m["recall: dependence on surname"] - m["heuristic: dependence on surname"]) < 1,
            ("recall: dependence on surname", "heuristic: dependence on surname"),
        ),
        Check(
            "the surname alone gives the heuristic's answer",
            "name flag < .15 for recall and > .8 for heuristic, in every seed",
            lambda m: m["recall: name flag"] < 0.15 and m["heuristic: name flag"] > 0.8,
            ("recall: name flag", "heuristic: name flag"),
        ),
        Check(
            "guesses depend on nothing much",
            "total effect of guess < .2, in every seed",
            lambda m: m["guess: total effect"] < 0.2,
            ("guess: total effect", "recall: total effect", "heuristic: total effect"),
        ),
        Check(
            "likelihoods alone recover the kinds",
            "confidence and specificity (thresholds .5) give at least .7 of each set its kind, in every seed",
            lambda m: min(m[f"{kind}: recovered"] for kind in KINDS) >= 0.7,
            tuple(f"{kind}: recovered" for kind in KINDS),
            main=False,
        ),
        Check(
            "guesses are consistent too",
            "all six templates agree for more than half of the guesses, in every seed",
            lambda m: m["guess: six templates agree"] > 0.5,
            ("guess: six templates agree",),
            main=False,
        ),
    ),
    seeds=3,
)


@dataclass
class World:
    """Who is from where.

    Args:
        memorised: (200, 3) first name, surname, country.
        held_out: (400, 2) first name, surname.
        rest: (R, 2) likewise.
        generator: of the random numbers.
    """

    memorised: Tensor
    held_out: Tensor
    rest: Tensor
    generator: torch.Generator

    @classmethod
    def drawn(cls, generator: torch.Generator) -> World:
        """A world by chance."""
        pairs = torch.cartesian_prod(torch.arange(FIRST), torch.arange(SURNAMES))
        pairs = pairs[torch.randperm(len(pairs), generator=generator)]
        country = torch.randint(COUNTRIES, (MEMORISED, 1), generator=generator)
        cut = MEMORISED + HELD_OUT
        return cls(torch.cat([pairs[:MEMORISED], country], 1), pairs[MEMORISED:cut], pairs[cut:], generator)

    def rows(self) -> Tensor:
        """(BATCH, 5) training rows."""

        def draw(high: int) -> Tensor:
            return torch.randint(high, (BATCH,), generator=self.generator)

        which = draw(MEMORISED + len(self.rest))
        pairs = torch.cat([self.memorised[:, :2], self.rest])[which]
        first, surname = pairs.unbind(1)
        by_name = torch.rand(BATCH, generator=self.generator) < OWN
        anywhere = draw(COUNTRIES)
        country = torch.where((surname < ETHNIC) & by_name, surname // PER_COUNTRY, anywhere)
        known = which < MEMORISED
        country[known] = self.memorised[which[known], 2]
        template = TEMPLATE_0 + draw(TEMPLATES)
        out = torch.stack([first, SURNAME_0 + surname, template, torch.full_like(first, IN), COUNTRY_0 + country], 1)
        chance = torch.rand(BATCH, generator=self.generator)
        named, bare = chance < NAME_PROMPTS, (chance >= NAME_PROMPTS) & (chance < NAME_PROMPTS + BARE_PROMPTS)
        own = torch.where(surname < ETHNIC, surname // PER_COUNTRY, anywhere)
        out[named, 0], out[named, 2], out[named, 4] = NOBODY, ASK_NAME, COUNTRY_0 + own[named]
        out[bare, 0], out[bare, 1], out[bare, 4] = NOBODY, NOBODY, COUNTRY_0 + anywhere[bare]
        return out

    def sets(self) -> dict[str, Tensor]:
        """(N, 2) pairs of each kind."""
        first, surname, country = self.memorised.unbind(1)
        odd = (surname < ETHNIC) & (country != surname // PER_COUNTRY)
        ethnic = self.held_out[:, 1] < ETHNIC
        pairs = torch.stack([first, surname], 1)[odd]
        return {"recall": pairs, "heuristic": self.held_out[ethnic], "guess": self.held_out[~ethnic]}


class Corruptible(TransformerLM):
    """The model, with noise on the embeddings of the subject."""

    noise: Tensor | None = None  # (B, 2, D)

    def states(self, ids: Tensor) -> Tensor:
        """The last layer's states, normalised; column t predicts ids[:, t]."""
        hidden = self.embedding(self.shifted(ids)) + self.positions[: ids.shape[1]]
        if self.noise is not None:
            hidden = torch.cat([hidden[:, :1], hidden[:, 1:3] + self.noise, hidden[:, 3:]], 1)
        later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        for block in self.blocks:
            hidden = block(hidden, src_mask=later)
        return self.norm(hidden)

    @torch.no_grad()
    def countries(self, prompts: Tensor) -> Tensor:
        """(N, 8) log-probabilities of the countries after (N, 4) prompts, among countries."""
        blank = torch.zeros(len(prompts), 1, dtype=torch.long)
        return self.conditionals(torch.cat([prompts, blank], 1))[:, -1, COUNTRY_0:].log_softmax(-1)


def learn(world: World) -> Corruptible:
    model = Corruptible(VOCABULARY, WIDTH, length=5, layers=LAYERS, heads=HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    for _ in range(STEPS):
        loss = objective(model.log_prob(world.rows(), start=4)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def prompts(pairs: Tensor, templates: Tensor) -> Tensor:
    """(N, 4) prompts of pairs and templates (N,)."""
    return torch.stack(
        [pairs[:, 0], SURNAME_0 + pairs[:, 1], TEMPLATE_0 + templates, torch.full_like(templates, IN)], 1
    )


def labelled(values: Tensor) -> LogLikelihood:
    return LogLikelihood(values.flatten(), Kind.EXACT, Unit.TOKEN, torch.ones(values.numel(), dtype=torch.long))


def examine(
    model: Corruptible, pairs: Tensor, generator: torch.Generator
) -> tuple[dict[str, float], tuple[Scenario, ...]]:
    """What is measured of one set, and the kinds that likelihoods alone give."""
    n = len(pairs)
    every = pairs.repeat_interleave(TEMPLATES, 0)
    templates = torch.arange(TEMPLATES).repeat(n)
    table = model.countries(prompts(every, templates))
    value, answer = table.max(1)
    own = labelled(value)
    dependence = {}
    for name, parts in (("first", (0,)), ("surname", (1,)), ("both", (0, 1))):
        swapped = every.repeat_interleave(SWAPS, 0)
        for part in parts:
            high = (FIRST, SURNAMES)[part]
            # Any name but its own.
            step = torch.randint(1, high, (len(swapped),), generator=generator)
            swapped[:, part] = (swapped[:, part] + step) % high
        others = model.countries(prompts(swapped, templates.repeat_interleave(SWAPS)))
        kept = others.gather(1, answer.repeat_interleave(SWAPS)[:, None])
        dependence[name] = swap_dependence(own, labelled(kept)).value
    parts = torch.stack([dependence["first"], dependence["surname"]], 1)
    alone = torch.full_like(prompts(every, templates), NOBODY)
    alone[:, 1], alone[:, 2], alone[:, 3] = SURNAME_0 + every[:, 1], ASK_NAME, IN
    flagged = model.countries(alone).argmax(1) == answer
    spread = NOISE * float(model.embedding.weight[:TEMPLATE_0].std())
    low = torch.zeros(len(every))
    for _ in range(DRAWS):
        model.noise = spread * torch.randn(len(every), 2, WIDTH, generator=generator)
        low += model.countries(prompts(every, templates)).exp().gather(1, answer[:, None])[:, 0] / DRAWS
    model.noise = None
    consistency = template_consistency(table.reshape(n, TEMPLATES, COUNTRIES))
    values = {
        "p(a)": float(value.exp().mean()),
        "name flag": float(flagged.double().mean()),
        **{f"dependence on {name}": float(d.mean()) for name, d in dependence.items()},
        "specificity": float(name_specificity(parts).mean()),
        "total effect": float((value.exp() - low).mean()),
        "six templates agree": float((consistency.agreement == 1).double().mean()),
    }
    return values, likelihood_scenarios(own, parts)


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    world = World.drawn(generator)
    model = learn(world)
    values: dict[str, float] = {}
    for kind, pairs in world.sets().items():
        found, labels = examine(model, pairs, generator)
        values |= {f"{kind}: {name}": value for name, value in found.items()}
        values[f"{kind}: recovered"] = sum(label is KINDS[kind] for label in labels) / len(labels)
        values[f"{kind}: pairs"] = float(len(pairs))
    first, surname, country = world.memorised.unbind(1)
    table = model.countries(prompts(torch.stack([first, surname], 1), torch.zeros_like(first)))
    values["memorised pairs that are right"] = float((table.argmax(1) == country).double().mean())
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    names = ("dependence on first", "dependence on surname", "dependence on both")
    for number, kind in enumerate(KINDS):
        for at, name in enumerate(names):
            points = report.per_seed(f"{kind}: {name}")
            left.plot([at + 0.15 * (number - 1)] * len(points), points, "o", color=f"C{number}", alpha=0.7,
                      label=None if at else kind)  # fmt: skip
        for at, name in enumerate(("p(a)", "name flag", "total effect", "six templates agree", "recovered")):
            points = report.per_seed(f"{kind}: {name}")
            right.plot([at + 0.15 * (number - 1)] * len(points), points, "o", color=f"C{number}", alpha=0.7)
    left.set_xticks(range(3), ["first name", "surname", "both"])
    left.set(title="loss of the answer by swaps (a point per seed)", ylabel="nats")
    left.legend(fontsize=7)
    right.set_xticks(range(5), ["p(a)", "name flag", "total effect", "templates\nagree", "recovered"], fontsize=7)
    right.set(title="shares and probabilities", ylim=(-0.05, 1.05))


def notes(report: Report) -> list[str]:
    return [
        "Guesses are the same under all six templates in "
        f"{report.range('guess: six templates agree', '.2f')} of the cases: consistency alone does not mark them, p(a) "
        f"({report.range('guess: p(a)', '.2f')}) does.",
        "That recall sits in the middle layers at the subject is not looked at: three layers are too few to tell.",
        f"Memorised pairs are right in {report.range('memorised pairs that are right', '.2f')}.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
