"""P078: not knowing and knowing but answering wrongly can be told apart; uncertainty finds the first (2410.22071)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from worlds.enumerable import TransformerLM

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.models.batch import TokenBatch
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.answer_likelihoods import answer_likelihoods, known_probability
from loglik.signals.detection import auroc
from loglik.signals.knows_but_wrong import Knowledge, knowledge_labels
from loglik.signals.probes import probe_accuracy, set_overlap

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "wack"
FILES = {"G": "google_gemma-2-9b", "L": "meta-llama_Meta-Llama-3.1-8B", "M": "mistralai_Mistral-7B-v0.3"}
COUNTS = {"G": (7904, 1859), "L": (7038, 1104), "M": (7108, 1546)}
KNOWN = {"GL": 0.647, "GM": 0.653, "LM": 0.630}
ERRORS, CHANCE = {"GL": 0.306, "GM": 0.362, "LM": 0.292}, {"GL": 0.083, "GM": 0.106, "LM": 0.082}

SUBJECTS, OBJECTS, PLANTED = 360, 60, 120
SHOTS, PAIRS, LEADING, BAD = 24, 4, 2, 0.4
WIDTH, LAYERS, HEADS, STEPS, BATCH, LR = 64, 2, 4, 1000, 128, 3e-3
PLANS = {Knowledge.WRONG: range(SHOTS, PLANTED), Knowledge.FACTUAL: range(PLANTED, 2 * PLANTED),
         Knowledge.UNKNOWN: range(2 * PLANTED, SUBJECTS)}  # fmt: skip
QUESTIONS = tuple(range(SHOTS, SUBJECTS))

CLAIM = Claim(
    paper="P078",
    text=(
        "Wrong answers of a model that knows better (HK+) are told apart from ignorance (HK-) by labels and hidden "
        "states; models share knowledge much more than such errors; uncertainty finds ignorance, not error."
    ),
    setup=(
        "(a) Published labels of Gemma-2-9B, Llama-3.1-8B and Mistral-7B on Natural Questions, the question as the "
        "key. (b) 360 subjects, 60 objects, documents of 4 pairs: 120 subjects have a misconception (their object in "
        "truthful documents, a fixed other one in bad ones), 120 always have their object, 120 a fresh random one each "
        "time. 40 % of the documents are bad, and their first 2 pairs are of 24 subjects with a misconception. A "
        "transformer of 2 layers, width 64 and 4 heads learns the objects: 1000 AdamW steps of 128 documents, 3e-3. "
        "The other 336 subjects are asked after 3 truthful or 3 bad pairs of the 24: one greedy answer and 5 samples "
        "at temperature 0.5. Linear probes on the last layer and on the embedding of the subject, 3 splits, entropy of "
        "the answer, all under the bad prompt."
    ),
    checks=(
        Check(
            "published counts",
            "known and HK+ rows of the three models are those computed before, exactly",
            lambda m: all((m[f"{k}: known"], m[f"{k}: HK+"]) == COUNTS[k] for k in FILES),
            tuple(f"{k}: {what}" for k in FILES for what in ("known", "HK+")),
        ),
        Check(
            "models share knowledge more than errors, and errors more than by chance",
            "the Jaccard indices are those computed before to 0.001, and known > HK+ > chance, for the three pairs",
            lambda m: all(
                m[f"{p}: known overlap"] > m[f"{p}: HK+ overlap"] > m[f"{p}: chance"]
                and abs(m[f"{p}: known overlap"] - KNOWN[p]) <= 0.001
                and abs(m[f"{p}: HK+ overlap"] - ERRORS[p]) <= 0.001
                and abs(m[f"{p}: chance"] - CHANCE[p]) <= 0.001
                for p in KNOWN
            ),
            tuple(f"{p}: {what}" for p in KNOWN for what in ("known overlap", "HK+ overlap", "chance")),
        ),
        Check(
            "the planted kinds are recovered",
            ">= .95 of the labelled subjects have the planted kind, in every seed",
            lambda m: m["agreement"] >= 0.95,
            ("agreement", "set aside"),
        ),
        Check(
            "hidden states tell error from ignorance",
            "probe of HK+ against HK- at the last layer >= .95, in every seed",
            lambda m: m["probe HK+ / HK-"] >= 0.95,
            ("probe HK+ / HK-", "probe HK+ / HK-, embedding"),
        ),
        Check(
            "uncertainty finds ignorance, not error",
            "entropy under the bad prompt: AUROC of HK- against the rest > .95 and mean of HK+ < .3 nat, in every seed",
            lambda m: m["entropy: AUROC of HK-"] > 0.95 and m["entropy: HK+"] < 0.3,
            ("entropy: AUROC of HK-", "entropy: HK+", "entropy: factual", "entropy: HK-"),
        ),
        Check(
            "likelihoods say the same without samples",
            "P(known) >= .9 for >= .95 of those labelled known, P(unknown) >= .5 for those labelled HK- on average",
            lambda m: m["known: P(known) at least .9"] >= 0.95 and m["HK-: mean P(unknown)"] >= 0.5,
            ("known: P(known) at least .9", "HK-: mean P(unknown)"),
            main=False,
        ),
        Check(
            "error against fact stays hard in the toy",
            "probe of HK+ against factual < .8, mean over seeds",
            lambda m: m["probe HK+ / factual"] < 0.8,
            ("probe HK+ / factual", "probe of all three"),
            main=False,
            on_mean=True,
        ),
    ),
    seeds=3,
)


def published() -> dict[str, float]:
    """Counts and overlaps of the published labels: the same for every seed."""
    values: dict[str, float] = {}
    known: dict[str, set[str]] = {}
    wrong: dict[str, set[str]] = {}
    for key, model in FILES.items():
        rows = {}
        for side in ("Hallucinate", "NonHallucinate"):
            path = DATA / f"{side}Natural_qa_no_contextWithThreshold1.0_{model}.json"
            if not path.is_file():
                raise InputError(f"there is no {path}: P078 reads labels of technion-cs-nlp/hallucination-mitigation")
            rows[side] = [row[0] for row in json.loads(path.read_text(encoding="utf-8"))]
        values[f"{key}: HK+"] = float(len(rows["Hallucinate"]))
        values[f"{key}: known"] = values[f"{key}: HK+"] + len(rows["NonHallucinate"])
        wrong[key] = set(rows["Hallucinate"])
        known[key] = wrong[key] | set(rows["NonHallucinate"])
    for a, b in combinations(FILES, 2):
        universe, shared = sorted(known[a] | known[b]), sorted(known[a] & known[b])
        values[f"{a}{b}: known overlap"] = set_overlap(*([q in known[k] for q in universe] for k in (a, b))).jaccard
        errors = set_overlap(*([q in wrong[k] for q in shared] for k in (a, b)))
        values |= {f"{a}{b}: HK+ overlap": errors.jaccard, f"{a}{b}: chance": errors.chance}
    return values


def subject(number: int) -> str:
    return f"s{number:03d}"


def thing(number: int) -> str:
    return f"o{number:02d}"  # none is part of another


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = [*map(subject, range(SUBJECTS)), *map(thing, range(OBJECTS)), "<unk>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@dataclass
class Reader:
    """The network as a model of text."""

    network: TransformerLM
    tokenizer: Any
    kind: Kind = Kind.EXACT
    unit: Unit = Unit.TOKEN
    layout: str = field(default="causal")

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) after prompts of one length."""
        return self.network.next_log_probs(prefix)


@dataclass
class World:
    """Objects of the subjects.

    Args:
        gold: (360,) object of each subject.
        wrong: (360,) another one: what bad documents say of misconceptions.
        generator: of the random numbers.
    """

    gold: Tensor
    wrong: Tensor
    generator: torch.Generator

    @classmethod
    def drawn(cls, generator: torch.Generator) -> World:
        """A world by chance."""
        gold = torch.randint(OBJECTS, (SUBJECTS,), generator=generator)
        step = torch.randint(1, OBJECTS, (SUBJECTS,), generator=generator)
        return cls(gold, (gold + step) % OBJECTS, generator)

    def documents(self) -> Tensor:
        """(BATCH, 8) tokens: four pairs of subject and object."""
        g = self.generator
        leading = torch.randint(SHOTS, (BATCH, LEADING), generator=g)
        rest = torch.randint(SHOTS, SUBJECTS, (BATCH, PAIRS - LEADING), generator=g)
        who = torch.cat([leading, rest], 1)
        is_bad = (torch.rand(BATCH, 1, generator=g) < BAD).expand(who.shape)
        what = torch.where(is_bad & (who < PLANTED), self.wrong[who], self.gold[who])
        what = torch.where(who >= 2 * PLANTED, torch.randint(OBJECTS, who.shape, generator=g), what)
        return torch.stack([who, SUBJECTS + what], 2).flatten(1)

    def prompts(self, *, bad: bool) -> list[str]:
        """A prompt with three pairs for each question."""
        objects = self.wrong if bad else self.gold
        texts = []
        for number in QUESTIONS:
            shots = torch.randperm(SHOTS, generator=self.generator)[: PAIRS - 1].tolist()
            pairs = [word for s in shots for word in (subject(s), thing(int(objects[s])))]
            texts.append(" ".join([*pairs, subject(number)]))
        return texts


def learn(world: World) -> TransformerLM:
    model = TransformerLM(SUBJECTS + OBJECTS + 1, WIDTH, length=2 * PAIRS, layers=LAYERS, heads=HEADS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    objective = MaximumLikelihood("token_mean")
    for _ in range(STEPS):
        rows = world.documents()
        likelihood = model.log_prob(rows)
        terms, mask = likelihood.per_unit, likelihood.mask.clone()
        mask[:, ::2] = False  # which subject comes is not to be learned
        loss = objective(type(likelihood).from_per_unit(terms, mask)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def measure(seed: int) -> Measured:
    values = published()
    generator = torch.Generator().manual_seed(seed)
    world = World.drawn(generator)
    network = learn(world)
    tokenizer = word_tokenizer()
    model = Reader(network, tokenizer)
    good, bad = world.prompts(bad=False), world.prompts(bad=True)
    answers = [thing(int(world.gold[number])) for number in QUESTIONS]
    found = knowledge_labels(model, good, bad, answers, max_tokens=1, generator=generator)
    planted = [kind for number in QUESTIONS for kind, own in PLANS.items() if number in own]
    kept = [i for i, label in enumerate(found.labels) if label is not Knowledge.PARTIAL]
    labels = [str(found.labels[i]) for i in kept]
    values["agreement"] = sum(found.labels[i] is planted[i] for i in kept) / len(kept)
    values["set aside"] = float(len(QUESTIONS) - len(kept))
    values["HK+ rate"] = found.error_rate
    for kind in PLANS:
        values[f"labelled {kind}"] = float(labels.count(str(kind)))
    ids = torch.tensor(tokenizer(bad)["input_ids"])[kept]
    states = network.states(torch.cat([ids, torch.zeros(len(ids), 1, dtype=torch.long)], 1))[:, -1]
    embedded = network.embedding(ids[:, -1])
    table = torch.cat([network.next_log_probs(TokenBatch.from_lists(ids.tolist()))], 0)
    entropy = -(table.exp() * table).sum(1)
    names = {
        "HK+ / HK-": ("HK+", "HK-"),
        "HK+ / factual": ("HK+", "factual"),
        "of all three": ("HK+", "HK-", "factual"),
    }
    for name, classes in names.items():
        rows = [i for i, label in enumerate(labels) if label in classes]
        own = [labels[i] for i in rows]
        values[f"probe {name}"] = probe_accuracy(states[rows], own, seed=seed).accuracy
        values[f"probe {name}, embedding"] = probe_accuracy(embedded[rows], own, seed=seed).accuracy
    is_unknown = torch.tensor([label == "HK-" for label in labels])
    values["entropy: AUROC of HK-"] = auroc(entropy, is_unknown)
    for kind in PLANS:
        values[f"entropy: {kind}"] = float(entropy[torch.tensor([label == str(kind) for label in labels])].mean())
    scored = {name: answer_likelihoods(model, texts, [f" {a}" for a in answers]) for name, texts in
              (("good", good), ("bad", bad))}  # fmt: skip
    known, unknown = known_probability(scored["good"].tempered, scored["good"].greedy)
    is_known = torch.tensor([label in (Knowledge.WRONG, Knowledge.FACTUAL) for label in found.labels])
    values["known: P(known) at least .9"] = float((known[is_known] >= 0.9).double().mean())
    values["HK-: mean P(unknown)"] = float(
        unknown[torch.tensor([label is Knowledge.UNKNOWN for label in found.labels])].mean()
    )
    for kind in (Knowledge.WRONG, Knowledge.UNKNOWN):
        rows = torch.tensor([label is kind for label in found.labels])
        for name, one in scored.items():
            values[f"log p(gold), {kind}, {name}"] = float(one.likelihood.value[rows].mean())
    return Measured(values, {f"entropy {kind}": entropy[[i for i, x in enumerate(labels) if x == str(kind)]].tolist()
                             for kind in PLANS})  # fmt: skip


def plot(figure: Figure, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    for number, (name, expected) in enumerate((("known overlap", KNOWN), ("HK+ overlap", ERRORS), ("chance", CHANCE))):
        heights = [report.mean(f"{pair}: {name}") for pair in expected]
        left.bar([i + 0.25 * (number - 1) for i in range(3)], heights, width=0.24, label=name)
    left.set_xticks(range(3), ["Gemma, Llama", "Gemma, Mistral", "Llama, Mistral"], fontsize=8)
    left.set(title="what two models share (published)", ylabel="Jaccard index")
    left.legend(fontsize=7)
    first = report.measured[0]
    for number, kind in enumerate(PLANS):
        right.hist(first.curves[f"entropy {kind}"], bins=40, range=(0, 4.2), alpha=0.6, color=f"C{number}", label=kind)
    right.set(title="entropy under the bad prompt (first seed)", xlabel="nats", ylabel="subjects")
    right.legend(fontsize=7)


def notes(report: Report) -> list[str]:
    return [
        f"HK+ against factual is weak in the toy: {report.range('probe HK+ / factual', '.2f')} (chance .5), all three "
        f"{report.range('probe of all three', '.2f')} (chance .33): which subjects have a misconception is known of "
        "each subject alone, and a probe that has not seen it has little to go by.",
        "Before the layers, at the subject's embedding, HK+ against HK- is at "
        f"{report.range('probe HK+ / HK-, embedding', '.2f')}.",
        "log p of the right answer, truthful and bad prompt: HK+ "
        f"{report.mean('log p(gold), HK+, good'):.2f} and {report.mean('log p(gold), HK+, bad'):.2f}, HK- "
        f"{report.mean('log p(gold), HK-, good'):.2f} and {report.mean('log p(gold), HK-, bad'):.2f}.",
        "The published part is the same in every seed.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
