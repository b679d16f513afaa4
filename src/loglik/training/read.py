"""Data sets in the formats that trainers share, as rows of tokens.

=====================================  ====================================================
columns                                a row is
=====================================  ====================================================
``text``                               a text, all of it trained on
``messages``                           a conversation, all of it trained on
``prompt``, ``completion``             a completion of a prompt; ``label`` says whether it is desirable
``prompt``, ``chosen``, ``rejected``   a preference pair; without ``prompt`` it is what both begin with
``prompt``, ``completions``            several completions, with ``rewards`` (a number each)
=====================================  ====================================================

Texts of completions may come with weights for parts of them: ``chosen_spans`` and ``rejected_spans``, or
``completion_spans``, are lists of ``{"start": 0, "end": 5, "weight": 2.0}`` in characters of the completion.

Texts may be conversations: lists of messages with ``role`` and ``content``, written out by the chat template.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

from loglik.errors import InputError, RowError
from loglik.models.encode import TextEncoder
from loglik.models.protocol import TextModel
from loglik.training.data import Row
from loglik.training.records import training_records
from loglik.training.spans import SPAN_COLUMNS, token_weights

__all__ = ["TrainingData", "read_training_data"]


@dataclass(slots=True)
class TrainingData:
    """Rows that can be trained on, and what happened to the others.

    Args:
        rows: in the order of the source.
        skipped: the sentence for each row that was left out.
        truncated: names of rows whose prompt was cut on its left.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)


def read_training_data(
    source: str | Path | Iterable[Mapping[str, Any]],
    model: TextModel,
    *,
    max_length: int | None = None,
    overflow: Literal["error", "truncate"] = "error",
    on_error: Literal["stop", "skip"] = "stop",
    eos: bool = True,
) -> TrainingData:
    """Read and tokenise training data.

    Prompt and completion are tokenised together; a token that straddles them is trained on with the completion.
    Completions of one prompt share its tokens.

    Args:
        source: a .jsonl(.gz) or .parquet file, a directory of `datasets.save_to_disk`, or mappings in memory.
        model: whose tokenizer, layout and context are used.
        max_length: tokens per sequence; the model's context by default.
        overflow: ``error`` refuses a longer row; ``truncate`` cuts its prompt on the left and says so.
        on_error: ``stop`` at the first row that cannot be used, or ``skip`` such rows and say so.
        eos: end completions with EOS where the tokenizer has one (conversations end as their template ends them).

    Raises:
        RowError: naming the first row that cannot be used and what is wrong with it.
        InputError: for a source that cannot be read, that has no rows, or a model that cannot be trained on rows.
    """
    if model.layout == "masked":
        raise InputError("a masked language model has no completions to train on: use a causal or encoder-decoder one")
    reader = _Reader(model, max_length or model.max_length, overflow, eos)
    found = TrainingData()
    for where, record in training_records(source):
        try:
            if isinstance(record, RowError):
                raise record
            row, was_cut = reader.row(record, where)
        except RowError as error:
            if on_error == "stop":
                raise error.at(where) from None
            found.skipped.append(f"{where}: {error.reason}")
            continue
        found.rows.append(row)
        if was_cut:
            found.truncated.append(where)
    if not found.rows:
        raise InputError(f"{source if isinstance(source, str | Path) else 'the data'} holds no rows to train on")
    return found


class _Reader:
    def __init__(self, model: TextModel, limit: int | None, overflow: str, eos: bool) -> None:
        self.tokenizer = model.tokenizer
        self.encoder = TextEncoder(model.tokenizer, layout=model.layout)
        self.plain = TextEncoder(model.tokenizer, layout=model.layout, bos="never")
        self.causal = model.layout == "causal"
        self.one_text = model.layout in ("causal", "diffusion")  # prompt and completion in one row
        self.limit, self.overflow = limit, overflow
        self.eos = model.tokenizer.eos_token_id if eos and self.one_text else None

    def row(self, record: Mapping[str, Any], where: str) -> tuple[Row, bool]:
        """One row of tokens, and whether its prompt was cut."""
        prompt, completions = _parts(record)
        if len(completions) == 2 and "chosen" in record and completions[0] == completions[1]:
            raise RowError("chosen and rejected are identical, so that there is nothing to prefer: remove the row")
        texts, ended = self._texts(prompt, completions)
        encoded = [self._tokens(before, after, ended=ended) for before, after in texts]
        heavy = self._weights(record, texts, encoded, ended=ended)
        start = min(begin for _, begin, _ in encoded)
        first = encoded[0][0]
        # What stands before the completions is the same text; tokens may differ where they touch the completion.
        while start and any(ids[:start] != first[:start] for ids, _, _ in encoded):
            start -= 1
        cut = self._excess([len(ids) for ids, _, _ in encoded], start)
        if not start - cut:
            raise RowError("has nothing before its first token (no BOS, no prompt): give a prompt")
        head = self._head(first)
        return (
            Row(
                [*first[:head], *first[head + cut : start]],
                tuple(ids[start:] for ids, _, _ in encoded),
                tuple(scored - start for _, _, scored in encoded),
                _values(record, len(completions)),
                None if heavy is None else tuple(weights[start:] for weights in heavy),
                name=where,
            ),
            cut > 0,
        )

    def _texts(self, prompt: Any, completions: Sequence[Any]) -> tuple[list[tuple[str, str]], bool]:
        """(before, after) of each completion as text; whether the chat template ends them."""
        if not any(_is_conversation(part) for part in (prompt, *completions)):
            for name, part in (("the prompt", prompt), *(("a completion", c) for c in completions)):
                if not isinstance(part, str):
                    raise RowError(f"{name} must be a text or a list of messages, got {type(part).__name__}")
            if not all(completions):
                raise RowError("a completion is empty, so that there is nothing to train on: fill it or remove the row")
            return [(prompt, completion) for completion in completions], False
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InputError("the data holds conversations, and the tokenizer has no chat template: give it one")
        before = self._rendered(prompt, open_turn=True) if prompt else ""
        pairs = []
        for completion in completions:
            if not completion:
                raise RowError("a completion has no message: fill it or remove the row")
            whole = self._rendered([*prompt, *completion], open_turn=False)
            if not whole.startswith(before):
                raise RowError(
                    "the chat template does not write prompt and completion as the prompt followed by something: use a "
                    "template that does"
                )
            pairs.append((before, whole[len(before) :]))
        return pairs, True

    def _rendered(self, messages: Sequence[Mapping[str, Any]], *, open_turn: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=open_turn
            )
        except Exception as error:  # a template is a program of its own and may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise RowError(f"the chat template refuses its messages ({reason})") from None
        return text

    def _tokens(self, before: str, after: str, *, ended: bool) -> tuple[list[int], int, int]:
        """Token ids, where the completion begins, and the first scored token."""
        # A template writes its own BOS.
        bos = self.tokenizer.bos_token
        encoder = self.plain if ended and bos and (before + after).startswith(bos) else self.encoder
        text = encoder.encode(before, after)
        ids = [*text.prefix, *text.content, *text.suffix]
        begin, scored = len(text.prefix) + text.start, len(text.prefix) + text.scored_from
        if not ended and self.eos is not None and ids[-1] != self.eos:
            ids.append(self.eos)
        # Of a text that nothing precedes, its first token is what the rest is conditioned on.
        return (ids, begin, scored) if begin else (ids, 1, max(scored, 1))

    def _weights(
        self,
        record: Mapping[str, Any],
        texts: Sequence[tuple[str, str]],
        encoded: Sequence[tuple[list[int], int, int]],
        *,
        ended: bool,
    ) -> list[list[float]] | None:
        """Token weights of each sequence from its spans, 1 outside them; None where no completion has any."""
        columns = ("chosen", "rejected") if len(texts) == 2 and "chosen" in record else ("completion",)
        given = [record.get(SPAN_COLUMNS[name]) for name in columns]
        if all(spans is None for spans in given) or len(given) != len(texts):
            return None
        if ended:
            raise RowError(
                f"column {SPAN_COLUMNS[columns[0]]!r} marks characters of a text, and this is a conversation"
            )
        out = []
        for name, spans, (before, after), (ids, _, _) in zip(columns, given, texts, encoded, strict=True):
            text = self.encoder.encode(before, after)
            own, skipped = text.pieces[text.start :], 0
            if text.boundary == "straddled":  # the first token holds the end of the prompt too
                skipped = len("".join(own)) - len(after)
                own = [own[0][skipped:], *own[1:]]
            found = token_weights(own, spans or [], column=SPAN_COLUMNS[name], text=after)
            weights = [1.0] * len(ids)
            begin = len(text.prefix) + text.start
            weights[begin : begin + len(found)] = found
            out.append(weights)
        return out

    def _head(self, ids: Sequence[int]) -> int:
        """1 if the row begins with BOS, which stays when the prompt is cut."""
        return int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)

    def _excess(self, lengths: Sequence[int], start: int) -> int:
        """Prompt tokens to leave out so that the longest sequence fits."""
        if self.limit is None:
            return 0
        # The last token of a causal row is only ever a target.
        over = max(lengths) - self.limit - int(self.causal)
        if over <= 0:
            return 0
        advice = "shorten it, raise --max-length, or cut prompts with --overflow truncate"
        if self.overflow == "error" or not self.one_text:
            raise RowError(f"has {max(lengths)} tokens, more than the context of {self.limit}: {advice}")
        if over >= start - 1:
            raise RowError(f"has a completion longer than the context of {self.limit} tokens: shorten it")
        return over


def _is_conversation(part: Any) -> bool:
    return isinstance(part, Sequence) and not isinstance(part, str) and all(isinstance(m, Mapping) for m in part)


def _parts(record: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Prompt and completions of a record.

    Raises:
        RowError: for columns that no format has.
    """
    have = {name for name, value in record.items() if value is not None}
    if {"chosen", "rejected"} <= have:
        chosen, rejected = record["chosen"], record["rejected"]
        if "prompt" in have:
            return record["prompt"], [chosen, rejected]
        return _split(chosen, rejected)
    if {"prompt", "completion"} <= have:
        return record["prompt"], [record["completion"]]
    if {"prompt", "completions"} <= have:
        if not isinstance(record["completions"], list) or not record["completions"]:
            raise RowError("column 'completions' must be a list of at least one completion")
        return record["prompt"], list(record["completions"])
    if "messages" in have:
        return [], [record["messages"]]
    if "text" in have:
        return "", [record["text"]]
    columns = ", ".join(map(repr, sorted(have))) or "none"
    raise RowError(
        f"has the columns {columns}: give 'prompt' with 'chosen' and 'rejected', 'completion' or 'completions', or "
        "'messages' or 'text'"
    )


def _split(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """The prompt that both begin with, and what is left of each."""
    if _is_conversation(chosen) and _is_conversation(rejected):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        return list(chosen[:shared]), [list(chosen[shared:]), list(rejected[shared:])]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise RowError("chosen and rejected must both be texts or both be lists of messages")
    shared = len(commonprefix([chosen, rejected]))  # noqa: RUF071 - character by character is what is meant
    if shared and shared < max(len(chosen), len(rejected)) and chosen[shared - 1] == " ":
        shared -= 1  # a space belongs to the word after it
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _values(record: Mapping[str, Any], count: int) -> dict[str, tuple[float, ...]]:
    """Numbers of a record under the names that objectives ask for."""
    found: dict[str, tuple[float, ...]] = {}
    if record.get("label") is not None:
        found["labels"] = (float(_number(record["label"], "label")),)
    if record.get("preference") is not None:
        found["preferences"] = (_number(record["preference"], "preference"),)
    for column, name in (("rewards", "rewards"), ("proposal_logps", "proposal")):
        values = record.get(column)
        if values is not None:
            given = values if isinstance(values, list) else [values]
            if len(given) != count:
                raise RowError(f"column {column!r} has {len(given)} numbers for {count} completions")
            found[name] = tuple(_number(value, column) for value in given)
    if record.get("ref_chosen_logps") is not None and record.get("ref_rejected_logps") is not None:
        found["reference"] = tuple(_number(record[c], c) for c in ("ref_chosen_logps", "ref_rejected_logps"))
    return found


def _number(value: Any, column: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"column {column!r} must hold finite numbers, got {value!r}")
    return float(value)
