"""A self-contained HTML page of an audit: what was asked, figures, plots and the rows behind them.

One file without any reference to the outside and without scripts. Everything that was read or computed enters it
escaped, so that no text of the data can become markup.
"""

from __future__ import annotations

import html
import io
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loglik.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AuditPage", "new_figure", "shown"]

_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.sub { margin: 0 0 1rem; opacity: .7; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; }
.wide { overflow-x: auto; } figure { margin: 0; background: #fff; border-radius: 4px; }
svg { max-width: 100%; height: auto; }
"""
_MAX_ROWS = 1_000
_MAX_TEXT = 160


class AuditPage:
    """Collects the parts of a page in their order, and writes them as one file.

    Args:
        title: heading.
        subtitle: one line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []

    def facts(self, heading: str, values: Mapping[str, Any]) -> None:
        """A table of names and values; those that are None are left out."""
        rows = [(name.replace("_", " "), shown(value)) for name, value in values.items() if value is not None]
        self._section(heading, _table(None, rows))

    def figure(self, heading: str, figure: Figure, caption: str = "") -> None:
        """A plot, drawn into the page as SVG."""
        buffer = io.StringIO()
        with warnings.catch_warnings():  # names of the data may have letters that the font lacks; they become boxes
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        drawn = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
        text = f"<p>{html.escape(caption)}</p>" if caption else ""
        self._section(heading, f"<figure>{drawn}</figure>{text}")

    def table(self, heading: str, records: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
        """Rows, the first thousand of them; the page says how many it leaves out."""
        if not records:
            return
        names = list(columns if columns is not None else records[0])
        rows = [[shown(record.get(name)) for name in names] for record in records[:_MAX_ROWS]]
        left = len(records) - len(rows)
        note = f"<p>The first {len(rows):,} of {len(records):,} rows.</p>" if left else ""
        self._section(heading, _table([name.replace("_", " ") for name in names], rows) + note)

    def text(self) -> str:
        """The whole page."""
        subtitle = f'<p class="sub">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>\n"
            f"<h1>{html.escape(self.title)}</h1>{subtitle}\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Put the page at `path`, whole or not at all.

        Raises:
            InputError: if nothing can be written there.
        """
        partial = f"{path}.partial"
        try:
            Path(partial).write_text(self.text(), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                os.unlink(partial)
            raise InputError(f"{path} cannot be written ({error.strerror}): choose another path") from None

    def _section(self, heading: str, body: str) -> None:
        self._parts.append(f'<section><h2>{html.escape(heading)}</h2><div class="wide">{body}</div></section>')


def new_figure(*, width: float = 8.0, height: float = 3.6) -> Figure:
    """An empty figure that no window shows; `savefig` writes it.

    Raises:
        InputError: where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: install loglik[plots]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def shown(value: Any) -> str:
    """A value as people read it: four significant digits, long texts cut."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    text = str(value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []

    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="n"' if numeric[i] else "" for i in range(len(cells))] if numeric else [""] * len(cells)
        return (
            "<tr>" + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f"<table>{top}<tbody>{body}</tbody></table>"


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "")) if text else 0.0
    except ValueError:
        return False
    return True
