r"""Rewards from feedback: binary reactions, and rewriting models that were trained on preference pairs.

A sequence-to-sequence reward model (arXiv 2409.00162) learns by maximum likelihood to rewrite any response into the
preferred one; its agreement with a response, token by token, is the reward. Binary reactions (arXiv 2505.14946) train
a scalar reward whose sigmoid is the probability of a positive one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.dense import output_head, states_before_head
from loglik.models.protocol import ChainRule, TextModel, require
from loglik.models.seq2seq import Seq2SeqLM
from loglik.models.tokens import widened
from loglik.models.trunk import evaluating
from loglik.objectives.base import Terms

__all__ = ["Seq2SeqReward", "TokenRewards", "binary_feedback", "correction_pairs", "downsampling_correction"]

Text = TypeVar("Text", str, list[int])

# Logits that exist at once: positions of a chunk times the vocabulary.
_CHUNK_LOGITS = 1 << 24


def binary_feedback(rewards: Tensor, labels: Tensor) -> Terms:
    r"""Cross-entropy of binary reactions under a scalar reward.

    .. math:: \ell_b = -\bigl[ l_b \log \sigma(z_b) + (1 - l_b) \log(1 - \sigma(z_b)) \bigr]

    Args:
        rewards: (B,) scalar rewards :math:`z`, logits of the probability of a positive reaction; any floating dtype.
        labels: (B,) bool or 0 and 1, whether the reaction was positive.

    Returns:
        Terms of weight one, so that the loss is a mean over responses, in nats; float32 or better. Metrics: ``reward``,
        ``probability`` and ``accuracy`` (whether the reward has the label's sign).

    Raises:
        InputError: for shapes that do not fit.
        RowError: for a label other than 0 and 1, or a reward that is NaN.

    Source: arXiv 2505.14946.
    """
    if rewards.dim() != 1 or labels.shape != rewards.shape:
        raise InputError(
            f"binary feedback needs rewards and labels of shape (B,), got {tuple(rewards.shape)} and "
            f"{tuple(labels.shape)}"
        )
    other = ((labels != 0) & (labels != 1)).nonzero().flatten()
    if len(other):
        raise RowError(f"the label is {labels[other[0]].item()}: give 0 or 1", row=f"row {int(other[0])}")
    bad = torch.isnan(rewards).nonzero().flatten()
    if len(bad):
        raise RowError("the reward is NaN: check the model", row=f"row {int(bad[0])}")
    wide = widened(rewards)
    loved = labels.bool()
    # softplus(-z) = -log sigma(z): finite where a sigmoid would have rounded to 0 or 1.
    loss = torch.nn.functional.softplus(torch.where(loved, -wide, wide))
    free = wide.detach()
    metrics = {
        "reward": free,
        "probability": torch.sigmoid(free),
        "accuracy": ((free > 0) == loved).to(wide.dtype),
    }
    return Terms(loss, torch.ones_like(free), metrics)


def downsampling_correction(logits: Tensor, keep_rate: float) -> Tensor:
    r"""Logits of a classifier that was trained on a share of the negatives, as logits for all of them.

    .. math:: z \leftarrow z + \log \rho

    With every positive and a share :math:`\rho` of the negatives the trained logit estimates
    :math:`\operatorname{logit} P + \log(1/\rho)`. The ranking stays; rates are off by a factor without it.

    Args:
        logits: any shape, from the model that saw the sampled data.
        keep_rate: :math:`\rho` in (0, 1], the probability that a negative was kept.

    Returns:
        The logits in float32 or better, shifted.

    Raises:
        InputError: for a rate out of range.

    Source: the prior correction of logistic regression; arXiv 2505.14946 has the setting.
    """
    if not (isinstance(keep_rate, int | float) and 0 < keep_rate <= 1):
        raise InputError(f"keep_rate must lie in (0, 1], got {keep_rate}")
    return widened(logits) + math.log(keep_rate)


def correction_pairs(
    rows: Iterable[Mapping[str, Text]], *, separator: Text | None = None, end: Text | None = None
) -> list[dict[str, Text]]:
    """Training pairs of a sequence-to-sequence reward model: rejected to chosen, and chosen to itself.

    Train on them by `MaximumLikelihood` of the completion. Without the second kind the model rewrites good responses
    too, and rewards break off early.

    Args:
        rows: preference pairs with ``prompt``, ``chosen`` and ``rejected``, texts or lists of token ids.
        separator: put between response and output, such as a line that asks for a better response; nothing if None.
        end: end of sequence, put after every response that does not end with it, in the prompt and in the output.

    Returns:
        Two rows for each: ``prompt`` the prompt, the response and the separator, ``completion`` the chosen response.

    Raises:
        RowError: for a missing column, an empty response, or a chosen response that is the rejected one.

    Source: arXiv 2409.00162.
    """
    pairs: list[dict[str, Text]] = []
    for number, row in enumerate(rows):
        where = f"row {number}"
        missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
        if missing:
            raise RowError(f"has no {missing[0]}: give prompt, chosen and rejected", row=where)
        chosen, rejected = row["chosen"], row["rejected"]
        for name, response in (("chosen", chosen), ("rejected", rejected)):
            if not len(response):
                raise RowError(f"its {name} response is empty: remove it", row=where)
        chosen, rejected = _ended(chosen, end), _ended(rejected, end)
        if chosen == rejected:
            raise RowError("its chosen response is its rejected one: remove it", row=where)
        for response in (rejected, chosen):
            source = row["prompt"] + response
            pairs.append({"prompt": source if separator is None else source + separator, "completion": chosen})
    return pairs


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """Rewards of B responses of T tokens at most, aligned left.

    Args:
        value: (B, T) float32, 0 where there is no token.
        mask: (B, T) bool, True where a token is.
        divergence: (B,) long, how many tokens agree with the rewrite before the first that does not.
    """

    value: Tensor
    mask: Tensor
    divergence: Tensor


@dataclass(frozen=True, slots=True)
class Seq2SeqReward:
    r"""Token rewards from a model that rewrites responses into preferred ones.

    The model reads prompt and response, and writes a better response. Two phases, for the greedy rewrite g and its
    first difference :math:`t^* = \min \{ t : g_t \ne y_t \}`:

    .. math:: r_t = \begin{cases} \text{pos} & t < t^* \\
              \text{neg} \cdot [a_t \ne y_t] & t \ge t^* \end{cases}, \qquad
              a_t = \arg\max_v p_\psi(v \mid x, y, y_{<t})

    The rewrite need not be decoded: up to :math:`t^*` it *is* the response, so :math:`g_t = a_t` for
    :math:`t \le t^*`, and one teacher-forced pass gives both phases. A tie for the first choice counts as agreement.
    Insertions and deletions shift the rewrite, and the second phase is teacher-forced for that reason.

    Prompts and responses are token ids of the model's own tokenizer, as in `correction_pairs`: text that was decoded
    and tokenised again would shift every later position. A response ends with the end token if its writer ended it,
    and that token is rewarded like any other.

    Args:
        model: trained on `correction_pairs`; frozen, in evaluation mode meanwhile. Nothing here has a gradient.
        pos: reward of a token before the first difference. The magnitudes are our reading of the paper.
        neg: reward of a token that differs from then on.
        separator: what stood between response and output in training.

    Raises:
        InputError: for a reward that is not finite, or a masked language model, whose choices see what follows.

    Source: arXiv 2409.00162.
    """

    model: TextModel
    pos: float = 1.0
    neg: float = -1.0
    separator: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("pos", "neg"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be finite, got {getattr(self, name)}")
        if self.model.layout == "masked":
            raise InputError("a sequence-to-sequence reward reads a response from left to right: use a causal model")

    @torch.no_grad()
    def token_rewards(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenRewards:
        """Reward of each token of B responses to B prompts, as token ids; the same whatever else is in the batch.

        Raises:
            InputError: for numbers that do not pair.
            RowError: for a response that is empty or too long for the model's context.
        """
        batch, mask = self._batch(prompts, responses)
        with self._evaluating():
            first = self.model.score_tokens(batch)[1]
        if first is None:
            raise InputError(
                "a model without first choices per token corrects nothing: use an encoder-decoder or causal one"
            )
        agrees = _aligned(first, batch, mask)
        before = agrees.int().cumprod(1).bool()
        value = before * self.pos + (mask & ~agrees) * self.neg
        return TokenRewards(value.float(), mask, before.sum(1))

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        aggregate: Literal["sum", "mean"] = "sum",
    ) -> Tensor:
        """(B,) sum, or mean over the tokens, of `token_rewards`; a sum favours long responses that agree.

        Raises:
            InputError: for numbers that do not pair, or an unknown aggregate.
            RowError: for a response that is empty or too long for the model's context.
        """
        if aggregate not in ("sum", "mean"):
            raise InputError(f"aggregate must be one of sum, mean, got {aggregate!r}")
        rewards = self.token_rewards(prompts, responses)
        total = rewards.value.sum(1)
        return total if aggregate == "sum" else total / rewards.mask.sum(1)

    @torch.no_grad()
    def soft_rewards(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenRewards:
        r"""A graded variant of our own: how far each token lies below the model's first choice.

        .. math:: r_t = \log p_\psi(y_t \mid x, y, y_{<t}) - \max_v \log p_\psi(v \mid x, y, y_{<t}) \le 0

        0 where token and first choice agree, in nats; `pos` and `neg` have no part in it. One forward pass of a neural
        model, one per token position of any other model with a chain rule.

        Raises:
            InputError: for numbers that do not pair, or a model without per-token conditionals.
            RowError: for a response that is empty or too long for the model's context.
        """
        batch, mask = self._batch(prompts, responses)
        with self._evaluating():
            if isinstance(self.model, CausalLM | Seq2SeqLM) and self.model.trunk is not None:
                gaps = _dense_gaps(self.model, batch)
            else:
                chain = require(self.model, ChainRule, "the soft reward")  # type: ignore[type-abstract]
                gaps = _stepwise_gaps(chain, batch)
        value = _aligned(gaps, batch, mask)
        return TokenRewards(value.float(), mask, ((value == 0) & mask).int().cumprod(1).sum(1))

    def _batch(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[TokenBatch, Tensor]:
        """Rows (prompt, response, separator; response), of which the second response is scored, and its mask."""
        if len(prompts) != len(responses) or not len(responses):
            raise InputError(
                f"each response needs its own prompt, and there must be one: got {len(prompts)} and {len(responses)}"
            )
        for number, response in enumerate(responses):
            if not len(response):
                raise RowError("is empty: remove it", row=f"response {number}")
        sources = [[*x, *y, *self.separator] for x, y in zip(prompts, responses, strict=True)]
        rows = [[*source, *y] for source, y in zip(sources, responses, strict=True)]
        limit, apart = self.model.max_length, self.model.layout == "seq2seq"
        for number, (source, row) in enumerate(zip(sources, rows, strict=True)):
            needed = max(len(source), len(row) - len(source)) if apart else len(row) - 1
            if limit is not None and needed > limit:
                raise RowError(
                    f"needs {needed} tokens with its prompt and itself again, and the model's context is {limit}: "
                    "shorten it",
                    row=f"response {number}",
                )
        lengths = torch.tensor([len(y) for y in responses], dtype=torch.long)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return TokenBatch.from_lists(rows, starts=[len(source) for source in sources]), mask

    def _evaluating(self) -> Any:
        network = getattr(self.model, "model", None)
        return evaluating(network) if isinstance(network, torch.nn.Module) else nullcontext()


def _ended(response: Text, end: Text | None) -> Text:
    if end is None or response[-len(end) :] == end:
        return response
    return response + end


def _aligned(values: Tensor, batch: TokenBatch, mask: Tensor) -> Tensor:
    """Values at the scored tokens of a batch, at the places of `mask`; 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=values.dtype)
    out[mask] = values.cpu()[batch.scored_mask]
    return out


def _dense_gaps(model: CausalLM | Seq2SeqLM, batch: TokenBatch) -> Tensor:
    """(B, T) target logit minus the highest one at scored tokens: their normaliser cancels."""
    batch = batch.to(model.device)
    head = output_head(model, method="the soft reward")
    states = states_before_head(model, batch, method="the soft reward")[batch.scored_mask]
    targets = batch.ids[batch.scored_mask]
    found, size = [], max(1, _CHUNK_LOGITS // head(states[:1]).shape[-1])
    for begin in range(0, len(states), size):
        logits = head(states[begin : begin + size])
        chosen = logits.gather(1, targets[begin : begin + size, None])[:, 0]
        found.append((chosen - logits.amax(1)).double())
    gaps = torch.zeros(batch.ids.shape, dtype=torch.float64, device=model.device)
    return gaps.masked_scatter(batch.scored_mask, torch.cat(found))


def _stepwise_gaps(model: ChainRule, batch: TokenBatch) -> Tensor:
    """The same from the distribution after each prefix, all rows at one position at a time."""
    gaps = torch.zeros(batch.ids.shape, dtype=torch.float64)
    starts = batch.completion_starts()
    position = batch.scored_mask.cumsum(1)
    for step in range(1, int(position.max()) + 1):
        rows, columns = ((position == step) & batch.scored_mask).nonzero(as_tuple=True)
        prefixes = [batch.ids[r, :c].tolist() for r, c in zip(rows.tolist(), columns.tolist(), strict=True)]
        log_p = model.next_log_probs(TokenBatch.from_lists(prefixes, starts=starts[rows].tolist())).cpu()
        target = log_p.gather(1, batch.ids[rows, columns, None])[:, 0]
        gaps[rows, columns] = (target - log_p.amax(1)).double()
    return gaps
