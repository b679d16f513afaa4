r"""Training of any-order marginals (MaM), from data or from an unnormalised log-density."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from loglik.errors import InputError, LoglikError
from loglik.models.any_order import AnyOrderMarginals
from loglik.objectives.any_order import flow_matching, kl_reinforce, marginal_self_consistency, order_agnostic_nll
from loglik.progress import bar

__all__ = ["EnergyConfig", "MarginalsConfig", "MarginalsFit", "fit_energy", "fit_marginals"]


@dataclass(frozen=True, slots=True)
class MarginalsConfig:
    """How to train by maximum likelihood.

    Args:
        conditional_steps: of the first stage, which trains the conditional network; 0 leaves it out.
        marginal_steps: of the second, which trains the marginal network to agree with it; 0 leaves it out.
        batch_size: rows per step.
        learning_rate: of Adam at the start of each stage.
        final_lr_ratio: last learning rate over the first, along a cosine; 1 for a constant one.
        max_grad_norm: gradient-norm clip; 0 for none.
        model_share: of the second stage's rows, how many are samples of the conditional network instead of data.
        model_samples: how many samples those are taken from; they are drawn once, D passes each.
        seed: of the batches, orders, steps and samples.
    """

    conditional_steps: int = 3000
    marginal_steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 5e-4
    final_lr_ratio: float = 0.0
    max_grad_norm: float = 0.0
    model_share: float = 0.5
    model_samples: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        _require_steps(batch_size=self.batch_size, model_samples=self.model_samples)
        for name in ("conditional_steps", "marginal_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        _require_rates(self.learning_rate, self.final_lr_ratio, self.max_grad_norm)
        if not 0 <= self.model_share <= 1:
            raise InputError(f"model_share must lie between 0 and 1, got {self.model_share}")


@dataclass(frozen=True, slots=True)
class EnergyConfig:
    """How to train towards an unnormalised log-density.

    Args:
        objective: ``kl``, REINFORCE on the Kullback-Leibler divergence, or ``flow_matching``, regression of the
            log-marginals of whole vectors, which learns log Z too.
        steps: optimizer steps.
        batch_size: rows per step: persistent samples, which are moved before each, and uniform vectors.
        learning_rate: of Adam at the start.
        log_z_learning_rate: that of the learned log Z, a number that has far to go in steps of this size.
        final_lr_ratio: last learning rate over the first, along a cosine; 1 for a constant one.
        max_grad_norm: gradient-norm clip; 0 for none.
        alpha: weight of self-consistency; without it (0) the conditional network is not trained.
        block: entries of every sample that are drawn again before each step; at most D.
        uniform_share: of the rows, how many are uniform vectors instead of persistent samples. Flow matching and
            self-consistency train on them too, so that states that the model rarely draws are visited; REINFORCE needs
            the model's own.
        seed: of the samples, orders and steps.
    """

    objective: Literal["kl", "flow_matching"] = "kl"
    steps: int = 3000
    batch_size: int = 256
    learning_rate: float = 5e-4
    log_z_learning_rate: float = 0.1
    final_lr_ratio: float = 0.0
    max_grad_norm: float = 0.0
    alpha: float = 4.0
    block: int = 4
    uniform_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("kl", "flow_matching"):
            raise InputError(f"objective must be 'kl' or 'flow_matching', got {self.objective!r}")
        _require_steps(steps=self.steps, batch_size=self.batch_size, block=self.block)
        _require_rates(self.learning_rate, self.final_lr_ratio, self.max_grad_norm)
        if not 0 < self.log_z_learning_rate < math.inf:
            raise InputError(f"log_z_learning_rate must be positive and finite, got {self.log_z_learning_rate}")
        if not 0 <= self.alpha < math.inf:
            raise InputError(f"alpha must be at least 0 and finite, got {self.alpha}")
        if not 0 <= self.uniform_share <= 1:
            raise InputError(f"uniform_share must lie between 0 and 1, got {self.uniform_share}")


@dataclass(frozen=True, slots=True)
class MarginalsFit:
    """How a training went.

    Attributes:
        curves: a number per step of each, nats: ``conditional`` and ``marginal`` (the losses of the two stages) or
            ``loss`` (energy-based), and ``residual``, the mean size of the self-consistency residual.
        seconds: wall-clock time.
        log_normalizer: the learned log Z of ``flow_matching``, nats; None elsewhere.
    """

    curves: Mapping[str, tuple[float, ...]]
    seconds: float
    log_normalizer: float | None = None


def fit_marginals(model: AnyOrderMarginals, data: Tensor, config: MarginalsConfig | None = None) -> MarginalsFit:
    r"""Maximum likelihood in two stages, in place: conditionals from data, then marginals from the conditionals.

    The first minimises `order_agnostic_nll`, the second `marginal_self_consistency` with the conditionals frozen and
    :math:`l(\emptyset)` anchored at 0, on data and samples of the conditional network.

    Args:
        model: both networks are trained.
        data: (N, D) long; batches are drawn with replacement.
        config: settings.

    Raises:
        InputError: for no data, a shape that does not fit, or an entry that is no value.
        LoglikError: if a loss or its gradient is not finite.

    Source: arXiv 2310.12920.
    """
    config = config or MarginalsConfig()
    model.require_complete(data)
    if not len(data):
        raise InputError("there is nothing to train on: data has no rows")
    generator = torch.Generator().manual_seed(config.seed)
    began = time.monotonic()

    def nll() -> dict[str, Tensor]:
        rows = _picked(data, config.batch_size, generator).to(model.device)
        return {"conditional": order_agnostic_nll(model, rows, generator).mean()}

    curves = _descend(
        nll,
        [(list(model.conditional_network.parameters()), config.learning_rate)],
        config.conditional_steps,
        config,
        "any-order conditionals",
    )
    own = round(config.model_share * config.batch_size) if config.marginal_steps else 0
    # The conditionals are frozen from here on: what they draw now they would draw at any later step.
    drawn = model.sample(config.model_samples if own else 0, generator=generator)

    def disagreement() -> dict[str, Tensor]:
        from_data = _picked(data, config.batch_size - own, generator).to(model.device)
        rows = torch.cat([from_data, _picked(drawn, own, generator)])
        terms = marginal_self_consistency(model, rows, generator, freeze_conditionals=True)
        return {"marginal": terms.mean(), "residual": terms.metrics["residual"].mean()}

    curves |= _descend(
        disagreement,
        [(list(model.marginal_network.parameters()), config.learning_rate)],
        config.marginal_steps,
        config,
        "any-order marginals",
    )
    return MarginalsFit(curves, time.monotonic() - began)


def fit_energy(
    model: AnyOrderMarginals, log_density: Callable[[Tensor], Tensor], config: EnergyConfig | None = None
) -> MarginalsFit:
    r"""Train both networks towards :math:`p \propto e^f`, in place, on samples that block Gibbs steps keep moving.

    .. math:: L = L_\text{KL or FM}(x) + \alpha \bigl(D\, E r^2 + (l(\emptyset) - c)^2\bigr)

    With ``kl``, c is 0 and the model becomes a normalised one; with ``flow_matching``, c is learned, and both it and
    :math:`l(\emptyset)` become :math:`\log Z`. The samples are drawn with the conditional network, and follow it with a
    delay: they are no independent draws of the model.

    Args:
        model: both networks are trained.
        log_density: f, (B, D) long to (B,) finite nats, minus the energy; no gradient goes through it.
        config: settings.

    Raises:
        InputError: for a block larger than the vectors, one sample for ``kl``, or values of f that are not finite.
        LoglikError: if the loss or its gradient is not finite.

    Source: arXiv 2310.12920.
    """
    config = config or EnergyConfig()
    if config.block > model.dims:
        raise InputError(f"block is {config.block}, and vectors have {model.dims} entries: lower it")
    generator = torch.Generator().manual_seed(config.seed)
    began = time.monotonic()
    uniform = round(config.uniform_share * config.batch_size)
    samples = model.sample(config.batch_size - uniform, generator=generator)
    everything = torch.ones(model.dims, dtype=torch.bool, device=model.device)
    first = next(model.parameters())
    regression = config.objective == "flow_matching"
    log_z = nn.Parameter(torch.zeros((), dtype=first.dtype, device=first.device), requires_grad=regression)

    def loss() -> dict[str, Tensor]:
        nonlocal samples
        samples = model.gibbs(samples, config.block, generator=generator)
        anywhere = torch.randint(model.values, (uniform, model.dims), generator=generator).to(samples.device)
        rows = torch.cat([samples, anywhere])
        matched = rows if regression else samples
        with torch.no_grad():
            target = log_density(matched)
        l_x = model.log_marginal(matched, everything)
        total = (flow_matching(l_x, target) if regression else kl_reinforce(l_x, target)).mean()
        if not config.alpha:
            return {"loss": total}
        terms = marginal_self_consistency(model, rows, generator, freeze_conditionals=False, log_normalizer=log_z)
        return {"loss": total + config.alpha * terms.mean(), "residual": terms.metrics["residual"].mean()}

    groups = [(list(model.parameters()), config.learning_rate)]
    groups += [([log_z], config.log_z_learning_rate)] if regression else []
    curves = _descend(loss, groups, config.steps, config, f"energy-based ({config.objective})")
    return MarginalsFit(curves, time.monotonic() - began, float(log_z.detach()) if regression else None)


def _descend(
    losses: Callable[[], dict[str, Tensor]],
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    steps: int,
    config: MarginalsConfig | EnergyConfig,
    title: str,
) -> dict[str, tuple[float, ...]]:
    """Adam on groups of parameters with their learning rates, and the curve of every number that `losses` gives.

    The first of the numbers is the loss.

    Raises:
        LoglikError: if one of them or the gradient is not finite.
    """
    trained = [parameter for group, _ in groups for parameter in group]
    optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups])
    curves: dict[str, list[float]] = {}
    with bar(title, total=steps, unit="step") as advance:
        for step in range(steps):
            falling = 0.5 * (1 + math.cos(math.pi * step / steps))
            share = config.final_lr_ratio + (1 - config.final_lr_ratio) * falling
            for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * share
            numbers = losses()
            loss = next(iter(numbers.values()))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf)
            value = float(loss.detach())
            for name, number in (("loss", value), ("gradient norm", float(norm))):
                if not math.isfinite(number):
                    raise LoglikError(
                        f"{title}: the {name} is {number} at step {step + 1}: lower learning_rate, which is "
                        f"{config.learning_rate:g}, or set max_grad_norm"
                    )
            optimizer.step()
            for name, tensor in numbers.items():
                curves.setdefault(name, []).append(float(tensor.detach()))
            advance(1, f"loss {value:.4f}")
    return {name: tuple(values) for name, values in curves.items()}


def _picked(rows: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` of the rows, with replacement."""
    if not n:
        return rows[:0]
    return rows[torch.randint(len(rows), (n,), generator=generator).to(rows.device)]


def _require_steps(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")


def _require_rates(learning_rate: float, final_lr_ratio: float, max_grad_norm: float) -> None:
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate must be positive and finite, got {learning_rate}")
    if not 0 <= final_lr_ratio <= 1:
        raise InputError(f"final_lr_ratio must lie between 0 and 1, got {final_lr_ratio}")
    if not 0 <= max_grad_norm < math.inf:
        raise InputError(f"max_grad_norm must be at least 0, got {max_grad_norm}")
