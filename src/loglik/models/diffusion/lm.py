r"""Masked-diffusion language models: bounds on :math:`\log p(x)` from any bidirectional transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import context_length
from loglik.models.diffusion.estimators import Estimator, FixedOrder, Points, estimator_named
from loglik.models.diffusion.passes import MaskedPasses
from loglik.models.diffusion.sampling import first_hitting
from loglik.models.diffusion.streams import row_streams, stream_key
from loglik.models.encode import Layout
from loglik.models.sampling import bos_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Evidence", "MaskedDiffusionLM"]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """An estimate with what it cost.

    Attributes:
        likelihood: (B,) labelled values, with standard errors where draws are random.
        evaluations: (B,) long, network evaluations (NFE) of each row.
        contributions: (B, T) nats, the weighted log-probabilities by token; they sum to the value, and are no
            conditional log-probabilities.
    """

    likelihood: LogLikelihood
    evaluations: Tensor
    contributions: Tensor


class MaskedDiffusionLM:
    r"""An absorbing (mask) diffusion model without time conditioning: RADD, MDLM, LLaDA.

    The network predicts each hidden token from the visible ones, :math:`c_\theta(x_i \mid x_\text{visible})`, a softmax
    over the vocabulary without the mask token. Prompt tokens are always visible; the scored tokens of a row, whose
    number is given, are generated. `log_prob` estimates

    .. math:: \text{ELBO}(x) = E_\pi \sum_l \log c_\theta(x_{\pi_l} \mid x_{\pi_{<l}}) \le \log p(x)

    by the estimator of the model. The masks of a row are a function of its tokens and of `draws` (of `seed` where none
    are given): the value is reproducible, does not depend on the batch, and two models with one key share their masks.

    Args:
        model: a network with `logits` (B, T, V) for every token given all: any `AutoModelForMaskedLM`, or
            `BidirectionalLlama`.
        tokenizer: of its vocabulary; needed for text only.
        mask_token_id: the network's or the tokenizer's by default.
        estimator: an `Estimator`, or a name of `ESTIMATORS`.
        points: evaluations that one draw spreads, for an estimator given by name.
        num_samples: independent draws.
        target_stderr: nats; draw on until a row's standard error is at most this (see `evidence`).
        seed: names the random numbers where no `draws` are given.
        max_batch_tokens: tokens per forward pass.

    Raises:
        InputError: if no mask token is known, or for a setting out of range.
    """

    unit = Unit.TOKEN
    layout: Layout = "diffusion"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        mask_token_id: int | None = None,
        estimator: Estimator | str = "count",
        points: int | None = None,
        num_samples: int = 16,
        target_stderr: float | None = None,
        seed: int = 0,
        max_batch_tokens: int = 8192,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        named = (mask_token_id, getattr(model.config, "mask_token_id", None), getattr(tokenizer, "mask_token_id", None))
        found = next((token for token in named if token is not None), None)
        if found is None:
            raise InputError("a masked diffusion model needs a mask token: none is configured, pass mask_token_id")
        self.mask_token_id = int(found)
        self.estimator = _estimator(estimator, points)
        self.kind: Kind = self.estimator.kind
        self.num_samples = _at_least_one("num_samples", num_samples)
        self.target_stderr = _target(target_stderr)
        self.seed = seed
        self.max_batch_tokens = _at_least_one("max_batch_tokens", max_batch_tokens)

    @cached_property
    def passes(self) -> MaskedPasses:
        """Forward passes over rows with hidden tokens."""
        return MaskedPasses(self.model, self.mask_token_id)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int | None:
        """Tokens of a row, prompt included; None: no limit."""
        return context_length(self.model.config)

    def on(self, network: Any) -> MaskedDiffusionLM:
        """The same settings on another network, such as this one with an adapter."""
        return MaskedDiffusionLM(
            network,
            self.tokenizer,
            mask_token_id=self.mask_token_id,
            estimator=self.estimator,
            num_samples=self.num_samples,
            target_stderr=self.target_stderr,
            seed=self.seed,
            max_batch_tokens=self.max_batch_tokens,
        )

    def with_samples(self, num_samples: int) -> MaskedDiffusionLM:
        """The same model with another number of draws."""
        model = self.on(self.model)
        model.num_samples = _at_least_one("num_samples", num_samples)
        return model

    # ------------------------------------------------------------------ likelihood
    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Labelled values (B,) of the scored tokens given the others; differentiable.

        A random estimator gives no terms per token; `FixedOrder` gives those of its chain rule.
        """
        return self.evidence(x, target_stderr=self.target_stderr, draws=draws).likelihood

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor | None]:
        """`log_prob`; which tokens are first choices has no meaning here."""
        return self.log_prob(x), None

    def evidence(
        self,
        x: TokenBatch,
        *,
        estimator: Estimator | str | None = None,
        points: int | None = None,
        num_samples: int | None = None,
        target_stderr: float | None = None,
        max_samples: int = 4096,
        draws: DrawsKey | None = None,
    ) -> Evidence:
        """An estimate within a budget.

        With `target_stderr`, rows draw on, doubling, until their estimated standard error is at most that or
        `max_samples` are drawn; stopping by the estimated error biases the value slightly.

        Args:
            x: rows; their scored tokens are what is generated.
            estimator: instead of the model's own, with `points` where given by name.
            points: evaluations per draw.
            num_samples: independent draws; with `target_stderr`, to begin with.
            target_stderr: nats.
            max_samples: draws at most.
            draws: names the random numbers.

        Raises:
            InputError: for settings out of range.
        """
        chosen = self.estimator if estimator is None else _estimator(estimator, points)
        if estimator is None and points is not None:
            raise InputError("points belong to an estimator: name it")
        count = _at_least_one("num_samples", self.num_samples if num_samples is None else num_samples)
        if _target(target_stderr) is not None:
            count = max(count, 2)
        x = x.to(self.device)
        run = _Run(self, x, chosen, draws)
        if not chosen.is_random:
            return run.result(1)
        if target_stderr is None:
            run.extend(list(range(len(x))), count)
            return run.result(count)
        live = list(range(len(x)))
        while live and run.drawn(live[0]) < max_samples:
            have = run.drawn(live[0])
            run.extend(live, min(max(have, count), max_samples - have))
            errors = run.stderrs()
            live = [row for row in live if errors[row] > target_stderr]
        return run.result(None)

    def terms(self, x: TokenBatch, *, num_samples: int, draws: DrawsKey | None = None) -> Iterator[LogLikelihood]:
        """Single draws, one at a time: a term can be back-propagated and freed before the next is computed.

        Their mean is what `log_prob` with as many samples gives.
        """
        run = _Run(self, x.to(self.device), self.estimator, draws)
        for number in range(num_samples if self.estimator.is_random else 1):
            run.values.clear()
            run.extend(list(range(len(x))), 1)
            key = DrawsKey.of(*run.key.ids, f"draw {number}") if self.estimator.is_random else None
            yield LogLikelihood(torch.cat(run.per_row()), self.kind, self.unit, run.lengths, draws=key)

    # ------------------------------------------------------------------ conditionals and samples
    def masked_log_probs(self, ids: Tensor, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """(N, V) log-probabilities of the hidden tokens of (B, T) rows, in row order; -inf at the mask token.

        Args:
            ids: (B, T); what stands under `hidden` is ignored.
            hidden: (B, T) bool.
            real: (B, T) bool, False at padding; everything by default.
        """
        return self.passes.log_probs(ids, hidden, real)

    def sample(
        self,
        n: int,
        *,
        prompt: TokenBatch | None = None,
        generator: torch.Generator | None = None,
        max_tokens: int = 64,
    ) -> TokenBatch:
        r"""Exact samples of `max_tokens` tokens, one token per evaluation in a random order (first-hitting).

        Their law is :math:`E_\pi \prod_l c_\theta`, whose logarithm the ELBO bounds. `loglik.models.diffusion`
        has faster samplers.
        """
        prompt = bos_prompt(self.tokenizer) if prompt is None else prompt
        return first_hitting(self, prompt, n=n, length=max_tokens, generator=generator).tokens

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        return f"{type(self).__name__}({type(self.model).__name__}, {count:,} parameters, {self.estimator})"


class _Run:
    """Draws of all rows of a batch, which can be added to."""

    def __init__(self, lm: MaskedDiffusionLM, x: TokenBatch, estimator: Estimator, draws: DrawsKey | None) -> None:
        self.lm, self.x, self.estimator = lm, x, estimator
        self.packed, self.origin = x.packed_left()
        self.key = stream_key(draws, lm.seed, estimator)
        self.streams = row_streams(self.key, self.packed)
        self.columns = [marks.nonzero()[0] for marks in self.packed.scored_mask.cpu().numpy()]
        self.lengths = self.packed.scored_mask.sum(1)
        self.counts = [0] * len(x)
        self.evaluations = torch.zeros(len(x), dtype=torch.long)
        self.values: list[tuple[Tensor, Tensor]] = []  # (row of each draw, its value)
        self.contributions = torch.zeros(self.packed.ids.shape, dtype=torch.float32, device=lm.device)

    def drawn(self, row: int) -> int:
        """Draws of a row so far."""
        return self.counts[row]

    def extend(self, rows: list[int], count: int) -> None:
        """`count` more draws of these rows."""
        owners: list[int] = []
        parts: list[Points] = []
        for row in rows:
            length = len(self.columns[row])
            for _ in range(count):
                drawn = self.estimator.draw(self.streams[row], length) if length else _nothing()
                some = drawn.hidden.any(1)  # a mask that hides nothing needs no evaluation
                parts.append(
                    Points(
                        drawn.hidden[some],
                        drawn.scored[some],
                        drawn.weight[some],
                        None if drawn.rates is None else drawn.rates[some],
                    )
                )
                owners.append(row)
                self.evaluations[row] += int(some.sum())
            self.counts[row] += count
        values, contributions = self.lm.passes.sums(
            self.packed, self.columns, owners, parts, max_tokens=self.lm.max_batch_tokens
        )
        self.values.append((torch.tensor(owners, device=values.device), values))
        if not isinstance(self.estimator, FixedOrder):  # whose terms are likelihoods: others are not trained on
            contributions = contributions.detach()
        self.contributions = self.contributions.to(contributions.dtype) + contributions

    def per_row(self) -> list[Tensor]:
        """The draws of each row, in order."""
        owners = torch.cat([owner for owner, _ in self.values])
        values = torch.cat([value for _, value in self.values])
        order = owners.argsort(stable=True)
        return list(torch.split(values[order], torch.bincount(owners, minlength=len(self.x)).tolist()))

    def stderrs(self) -> list[float]:
        """Estimated standard error of each row's mean."""
        return [float(own.detach().double().std() / math.sqrt(len(own))) for own in self.per_row()]

    def result(self, count: int | None) -> Evidence:
        """The estimate; `count` is the number of draws where it is the same for all rows."""
        if not self.estimator.is_random:
            self.extend(list(range(len(self.x))), 1)
        drawn = torch.tensor(self.counts, device=self.contributions.device).clamp_min(1)
        mean = self.contributions / drawn[:, None]
        terms = self.x.unpack(mean, self.origin, self.packed)
        rows = self.per_row()
        kind, unit = self.estimator.kind, self.lm.unit
        if not self.estimator.is_random:
            if isinstance(self.estimator, FixedOrder):
                scored = self.x.scored_mask & self.x.attention_mask
                likelihood = LogLikelihood.from_per_unit(terms, scored, kind=kind, unit=unit)
            else:
                likelihood = LogLikelihood(torch.cat(rows), kind, unit, self.lengths)
        elif count is not None:
            samples = torch.stack(rows, dim=1)
            likelihood = LogLikelihood.from_samples(
                samples, kind=kind, unit=unit, num_units=self.lengths, draws=self.key
            )
        else:
            likelihood = LogLikelihood(
                torch.stack([own.mean() for own in rows]),
                kind,
                unit,
                self.lengths,
                stderr=torch.stack([own.detach().std() / math.sqrt(len(own)) for own in rows]),
                draws=self.key,
            )
        return Evidence(likelihood, self.evaluations.to(self.lm.device), terms.detach())


def _nothing() -> Points:
    return Points(np.zeros((0, 0), dtype=bool), np.zeros((0, 0), dtype=bool), np.zeros(0))


def _estimator(given: Estimator | str, points: int | None) -> Estimator:
    if isinstance(given, str):
        return estimator_named(given, points)
    if points is not None:
        raise InputError("points are a setting of the estimator itself where it is given as an object")
    return given


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a positive whole number, got {value!r}")
    return value


def _target(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"target_stderr must be positive and finite, got {value}")
    return value
