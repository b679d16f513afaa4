"""Reward models: a network of transformers with one number at the last token of a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM, context_length
from loglik.models.encode import Layout
from loglik.models.tokens import widened
from loglik.progress import quiet_transformers

__all__ = ["RewardModel"]

_ONE_LABEL = {"num_labels": 1, "id2label": {0: "reward"}, "label2id": {"reward": 0}}


class RewardModel:
    r"""A scalar reward :math:`r(x, y)` of prompt and completion: ``AutoModelForSequenceClassification``, one label.

    Trained by `fit` with ``bradley_terry`` on pairs or ``binary_feedback`` on labelled completions, it has no
    likelihood of its own.

    Args:
        model: a causal transformer with a `score` head of one output.
        tokenizer: of its vocabulary; needed for text only.

    Raises:
        InputError: for a network with another head.
    """

    layout: Layout = "causal"

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not hasattr(inner, "score") or inner.config.num_labels != 1:
            raise InputError(f"{type(inner).__name__} is no reward model: its head must be a `score` with one output")
        self.model, self.tokenizer, self._inner = model, tokenizer, inner

    @classmethod
    def from_causal(cls, model: CausalLM, *, seed: int = 0) -> RewardModel:
        """A new reward model on the weights of a language model; its head starts at small random numbers.

        Raises:
            InputError: where transformers knows no such head for the architecture.
        """
        config = type(model.model.config).from_dict({**model.model.config.to_dict(), **_ONE_LABEL})
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                make: Any = AutoModelForSequenceClassification.from_config
                network = make(config, dtype=model.model.dtype)
        except ValueError:
            raise InputError(f"transformers has no reward head for {type(model.model).__name__}") from None
        network.base_model.load_state_dict(model.model.base_model.state_dict())
        return cls(network.to(model.device).eval(), model.tokenizer)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, *, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> RewardModel:
        """What `save_pretrained` of a reward model wrote, or the name of one on the model hub.

        Raises:
            InputError: for a name that is nowhere, unreadable weights, or another kind of network.
        """
        source = str(name_or_dir)
        try:
            with quiet_transformers():
                network = AutoModelForSequenceClassification.from_pretrained(
                    source, dtype=dtype, trust_remote_code=False, use_safetensors=True
                )
                tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise InputError(f"{source!r} cannot be read as a reward model ({reason})") from None
        return cls(network.to(device or "cpu").eval(), tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def max_length(self) -> int | None:
        """The model's context in tokens, or None where its configuration states no limit."""
        return context_length(self.model.config)

    def rewards(self, x: TokenBatch) -> Tensor:
        """(B,) rewards at the last real token of each row, float32 or better, differentiable.

        Padding and the other rows change nothing: rows are aligned left, and causal attention sees no padding.

        Raises:
            ValueError: for a row without tokens.
        """
        packed, _ = x.to(self.device).packed_left()
        last = packed.prefix_lengths() - 1
        states = self._inner.base_model(input_ids=packed.ids, use_cache=False).last_hidden_state
        picked = states[torch.arange(len(packed), device=self.device), last]
        return widened(self._inner.score(picked)).squeeze(-1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._inner).__name__})"
