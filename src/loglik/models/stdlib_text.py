"""The text every Python installation has: the standard library's source and its help topics, split by module.

The embedded models are trained on the training part, and `loglik demo` scores the held-out part. The split is by
top-level module name, so that it is the same in every Python version; test suites are left out because they quote the
modules they test.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["HELD_OUT", "Document", "stdlib_documents"]

HELD_OUT = (
    "bisect",
    "calendar",
    "colorsys",
    "fractions",
    "graphlib",
    "heapq",
    "netrc",
    "queue",
    "sched",
    "shlex",
    "statistics",
    "textwrap",
    "tomllib",
    "wave",
)

# Tests quote held-out modules; character tables and generated build data are not text.
_SKIPPED_PARTS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")


@dataclass(frozen=True, slots=True)
class Document:
    """One file of the standard library, or one help topic: `name`, its top-level `module`, and its `text`."""

    name: str
    module: str
    text: str


def stdlib_documents(part: Literal["train", "held_out"], *, root: str | Path | None = None) -> Iterator[Document]:
    """Documents of one part, in a fixed order.

    Args:
        part: ``"train"`` or ``"held_out"``.
        root: directory of the standard library; that of the running Python by default.
    """
    base = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(base.rglob("*.py")):
        relative = path.relative_to(base)
        if _SKIPPED_PARTS.intersection(relative.parts) or relative.parts[0].startswith(_SKIPPED_PREFIXES):
            continue
        module = relative.parts[0].removesuffix(".py")
        if (module in HELD_OUT) != (part == "held_out"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of files declare another encoding
            continue
        if text.strip():
            yield Document(relative.as_posix(), module, text)
    if part == "train" and root is None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        for name, text in sorted(topics.items()):
            yield Document(f"pydoc_data/topics.py#{name}", "pydoc_data", text)
