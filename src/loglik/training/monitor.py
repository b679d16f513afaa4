"""Watching preference training: displacement and over-optimisation indicators at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loglik.training.data import Row

__all__ = ["PreferenceMonitor"]


class PreferenceMonitor:
    """placeholder"""

    def __init__(self, rows: Sequence[Row], *, batch_size: int = 8) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __call__(self, step: int, model: Any, record: dict[str, Any]) -> None:
        """Add."""
