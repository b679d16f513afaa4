r"""Encoder-decoder models: exact :math:`\log p(y \mid x) = \sum_t \log p(y_t \mid y_{<t}, x)`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.encode import Layout
from loglik.models.sampling import ancestral_samples
from loglik.models.tokens import labelled, widened
from loglik.models.trunk import Trunk, token_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Seq2SeqLM"]


class Seq2SeqLM:
    r"""An encoder-decoder of transformers behind the `Model` protocol.

    The tokens of a row before `TokenBatch.starts` are the source, the others the target; the decoder starts from the
    configuration's start token, so that the first target token is scored like every other.

    .. math:: \log p(y \mid x) = \sum_t \log p_\theta(y_t \mid \langle s \rangle, y_{<t}, x)

    Args:
        model: any model of `AutoModelForSeq2SeqLM`.
        tokenizer: the tokenizer of its vocabulary; needed for text only.

    Raises:
        ValueError: if the configuration names no decoder start token.
    """

    kind = Kind.EXACT
    unit = Unit.TOKEN
    layout: Layout = "seq2seq"

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        config = model.config
        start = getattr(config, "decoder_start_token_id", None)
        start = start if start is not None else getattr(config, "bos_token_id", None)
        if start is None:
            raise ValueError("the configuration has no decoder_start_token_id: set it, the decoder cannot start")
        self.start_id: int = start

    @cached_property
    def trunk(self) -> Trunk | None:
        """The model without its head, and the head by itself; None for a network that cannot be taken apart."""
        return Trunk.find(self.model, "input_ids", "decoder_input_ids")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int | None:
        """Longest source and longest target in tokens; None with relative positions, which have no end."""
        value = getattr(self.model.config, "max_position_embeddings", None)
        return value if isinstance(value, int) else None

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Exact log-likelihood (B,) of the scored target tokens given the source; differentiable.

        Raises:
            ValueError: if a source token is to be scored, or a source is empty.
        """
        return self.score_tokens(x)[0]

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor]:
        """`log_prob`, and (B, T) bool whether each scored token is the model's first choice."""
        x = x.to(self.device)
        packed, origin = x.packed_left()
        source, target, column = _split(packed)
        if bool((packed.scored_mask & ~_after(packed)).any()):
            raise ValueError("a source token is to be scored; an encoder-decoder scores only what follows `starts`")
        picked = packed.scored_mask.gather(1, column) & target.attention_mask
        targets = target.ids[picked]
        chosen, first = token_scores(self.trunk, self.model, self._inputs(source, target), picked, targets)
        terms = torch.zeros(packed.ids.shape, dtype=chosen.dtype, device=self.device)
        # Row-major order of `picked` is that of the scored tokens in `packed`: targets keep their order.
        terms = terms.masked_scatter(packed.scored_mask, chosen)
        greedy = torch.zeros_like(packed.attention_mask)
        greedy = greedy.masked_scatter(packed.scored_mask, first)
        return labelled(x, packed, origin, terms, greedy, kind=self.kind)

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) log-probabilities after each row, whose target may be empty; float32 or better, nats."""
        packed, _ = prefix.to(self.device).packed_left()
        source, target, _ = _split(packed)
        lengths = target.attention_mask.sum(1)
        # One more column, so that the position after the last target token has an output.
        ids = torch.nn.functional.pad(target.ids, (0, 1))
        longer = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
        logits = self.model(**self._inputs(source, longer)).logits
        return torch.log_softmax(widened(logits[torch.arange(len(packed), device=self.device), lengths]), dim=-1)

    def sample(
        self,
        n: int,
        *,
        prompt: TokenBatch | None = None,
        generator: torch.Generator | None = None,
        max_tokens: int = 64,
    ) -> TokenBatch:
        """Ancestral samples of the target: `n` per source (a row of `prompt`), each ended by EOS or `max_tokens`.

        No temperature, no truncation. The target (EOS included) is scored in the returned batch.

        Raises:
            ValueError: without a prompt: there is no source to encode.
        """
        if prompt is None:
            raise ValueError("an encoder-decoder samples given a source: give a prompt")
        return ancestral_samples(self, n, prompt=prompt, generator=generator, max_tokens=max_tokens)

    def _inputs(self, source: TokenBatch, target: TokenBatch) -> dict[str, Any]:
        """Arguments of a forward pass; equal sources are encoded once, target padding is out of causal sight."""
        start = torch.full_like(target.ids[:, :1], self.start_id)
        rows = torch.where(source.attention_mask, source.ids, -1)
        distinct, which = torch.unique(rows, dim=0, return_inverse=True)
        real = distinct >= 0
        encoder = self.model.get_encoder()
        states = encoder(input_ids=distinct.clamp_min(0), attention_mask=real.long()).last_hidden_state
        return {
            "encoder_outputs": BaseModelOutput(last_hidden_state=states[which]),
            "attention_mask": real[which].long(),
            "decoder_input_ids": torch.cat([start, target.ids[:, :-1]], dim=1),
            "use_cache": False,
        }

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return f"{type(self).__name__}({type(self.model).__name__}, {count:,} parameters, context {self.max_length})"


def _after(packed: TokenBatch) -> Tensor:
    """(B, T) True from the first target token on."""
    columns = torch.arange(packed.ids.shape[1], device=packed.ids.device)
    return columns >= packed.completion_starts()[:, None]


def _split(packed: TokenBatch) -> tuple[TokenBatch, TokenBatch, Tensor]:
    """Source and target of left-aligned rows, each left-aligned, and the column every target token came from."""
    after = _after(packed) & packed.attention_mask
    before = packed.attention_mask & ~after
    if bool((before.sum(1) == 0).any()):
        row = int((before.sum(1) == 0).nonzero()[0])
        raise ValueError(f"row {row}: the source is empty; an encoder-decoder needs at least its end token there")
    source, _ = TokenBatch(packed.ids, before, torch.zeros_like(before)).packed_left()
    target, column = TokenBatch(packed.ids, after, torch.zeros_like(after)).packed_left()
    return source, target, column
