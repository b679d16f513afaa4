r"""Causal language models: exact :math:`\log p(x) = \sum_t \log p(x_t \mid x_{<t})` from any `AutoModelForCausalLM`."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.encode import Layout
from loglik.models.paths import ForwardPath, PathReport, find_path, scaled_rope_start
from loglik.models.sampling import ancestral_samples
from loglik.models.shared_prompt import shared_scores
from loglik.models.tokens import greedy_match, labelled, selected_log_probs, widened
from loglik.models.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CausalLM"]


class CausalLM:
    r"""A causal language model of transformers behind the `Model` protocol.

    .. math:: \log p(x_{s:} \mid x_{<s}) = \sum_{t \ge s} \log p_\theta(x_t \mid x_{<t})

    Rows are stripped of their padding before the forward pass and aligned left, so that a value depends neither on the
    side of the padding nor on what else is in the batch.

    Args:
        model: any model whose output has `logits` (B, T, V) that predict the next token.
        tokenizer: the tokenizer of its vocabulary; needed for text only.
    """

    kind = Kind.EXACT
    unit = Unit.TOKEN
    layout: Layout = "causal"

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._paths: dict[str | None, PathReport] = {}

    @cached_property
    def trunk(self) -> Trunk | None:
        """The model without its head, and the head by itself; None for a network that cannot be taken apart."""
        return Trunk.find(self.model, "input_ids", longest=self.max_length)

    def forward_path(self, wanted: ForwardPath | None = None) -> PathReport:
        """The fastest way through this network that gives its own numbers, found by trying (once).

        Raises:
            ValueError: if the wanted path is not possible, with the reason.
        """
        if wanted not in self._paths:
            if self.trunk is None:
                raise ValueError("this network cannot be taken apart into hidden states and head")
            self._paths[wanted] = find_path(self.trunk, wanted)
        return self._paths[wanted]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def max_length(self) -> int | None:
        """The model's context in tokens, or None where its configuration states no limit."""
        return context_length(self.model.config)

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Exact log-likelihood (B,) of the scored tokens, with per-token terms (B, T); differentiable.

        Raises:
            ValueError: if the first token of a row is to be scored: nothing stands before it.
        """
        return self.score_tokens(x)[0]

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor]:
        """`log_prob`, and (B, T) bool whether each scored token is the model's first choice."""
        x = x.to(self.device)
        packed, origin = x.packed_left()
        packed.require_context()
        terms = torch.zeros(packed.ids.shape, dtype=torch.float32, device=self.device)
        greedy = torch.zeros_like(packed.attention_mask)
        if bool(packed.scored_mask.any()):
            chosen, first = self._scored(packed)
            terms = terms.to(chosen.dtype).masked_scatter(packed.scored_mask, chosen)
            greedy = greedy.masked_scatter(packed.scored_mask, first)
        return labelled(x, packed, origin, terms, greedy, kind=self.kind)

    def _scored(self, packed: TokenBatch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and greedy match of the scored tokens of left-aligned rows, row by row."""
        if packed.groups is not None and self.trunk is not None and self._shares():
            return shared_scores(self.trunk, packed, narrows=self.forward_path().narrows)
        picked = packed.scored_mask[:, 1:]
        targets = packed.ids[:, 1:][picked]
        inputs = packed.ids[:, :-1]  # the last token is only ever a target
        if self.trunk is None:
            logits = self._logits(inputs)[picked]
            return selected_log_probs(logits, targets), greedy_match(logits.detach(), targets)
        hidden = self._hidden(self.trunk, inputs, packed.attention_mask.sum(1) - 1)[picked]
        chosen, first, _ = self.trunk.log_probs(hidden, targets)
        return chosen, first

    def _shares(self) -> bool:
        """Whether prompts can be computed once for all their completions."""
        network = self.model
        # Layers that run again in the backward pass would run without the tree.
        again = network.training and any(getattr(m, "gradient_checkpointing", False) for m in network.modules())
        return not again and self.forward_path().path == "packed"

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) log-probabilities of the token after each row, float32 or better, nats; rows must not be empty."""
        packed, _ = prefix.to(self.device).packed_left()
        lengths = packed.prefix_lengths()
        logits = self._logits(packed.ids)
        last = logits[torch.arange(len(packed), device=self.device), lengths - 1]
        return torch.log_softmax(widened(last), dim=-1)

    def hidden_states(self, x: TokenBatch) -> Tensor:
        """(B, T, D) last hidden states at the columns of `x`, zero at padding."""
        x = x.to(self.device)
        packed, origin = x.packed_left()
        out = self.model(input_ids=packed.ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        full = torch.zeros(*x.ids.shape, out.shape[-1], dtype=out.dtype, device=out.device)
        index = origin.unsqueeze(-1).expand_as(out)
        return full.scatter_add(1, index, out.masked_fill(~packed.attention_mask.unsqueeze(-1), 0.0))

    def sample(
        self,
        n: int,
        *,
        prompt: TokenBatch | None = None,
        generator: torch.Generator | None = None,
        max_tokens: int = 64,
    ) -> TokenBatch:
        """Ancestral samples of the model's own distribution: `n` per prompt row, each ended by EOS or `max_tokens`.

        No temperature, no truncation: the sampled distribution is the one that `log_prob` scores. The completion
        (EOS included) is scored in the returned batch.
        """
        return ancestral_samples(self, n, prompt=prompt, generator=generator, max_tokens=max_tokens)

    def _hidden(self, trunk: Trunk, ids: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D). Rows on either side of a length from which rotary frequencies change do not run together."""
        start = scaled_rope_start(self.model.config)
        is_long = torch.zeros_like(lengths, dtype=torch.bool) if start is None else lengths > start
        if bool(is_long.all()) or not bool(is_long.any()):
            return trunk.hidden(input_ids=ids, use_cache=False)
        long = trunk.hidden(input_ids=ids[is_long], use_cache=False)
        short = trunk.hidden(input_ids=ids[~is_long, :start], use_cache=False)
        out = long.new_zeros(*ids.shape, long.shape[-1])
        out = out.index_put((is_long.nonzero()[:, 0],), long)
        short = torch.nn.functional.pad(short, (0, 0, 0, ids.shape[1] - short.shape[1]))
        return out.index_put(((~is_long).nonzero()[:, 0],), short)

    def _logits(self, ids: Tensor) -> Tensor:
        """(B, T, V). Padding stands on the right, where causal attention cannot see it: no mask is needed."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return f"{type(self).__name__}({type(self.model).__name__}, {count:,} parameters, context {self.max_length})"


def context_length(config: Any) -> int | None:
    """Positions a model was built for, from its configuration; None where there is no limit (state-space models)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
