r"""Every token's logit at every position, and the states before the head: for objectives that need more than targets.

A `LogLikelihood` knows the probability of the tokens that are there. Label smoothing, n-gram matching or soft
Q-learning need those of all others as well, and contrastive objectives the states :math:`h_t` themselves. What a causal
model and an encoder-decoder have in common is written once here: position by position of a forward pass without
padding, put back into the columns of the batch, so that neither the padding nor the other rows change anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.seq2seq import Seq2SeqLM, _split
from loglik.models.tokens import widened
from loglik.models.trunk import Trunk

__all__ = [
    "EncoderDecoderStates",
    "Head",
    "encoder_decoder_states",
    "encoder_states",
    "output_head",
    "predicted_mask",
    "scored_logits",
    "states_before_head",
    "target_logits",
]

Head: TypeAlias = Callable[[Tensor], Tensor]  # hidden (..., D) -> logits (..., V)


class EncoderDecoderStates(NamedTuple):
    """Both sides of one forward pass of an encoder-decoder.

    Attributes:
        encoder: (B, S, D) states of the source tokens, aligned left, zero behind each row's last.
        source_mask: (B, S) bool, True where a source token stands.
        decoder: (B, T, D) the state that predicts the token in each column of the batch, zero where nothing does.
        predicted: (B, T) bool, True where something predicts the token.
    """

    encoder: Tensor
    source_mask: Tensor
    decoder: Tensor
    predicted: Tensor


def target_logits(model: object, x: TokenBatch, *, method: str = "target_logits") -> Tensor:
    r"""Raw logits (B, T, V) that predict the token in each column of `x`, in float32 or better; differentiable.

    .. math:: p_\theta(v \mid x_{<t}) = e^{z_{tv}} \Big/ \sum_u e^{z_{tu}}

    A causal model predicts every real token but a row's first, an encoder-decoder every target token. Columns that
    nothing predicts (padding, the first token, the source) are zero.

    Args:
        model: a `CausalLM` or `Seq2SeqLM`.
        x: B rows; padding may stand anywhere.
        method: name for the refusal.

    Raises:
        InputError: for another model, or a batch in which nothing is predicted.
    """
    known = _known(model, method)
    places = _places(known, x, None)
    logits = _logits(known, places)
    return _scatter(logits, places, x)


def scored_logits(model: object, x: TokenBatch, *, method: str = "scored_logits") -> Tensor:
    """The rows of `target_logits` at the scored tokens alone: (N, V), in the order of ``x.ids[x.scored_mask]``.

    The head sees these positions only, so that a long prompt costs no logits.

    Raises:
        InputError: for another model, for a batch without scored tokens, or a scored token that nothing predicts.
    """
    known = _known(model, method)
    return _logits(known, _places(known, x, x.scored_mask & x.attention_mask))


def states_before_head(model: object, x: TokenBatch, *, method: str = "states_before_head") -> Tensor:
    """(B, T, D) the state that predicts the token in each column of `x`; zero where nothing does; differentiable.

    ``output_head(model)(states)`` are the `target_logits` there. The states are the network's own, in its dtype: a
    factor or a cap on the logits (T5's :math:`D^{-1/2}`, Gemma's soft-cap) is part of the head.

    Raises:
        InputError: for another model, one that cannot be taken apart, or a batch in which nothing is predicted.
    """
    known = _known(model, method)
    trunk = _trunk(known, method)
    places = _places(known, x, None)
    return _scatter(_hidden(known, trunk, places), places, x)


def output_head(model: object, *, method: str = "output_head") -> Head:
    """The head by itself: hidden states (..., D) to logits (..., V), float32 or better, with the weights of now.

    Raises:
        InputError: for another model, or one that cannot be taken apart.
    """
    trunk = _trunk(_known(model, method), method)
    linear = trunk.head
    if linear is not None:
        return linear.logits

    def own(hidden: Tensor) -> Tensor:
        rows = widened(trunk.logits(hidden.reshape(-1, hidden.shape[-1])))
        return rows.reshape(*hidden.shape[:-1], rows.shape[-1])

    return own


def predicted_mask(model: object, x: TokenBatch, *, method: str = "predicted_mask") -> Tensor:
    """(B, T) bool, True where the model predicts the token of a column: where `target_logits` are not just zeros.

    Raises:
        InputError: for another model, or a batch in which nothing is predicted.
    """
    return _mask(_places(_known(model, method), x, None, forward=False), x)


def encoder_decoder_states(
    model: object, x: TokenBatch, *, method: str = "encoder_decoder_states"
) -> EncoderDecoderStates:
    """Encoder states and the decoder states before the head from one forward pass; differentiable.

    Equal sources are encoded once. Under dropout both sides belong to the same draw.

    Raises:
        InputError: for anything but an encoder-decoder that can be taken apart, or a batch without target tokens.
    """
    known = _encoder_decoder(model, method)
    trunk = _trunk(known, method)
    places = _places(known, x, None)
    states, mask = _encoded(places)
    decoder = _scatter(_hidden(known, trunk, places), places, x)
    return EncoderDecoderStates(states, mask, decoder, _mask(places, x))


def encoder_states(model: object, x: TokenBatch, *, method: str = "encoder_states") -> tuple[Tensor, Tensor]:
    """States (B, S, D) of the source tokens, aligned left and zero behind each row's last; and their mask (B, S).

    Raises:
        InputError: for anything but an encoder-decoder, or a batch without target tokens.
    """
    return _encoded(_places(_encoder_decoder(model, method), x, None))


class _Places(NamedTuple):
    """One forward pass, and which of its positions predicts which column of the batch (N of them, row-major)."""

    inputs: dict[str, Any]
    lengths: Tensor  # (B,) tokens of each row of the pass, for causal models
    row: Tensor
    position: Tensor
    column: Tensor


def _places(model: CausalLM | Seq2SeqLM, x: TokenBatch, wanted: Tensor | None, *, forward: bool = True) -> _Places:
    """Where each predicted column of `x` is predicted; only those of `wanted` (B, T) where it is given.

    Without `forward` nothing is encoded, and the inputs of the pass are left out.
    """
    x = x.to(model.device)
    packed, origin = x.packed_left()
    if isinstance(model, CausalLM):
        row, packed_column = packed.attention_mask.nonzero(as_tuple=True)
        row, packed_column = row[packed_column > 0], packed_column[packed_column > 0]
        position = packed_column - 1
        inputs: dict[str, Any] = {"input_ids": packed.ids[:, :-1]}  # the last token is only ever a target
    else:
        source, target, target_column = _split(packed)
        row, position = target.attention_mask.nonzero(as_tuple=True)
        packed_column = target_column[row, position]
        inputs = model._inputs(source, target) if forward and len(row) else {}
    column = origin[row, packed_column]
    if wanted is not None:
        here = wanted.to(x.ids.device)[row, column]
        if int(here.sum()) != int(wanted.sum()):
            found = torch.zeros_like(x.scored_mask).index_put((row, column), here)
            missing, where = (wanted.to(found.device) & ~found).nonzero()[0].tolist()
            raise InputError(f"row {missing}: column {where} is scored, and nothing predicts it: score later tokens")
        row, position, column = row[here], position[here], column[here]
    if not len(row):
        raise InputError("no token of this batch is predicted or scored: give rows with something to predict")
    return _Places(inputs, (packed.attention_mask.sum(1) - 1).clamp_min(0), row, position, column)


def _hidden(model: CausalLM | Seq2SeqLM, trunk: Trunk, places: _Places) -> Tensor:
    """(N, D) states that predict."""
    if isinstance(model, CausalLM):
        states = model._hidden(trunk, places.inputs["input_ids"], places.lengths)
    else:
        states = trunk.hidden(**places.inputs)
    return states[places.row, places.position]


def _logits(model: CausalLM | Seq2SeqLM, places: _Places) -> Tensor:
    """(N, V) logits that predict; of a network that cannot be taken apart, picked from all of its logits."""
    if model.trunk is not None:
        return output_head(model)(_hidden(model, model.trunk, places))
    inputs = places.inputs if isinstance(model, Seq2SeqLM) else {**places.inputs, "use_cache": False}
    logits: Tensor = model.model(**inputs).logits[places.row, places.position]
    return widened(logits)


def _encoded(places: _Places) -> tuple[Tensor, Tensor]:
    mask = places.inputs["attention_mask"].bool()
    states: Tensor = places.inputs["encoder_outputs"].last_hidden_state
    return states.masked_fill(~mask[..., None], 0.0), mask


def _scatter(values: Tensor, places: _Places, x: TokenBatch) -> Tensor:
    """(N, K) values at the columns of `x`: (B, T, K), zero elsewhere."""
    out = values.new_zeros(*x.ids.shape, values.shape[-1])
    return out.index_put((places.row, places.column), values)


def _mask(places: _Places, x: TokenBatch) -> Tensor:
    """(B, T) bool, True at the columns of the batch that are predicted."""
    return _scatter(torch.ones_like(places.row, dtype=torch.bool)[:, None], places, x)[..., 0]


def _known(model: object, method: str) -> CausalLM | Seq2SeqLM:
    if isinstance(model, CausalLM | Seq2SeqLM):
        return model
    raise InputError(
        f"{method} needs a logit for every token at every position (a causal or encoder-decoder network); "
        f"{type(model).__name__} does not have it: use a model that does"
    )


def _encoder_decoder(model: object, method: str) -> Seq2SeqLM:
    if isinstance(model, Seq2SeqLM):
        return model
    raise InputError(
        f"{method} needs the states of an encoder; {type(model).__name__} does not have it: use an encoder-decoder"
    )


def _trunk(model: CausalLM | Seq2SeqLM, method: str) -> Trunk:
    if model.trunk is None:
        raise InputError(
            f"{method} needs the states before the head, and {type(model.model).__name__} does not say what its head "
            "does: use a network of transformers with a usual head"
        )
    return model.trunk
