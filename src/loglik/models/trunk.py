"""A transformers model in two steps: hidden states first, then the head at the positions that are scored.

The architecture's own code computes both. A forward hook on the transformer catches the hidden states and hands the
LM head a single position, so that no logits of all positions ever exist. Which algebra the head is (scale, bias,
soft-cap) is read from the model, checked against its logits once, and replaced by the architecture's own head, run on
the chosen positions, where it is anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loglik.models.head import HeadScores, LinearHead, token_log_probs
from loglik.models.tokens import greedy_match, selected_log_probs, widened

__all__ = ["Trunk", "evaluating", "relative_difference", "token_scores"]


@dataclass(slots=True)
class Trunk:
    """Hidden states of a model, and log-probabilities from them.

    Args:
        model: any transformers model with logits.
        probe: inputs of one short forward pass, to find out what the head is.

    Raises:
        TypeError: if nothing in the model hands its head the hidden states.
    """

    model: Any
    probe: Mapping[str, Tensor]
    _transformer: nn.Module = field(init=False)
    _form: tuple[float, float | None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        with evaluating(self.model), torch.no_grad():
            self._transformer = _find_transformer(self.model, self.probe)
            self._form = self._find_form()
            if self._form is None:
                self._try_own_head()

    @classmethod
    def find(cls, model: Any, *names: str, longest: int | None = None) -> Trunk | None:
        """The trunk of a model whose inputs have these names; None for a network that cannot be taken apart."""
        device = next(model.parameters()).device
        probe = (
            torch.arange(3, 3 + min(6, longest or 6), device=device)[None] % model.config.get_text_config().vocab_size
        )
        try:
            return cls(model, dict.fromkeys(names, probe))
        except (TypeError, NotImplementedError):  # the latter where weights are elsewhere while nothing runs
            return None

    @property
    def inner(self) -> Any:
        """The transformers model itself, under an adapter if there is one."""
        return _inner(self.model)

    @property
    def head(self) -> LinearHead | None:
        """The head as linear algebra, with the weights of this moment; None where it is anything else."""
        if self._form is None:
            return None
        output = self.inner.get_output_embeddings()
        if type(output) is not nn.Linear:  # an adapter has been put on it since
            return None
        return LinearHead(output.weight, getattr(output, "bias", None), *self._form)

    def hidden(self, **inputs: Any) -> Tensor:
        """(B, T, D) last hidden states, as the head would receive them."""
        caught: list[Tensor] = []

        def catch(states: Tensor) -> Tensor:
            caught.append(states)
            return states[:, :1]

        with _hooked(self._transformer, catch):
            self.model(**inputs)
        return caught[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) logits of (N, D) hidden states by the architecture's own head, in the model's dtype."""
        first = {name: value[:1, :1] for name, value in self.probe.items()}
        with _hooked(self._transformer, lambda _: hidden.unsqueeze(0)):
            out: Tensor = self.model(**first).logits[0]
        return out

    def log_probs(
        self, hidden: Tensor, targets: Tensor, *, rows: Tensor | None = None, subset: Tensor | None = None
    ) -> HeadScores:
        """Log-probabilities of targets (N,) given hidden states (P, D); see `token_log_probs`."""
        head = self.head
        if head is not None:
            return token_log_probs(hidden, targets, head, rows=rows, subset=subset)
        logits = self.logits(hidden)
        mass = None
        if subset is not None:
            with torch.no_grad():
                mass = torch.log_softmax(widened(logits), -1)[:, subset].logsumexp(-1)
        logits = logits if rows is None else logits[rows]
        return HeadScores(selected_log_probs(logits, targets), greedy_match(logits.detach(), targets), mass)

    def _try_own_head(self) -> None:
        """The architecture's own head on caught hidden states must give its logits.

        Raises:
            TypeError: if it does not.
        """
        want = widened(self.model(**self.probe).logits[0])
        got = widened(self.logits(self.hidden(**self.probe)[0]))
        finite = bool(torch.isfinite(want).all())
        if got.shape != want.shape or (finite and relative_difference(got, want) > _tolerance(want.dtype)):
            raise TypeError(f"{type(self.inner).__name__} does not say what its head does")

    def _find_form(self) -> tuple[float, float | None] | None:
        """Scale and soft-cap with which the linear head gives the model's logits, or None if nothing does."""
        output = self.inner.get_output_embeddings()
        if type(output) is not nn.Linear:  # an adapter or a parametrisation on the head is not its weight alone
            return None
        want = widened(self.model(**self.probe).logits)
        hidden = self.hidden(**self.probe)
        if output.weight.shape[1] != hidden.shape[-1]:  # something stands between
            return None
        config = self.inner.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        cap = getattr(config, "final_logit_softcapping", None)
        for scale in _scales(config):
            form = (scale, float(cap) if cap else None)
            got = LinearHead(output.weight, output.bias, *form).logits(hidden)
            if got.shape == want.shape and relative_difference(got, want) < _tolerance(hidden.dtype):
                return form
        return None


def token_scores(
    trunk: Trunk | None, model: Any, inputs: Mapping[str, Any], at: Any, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) and greedy match (N,) of targets at positions of a forward pass, by the leanest way.

    Args:
        trunk: of the model; None computes all of its logits.
        model: the network.
        inputs: of the forward pass.
        at: index into (B, T) that picks the N positions.
        targets: (N,) token ids.
    """
    if trunk is None:
        logits = model(**inputs).logits[at]
        return selected_log_probs(logits, targets), greedy_match(logits.detach(), targets)
    scores = trunk.log_probs(trunk.hidden(**inputs)[at], targets)
    return scores.log_probs, scores.greedy


def relative_difference(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where either is not finite."""
    difference = (got - want).abs().max() / want.abs().max().clamp_min(1e-6)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for a while, then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 2e-2)


def _scales(config: Any) -> list[float]:
    """Factors on the logits that architectures are known to have; the first that fits is taken.

    A factor that the configuration names comes before none: where all logits are 0, each would fit.
    """
    found = []
    for name in ("logit_scale", "lm_head_multiplier"):
        value = getattr(config, name, None)
        found += [float(value)] if isinstance(value, int | float) and value else []
    divisor = getattr(config, "logits_scaling", None)
    found += [1 / float(divisor)] if isinstance(divisor, int | float) and divisor else []
    width = getattr(config, "d_model", None)
    found += [1.0]
    found += [float(width) ** -0.5] if isinstance(width, int) else []
    return found


def _inner(model: Any) -> Any:
    """The transformers model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find_transformer(model: Any, probe: Mapping[str, Tensor]) -> nn.Module:
    """The module whose output the head reads: the decoder of an encoder-decoder, else everything but the head."""
    inner = _inner(model)
    names = ["base_model", "get_decoder", "model", "transformer"]
    names = ["get_decoder"] if inner.config.is_encoder_decoder else names
    for name in names:
        found = getattr(inner, name, None)
        module = found() if callable(found) and not isinstance(found, nn.Module) else found
        if not isinstance(module, nn.Module) or module is inner:
            continue
        if _is_called(module, model, probe):
            return module
    raise TypeError(f"{type(inner).__name__} does not say what stands before its head")


def _is_called(module: nn.Module, model: Any, probe: Mapping[str, Tensor]) -> bool:
    """Whether a forward pass goes through the module."""
    calls: list[Tensor] = []

    def note(states: Tensor) -> Tensor:
        calls.append(states)
        return states

    with _hooked(module, note):
        model(**probe)
    return bool(calls)


@contextmanager
def _hooked(transformer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The transformer's hidden states pass through `change` on their way to the head."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        output["last_hidden_state"] = change(output["last_hidden_state"])
        return output

    handle = transformer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
