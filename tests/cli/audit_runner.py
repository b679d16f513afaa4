"""Runs one audit the way the command line does."""

from __future__ import annotations

import sys

import tyro

from loglik.errors import LoglikError


def run_audit(audit: type, *arguments: object) -> None:
    """Parse and run; bad input ends with exit code 2 and one sentence on standard error."""
    try:
        tyro.cli(audit, args=[str(part) for part in arguments]).run()
    except LoglikError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
