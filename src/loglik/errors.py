"""The errors a user can mend: one sentence that names the row or the option and says what to do."""

from __future__ import annotations

__all__ = ["InputError", "LoglikError", "RowError"]


class LoglikError(ValueError):
    """Something the caller can mend. The command line prints the sentence and exits with code 2."""


class InputError(LoglikError):
    """A file, option or model name cannot be used as given."""


class RowError(LoglikError):
    """One row of the input cannot be scored.

    Args:
        reason: the sentence, without the row.
        row: what names the row to its owner (``"line 3"``, an id); ``None`` if the caller adds it.
        skipped: the row was left out because its owner asked for that.
    """

    def __init__(self, reason: str, *, row: str | None = None, skipped: bool = False) -> None:
        super().__init__(reason if row is None else f"{row}: {reason}")
        self.reason = reason
        self.row = row
        self.skipped = skipped

    def at(self, row: str) -> RowError:
        """The same error, with the row it belongs to."""
        return RowError(self.reason, row=row, skipped=self.skipped)
