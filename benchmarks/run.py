"""Run every benchmark: peers and loglik on the same work in one process, ratios beside the agreement of the values.

    make bench                      # all
    python benchmarks/run.py basic  # by name

Results go to ``benchmarks/results/<name>.json``. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up while it runs
    spec.loader.exec_module(module)
    return module


def main(names: list[str]) -> None:
    found = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(found)}")
    (HERE / "results").mkdir(exist_ok=True)
    for name in names or list(found):
        result = load(found[name]).run()
        result["machine"] = {"cpu_threads": torch.get_num_threads(), "torch": torch.__version__}
        result["machine"]["python"] = platform.python_version()
        (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if "table" in result:  # a page of the documentation shows it
            (HERE.parent / "docs" / f"_{name}_bench.md").write_text(result["table"], encoding="utf-8")
        print(f"== {name}: {result['what']}")
        for row in result["rows"]:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
