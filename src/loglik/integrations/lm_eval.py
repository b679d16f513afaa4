"""lm-evaluation-harness with loglik's scoring: ``--model loglik`` on its command line, `LoglikLM` in Python.

The harness knows a model of another package once that model's module has been imported. Importing this one registers
the name ``loglik``; running it registers the name and hands over to the harness's own command line::

    python -m loglik.integrations.lm_eval run --model loglik --model_args pretrained=DIR --tasks hellaswag
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from rich.text import Text
from transformers import AutoTokenizer

from loglik.errors import InputError, LoglikError, RowError
from loglik.integrations.lm_eval_scoring import (
    check_continuation,
    exact_sum,
    make_window,
    progress,
    request_name,
    score_windows,
)
from loglik.models.causal import CausalLM
from loglik.models.encode import TextEncoder
from loglik.models.load import load
from loglik.models.protocol import TextModel
from loglik.progress import stderr_console
from loglik.scoring.budget import Budget
from loglik.scoring.execute import Executor
from loglik.scoring.windows import Window

try:
    import jinja2
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import has_bos_prefix
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from loglik.integrations.lm_eval_generation import Generator
except ImportError as error:
    raise ImportError(
        f"loglik.integrations.lm_eval needs lm-eval 0.4.10 or later ({error}); install loglik[eval]", name=error.name
    ) from error

__all__ = ["LoglikLM", "main"]

_log = logging.getLogger(__name__)
_UNLIMITED, _DEFAULT_CONTEXT = 10**29, 2048  # tokenizers without a limit report 1e30; the harness then takes 2,048

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class LoglikLM(TemplateLM):  # type: ignore[misc]  # the harness is not typed
    r"""A causal model for the harness: :math:`\log p(\text{continuation} \mid \text{context})` in nats.

    Requests are tokenised as by the harness's ``hf`` model: spaces at the end of the context move to the continuation,
    the context's own tokens are cut off the joint tokens, and a context too long loses tokens on its left. Where that
    cut leaves the continuation without a token, because one token spans the join (``"The Ans"`` + ``"wer"``), that
    token is scored with the continuation; ``hf`` stops there. A score does not depend on the rest of its batch, and the
    tokenizer is never altered.

    Args:
        pretrained: ``tiny``, a directory written by `save_pretrained`, or a name on the model hub.
        model: a loaded causal `TextModel`, instead of `pretrained`.
        dtype: of the weights; log-softmax is float32 or better in any case.
        device: a GPU if there is one, by default.
        revision: of a hub repository.
        max_length: context in tokens; the model's by default.
        max_batch_tokens: tokens per forward pass, padding included; chosen from device and vocabulary by default.
        batch_size: prompts generated from together; scoring goes by `max_batch_tokens`. A number, or ``auto``.
        max_batch_size: accepted for the harness's sake; without effect.
        add_bos_token: prepend BOS, or do not; the tokenizer's own way by default.
        prefix_token_id: stands before text without context; BOS by default, or EOS where there is no BOS.
        enable_thinking: passed on to the chat template.
        think_end_token: text or id of the token that ends a thought; what stands before it is cut off generated text.
        chat_template_args: passed on to the chat template.

    Attributes:
        truncated: tokens cut off the left of each request's context in the last call, in the requests' order.

    Raises:
        InputError: for a model or an option that cannot be used.
        RowError: from the methods, for a request that cannot be scored.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        model: TextModel | None = None,
        dtype: str = "float32",
        device: str | None = None,
        revision: str | None = None,
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(f"the loglik model has no option {sorted(unknown)[0]!r}: leave it out of model_args")
        if (pretrained is None) == (model is None):
            raise InputError("give the loglik model either pretrained=DIR (a directory, a hub name or tiny) or model")
        for option, value in (("max_batch_tokens", max_batch_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise InputError(f"{option} must be at least 1, got {value}")
        if enable_thinking and think_end_token is None:
            raise InputError("enable_thinking needs think_end_token, the text or id of the token that ends a thought")
        revision = None if revision is None else str(revision)
        loaded = model if model is not None else load(str(pretrained), dtype=dtype, device=device, revision=revision)
        if loaded.layout != "causal":
            raise InputError(f"the loglik model scores causal language models, not {type(loaded).__name__}")
        self.text_model = loaded
        self.tokenizer = loaded.tokenizer
        if self.tokenizer is None:
            raise InputError("the model has no tokenizer, so it cannot score text; save one beside its weights")
        if model is None and add_bos_token is not None:  # tokenizers take it at construction only
            self.tokenizer = AutoTokenizer.from_pretrained(
                self.tokenizer.name_or_path, revision=revision, add_bos_token=add_bos_token
            )
        self.add_bos_token = add_bos_token
        choices = (prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        prefix = next((token for token in choices if token is not None), None)
        if prefix is None:
            raise InputError("the tokenizer has neither BOS nor EOS to stand before a text: give prefix_token_id")
        self._prefix: int = prefix
        self.pretrained, self.revision = pretrained, revision
        self.batch_size = rows if isinstance(rows := _number(batch_size), int) else None
        self.think_end_token = _number(think_end_token)
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self.truncated: list[int] = []
        self._device = getattr(loaded, "device", None)
        self._max_length = max_length
        self.executor = Executor(loaded, budget=Budget(max_batch_tokens))
        self._prefix_text = self.tokenizer.decode(prefix)

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the option, else BOS, else EOS."""
        return self._prefix

    @property
    def max_length(self) -> int:
        """Context in tokens: the option, the model's, the tokenizer's, or 2,048."""
        own = self._max_length or self.text_model.max_length
        if own is not None:
            return own
        limit = getattr(self.tokenizer, "model_max_length", None)
        return int(limit) if limit is not None and limit < _UNLIMITED else _DEFAULT_CONTEXT

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        module = getattr(self.text_model, "model", None)
        parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
        return {
            "model_num_parameters": sum(p.numel() for p in parameters) or -1,
            "model_dtype": str(parameters[0].dtype) if parameters else "",
            "model_revision": self.revision or "",
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The history as one string by the tokenizer's template, without the system role where it takes none."""

        def render(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )
            return text

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            _log.warning("the chat template refuses these messages; leaving out the system role")
            return render([message for message in chat_history if message["role"] != "system"])

    # Tokens

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: object,
    ) -> list[int]:
        """Token ids; special tokens as asked for, else none before a text that begins with the prefix token's text."""
        if add_special_tokens is None:
            add_special_tokens = False if has_bos_prefix(string, self._prefix_text) else self.add_bos_token
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = list(self.tokenizer.encode(string, **given))
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The tokens' text."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)  # type: ignore[no-any-return]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's tokens of a pair, and loglik's boundary where they leave the continuation empty."""
        before, after = super()._encode_pair(context, continuation)
        if not after:
            kept = context.rstrip()
            before, after = self._straddling(kept, context[len(kept) :] + continuation)
        return before or [self.prefix_token_id], after

    def _straddling(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Joint tokens of a pair, cut before the token that spans the join (or at the join)."""
        if not context + continuation:
            return [], []
        whole = self.tok_encode(context + continuation)
        text = self.tok_encode(context + continuation, add_special_tokens=False)
        front = next((i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text), 0)
        if continuation and len(text) > 1:  # a single token can only stand with the continuation
            start = self._encoder.encode(context, continuation).start
        else:
            start = 0 if continuation else len(text)
        return whole[: front + start], text[start:]

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, layout="causal", bos="never")

    # Likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the model's first choice throughout.

        Raises:
            RowError: naming the request whose continuation is empty, or longer than the context.
        """
        encoded: list[TokenRequest] = []
        for index, request in enumerate(requests):
            context, continuation = request.args
            try:
                if context:
                    before, after = self._encode_pair(context, continuation)
                else:
                    after = self.tok_encode(continuation, add_special_tokens=False)
                    # the prefix token stands once before the text, also where the text begins with it
                    before = [after.pop(0) if after[:1] == [self.prefix_token_id] else self.prefix_token_id]
                check_continuation(after, self.max_length)
            except LoglikError as problem:
                raise RowError(str(problem), row=request_name(request, index)) from None
            encoded.append(((context, continuation), before, after))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, in the harness's windows: each token in exactly one."""
        spans: list[slice] = []
        windows: list[Window] = []
        for request in requests:
            (text,) = request.args
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            first = len(windows)
            windows.extend(make_window(a, b, self.max_length) for a, b in map(make_disjoint_window, pieces))
            spans.append(slice(first, len(windows)))
        self.truncated = [0] * len(requests)
        sums = [exact_sum(scores.terms) for scores in score_windows(self.executor, windows, quiet=disable_tqdm)]
        totals = [math.fsum(sums[span]) for span in spans]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        windows = [make_window(before, after, self.max_length) for _, before, after in requests]
        self._record_truncated(
            len(before) + len(after) - len(window.ids)
            for (_, before, after), window in zip(requests, windows, strict=True)
        )
        results = []
        scored = score_windows(self.executor, windows, quiet=disable_tqdm)
        for (texts, _, _), scores in zip(requests, scored, strict=True):
            results.append((exact_sum(scores.terms), all(scores.greedy)))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, results[-1])
        return results

    def _record_truncated(self, counts: Iterable[int]) -> None:
        """Keep the tokens cut off each request, and say once how many there were."""
        self.truncated = list(counts)
        cut = [count for count in self.truncated if count]
        if cut:
            _log.warning(
                "%d of %d requests exceed the context of %d tokens: %d tokens were cut off the left of their contexts, "
                "at most %d of one (the attribute `truncated` has the count of each request)",
                *(len(cut), len(self.truncated), self.max_length, sum(cut), max(cut)),
            )

    # Generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string or EOS, by the model's own `generate`.

        Prompts are generated from together only if they have equal settings and equal lengths: no padding enters the
        model, so greedy text does not depend on the batch.

        Raises:
            InputError: for a model that cannot generate, or settings that leave no room for a prompt.
        """
        if not isinstance(self.text_model, CausalLM):
            raise InputError(f"generate_until needs a causal neural model, not {type(self.text_model).__name__}")
        generator = Generator(self.text_model.model, self.tokenizer, self.max_gen_toks, self.think_end_token)
        prompts: list[list[int]] = []
        cut: list[int] = []
        for index, request in enumerate(requests):
            context, settings = request.args
            wanted = generator.max_tokens(settings)
            room = self.max_length - wanted
            if room < 1:
                raise InputError(
                    f"{request_name(request, index)}: max_gen_toks {wanted} leaves no room for a prompt in the context "
                    f"of {self.max_length} tokens: lower it in the task's generation_kwargs"
                )
            # whether BOS is added is decided for each text by itself
            special = False if has_bos_prefix(context, self.tokenizer.bos_token) else self.add_bos_token
            ids = self.tok_encode(context, special) or [self.prefix_token_id]
            prompts.append(ids[-room:])
            cut.append(max(0, len(ids) - room))
        self._record_truncated(cut)
        texts = [""] * len(requests)
        settings_of = [request.args[1] for request in requests]
        with progress("generation", len(requests), "prompts", disable_tqdm) as advance:
            for rows, made in generator.batches(
                prompts, settings_of, self.batch_size, max_tokens=self.executor.budget.pack_tokens
            ):
                for row, text in zip(rows, made, strict=True):
                    texts[row] = text
                    self.cache_hook.add_partial("generate_until", requests[row].args, text)
                advance(len(rows))
        return texts


def _number(value: str | int | None) -> str | int | None:
    """The number that digits spell."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def main() -> None:
    """Run the harness's command line with the model ``loglik``; a mendable error is a sentence and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LoglikError as problem:
        stderr_console().print(Text(f"loglik: {problem}"), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    # The class is registered once, by the module that others can import.
    from loglik.integrations.lm_eval import main as importable_main

    importable_main()
else:
    register_model("loglik")(LoglikLM)
