"""Formulas in docstrings are LaTeX in reStructuredText's notation; the site shows their source as code.

Markdown would read the underscores of ``.. math::`` as emphasis and ``<t`` as the beginning of a tag.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

_INLINE = re.compile(r":math:`([^`]*)`")
_BLOCK = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)(?P<rest>(?:\n(?:(?P=indent) +[^\n]*| *(?=\n)))*)", re.M
)


def as_markdown(text: str) -> str:
    """`text` with its formulas as code: inline in back quotes, displayed ones in a fence."""
    return _INLINE.sub(r"`\1`", _BLOCK.sub(_fence, text))


def _fence(match: re.Match[str]) -> str:
    lines = f"{match['first'].strip()}\n{dedent(match['rest']).strip()}".strip()
    body = f"```latex\n{lines}\n```"
    return "\n".join(match["indent"] + line for line in body.splitlines()) + "\n"


class Formulas(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each object, when it and its members are loaded."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
