"""Random pairs, a tiny model with its reference, and TRL's own losses on them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from loglik.kinds import ConstantKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from zoo import CAUSAL, build

SIDES = ("chosen", "rejected", "reference_chosen", "reference_rejected")


def exact(values: Tensor | list[float], kind: Kind = Kind.EXACT, units: int = 1, **label) -> LogLikelihood:
    """Sequences as bare sums, each of `units` tokens."""
    values = torch.as_tensor(values)
    return LogLikelihood(values, kind, Unit.TOKEN, torch.full(values.shape, units), **label)


def unnormalised(values: Tensor | list[float], constant: str) -> LogLikelihood:
    return exact(values, Kind.UNNORMALIZED, constant=ConstantKey.of(constant))


@dataclass
class Pairs:
    """Token log-probabilities (B, T) of pairs, leaves of the graph, and which of them are scored."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor

    def likelihoods(self) -> list[LogLikelihood]:
        """Chosen, rejected, and both under the reference."""
        masks = (self.chosen_mask, self.rejected_mask) * 2
        return [LogLikelihood.from_per_unit(getattr(self, s), m) for s, m in zip(SIDES, masks, strict=True)]

    def sums(self) -> list[Tensor]:
        """The same as bare sums, by plain torch."""
        masks = (self.chosen_mask, self.rejected_mask) * 2
        return [(getattr(self, s) * m).sum(-1) for s, m in zip(SIDES, masks, strict=True)]

    def lengths(self) -> tuple[Tensor, Tensor]:
        return self.chosen_mask.sum(-1), self.rejected_mask.sum(-1)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.chosen, self.rejected), retain_graph=True)

    def assert_same(self, ours: Tensor, theirs: Tensor) -> None:
        """Equal losses and gradients, to 1e-5."""
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        for got, wanted in zip(self.gradients(ours), self.gradients(theirs), strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def random_pairs(seed: int = 0, rows: int = 6, width: int = 9, dtype: torch.dtype = torch.float32) -> Pairs:
    """Completions of 1 to 6 tokens somewhere in `width` columns; columns that are not scored hold numbers too."""
    generator = torch.Generator().manual_seed(seed)
    terms = [-2 * torch.rand(rows, width, generator=generator, dtype=torch.float64) for _ in SIDES]
    columns = torch.arange(width)
    masks = []
    for _ in range(2):
        first = torch.randint(0, 3, (rows, 1), generator=generator)
        length = torch.randint(1, 7, (rows, 1), generator=generator)
        masks.append((columns >= first) & (columns < first + length))
    leaves = [t.to(dtype).requires_grad_(i < 2) for i, t in enumerate(terms)]
    return Pairs(*leaves, *masks)


# ------------------------------------------------------------------ a real model
PROMPTS = [[1, 5, 6], [1, 7], [1, 9, 3, 4]]
CHOSEN = [[8, 9, 2], [10, 11, 12, 13, 2], [2]]
REJECTED = [[8, 3, 4, 2], [10, 2], [15, 16, 17, 2]]


def tiny_batches() -> tuple[TokenBatch, TokenBatch]:
    starts = [len(p) for p in PROMPTS]
    return tuple(
        TokenBatch.from_lists([p + c for p, c in zip(PROMPTS, side, strict=True)], starts=starts)
        for side in (CHOSEN, REJECTED)
    )


@cache
def tiny_models():
    """A policy and a reference with other weights."""
    policy, reference = build(CAUSAL["llama"], 20), build(CAUSAL["llama"], 20, seed=1)
    for parameter in reference.parameters():
        parameter.requires_grad_(False)
    return policy, reference


@cache
def tiny_likelihoods() -> list[LogLikelihood]:
    """Chosen and rejected under the policy, then under the reference; one graph, kept."""
    return [CausalLM(model).log_prob(batch) for model in tiny_models() for batch in tiny_batches()]


@cache
def tiny_sums() -> list[Tensor]:
    """The same sums by plain torch, row by row and without padding."""

    def score(model, prompt, completion):
        ids = torch.tensor([prompt + completion])
        log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    return [
        torch.stack([score(model, p, c) for p, c in zip(PROMPTS, side, strict=True)])
        for model in tiny_models()
        for side in (CHOSEN, REJECTED)
    ]


def parameter_gradients(loss: Tensor) -> list[Tensor]:
    policy, _ = tiny_models()
    return list(torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True))


def assert_same_training(ours: Tensor, plain: Tensor, tolerance: float = 1e-5) -> None:
    """Equal losses, and equal gradients in every parameter of the tiny policy."""
    torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)
    for got, expected in zip(parameter_gradients(ours), parameter_gradients(plain), strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=1e-4)


# ------------------------------------------------------------------ TRL
@cache
def trl():
    """TRL's trainers; importing the experimental ones warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer, KTOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def _accelerator() -> SimpleNamespace:
    def same(tensor):
        return tensor

    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


def _trainer(**settings) -> SimpleNamespace:
    defaults = {
        "model": SimpleNamespace(training=True),
        "accelerator": _accelerator(),
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(defaults | settings))


def _model(log_probs: Tensor):
    """A stand-in for TRL's model: its outputs are the given token log-probabilities."""
    zeros = torch.zeros_like(log_probs)
    output = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **inputs: output


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """TRL's inputs, which have one column more in front: the token that nothing predicts."""
    completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))
    ids = torch.zeros_like(completion_mask)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask}


def trl_dpo(
    pairs: Pairs, loss_types: list[str], *, beta: float, label_smoothing: float = 0.0, weights=None
) -> tuple[Tensor, dict[str, float]]:
    """TRL's `DPOTrainer` loss and its metrics."""
    mask = torch.cat([pairs.chosen_mask, pairs.rejected_mask])
    _, _, reference_chosen, reference_rejected = pairs.sums()
    trainer = _trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )
    inputs = _inputs(mask) | {"ref_chosen_logps": reference_chosen, "ref_rejected_logps": reference_rejected}
    model = _model(torch.cat([pairs.chosen, pairs.rejected]) * mask)
    loss = trl().dpo._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


def trl_cpo(chosen: Tensor, rejected: Tensor, loss_type: str, *, beta: float, gamma=0.5, label_smoothing=0.0):
    """TRL's `CPOTrainer` loss per pair."""
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=_accelerator(),
        loss_type=loss_type,
        simpo_gamma=gamma,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    return trl().cpo.cpo_loss(trainer, chosen, rejected)


def trl_orpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> tuple[Tensor, ...]:
    """TRL's odds-ratio term per pair (its negative), rewards, and means of ratio and odds."""
    return trl().orpo.odds_ratio_loss(SimpleNamespace(beta=beta, accelerator=_accelerator()), chosen, rejected)


def trl_kto(
    log_probs: Tensor,
    mask: Tensor,
    reference: Tensor,
    labels: Tensor,
    mismatched: tuple[Tensor, Tensor],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    loss_type: str = "kto",
) -> tuple[Tensor, dict[str, float]]:
    """TRL's `KTOTrainer` loss and metrics; `mismatched` holds sums under policy and reference."""
    trainer = _trainer(
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        _compute_kl_logps=lambda model, batch: mismatched[0].detach(),
    )
    inputs = _inputs(mask) | {"label": labels, "ref_logps": reference, "ref_KL_logps": mismatched[1]}
    loss = trl().kto._compute_loss(trainer, _model(log_probs * mask), inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
