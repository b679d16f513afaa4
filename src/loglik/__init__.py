"""One interface to the likelihood of generative models: measure it, train on it, decode with it, decide by it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loglik.errors import InputError, LoglikError, RowError
    from loglik.kinds import Kind, Unit
    from loglik.likelihood import LogLikelihood, Measurement
    from loglik.models.batch import TokenBatch
    from loglik.models.load import load
    from loglik.scoring.next_bytes import next_bytes
    from loglik.scoring.score import score
    from loglik.scoring.stream import score_text
    from loglik.training.fit import fit

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Kind",
    "LogLikelihood",
    "LoglikError",
    "Measurement",
    "RowError",
    "TokenBatch",
    "Unit",
    "fit",
    "load",
    "next_bytes",
    "score",
    "score_text",
]

# Public names and where they live. They are imported at first use, so that commands without tensors start at once.
_HOMES = {
    "InputError": "loglik.errors",
    "Kind": "loglik.kinds",
    "LogLikelihood": "loglik.likelihood",
    "LoglikError": "loglik.errors",
    "Measurement": "loglik.likelihood",
    "RowError": "loglik.errors",
    "TokenBatch": "loglik.models.batch",
    "Unit": "loglik.kinds",
    "fit": "loglik.training.fit",
    "load": "loglik.models.load",
    "next_bytes": "loglik.scoring.next_bytes",
    "score": "loglik.scoring.score",
    "score_text": "loglik.scoring.stream",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loglik' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
