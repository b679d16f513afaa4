"""``loglik reproduce``: run the reproductions of papers' claims."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from loglik.errors import InputError
from loglik.papers.catalogue import papers as catalogue
from loglik.progress import stderr_console

__all__ = ["Reproduce", "choose", "find", "run_folders"]

FAILED = "failed"


@dataclass(frozen=True)
class Reproduce:
    """Run small experiments on papers' claims: what was measured over how many seeds, and a verdict."""

    papers: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PAPERS")] = ()
    """Papers by number (P023), or folders of --reproductions."""
    all: bool = False
    """Run every reproduction there is."""
    reproductions: Path = Path("reproductions")
    """Where the reproductions lie: the folder of that name in a checkout of the repository."""
    seeds: int | None = None
    """How many seeds; by default as many as each claim states, and with fewer no results are written."""

    def run(self) -> None:
        """Run the chosen ones, go on where one fails, and exit with 1 if one did."""
        if self.seeds is not None and self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
        folders = find(self.reproductions)
        if self.all and self.papers:
            raise InputError("give papers or --all, not both")
        if not (self.all or self.papers):
            raise InputError(f"name a paper, or use --all; there are {', '.join(folders)}")
        names = choose(self.papers, folders) if self.papers else list(folders)
        if FAILED in run_folders({name: folders[name] for name in names}, seeds=self.seeds).values():
            sys.exit(1)


def find(directory: Path) -> dict[str, Path]:
    """The ``run.py`` of every reproduction under `directory`, by folder.

    Raises:
        InputError: if there is none.
    """
    folders = {path.parent.name: path for path in sorted(directory.glob("*/run.py"))}
    if not folders:
        raise InputError(
            f"no reproductions at {directory}: they live in the repository, not in the installed package; run this in "
            "a checkout, or give its folder as --reproductions"
        )
    return folders


def choose(names: Sequence[str], folders: dict[str, Path]) -> list[str]:
    """Folders that `names` (paper numbers or folders) stand for, in the order given, each once.

    Raises:
        InputError: for an unknown one, with the nearest there is.
    """
    chosen: dict[str, None] = {}
    for name in names:
        found = [f for f in folders if name.casefold() in (f.casefold(), f.split("_")[0].casefold())]
        if not found:
            numbers = [f.split("_")[0] for f in folders if _is_paper(f.split("_")[0])]
            known = {text.casefold(): text for text in [*folders, *numbers]}
            (near,) = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.0)
            what = "has no reproduction yet" if _is_paper(name.upper()) else "is no reproduction"
            raise InputError(f"{name!r} {what}; the nearest is {known[near]}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def run_folders(folders: dict[str, Path], *, seeds: int | None = None) -> dict[str, str]:
    """Run each ``run.py`` and print the verdicts; one that raises is reported and counted as failed."""
    console = Console(highlight=False)
    verdicts: dict[str, str] = {}
    for name, path in folders.items():
        console.rule(escape(name))
        try:
            verdicts[name] = _run(path, seeds)
        except (Exception, SystemExit) as error:
            if not isinstance(error, InputError):
                traceback.print_exc()
            stderr_console().print(f"loglik: {name} failed: {error}", markup=False, soft_wrap=True)
            verdicts[name] = FAILED
    console.rule("verdicts")
    for name, verdict in verdicts.items():
        console.print(f"{name}: {verdict}", markup=False)
    failed = [name for name, verdict in verdicts.items() if verdict == FAILED]
    if failed:
        message = f"loglik: {len(failed)} of {len(verdicts)} reproductions failed: {', '.join(failed)}"
        stderr_console().print(message, markup=False, soft_wrap=True)
    return verdicts


def _run(path: Path, seeds: int | None) -> str:
    """The verdict of ``main()``; runs without anything random take no seeds."""
    with _importable(path.parent.parent):
        main = _load(path).main
        takes_seeds = "seeds" in inspect.signature(main).parameters
        return str(main(seeds=seeds) if takes_seeds else main())


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Let a run import what the reproductions share, which stands beside their folders."""
    entry = str(directory.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _load(path: Path) -> ModuleType:
    name = f"reproduction_{path.parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _is_paper(name: str) -> bool:
    return any(paper.id == name for paper in catalogue())
