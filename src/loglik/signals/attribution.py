r"""Where in a network does a prediction come from? Causal tracing and attention knockout.

*Causal tracing*: noise on the embeddings of the subject destroys a prediction. States of the clean run are put back at
one token and a few layers, and where that brings the prediction back, they carry it. *Attention knockout*: the last
token is kept from attending to some tokens in a few layers, and what the prediction loses came from there.

Kinds of predictions have different traces (`loglik.signals.scenarios`): pool each by itself
(`loglik.signals.pooled_traces`). Both need a causal language
model of transformers, whose blocks are found by trying (`loglik.models.blocks`). All probabilities are those of one
token, the first of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.blocks import BlockPart, Blocks, changed, find_blocks
from loglik.signals.subject_prompts import SubjectPrompt

__all__ = [
    "CausalTrace",
    "KnockoutEffect",
    "attention_knockout",
    "causal_trace",
    "embedding_spread",
    "restored_probability",
]

_ROWS = 64  # rows of a forward pass
_LEAST_EFFECT = 1e-6  # total effect of which shares have no meaning
_WINDOWS: dict[BlockPart, int] = {"mlp": 10, "attention": 10, "residual": 1}


@dataclass(frozen=True, slots=True)
class CausalTrace:
    """Probability of a token with parts of the clean run put back into a corrupted one.

    Args:
        prompt: what was traced.
        kind: what was put back.
        window: in how many layers around each.
        noise: of the embeddings, in units of `spread`.
        spread: standard deviation of subject embeddings.
        draws: of the noise; the same for every place.
        high: probability in the clean run.
        low: its mean over corrupted runs.
        score: (T, L) the mean with the clean states back at a token and around a layer, float64.
    """

    prompt: SubjectPrompt
    kind: BlockPart
    window: int
    noise: float
    spread: float
    draws: int
    high: float
    low: float
    score: Tensor

    @property
    def total_effect(self) -> float:
        """What corruption takes away: high - low."""
        return self.high - self.low

    @property
    def indirect_effect(self) -> Tensor:
        """(T, L) what putting back brings: score - low."""
        return self.score - self.low

    def normalised(self, *, clip: bool = True) -> tuple[Tensor, int]:
        r"""(T, L) :math:`(\text{score} - \text{low}) / |\text{high} - \text{low}|`, and how many lie outside [-1, 1].

        Args:
            clip: to [-1, 1].

        Raises:
            InputError: where corruption changes nothing.
        """
        if abs(self.total_effect) < _LEAST_EFFECT:
            raise InputError(
                f"corruption changes the probability by {self.total_effect:.2g}, of which there are no shares: read "
                "indirect_effect, or corrupt more"
            )
        share = self.indirect_effect / abs(self.total_effect)
        outside = int((share.abs() > 1 + _LEAST_EFFECT).sum())
        return (share.clamp(-1.0, 1.0) if clip else share), outside


def causal_trace(
    model: Any,
    prompt: SubjectPrompt,
    *,
    kind: BlockPart = "mlp",
    window: int | None = None,
    noise: float = 3.0,
    spread: float | None = None,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = _ROWS,
) -> CausalTrace:
    r"""Put clean states back into a corrupted run, one token and a few layers at a time.

    .. math:: \mathrm{TE} = p(a \mid x) - \mathbb E\, p(a \mid \tilde x), \qquad
              \mathrm{IE}_{i,l} = \mathbb E\, p(a \mid \tilde x, h_{i, l'} = h^{x}_{i, l'} \ \forall l' \in W_l)
              - \mathbb E\, p(a \mid \tilde x)

    :math:`\tilde x` has Gaussian noise on the embeddings of the subject. The window :math:`W_l` reaches from half its
    size below the layer to half above (one less if it is even), as far as there are layers. Tokens before the subject
    are not corrupted, so that their effect is 0. Takes draws x tokens x layers rows.

    Args:
        model: a causal language model of transformers.
        prompt: from `subject_prompt`.
        kind: what is put back: output of ``mlp`` or ``attention``, or the ``residual`` stream behind a block.
        window: layers; 10 for mlp and attention, 1 for the residual stream if None.
        noise: standard deviation, in units of `spread`.
        spread: from `embedding_spread` of all prompts of a study; of this one if None.
        draws: of the noise.
        seed: of the noise.
        batch_size: rows of a forward pass.

    Raises:
        InputError: for a model without blocks, or whose blocks do not have this part by themselves; an unknown kind; or
            options out of range.

    Source: arXiv 2410.14405, with the settings of arXiv 2202.05262.
    """
    blocks = find_blocks(model, "causal tracing")
    if kind not in _WINDOWS:
        raise InputError(f"kind must be mlp, attention or residual, got {kind!r}")
    size = _WINDOWS[kind] if window is None else window
    near = _windows(len(blocks), size)
    scale = embedding_spread(model, [prompt]) if spread is None else spread
    places = range(prompt.span[0], len(prompt.ids))
    masks = torch.zeros(len(places) * len(blocks) + 1, len(prompt.ids), len(blocks), dtype=torch.bool)
    for i, place in enumerate(places):
        masks[1 + i * len(blocks) : 1 + (i + 1) * len(blocks), place] = near
    found = restored_probability(
        model, prompt, {kind: masks}, noise=noise, spread=scale, draws=draws, seed=seed, batch_size=batch_size
    )
    low = float(found[0])
    score = torch.full((len(prompt.ids), len(blocks)), low, dtype=torch.float64)
    score[places.start :] = found[1:].reshape(len(places), len(blocks))
    high = float(blocks.last_log_probs(_tensor(blocks, prompt.ids))[0, prompt.target].double().exp())
    return CausalTrace(prompt, kind, size, noise, scale, draws, high, low, score)


@torch.no_grad()
def restored_probability(
    model: Any,
    prompt: SubjectPrompt,
    restore: Mapping[BlockPart | Literal["embedding"], Tensor],
    *,
    noise: float = 3.0,
    spread: float | None = None,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = _ROWS,
) -> Tensor:
    """Probability of the target in a corrupted run in which chosen states are those of the clean run.

    Args:
        model: a causal language model of transformers.
        prompt: from `subject_prompt`.
        restore: for each part, where it is clean: (R, T, L) bool for R choices at once, (R, T) of the embedding. Each
            choice is run under the same draws of the noise.
        noise: as in `causal_trace`.
        spread: likewise.
        draws: likewise.
        seed: likewise.
        batch_size: likewise.

    Returns:
        (R,) mean over the draws, float64.

    Raises:
        InputError: as `causal_trace`; or for masks of another shape.
    """
    blocks = find_blocks(model, "restoring states")
    _check_rows(blocks, prompt, batch_size)
    scale = embedding_spread(model, [prompt]) if spread is None else spread
    _check_noise(noise, scale, draws)
    ids, layers, (begin, end) = _tensor(blocks, prompt.ids), len(blocks), prompt.span
    length = ids.shape[1]
    modules = {part: blocks.parts(part) for part in restore if part != "embedding"}
    count = len(next(iter(restore.values()), ()))
    for part, mask in restore.items():
        shape = (count, length) if part == "embedding" else (count, length, layers)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool or not count:
            raise InputError(f"restore[{part!r}] must be bool of shape {shape}, got {mask.dtype} {tuple(mask.shape)}")
    clean: dict[tuple[str, int], Tensor] = {}

    def keep(part: str) -> Any:
        def note(layer: int, states: Tensor) -> Tensor:
            clean[part, layer] = states[0].clone()  # some blocks go on writing into what a part gave them
            return states

        return note

    blocks.last_log_probs(ids, *(changed(m, keep(part), length=length) for part, m in modules.items()))
    generator = torch.Generator().manual_seed(seed)
    width = blocks.embedding(ids).shape[-1]
    drawn = torch.randn(draws, end - begin, width, generator=generator) * noise * scale
    out = torch.zeros(count * draws, dtype=torch.float64)
    for first in range(0, count * draws, batch_size):
        rows = torch.arange(first, min(first + batch_size, count * draws))
        chosen = {part: mask[rows // draws].to(ids.device) for part, mask in restore.items()}
        added = torch.zeros(len(rows), length, width)
        added[:, begin:end] = drawn[rows % draws]
        added = added.to(ids.device)
        if "embedding" in chosen:
            added.masked_fill_(chosen["embedding"][:, :, None], 0.0)

        def put_back(part: str, chosen: Mapping[Any, Tensor] = chosen) -> Any:
            def replace(layer: int, states: Tensor) -> Tensor:
                return torch.where(chosen[part][:, :, layer, None], clean[part, layer], states)

            return replace

        table = blocks.last_log_probs(
            ids.expand(len(rows), -1),
            changed([blocks.embedding], lambda _, states, added=added: states + added.to(states.dtype)),  # type: ignore[misc]
            *(changed(m, put_back(part), length=length) for part, m in modules.items()),
        )
        out[rows] = table[:, prompt.target].double().exp().cpu()
    return out.reshape(count, draws).mean(1)


@dataclass(frozen=True, slots=True)
class KnockoutEffect:
    """What a prediction loses when the last token does not see others.

    Args:
        prompt: what was looked at.
        blocked: tokens that it does not see.
        window: in how many layers around each.
        base: probability with everything seen.
        probability: (L,) with the edges cut around each layer, float64.
    """

    prompt: SubjectPrompt
    blocked: tuple[int, ...]
    window: int
    base: float
    probability: Tensor

    @property
    def relative_change(self) -> Tensor:
        r"""(L,) percent: :math:`100 (p' - p) / p`.

        Raises:
            InputError: if p is 0.
        """
        if not self.base:
            raise InputError("the target has probability 0, of which there are no shares: choose another")
        return 100 * (self.probability - self.base) / self.base


def attention_knockout(
    model: Any,
    prompt: SubjectPrompt,
    blocked: Literal["subject", "non-subject", "last"] | Collection[int],
    *,
    window: int = 9,
    batch_size: int = _ROWS,
) -> KnockoutEffect:
    """Keep the last token from attending to some tokens, in a window of layers around each.

    Args:
        model: a causal language model of transformers, with eager or sdpa attention.
        prompt: from `subject_prompt`.
        blocked: tokens of the ``subject``, all others before the ``last``, the last itself, or numbers of tokens; one
            must be left to attend to.
        window: layers: half of it below the layer to half above (one less if it is even), as far as there are any.
        batch_size: rows of a forward pass.

    Raises:
        InputError: for a model without blocks with masked attention, tokens outside the prompt, nothing left, or a
            window below 1.

    Source: arXiv 2410.14405, with the windows of arXiv 2304.14767.
    """
    blocks = find_blocks(model, "attention knockout")
    layers = _windows(len(blocks), window)
    length, inside = len(prompt.ids), range(*prompt.span)
    groups: dict[str, Collection[int]] = {
        "subject": inside,
        "non-subject": [i for i in range(length - 1) if i not in inside],
        "last": [length - 1],
    }
    if isinstance(blocked, str) and blocked not in groups:
        raise InputError(f"blocked must be subject, non-subject, last or numbers of tokens, got {blocked!r}")
    places = sorted(set(groups[blocked] if isinstance(blocked, str) else blocked))
    if places and not 0 <= places[0] <= places[-1] < length:
        raise InputError(f"blocked tokens must be from 0 to {length - 1}, got {places[0]} to {places[-1]}")
    if len(places) == length:
        raise InputError("the last token must see at least one token, and all are blocked: leave one")
    _check_rows(blocks, prompt, batch_size)
    blocks.require_cuts()
    ids = _tensor(blocks, prompt.ids)
    mask = torch.zeros(length, dtype=torch.bool, device=ids.device)
    mask[places] = True
    found = []
    for first in range(0, len(blocks), batch_size):
        part = layers[first : first + batch_size].to(ids.device)
        table = blocks.last_log_probs(ids.expand(len(part), -1), blocks.cut(mask, part))
        found.append(table[:, prompt.target].double().exp().cpu())
    base = float(blocks.last_log_probs(ids)[0, prompt.target].double().exp())
    return KnockoutEffect(prompt, tuple(places), window, base, torch.cat(found))


@torch.no_grad()
def embedding_spread(model: Any, prompts: Sequence[SubjectPrompt]) -> float:
    """Standard deviation of the embeddings of all subject tokens: the unit of the noise.

    Raises:
        InputError: for a model without blocks, no prompts, or embeddings that are all the same.

    Source: arXiv 2202.05262.
    """
    blocks = find_blocks(model, "causal tracing")
    tokens = [token for prompt in prompts for token in prompt.ids[slice(*prompt.span)]]
    if not tokens:
        raise InputError("there are no prompts, so that the embeddings have no spread: give at least one")
    for prompt in prompts:
        _check_rows(blocks, prompt, 1)
    spread = float(blocks.embedding(_tensor(blocks, tokens)).float().std())
    if not spread > 0:  # also NaN, of a single number
        raise InputError("the embeddings of the subjects do not differ: give the spread of the noise yourself")
    return spread


def _windows(layers: int, size: int) -> Tensor:
    """(L, L) bool: which layers lie in the window around each."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"window must be at least 1 layer, got {size!r}")
    step = torch.arange(layers)[None, :] - torch.arange(layers)[:, None]
    return (step >= -(size // 2)) & (step < size - size // 2)


def _check_noise(noise: float, spread: float, draws: int) -> None:
    if not (0 <= noise < math.inf and 0 < spread < math.inf):
        raise InputError(f"noise must be at least 0 and spread positive, both finite, got {noise} and {spread}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise InputError(f"draws must be at least 1, got {draws!r}")


def _check_rows(blocks: Blocks, prompt: SubjectPrompt, batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size!r}")
    size = blocks.network.config.get_text_config().vocab_size
    if max((*prompt.ids, prompt.target)) >= size:
        raise InputError(f"token {max((*prompt.ids, prompt.target))} is not among the {size:,} of the model")
    longest = getattr(blocks.model, "max_length", None)
    if longest is not None and len(prompt.ids) > longest:
        raise InputError(
            f"the prompt has {len(prompt.ids):,} tokens and the model a context of {longest:,}: shorten it"
        )


def _tensor(blocks: Blocks, ids: Sequence[int]) -> Tensor:
    """(1, T) where the embeddings are."""
    return torch.tensor([list(ids)], device=next(blocks.embedding.parameters()).device)
