"""Progress on standard error: a bar with rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["bar", "quiet_transformers", "stderr_console"]


def stderr_console() -> Console:
    """A console on standard error, so that standard output stays data."""
    return Console(stderr=True)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        return Text(f"{task.completed / elapsed if elapsed > 0 else 0.0:,.1f} {self.unit}/s", style="cyan")


@contextmanager
def bar(description: str, *, total: int | Callable[[], int | None] | None, unit: str) -> Iterator[Callable[..., None]]:
    """Show progress while the block runs; yields ``advance(n=1, note="")``.

    `total` None means that the end is not known: then the count and the rate are shown without time left. A function
    that finds it out is called only if the bar is shown.
    """
    console = stderr_console()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=False) as progress:
        if callable(total):
            total = total() if console.is_terminal else None
        task = progress.add_task(description, total=total, note="")
        shown = time.monotonic()
        pending = 0

        def advance(count: int = 1, note: str | None = None) -> None:
            nonlocal pending, shown
            pending += count
            if time.monotonic() - shown > 0.1:  # a bar redrawn for every row would cost more than the row
                progress.update(task, advance=pending)
                if note is not None:
                    progress.update(task, note=note)
                pending, shown = 0, time.monotonic()

        yield advance
        progress.update(task, advance=pending)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log lines and bars while the block runs; what matters in them is reported as our own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(40)  # errors only
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
