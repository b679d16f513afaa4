"""Run every reproduction: a folder each, whose ``run.py`` writes ``results.json`` and returns a verdict.

make reproduce                                  # all
python reproductions/run_all.py embedded_tiny   # by folder
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    folders = {path.parent.name: path for path in sorted(HERE.glob("*/run.py"))}
    unknown = [name for name in names if name not in folders]
    if unknown:
        sys.exit(f"unknown reproduction {unknown[0]!r}; choose from {', '.join(folders)}")
    verdicts = {}
    for name in names or list(folders):
        spec = importlib.util.spec_from_file_location(f"reproduce_{name}", folders[name])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        print(f"== {name}", flush=True)
        verdicts[name] = module.main()
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")


if __name__ == "__main__":
    main(sys.argv[1:])
