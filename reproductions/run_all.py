"""Run reproductions: each folder's ``run.py`` prints and writes its results and returns a verdict.

make reproduce                                   # all
python reproductions/run_all.py P023 P101        # by paper
python reproductions/run_all.py embedded_tiny    # by folder
python reproductions/run_all.py P023 --seeds 10  # with more seeds than the claim states
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loglik.cli.reproduce import Reproduce
from loglik.errors import InputError

HERE = Path(__file__).parent


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="papers (P023) or folders; all by default")
    parser.add_argument("--seeds", type=int, help="how many seeds; as many as each claim states by default")
    given = parser.parse_args(arguments)
    try:
        Reproduce(tuple(given.names), all=not given.names, reproductions=HERE, seeds=given.seeds).run()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
