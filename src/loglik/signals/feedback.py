r"""Signals from user feedback: how likely a follow-up is after a response, and what feedback says about a policy.

A language model that finds "Yes, that is right." likelier after a response than "No, that is wrong." has judged the
response (arXiv 2409.13948). The model need not be the one that wrote it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.likelihood import Measurement
from loglik.models.protocol import TextModel
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.pending import TokenScores
from loglik.signals.follow_ups import DEFAULT_FOLLOW_UPS, FollowUps
from loglik.signals.intervals import bootstrap_means

__all__ = [
    "DEFAULT_FOLLOW_UPS",
    "FollowUpScores",
    "FollowUps",
    "Message",
    "PolicyValues",
    "Template",
    "follow_up_likelihood",
    "mine_pairs",
    "offline_policy_value",
    "plain_template",
]

Message = Mapping[str, str]
Template = Literal["auto", "chat", "plain"] | Callable[[Sequence[Message]], str]


@dataclass(frozen=True, slots=True)
class FollowUpScores:
    """How likely follow-ups are after N responses, in nats (per token where the aggregate is a mean).

    Args:
        reward: (N,) mean over the positive follow-ups minus mean over the negative ones, labelled. Compare it between
            responses to the same context and under the same follow-ups only.
        positive: (N, P) of each positive follow-up.
        negative: (N, Q) of each negative one.
    """

    reward: Measurement
    positive: Tensor
    negative: Tensor


def follow_up_likelihood(
    model: TextModel,
    prompts: Sequence[str | Sequence[Message]],
    responses: Sequence[str],
    *,
    positive: Sequence[str] | None = None,
    negative: Sequence[str] | None = None,
    aggregate: Literal["mean", "sum"] = "mean",
    template: Template = "auto",
    overflow: Literal["error", "window"] = "error",
) -> FollowUpScores:
    r"""Reward of responses: how much likelier positive user follow-ups are than negative ones.

    .. math:: \mathrm{FLR}(c, y) = \frac{1}{|F^+|} \sum_{f \in F^+} \ell(f \mid c, y)
              - \frac{1}{|F^-|} \sum_{f \in F^-} \ell(f \mid c, y), \qquad
              \ell(f \mid c, y) = \frac{1}{|f|} \sum_j \log p(f_j \mid c, y, f_{<j})

    The follow-up is the user's next turn. Its own tokens are scored, tokenised together with what stands before them;
    the template's are context, and what the template would put after it is left out. Beginnings are shared, so that a
    response is encoded once for all follow-ups. (An encoder-decoder scores the end token of its target too.)

    Args:
        model: scores the follow-ups; any text model.
        prompts: N contexts, each a user's message or a conversation of role/content messages that the response
            continues.
        responses: N responses, one per context; repeat a context to compare responses to it.
        positive: what a satisfied user might write; those of all categories of `DEFAULT_FOLLOW_UPS` by default. An
            empty sequence leaves this side out.
        negative: what a dissatisfied user might write, likewise.
        aggregate: over the tokens of a follow-up: ``mean``, or ``sum``, whose differences between responses are
            pointwise mutual information.
        template: ``chat`` the tokenizer's chat template, ``plain`` `plain_template`, ``auto`` the former if there is
            one, or a function from the messages (the response last) to the text after which the follow-up stands.
        overflow: a context longer than the model's is an error, or read from a later token on (``window``).

    Raises:
        InputError: for no responses or no follow-ups, numbers that do not pair, unknown options, or a chat template
            that cannot render the conversation.
        RowError: for an empty response, a malformed conversation, or a row that cannot be scored.

    Source: arXiv 2409.13948. The paper's own aggregation over tokens is not stated; its released script averages raw
    logits at one position, which is no likelihood.
    """
    sides = [_follow_ups("positive", positive), _follow_ups("negative", negative)]
    texts = [*sides[0], *sides[1]]
    if not texts:
        raise InputError("there are no follow-ups: give positive or negative ones")
    for name, value, allowed in (
        ("aggregate", aggregate, ("mean", "sum")),
        ("overflow", overflow, ("error", "window")),
    ):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    contexts, bos = _contexts(model.tokenizer, _conversations(prompts, responses), template, texts)
    scorer = Scorer(model, ScoreOptions(bos=bos, overflow=overflow))
    results = scorer.score_pairs([(context, text) for context in contexts for text in texts])
    rows: list[TokenScores] = []
    for number, result in enumerate(results):
        if isinstance(result, RowError):
            response, follow_up = divmod(number, len(texts))
            raise RowError(f"with follow-up {texts[follow_up]!r}: {result.reason}", row=f"response {response}")
        assert isinstance(result, TokenScores)
        rows.append(result)
    values = torch.tensor(
        [row.log_prob / (row.num_tokens if aggregate == "mean" else 1) for row in rows], dtype=torch.float64
    ).reshape(len(contexts), len(texts))
    cut = len(sides[0])
    likely, unlikely = values[:, :cut], values[:, cut:]
    reward = torch.zeros(len(contexts), dtype=torch.float64)
    reward = reward + likely.mean(1) if cut else reward
    reward = reward - unlikely.mean(1) if cut < len(texts) else reward
    kinds = [row.kind if number % len(texts) < cut else -row.kind for number, row in enumerate(rows)]
    return FollowUpScores(Measurement(reward, reduce(add, kinds), "follow_up_likelihood"), likely, unlikely)


def plain_template(messages: Sequence[Message]) -> str:
    """Turns as ``User: ...`` and ``Assistant: ...``, one per line, and the beginning of the user's next one."""
    return "".join(f"{m['role'].capitalize()}: {m['content']}\n" for m in messages) + "User: "


def mine_pairs(scores: Tensor, groups: Tensor, *, gap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Preference pairs from scored responses: the best and the worst of each prompt.

    Args:
        scores: (N,) of the responses, such as `FollowUpScores.reward.value`.
        groups: (N,) long, the prompt each response belongs to, in any order.
        gap: a pair is kept if its scores differ by more than this; 0 drops ties.

    Returns:
        (chosen, rejected): row numbers (P,) of the highest and lowest score of each prompt that gives a pair, in the
        order of the prompts' numbers; a prompt with one response gives none.

    Raises:
        InputError: for shapes that do not fit or a negative gap.
        RowError: for a score that is not finite.

    Source: arXiv 2409.13948.
    """
    if scores.dim() != 1 or groups.shape != scores.shape:
        raise InputError(
            f"scores and groups must both have shape (N,), got {tuple(scores.shape)} and {tuple(groups.shape)}"
        )
    if not 0 <= gap < math.inf:
        raise InputError(f"gap must be at least 0 and finite, got {gap}")
    bad = (~torch.isfinite(scores)).nonzero().flatten()
    if len(bad):
        raise RowError(f"the score is {float(scores[bad[0]])}: remove the response", row=f"row {int(bad[0])}")
    order = scores.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    _, count = torch.unique_consecutive(groups[order], return_counts=True)
    last = count.cumsum(0) - 1
    chosen, rejected = order[last], order[last - count + 1]
    keep = scores[chosen] - scores[rejected] > gap
    return chosen[keep], rejected[keep]


@dataclass(frozen=True, slots=True)
class PolicyValues:
    """Values of K policies on the same prompts, with bootstrap intervals over the prompts.

    Args:
        value: (K,) mean over prompts of the mean over the prompt's responses.
        interval: (K, 2) of each value.
        difference: (K,) to the first policy.
        difference_interval: (K, 2) of each difference, from the same resampled prompts (paired).
        level: confidence of the intervals.
        num_groups: prompts.
    """

    value: Tensor
    interval: Tensor
    difference: Tensor
    difference_interval: Tensor
    level: float
    num_groups: int


def offline_policy_value(
    probabilities: Tensor, groups: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> PolicyValues:
    r"""Predicted rate of positive feedback of policies, before any user sees them.

    .. math:: \hat L(\pi) = \frac{1}{|D|} \sum_{x \in D} \frac{1}{n_x} \sum_{i=1}^{n_x} P(\text{love} \mid x, y_i),
              \quad y_i \sim \pi(\cdot \mid x)

    Prompts are resampled, not responses, and the same ones for all policies: what prompts have in common cancels in
    the differences.

    Args:
        probabilities: (N,) predicted probability of positive feedback for each response of one policy, or (K, N) for
            K policies with equally many responses to each prompt; calibrated (`downsampling_correction`).
        groups: (N,) long, the prompt each response answers, in any order.
        level: confidence of the percentile intervals, in (0, 1).
        resamples: of the bootstrap.
        seed: of its random numbers.

    Raises:
        InputError: for shapes that do not fit, fewer than two prompts, or options out of range.
        RowError: for a probability outside [0, 1].

    Source: arXiv 2505.14946.
    """
    rows = probabilities.reshape(1, -1) if probabilities.dim() == 1 else probabilities
    if rows.dim() != 2 or groups.shape != rows.shape[1:] or not len(rows):
        raise InputError(
            f"probabilities (N,) or (K, N) need groups (N,), got {tuple(probabilities.shape)} and {tuple(groups.shape)}"
        )
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, got {resamples}")
    bad = (~((rows >= 0) & (rows <= 1))).nonzero()
    if len(bad):
        policy, row = bad[0].tolist()
        raise RowError(
            f"the probability under policy {policy} is {float(rows[policy, row])}, outside [0, 1]", row=f"row {row}"
        )
    _, which, count = torch.unique(groups, return_inverse=True, return_counts=True)
    if len(count) < 2:
        raise InputError(f"an interval needs at least two prompts, got {len(count)}")
    sums = torch.zeros(len(rows), len(count), dtype=torch.float64, device=rows.device)
    means = (sums.index_add_(1, which, rows.detach().double()) / count).cpu().numpy()
    drawn = bootstrap_means(means, resamples, seed)
    tails = [(1 - level) / 2, (1 + level) / 2]
    interval = np.quantile(drawn, tails, axis=1).T
    paired = np.quantile(drawn - drawn[:1], tails, axis=1).T
    value = torch.from_numpy(means.mean(1))
    return PolicyValues(
        value, torch.from_numpy(interval), value - value[:1], torch.from_numpy(paired), level, len(count)
    )


def _follow_ups(side: Literal["positive", "negative"], given: Sequence[str] | None) -> list[str]:
    if given is None:
        return [text for both in DEFAULT_FOLLOW_UPS.values() for text in getattr(both, side)]
    if isinstance(given, str):
        raise InputError(f"{side} must be several follow-ups, not one string; give [text]")
    for number, text in enumerate(given):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{side} follow-up {number} must be a text that is not empty, got {text!r}")
    return list(given)


def _conversations(prompts: Sequence[str | Sequence[Message]], responses: Sequence[str]) -> list[list[Message]]:
    """Messages up to and including the response."""
    if isinstance(prompts, str) or isinstance(responses, str):
        raise InputError("prompts and responses must be sequences, not one string; give [prompt] and [response]")
    if len(prompts) != len(responses) or not len(responses):
        raise InputError(
            f"each response needs its own prompt, and there must be one: got {len(prompts)} and {len(responses)}"
        )
    out = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        row = f"response {number}"
        if not isinstance(response, str) or not response.strip():
            raise RowError("is empty: remove it", row=row)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise RowError("its conversation must be messages with a role and a content, both texts", row=row)
        if not messages or messages[-1]["role"] == "assistant":
            raise RowError("its conversation must end with a turn that the response answers", row=row)
        out.append([*messages, {"role": "assistant", "content": response}])
    return out


def _contexts(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], template: Template, texts: Sequence[str]
) -> tuple[list[str], Literal["auto", "never"]]:
    """The text before the follow-up, and when BOS is prepended to it: a chat template writes its own."""
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    if callable(template):
        return [template(messages) for messages in conversations], "auto"
    if template not in ("auto", "chat", "plain"):
        raise InputError(f"template must be auto, chat, plain or a function of the messages, got {template!r}")
    if template == "plain" or (template == "auto" and not has_chat):
        return [plain_template(messages) for messages in conversations], "auto"
    if not has_chat:
        raise InputError("the tokenizer has no chat template: set template to plain, or give a function")
    contexts = [_before(tokenizer, messages, number) for number, messages in enumerate(conversations)]
    for text in texts:
        # What a template does to a message it does in every conversation: one is enough to see it.
        if not _rendered(tokenizer, conversations[0], text, 0).startswith(contexts[0] + text):
            raise InputError(f"the chat template changes the follow-up {text!r}: reword it, or use another template")
    return contexts, "never"


def _before(tokenizer: Any, messages: Sequence[Message], number: int) -> str:
    """What the chat template puts before the user's next turn."""
    marker = "follow-up"  # the last one is the turn's own, whatever the messages say
    before, found, _ = _rendered(tokenizer, messages, marker, number).rpartition(marker)
    if not found:
        raise InputError("the chat template leaves the user's last turn out: set template to plain, or give a function")
    return before


def _rendered(tokenizer: Any, messages: Sequence[Message], follow_up: str, number: int) -> str:
    from jinja2.exceptions import TemplateError

    turns = [*(dict(m) for m in messages), {"role": "user", "content": follow_up}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    except TemplateError as error:
        raise RowError(f"the chat template refuses its conversation ({error})", row=f"response {number}") from None
