"""The command line: thin shells over the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.text import Text

from loglik import __version__
from loglik.cli.audit import Audit
from loglik.cli.demo import Demo
from loglik.cli.papers import Papers
from loglik.cli.reproduce import Reproduce
from loglik.cli.score import Score
from loglik.cli.train import Train
from loglik.errors import LoglikError
from loglik.progress import stderr_console

__all__ = ["main"]

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
    | Annotated[Papers, tyro.conf.subcommand("papers")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
)


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; an error a user can mend is one sentence on standard error and exit code 2."""
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:
        sys.stdout.write(f"loglik {__version__}\n")
        return
    command = tyro.cli(
        Command,
        prog="loglik",
        description="Likelihoods of generative models: measure them, train on them, decode and decide by them.",
        args=given,
    )
    try:
        command.run()
    except LoglikError as error:
        # soft_wrap: the sentence stays one line for whoever reads it from a log
        stderr_console().print(Text(f"loglik: {error}"), soft_wrap=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone, as in `loglik score ... | head`
        sys.stderr.close()
        sys.exit(1)
