"""Low-rank adapters by PEFT around a loglik model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loglik.errors import InputError

__all__ = ["LoraSettings", "with_lora"]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Of an adapter (arXiv 2106.09685).

    Args:
        rank: of the update of each matrix.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapter's input.
        targets: names of the layers; all linear layers but the head if empty.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Sequence[str] = ()


def with_lora(model: Any, settings: LoraSettings, *, base: str | None = None) -> Any:
    """The same model with a new adapter on its network; only the adapter is trained.

    Args:
        model: a loglik model; its network is wrapped in place.
        settings: of the adapter.
        base: name or directory of the base model, recorded beside the adapter so that it can be loaded again.

    Raises:
        InputError: for settings out of range, or layers that the network does not have.
    """
    from peft import LoraConfig, get_peft_model

    if settings.rank < 1 or settings.alpha <= 0 or not 0 <= settings.dropout < 1:
        raise InputError(
            f"an adapter needs a rank of at least 1, a positive alpha and a dropout in [0, 1), got {settings.rank}, "
            f"{settings.alpha} and {settings.dropout}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or "all-linear",
        task_type="SEQ_2_SEQ_LM" if model.layout == "seq2seq" else "CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        network = get_peft_model(model.model, config)
    except ValueError as error:
        raise InputError(f"the adapter does not fit this network ({str(error).splitlines()[0][:160]})") from None
    if base is not None:
        network.peft_config["default"].base_model_name_or_path = base
    return model.on(network) if hasattr(model, "on") else type(model)(network, model.tokenizer)
