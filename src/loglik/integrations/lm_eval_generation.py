"""Text from prompts of one length, with the settings, stop strings and clean-up of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from loglik.errors import InputError

__all__ = ["Generator", "StopStrings"]


@dataclass(frozen=True, slots=True)
class Generator:
    """Generates with a transformers model; nothing is padded, and neither model nor tokenizer is altered.

    Args:
        model: a causal model of transformers.
        tokenizer: its tokenizer.
        default_tokens: generated where the settings do not say.
        think_end_token: text or id of the token that ends a thought; what stands before it is cut off.
    """

    model: Any
    tokenizer: Any
    default_tokens: int
    think_end_token: str | int | None = None

    def max_tokens(self, settings: dict[str, Any]) -> int:
        """Tokens that the settings allow to be generated."""
        return int(normalize_gen_kwargs(settings, self.default_tokens)["max_gen_toks"])

    def batches(
        self, prompts: Sequence[list[int]], settings: Sequence[dict[str, Any]], size: int | None, *, max_tokens: int
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Rows and their continuations, batch by batch, longest prompts first.

        A batch holds prompts of equal length with equal settings, so that no padding enters the model and greedy text
        does not depend on what else is generated.

        Args:
            prompts: token ids of each row.
            settings: of each row.
            size: rows of a batch at most; None: as many as `max_tokens` prompt and generated tokens allow.
            max_tokens: see `size`.
        """
        groups: dict[tuple[int, str], list[int]] = {}
        for row, (prompt, given) in enumerate(zip(prompts, settings, strict=True)):
            groups.setdefault((len(prompt), json.dumps(given, sort_keys=True, default=repr)), []).append(row)
        for (length, _), group in sorted(groups.items(), reverse=True):
            count = size or max(1, max_tokens // (length + self.max_tokens(settings[group[0]])))
            for rows in (group[i : i + count] for i in range(0, len(group), count)):
                yield rows, self([prompts[row] for row in rows], settings[rows[0]])

    def __call__(self, prompts: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[str]:
        """Continuations of prompts of one length, up to the first stop string or EOS of each.

        Args:
            prompts: token ids, as many in each.
            settings: a task's ``generation_kwargs`` (until, max_gen_toks, do_sample, temperature, and what else
                `generate` of transformers takes).

        Raises:
            InputError: if sampling is asked for at temperature 0.
        """
        options = dict(normalize_gen_kwargs(settings, self.default_tokens))
        eos = self.tokenizer.eos_token_id
        stops = handle_stop_sequences(options.pop("until"), None if eos is None else self.tokenizer.decode(eos))
        limit = {"max_new_tokens": options.pop("max_gen_toks")}
        if "max_length" in options:  # of prompt and continuation together
            limit = {"max_length": options.pop("max_length")}
        if not options["do_sample"]:
            options.pop("temperature", None)
        elif options.get("temperature") == 0:
            raise InputError("do_sample needs a temperature above 0: set it in the task's generation_kwargs")
        ids = torch.tensor(prompts, device=self.model.device)
        stopping = StopStrings(self.tokenizer, stops, ids.shape[1])
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                stopping_criteria=StoppingCriteriaList([stopping]),
                pad_token_id=pad,
                use_cache=True,
                **limit,
                **options,
            )
        # A row that ended before the others goes on with padding, which is a special token and has no text.
        return [self._text(row, stops) for row in out[:, ids.shape[1] :].tolist()]

    def _text(self, tokens: list[int], stops: list[str]) -> str:
        """Generated tokens as text, without thoughts and without what begins at a stop string."""
        marker = self.think_end_token
        if isinstance(marker, int):
            thought = max((i + 1 for i, token in enumerate(tokens) if token == marker), default=0)
            text, marker = self.tokenizer.decode(tokens[thought:], skip_special_tokens=True).lstrip(), None
        else:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        cut: str = postprocess_generated_text(generation=text, stop=stops, think_end_token=marker)
        return cut


class StopStrings(StoppingCriteria):
    """Ends each row of a batch where its own generated text contains a stop string.

    Args:
        tokenizer: of the model.
        stops: the stop strings.
        prompt_length: tokens of the prompts, which are not searched.

    Attributes:
        ended: the rows that have ended.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.prompt_length = prompt_length
        # A token stands for a byte at least, so no stop string has more tokens than this.
        self.reach = 1 + max((len(stop.encode()) for stop in self.stops), default=0)
        self.ended: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """(B,) bool: which rows have ended."""
        made = input_ids[:, self.prompt_length :]
        for i, text in enumerate(self.tokenizer.batch_decode(made[:, -self.reach :])):
            if any(stop in text for stop in self.stops):
                self.ended.add(i)
        return torch.tensor([i in self.ended for i in range(len(made))], device=input_ids.device)
