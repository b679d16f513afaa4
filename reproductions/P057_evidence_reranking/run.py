"""P057: a reader that always finds an answer is corrected by asking in several directions (2203.05115)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import Check, Claim, Measured, Report, reproduce
from matplotlib.figure import Figure
from torch import Tensor
from worlds.enumerable import TransformerLM

from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.objectives.supervised import MaximumLikelihood
from loglik.signals.evidence import noisy_channel, rag_marginal, retrieval_log_probs
from loglik.signals.thinksum import fit_weights, product_of_experts

ENTITIES, RELATIONS, VALUES, FACTS, RETRIEVED = 200, 6, 50, 3, 10
GOLD, SAME_ENTITY = 2, 4  # of the retrieved paragraphs; the others share the relation
FIRST_RELATION, FIRST_VALUE = ENTITIES, ENTITIES + RELATIONS
DIRECT, QUESTION_OF, ANSWER_OF, QUESTION, CLOSED, UNKNOWN = range(
    FIRST_VALUE + VALUES, FIRST_VALUE + VALUES + 6
)  # what the row asks for, and "no answer"
VOCABULARY, LENGTH = UNKNOWN + 1, 1 + 3 * FACTS + 3
WIDTH, STEPS, BATCH, LR = 64, 700, 128, 3e-3
TESTED, VALIDATED = 500, 200
FACTORS = ("retrieval", "direct", "question", "answer")

CLAIM = Claim(
    paper="P057",
    text=(
        "Reranking answers over several paragraphs by a product of probabilities in several directions beats the "
        "single best paragraph and the direct probability, when the reader is over-confident on irrelevant evidence."
    ),
    setup=(
        "200 entities, 6 relations, 50 values; a paragraph is 3 facts, a question an entity and a relation. For each "
        "question 10 paragraphs: 2 hold the fact, 4 the entity with other relations, 4 the relation with other "
        "entities; their similarity is the number of question words in them by inverse document frequency. A "
        "transformer (2 layers, width 64, 4 heads) learns answers, questions given answers, answers alone and "
        "questions alone, each given evidence that holds the fact, by a tag in front: 700 AdamW steps of 128, "
        "learning rate 3e-3 decayed to 0. Candidates are its likeliest value for each paragraph. 500 questions; "
        "weights fitted on 200 others. Ablation: the reader also learns to say that the evidence has no answer."
    ),
    checks=(
        Check(
            "more paragraphs help",
            "exact match of the product of experts (unit weights, 10 paragraphs) > that of the top paragraph alone, in "
            "every seed",
            lambda m: m["product"] > m["top paragraph"],
            ("product", "top paragraph"),
        ),
        Check(
            "several directions beat one",
            "product of experts >= direct + 5 points, in every seed",
            lambda m: m["product"] >= m["direct"] + 0.05,
            ("product", "direct"),
        ),
        Check(
            "not needed where the reader can say no",
            "in the ablation the product of experts is within 5 points of direct, in every seed",
            lambda m: abs(m["with no answer: product"] - m["with no answer: direct"]) <= 0.05,
            ("with no answer: product", "with no answer: direct"),
            main=False,
        ),
    ),
    seeds=5,
)


@dataclass(frozen=True)
class World:
    """The value of each entity and relation, (ENTITIES, RELATIONS)."""

    values: Tensor

    def facts(self, entity: Tensor, relation: Tensor) -> Tensor:
        """(..., 3) tokens."""
        return torch.stack([entity, FIRST_RELATION + relation, FIRST_VALUE + self.values[entity, relation]], -1)

    def paragraphs(self, entity: Tensor, relation: Tensor, kind: str, generator: torch.Generator) -> Tensor:
        """(B, 3 FACTS) that hold the fact, the entity or the relation of each question."""
        count = len(entity)
        entities = torch.randint(ENTITIES, (count, FACTS), generator=generator)
        relations = torch.randint(RELATIONS, (count, FACTS), generator=generator)
        first = torch.arange(FACTS) == 0
        if kind in ("gold", "entity"):
            entities = torch.where(first, entity[:, None], entities)
        if kind in ("gold", "relation"):
            relations = torch.where(first, relation[:, None], relations)
        # No other fact may answer the question: move its relation on.
        clash = (entities == entity[:, None]) & (relations == relation[:, None])
        clash &= ~first if kind == "gold" else torch.ones_like(clash)
        relations = torch.where(clash, (relations + 1) % RELATIONS, relations)
        order = torch.rand(count, FACTS, generator=generator).argsort(1)
        facts = self.facts(entities, relations)
        return facts.gather(1, order[..., None].expand(-1, -1, 3)).flatten(1)


def rows(tag: int, evidence: Tensor, *asked: Tensor) -> Tensor:
    """(B, LENGTH): the tag, the evidence, what follows; padded by the tag."""
    count = len(evidence)
    parts = [torch.full((count, 1), tag), evidence, *(a[:, None] for a in asked)]
    row = torch.cat(parts, 1)
    return torch.cat([row, torch.full((count, LENGTH - row.shape[1]), tag)], 1)


def train(world: World, seed: int, *, refuses: bool) -> TransformerLM:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = TransformerLM(VOCABULARY, WIDTH, length=LENGTH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    objective = MaximumLikelihood()
    begin = 1 + 3 * FACTS
    for _ in range(STEPS):
        entity = torch.randint(ENTITIES, (BATCH,), generator=generator)
        relation = torch.randint(RELATIONS, (BATCH,), generator=generator)
        evidence = world.paragraphs(entity, relation, "gold", generator)
        asked, value = FIRST_RELATION + relation, FIRST_VALUE + world.values[entity, relation]
        parts = [
            (rows(DIRECT, evidence, entity, asked, value), begin + 2, begin + 3),
            (rows(QUESTION_OF, evidence, value, entity, asked), begin + 1, begin + 3),
            (rows(ANSWER_OF, evidence, value), begin, begin + 1),
            (rows(QUESTION, evidence, entity, asked), begin, begin + 2),
            (rows(CLOSED, evidence[:, :0], entity, asked, value), 3, 4),
        ]
        if refuses:
            kind = "entity" if torch.rand((), generator=generator) < 0.5 else "relation"
            other = world.paragraphs(entity, relation, kind, generator)
            nothing = torch.full((BATCH,), UNKNOWN)
            parts.append((rows(DIRECT, other, entity, asked, nothing), begin + 2, begin + 3))
        ids = torch.cat([ids for ids, _, _ in parts])
        columns = torch.arange(LENGTH)
        scored = torch.cat([((columns >= i) & (columns < j)).expand(BATCH, -1) for _, i, j in parts])
        terms = network.conditionals(ids).gather(-1, ids[..., None])[..., 0]
        loss = objective(LogLikelihood.from_per_unit(terms, scored)).mean() * len(parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.requires_grad_(False).eval()


def span(network: TransformerLM, ids: Tensor, start: int, stop: int) -> LogLikelihood:
    """Log-likelihood of the tokens in these columns given all before them."""
    found = network.log_prob(ids[:, :stop], start=start)
    assert found.per_unit is not None
    return found


def bare(values: Tensor) -> LogLikelihood:
    return LogLikelihood(values, Kind.EXACT, Unit.TOKEN, torch.ones(len(values), dtype=torch.long))


def retrieved(world: World, entity: Tensor, relation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, RETRIEVED, 3 FACTS) paragraphs and (B, RETRIEVED) their similarities to the question."""
    kinds = ["gold"] * GOLD + ["entity"] * SAME_ENTITY + ["relation"] * (RETRIEVED - GOLD - SAME_ENTITY)
    found = torch.stack([world.paragraphs(entity, relation, kind, generator) for kind in kinds], 1)
    idf = np.log(ENTITIES / FACTS), np.log(RELATIONS / FACTS + 1)
    similarity = idf[0] * (found == entity[:, None, None]).any(-1).double()
    similarity += idf[1] * (found == FIRST_RELATION + relation[:, None, None]).any(-1).double()
    # Equal similarities would leave the order of construction: real retrievers are noisy.
    return found, similarity + 0.3 * torch.rand(similarity.shape, generator=generator).double()


def candidates(network: TransformerLM, entity: Tensor, relation: Tensor, evidence: Tensor) -> dict[str, Tensor]:
    """The likeliest value for each paragraph (B, n), and its log-factors."""
    count, n = evidence.shape[:2]
    paragraph = evidence.flatten(0, 1)
    e, r = entity.repeat_interleave(n), FIRST_RELATION + relation.repeat_interleave(n)
    begin = 1 + 3 * FACTS
    asked = rows(DIRECT, paragraph, e, r)
    log_p = network.conditionals(asked)[:, begin + 2, FIRST_VALUE : FIRST_VALUE + VALUES]
    direct, value = log_p.max(1)
    token = FIRST_VALUE + value
    found = {
        "value": value,
        "direct": direct,
        "question": span(network, rows(QUESTION_OF, paragraph, token, e, r), begin + 1, begin + 3).value,
        "answer": span(network, rows(ANSWER_OF, paragraph, token), begin, begin + 1).value,
        "evidence": span(network, rows(QUESTION, paragraph, e, r), begin, begin + 2).value,
    }
    return {name: tensor.reshape(count, n) for name, tensor in found.items()}


def exact_match(scores: Tensor, values: Tensor, truth: Tensor) -> float:
    """Share of questions whose best pair has the right value."""
    best = values.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    return (best == truth).double().mean().item()


def evaluate(world: World, network: TransformerLM, generator: torch.Generator) -> dict[str, float]:
    def asked(count: int) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        entity = torch.randint(ENTITIES, (count,), generator=generator)
        relation = torch.randint(RELATIONS, (count,), generator=generator)
        evidence, similarity = retrieved(world, entity, relation, generator)
        found = candidates(network, entity, relation, evidence)
        found["retrieval"] = torch.stack([retrieval_log_probs(row) for row in similarity])
        closed = rows(CLOSED, evidence[:, 0, :0], entity, FIRST_RELATION + relation)
        guess = network.conditionals(closed)[:, 3, FIRST_VALUE : FIRST_VALUE + VALUES].argmax(1)
        return found, similarity, world.values[entity, relation], guess

    validation, _, answers, _ = asked(VALIDATED)
    gold = validation["value"] == answers[:, None]
    usable = gold.any(1)
    table = torch.stack([validation[name][usable].flatten().double() for name in FACTORS], 1)
    question = torch.arange(int(usable.sum())).repeat_interleave(RETRIEVED)
    weights = dict(zip(FACTORS, fit_weights(table, question, gold[usable].flatten()).tolist(), strict=True))

    found, similarity, truth, guess = asked(TESTED)
    shape, values = found["value"].shape, found["value"]
    factors = {name: bare(found[name].flatten().double()) for name in FACTORS}
    channel = noisy_channel(factors["question"], factors["answer"], bare(found["evidence"].flatten().double()))
    rag = []
    for row in range(TESTED):
        direct = bare(found["direct"][row].double())
        texts = [str(v) for v in values[row].tolist()]
        best = rag_marginal(direct, found["retrieval"][row], torch.arange(RETRIEVED), texts).answers[0]
        rag.append(int(best) == int(truth[row]))
    return {
        "top paragraph": exact_match(similarity, values, truth),
        "direct": exact_match(found["direct"], values, truth),
        "RAG": float(np.mean(rag)),
        "channel": exact_match(channel.value.reshape(shape), values, truth),
        "product": exact_match(product_of_experts(factors).value.reshape(shape), values, truth),
        "product, fitted": exact_match(product_of_experts(factors, weights).value.reshape(shape), values, truth),
        "closed book": (guess == truth).double().mean().item(),
        "gold paragraph": (values[:, :GOLD] == truth[:, None]).double().mean().item(),
        "confidence on gold": found["direct"][:, :GOLD].exp().mean().item(),
        "confidence elsewhere": found["direct"][:, GOLD:].exp().mean().item(),
    } | {f"weight of {name}": weight for name, weight in weights.items()}


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    world = World(torch.randint(VALUES, (ENTITIES, RELATIONS), generator=generator))
    values: dict[str, float] = {}
    for prefix, refuses in (("", False), ("with no answer: ", True)):
        network = train(world, seed, refuses=refuses)
        found = evaluate(world, network, torch.Generator().manual_seed(seed + 1_000_000))
        values |= {prefix + name: value for name, value in found.items()}
    return Measured(values)


def plot(figure: Figure, report: Report) -> None:
    names = ("closed book", "top paragraph", "direct", "RAG", "channel", "product", "product, fitted")
    for axis, prefix in zip(figure.subplots(1, 2, sharey=True), ("", "with no answer: "), strict=True):
        for place, name in enumerate(names):
            axis.plot([place] * len(report.seeds), report.per_seed(prefix + name), "o", ms=4)
        axis.set_xticks(range(len(names)), [n.replace(", ", "\n").replace(" ", "\n") for n in names], fontsize=7)
        axis.set(title=prefix.rstrip(": ") or "always an answer", ylabel="exact match", ylim=(0, 1.02))


def notes(report: Report) -> list[str]:
    return [
        f"Given the right paragraph the reader is right in {report.range('gold paragraph', '.2f')}; its answer has "
        f"probability {report.mean('confidence on gold'):.2f} there and {report.mean('confidence elsewhere'):.2f} on "
        "other paragraphs.",
        f"Fitted weights reach {report.range('product, fitted', '.2f')}, the channel alone "
        f"{report.range('channel', '.2f')}, RAG {report.range('RAG', '.2f')}.",
        f"Closed book the model is right in {report.range('closed book', '.2f')}: the 1200 facts of this world can be "
        "learned by heart, so the comparison is between ways of using evidence, not with and without it.",
        f"Where the reader has learned to say that there is no answer, direct reaches "
        f"{report.range('with no answer: direct', '.2f')} and the product "
        f"{report.range('with no answer: product', '.2f')}.",
    ]


def main(seeds: int | None = None) -> str:
    return reproduce(CLAIM, measure, folder=Path(__file__).parent, plot=plot, notes=notes, seeds=seeds)
