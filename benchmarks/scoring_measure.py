"""What the scoring benchmark measures beside seconds: arithmetic done, the machine's own rate, and peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scoring_peers import PEERS
from scoring_workloads import VOCABULARIES, Row, Workload, build_model, token_rows, wrap
from tokenizers import Tokenizer

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Arithmetic:
    """Distinct (prefix, token) inputs of a workload, how many predict a scored token, and the FLOPs of both."""

    distinct: int
    scored: int
    flops: float


def arithmetic(model: Any, rows: list[Row]) -> Arithmetic:
    r"""FLOPs that no exact method can avoid: each distinct token once through the trunk, each scored one to the head.

    .. math:: 2 P n + \sum_{i=1}^{n} 4 L d (p_i + 1) + 2 d V m

    with P trunk matrix parameters, n distinct input tokens at positions :math:`p_i` (a token is distinct by its whole
    prefix), L layers of width d, V the vocabulary and m the distinct inputs whose next token is scored.
    """
    nodes: dict[tuple[int, int], int] = {}
    depths: list[int] = []
    scored: set[int] = set()
    for _, ids, start in rows:
        at = -1
        for position, token in enumerate(ids[:-1]):
            at = nodes.setdefault((at, token), len(nodes))
            if at == len(depths):
                depths.append(position)
            if position >= start - 1:
                scored.add(at)
    config = model.config
    attended = sum(depths) + len(depths)
    trunk = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    flops = 2.0 * trunk * len(depths) + 4.0 * config.num_hidden_layers * config.hidden_size * attended
    return Arithmetic(len(depths), len(scored), flops + 2.0 * config.hidden_size * config.vocab_size * len(scored))


@torch.inference_mode()
def matmul_rate(model: Any, made: Arithmetic) -> float:
    """FLOP/s of `torch.mm` alone at the model's layer shapes, in the shares this workload needs.

    Each shape runs with 256 and with 1,024 tokens into memory that is already there, and counts with its better rate
    (best of five).
    """
    layers = [m.weight for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    work = [(weight, made.distinct) for weight in layers] + [(model.lm_head.weight, made.scored)]
    rates: dict[tuple[int, ...], float] = {}
    seconds = flops = 0.0
    for weight, tokens in work:
        shape = tuple(weight.shape)
        if shape not in rates:
            rates[shape] = max(_rate(weight, count) for count in (256, 1024))
        flops += 2.0 * tokens * weight.numel()
        seconds += 2.0 * tokens * weight.numel() / rates[shape]
    return flops / seconds


def _rate(weight: torch.Tensor, tokens: int) -> float:
    x, out = torch.randn(tokens, weight.shape[1]), torch.zeros(tokens, weight.shape[0])
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        torch.mm(x, weight.t(), out=out)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * tokens * weight.numel() / best


def peak_memory(
    peer: str, setting: int, workload: Workload, vocab: str, tokenizer: Any, threads: int
) -> dict[str, Any]:
    """MiB above the loaded model that one peer needs for one workload, in a process of its own.

    Peers run their longest rows only (at least eight and two batches): they sort by length, so their first batch is
    their peak. loglik runs all rows.
    """
    if peer != "loglik":
        rows = sorted(token_rows(tokenizer, workload.pairs), key=lambda row: -len(row[1]))
        longest = len(rows[0][1])
        count = max(8, 2 * (setting if PEERS[peer].unit == "rows" else 1 + setting // longest))
        workload = workload.take(sorted({index for index, _, _ in rows[:count]}))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "workload.json").write_text(workload.dump(), encoding="utf-8")
        tokenizer.backend_tokenizer.save(str(base / "tokenizer.json"))
        (base / "task.json").write_text(json.dumps({"peer": peer, "setting": setting, "vocab": vocab}))
        command = [sys.executable, __file__, folder, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"memory of {peer} on {workload.name}:\n{done.stderr[-2000:]}")
        out: dict[str, Any] = json.loads((base / "result.json").read_text())
        return out


def _child(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    task = json.loads((folder / "task.json").read_text())
    workload = Workload.parse((folder / "workload.json").read_text(encoding="utf-8"))
    tokenizer = wrap(Tokenizer.from_file(str(folder / "tokenizer.json")))
    model = build_model(VOCABULARIES[task["vocab"]])
    run = PEERS[task["peer"]].prepare(model, tokenizer, workload.name, task["setting"])
    with torch.inference_mode():
        run([("", "To be, or not")] if workload.name == "e" else [("To be,", " or not")])
        with peak() as above:
            run(workload.pairs)
    (folder / "result.json").write_text(json.dumps({"mib": above(), "rows": len(workload.pairs), "how": above.how}))


class _Above:
    """MiB by which the resident set rose; `how` it was read."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.base = self.top = 0

    def __call__(self) -> int:
        return round((self.top - self.base) / 1024)


@contextlib.contextmanager
def peak() -> Iterator[_Above]:
    """The kernel's high-water mark, reset at the start; where it cannot be reset, a thread that looks every 2 ms."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        above = _Above("sampled every 2 ms")
        with _sampled(above):
            yield above
        return
    above = _Above("kernel high-water mark")
    above.base = _kib("VmRSS")
    yield above
    above.top = _kib("VmHWM")


@contextlib.contextmanager
def _sampled(above: _Above) -> Iterator[None]:
    import psutil

    def process() -> int:
        return int(psutil.Process().memory_info().rss // 1024)

    above.base = above.top = process()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            above.top = max(above.top, process())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    stop.set()
    thread.join()


def _kib(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]))
