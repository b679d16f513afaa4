"""Texts, tokenizer, model and rows of the scoring benchmark: five workloads that every peer is given as text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loglik.models.stdlib_text import stdlib_documents

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CONTEXT = 2048
VOCABULARIES = {"32k": 32_000, "128k": 128_000}
TITLES = {
    "a": "10-shot, 4 multi-token choices",
    "b": "5-shot, 4 single-token choices",
    "c": "zero-shot, 4 multi-token choices",
    "d": "unrelated pairs",
    "e": "rolling perplexity",
}
SHOT_TOKENS, QUESTION_TOKENS, ENDING_TOKENS = 834, 40, (14, 22)

Row = tuple[int, list[int], int]  # which pair, its tokens, first scored token (all behind it are scored)


@dataclass(frozen=True)
class Problem:
    """A question with its worked solution and short answer."""

    question: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """Where the texts come from, and the texts."""

    source: str
    problems: list[Problem]
    prose: str
    documents: list[str]


@dataclass(frozen=True)
class Workload:
    """Rows of text: `groups` says which of them belong to one question, an empty prompt means the whole text."""

    name: str
    pairs: list[tuple[str, str]]
    groups: list[int]

    def every(self, step: int) -> Workload:
        """The rows of every `step`-th question, whole questions only."""
        keep = [i for i, group in enumerate(self.groups) if group % step == 0]
        return self.take(keep)

    def take(self, keep: Sequence[int]) -> Workload:
        """The rows with these numbers."""
        return Workload(self.name, [self.pairs[i] for i in keep], [self.groups[i] for i in keep])

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From `dump`."""
        state = json.loads(text)
        return cls(state["name"], [(p, c) for p, c in state["pairs"]], state["groups"])


def corpus() -> Corpus:
    """GSM8K, WikiText-2 and Shakespeare where they lie beside the repository, else the standard library's sources."""
    if not DATA.is_dir():
        texts = [d.text.replace("\0", "") for d in stdlib_documents("train")][:400]
        words = [word for word in " ".join(texts).split() if len(word) <= 12]
        pieces = [words[i : i + 35] for i in range(0, min(len(words) - 35, 140_000), 35)]
        problems = [Problem(" ".join(p[:10]), " ".join(p[10:]), p[-1]) for p in pieces]
        return Corpus("sources of Python's standard library", problems, "\n".join(texts)[:2_000_000], texts)
    problems = []
    for line in (DATA / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        solution, _, answer = re.sub(r"<<.*?>>", "", record["answer"]).partition("\n#### ")
        problems.append(Problem(record["question"].strip(), solution.strip(), answer.strip()))
    wiki = (DATA / "wikitext2_test.txt").read_text(encoding="utf-8")
    documents = [part.strip() for part in re.split(r"(?m)^(?= = [^=\n]+ = $)", wiki) if part.strip()]
    valid = (DATA / "wikitext2_valid.txt").read_text(encoding="utf-8")
    plays = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    return Corpus("GSM8K, WikiText-2, Shakespeare", problems, valid + plays, documents)


def build_tokenizer(texts: Corpus, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus; BOS is never added by the tokenizer itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = (f"Question: {p.question}\nAnswer: {p.solution}\n" for p in texts.problems)
    backend.train_from_iterator((*texts.prose.splitlines(True), *texts.documents, *problems), trainer)
    return wrap(backend)


def wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=10**9,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """A Llama of 42M parameters at 32k (tied embedding), random but with predictions that differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model


def workloads(
    names: str, texts: Corpus, tokenizer: Any, *, questions: int, zero_shot: int, pairs: int, rolling: int
) -> Iterator[Workload]:
    """The named workloads; the same seed gives the same rows whichever are asked for."""
    makers = {
        "a": lambda: _choices(texts, tokenizer, questions),
        "b": lambda: _letters(texts, tokenizer, questions),
        "c": lambda: _zero_shot(texts, tokenizer, zero_shot),
        "d": lambda: _pairs(texts, tokenizer, pairs),
        "e": lambda: _rolling(texts, tokenizer, rolling),
    }
    for name in names:
        made = makers[name]()
        _check_boundaries(tokenizer, made)
        yield made


def token_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]], context: int = CONTEXT) -> list[Row]:
    """Tokens of each pair and where its scored tokens begin; a text longer than the context gives several rows.

    Those are disjoint windows: each starts with BOS and the token before its first scored one, and the last reaches
    back as far as the context allows.
    """
    whole = tokenizer([prompt + completion for prompt, completion in pairs])["input_ids"]
    heads = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    rows: list[Row] = []
    for index, (ids, head) in enumerate(zip(whole, heads, strict=True)):
        if head:
            rows.append((index, ids, len(head)))
            continue
        begin, end = 0, min(context, len(ids))
        while begin < len(ids):
            left = max(0, end - context)
            rows.append((index, [tokenizer.bos_token_id, *ids[left:end]], 1 + begin - left))
            begin, end = end, min(len(ids), end + context - 1)
    return rows


def _check_boundaries(tokenizer: Any, workload: Workload) -> None:
    """Joint tokens begin with the prompt's own, so that every peer cuts a row at the same token."""
    for prompt, completion in workload.pairs:
        if not _aligned(tokenizer, prompt, completion):
            raise AssertionError(f"workload {workload.name}: the boundary is inside a token: {completion!r}")


def _aligned(tokenizer: Any, prompt: str, completion: str) -> bool:
    whole, head = _ids(tokenizer, prompt + completion), _ids(tokenizer, prompt)
    return len(whole) > len(head) and whole[: len(head)] == head and prompt == prompt.rstrip()


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _count(tokenizer: Any, text: str) -> int:
    return len(_ids(tokenizer, text))


def _trim(tokenizer: Any, text: str, most: int) -> str:
    """The first words of `text` that fit into `most` tokens."""
    kept = ""
    for word in text.split():
        if _count(tokenizer, f"{kept} {word}") > most:
            break
        kept = f"{kept} {word}"
    return kept


def _choices(texts: Corpus, tokenizer: Any, questions: int) -> Workload:
    """One few-shot prompt for all questions; endings are solutions of this and of three other problems."""
    rng = random.Random(1)
    half = len(texts.problems) // 2
    seen, unseen = texts.problems[:half], texts.problems[half:]
    asked = [p for p in unseen if _count(tokenizer, p.question) <= QUESTION_TOKENS][:questions]
    stems = [f"Question: {p.question}\nAnswer:" for p in asked]
    size = (SHOT_TOKENS - sum(_count(tokenizer, stem) for stem in stems) / len(stems)) / 10
    candidates = [f"Question: {p.question}\nAnswer: {p.solution}\n\n" for p in seen]
    shots = sorted(candidates, key=lambda shot: abs(_count(tokenizer, shot) - size))[:10]
    others = [p.solution for p in seen if _count(tokenizer, p.solution) >= ENDING_TOKENS[1]]
    pairs, groups = [], []
    for group, (stem, problem) in enumerate(zip(stems, asked, strict=True)):
        for solution in (problem.solution, *rng.sample(others, 3)):
            ending = _trim(tokenizer, solution, rng.randint(*ENDING_TOKENS))
            pairs.append(("".join(shots) + stem, ending))
            groups.append(group)
    return Workload("a", pairs, groups)


def _letters(texts: Corpus, tokenizer: Any, questions: int) -> Workload:
    """One 5-shot prompt; the choices stand in the question and a letter is scored."""
    rng = random.Random(2)
    short = [p for p in texts.problems if _count(tokenizer, p.question) <= 2 * QUESTION_TOKENS][: questions + 5]
    stems, answers = [], []
    for problem in short:
        options = [problem.answer, *(p.answer for p in rng.sample(texts.problems, 3))]
        rng.shuffle(options)
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        stems.append(f"Question: {problem.question}\n{listed}\nAnswer:")
        answers.append(" " + "ABCD"[options.index(problem.answer)])
    shots = "".join(f"{stem}{answer}\n\n" for stem, answer in zip(stems[:5], answers[:5], strict=True))
    pairs = [(shots + stem, f" {letter}") for stem in stems[5:] for letter in "ABCD"]
    return Workload("b", pairs, [i // 4 for i in range(len(pairs))])


class _Prose:
    """The prose with its tokens' character offsets, to cut passages of a known number of tokens."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.text = text
        self.offsets: list[tuple[int, int]] = tokenizer.backend_tokenizer.encode(text).offsets

    def starts_word(self, token: int) -> bool:
        """Whether the token is a space and the beginning of a word, right behind a word."""
        at = self.offsets[token][0]
        return at > 0 and re.match(r"\S \S", self.text[at - 1 : at + 2]) is not None

    def word_from(self, token: int) -> int:
        while not self.starts_word(token):
            token += 1
        return token

    def between(self, first: int, last: int) -> str:
        return self.text[self.offsets[first][0] : self.offsets[last][0]]


def _zero_shot(texts: Corpus, tokenizer: Any, questions: int) -> Workload:
    """Unrelated passages of about 100 tokens with the true next words and three other endings."""
    rng = random.Random(3)
    prose = _Prose(texts.prose, tokenizer)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < 4 * questions:
        begin = rng.randrange(len(prose.offsets) - 400)
        cut = prose.word_from(begin + 100)
        places = [cut, *(prose.word_from(rng.randrange(len(prose.offsets) - 400)) for _ in range(3))]
        context = prose.between(begin, cut)
        rows = [(context, prose.between(at, at + rng.randint(*ENDING_TOKENS))) for at in places]
        if all(_aligned(tokenizer, *row) for row in rows):
            pairs += rows
    return Workload("c", pairs, [i // 4 for i in range(len(pairs))])


def _pairs(texts: Corpus, tokenizer: Any, count: int) -> Workload:
    """Passages of 16 to 1,024 tokens (uniform), cut at a word somewhere between 30 and 80 % of their tokens."""
    rng = random.Random(4)
    prose = _Prose(texts.prose, tokenizer)
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        length = rng.randint(16, 1024)
        begin = rng.randrange(len(prose.offsets) - 2000)
        cut = prose.word_from(begin + int(length * rng.uniform(0.3, 0.8)))
        row = (prose.between(begin, cut), prose.between(cut, begin + length))
        good = cut < begin + 0.8 * length and row[1] and _aligned(tokenizer, *row)
        if good and 16 <= _count(tokenizer, "".join(row)) <= 1024:
            pairs.append(row)
    return Workload("d", pairs, list(range(count)))


def _rolling(texts: Corpus, tokenizer: Any, tokens: int) -> Workload:
    """Whole articles, in the file's order, until `tokens` are reached."""
    pairs: list[tuple[str, str]] = []
    total = 0
    for document in texts.documents:
        if total >= tokens:
            break
        total += _count(tokenizer, document)
        pairs.append(("", document))
    return Workload("e", pairs, list(range(len(pairs))))
