"""Scoring text: loglik beside lm-evaluation-harness, minicons and a plain transformers loop, on the same weights.

    python benchmarks/run.py scoring                                             # all of it, 45 minutes
    python benchmarks/bench_scoring.py --workload d --vocab 32k --only loglik,plain
    python benchmarks/bench_scoring.py --workload a --only loglik --profile      # where loglik's time goes
    python benchmarks/bench_scoring.py --table                                   # the last results as Markdown

Every method gets text and gives nats per row; tokenisation is timed, construction is not, and each timed run gets a
newly built scorer, so that nothing is kept from the run before. A difference of values counts as agreement up to
1e-3 nats per row; for lm-eval and minicons, which add up a row in float32, or four float32 steps of the value. A
token is worth about ten nats here, so that values which agree also scored the same tokens.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from scoring_measure import Arithmetic, arithmetic, matmul_rate, peak_memory
from scoring_peers import PEERS, Peer, choose, warm_up
from scoring_workloads import (
    CONTEXT,
    TITLES,
    VOCABULARIES,
    Corpus,
    Row,
    Workload,
    build_model,
    build_tokenizer,
    corpus,
    token_rows,
    workloads,
)

# Seconds of the peer over seconds of loglik.
TARGETS = {
    "lm-eval": {"a": 30.0, "b": 8.0, "c": 3.0, "d": 1.5, "e": 1.1},
    "plain": {"a": 25.0, "b": 8.0, "c": 2.5, "d": 1.15, "e": 1.0},
}
EFFICIENCY_TARGET = 0.6  # of the machine's matrix products, on d
MEMORY_TARGET = 0.2  # of lm-eval's, on d at 128k
TOLERANCE, STEPS = 1e-3, 4 * 2.0**-24
SLOW = 60.0  # seconds after which a method is timed once
RESULTS = Path(__file__).parent / "results" / "scoring.json"


@dataclass(frozen=True)
class Settings:
    """Score workloads with loglik and its peers.

    Args:
        workload: letters of workloads.
        vocab: model vocabularies, comma-separated.
        only: methods, comma-separated; values are compared with loglik's where it is among them.
        questions: of a and b.
        zero_shot: questions of c.
        pairs: of d.
        tokens: of e, at least.
        threads: of every method.
        repeats: timed runs, of which the best counts; one only for what takes over a minute.
        memory: workloads whose peak memory is measured (a process per method).
        profile: print where loglik's time goes instead.
        table: print the last results as Markdown instead.
    """

    workload: str = "abcde"
    vocab: str = "32k"
    only: str = "loglik,lm-eval,minicons,plain"
    questions: int = 20
    zero_shot: int = 40
    pairs: int = 120
    tokens: int = 30_000
    threads: int = 2
    repeats: int = 2
    memory: str = ""
    profile: bool = False
    table: bool = False


# The whole benchmark: at 128k fewer rows, fewer runs and without minicons, to stay under an hour.
LARGE = Settings(workload="abc", vocab="128k", only="loglik,lm-eval,plain", repeats=1)
PLAN = (Settings(memory="ad"), LARGE, replace(LARGE, workload="d", pairs=60, repeats=2, memory="d"))


@dataclass
class Timing:
    """Timed runs of one method on one set of rows."""

    peer: Peer
    setting: int
    tried: dict[int, float]
    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Seconds of the fastest run."""
        return min(self.seconds)


def run() -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    texts = corpus()
    for settings in PLAN:
        rows += measure(settings, texts)
    return _result(rows, texts, PLAN)


def measure(settings: Settings, texts: Corpus) -> list[dict[str, Any]]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    torch.set_num_threads(settings.threads)
    tokenizer = build_tokenizer(texts, VOCABULARIES["32k"])
    rows = []
    for vocab in settings.vocab.split(","):
        model = build_model(VOCABULARIES[vocab])
        made = workloads(
            settings.workload,
            texts,
            tokenizer,
            questions=settings.questions,
            zero_shot=settings.zero_shot,
            pairs=settings.pairs,
            rolling=settings.tokens,
        )
        for workload in made:
            if settings.profile:
                _profile(model, tokenizer, workload)
            else:
                rows += _compare(model, tokenizer, workload, vocab, settings)
    return rows


def _compare(model: Any, tokenizer: Any, workload: Workload, vocab: str, settings: Settings) -> list[dict[str, Any]]:
    """One line per method; a slow peer and loglik run once more on the rows that the peer gets."""
    names = settings.only.split(",")
    base = {"workload": workload.name, "vocab": vocab}
    refused = [{**base, "method": n, "note": why} for n in names if (why := PEERS[n].refuses(workload.name))]
    able = [PEERS[n] for n in names if not PEERS[n].refuses(workload.name)]
    few = {peer.name for peer in able if peer.step > 1 and workload.name != "c"}
    parts = [(workload, [peer for peer in able if peer.name not in few])]
    ours = [peer for peer in able if peer.name == "loglik"]
    parts += [(workload.every(peer.step), [*ours, peer]) for peer in able if peer.name in few]
    lines: list[dict[str, Any]] = []
    for part, peers in parts:
        rows = token_rows(tokenizer, part.pairs)
        made = arithmetic(model, rows)
        rate = matmul_rate(model, made)
        timings = _time(model, tokenizer, part, peers, settings.repeats)
        rate = max(rate, matmul_rate(model, made))  # before and after: a machine is seldom quite quiet
        for timing in timings:
            if part is workload or timing.peer.name != "loglik":
                lines.append({**base, **_line(part, rows, made, rate, timing, timings)})
    if workload.name in settings.memory:
        _add_memory(lines, workload, vocab, tokenizer, settings.threads)
    for line in lines:
        _show(line)
    return lines + refused


def _time(model: Any, tokenizer: Any, workload: Workload, peers: Sequence[Peer], repeats: int) -> list[Timing]:
    """Timed runs in turns, each of a newly built scorer."""
    timings = [Timing(peer, *choose(peer, model, tokenizer, workload)) for peer in peers]
    for timing in timings:
        warm_up(timing.peer, model, tokenizer, workload, timing.setting)
    for _ in range(repeats):
        for timing in timings:
            if timing.seconds and timing.seconds[0] > SLOW:
                continue
            score = timing.peer.prepare(model, tokenizer, workload.name, timing.setting)
            gc.collect()
            with torch.inference_mode():
                begun = time.perf_counter()
                timing.values = score(workload.pairs)
                timing.seconds.append(time.perf_counter() - begun)
    return timings


def _line(
    workload: Workload, rows: Sequence[Row], made: Arithmetic, rate: float, timing: Timing, timings: Sequence[Timing]
) -> dict[str, Any]:
    name = timing.peer.name
    scored = sum(len(ids) - start for _, ids, start in rows)
    line: dict[str, Any] = {
        "method": name,
        "rows": len(workload.pairs),
        "input_tokens": sum(len(ids) - 1 for _, ids, _ in rows),
        "distinct_tokens": made.distinct,
        "scored_tokens": scored,
        "nats_per_token": round(math.fsum(timing.values) / scored, 3),
        "seconds": round(timing.best, 3),
        "runs": [round(s, 3) for s in timing.seconds],
    }
    if timing.peer.unit:
        line |= {"batch": f"{timing.setting} {timing.peer.unit}", "batches_tried": timing.tried}
    ours = next((t for t in timings if t.peer.name == "loglik"), None)
    if ours is timing:
        line |= {
            "gflops": round(made.flops / timing.best / 1e9, 1),
            "machine_gflops": round(rate / 1e9, 1),
            "efficiency": round(made.flops / timing.best / rate, 3),
        }
        if workload.name == "d":
            line |= {"efficiency_target": EFFICIENCY_TARGET, "reached": line["efficiency"] >= EFFICIENCY_TARGET}
    elif ours is not None:
        line |= {"loglik_seconds": round(ours.best, 3), "ratio": round(timing.best / ours.best, 2)}
        target = TARGETS.get(name, {}).get(workload.name)
        if target is not None:
            line |= {"target": target, "reached": timing.best / ours.best >= target}
        line |= _agreement(workload, rows, timing, ours)
    return line


def _agreement(workload: Workload, rows: Sequence[Row], timing: Timing, ours: Timing) -> dict[str, Any]:
    """Differences per row; lm-eval cuts text longer than the context into other windows, which stand apart."""
    windows = [0] * len(workload.pairs)
    for index, _, _ in rows:
        windows[index] += 1
    differences = [abs(a - b) for a, b in zip(timing.values, ours.values, strict=True)]
    other = timing.peer.name == "lm-eval"
    steps = 0.0 if timing.peer.name == "plain" else STEPS
    same = [i for i, count in enumerate(windows) if count == 1 or not other]
    line: dict[str, Any] = {
        "max_difference_nats": _figure(max((differences[i] for i in same), default=0.0)),
        "agree": all(differences[i] <= max(TOLERANCE, steps * abs(ours.values[i])) for i in same),
        "rows_compared": len(same),
    }
    if len(same) < len(windows):
        apart = [i for i in range(len(windows)) if i not in set(same)]
        line["other_windows_relative"] = _figure(max(differences[i] / abs(ours.values[i]) for i in apart))
    return line


def _add_memory(lines: list[dict[str, Any]], workload: Workload, vocab: str, tokenizer: Any, threads: int) -> None:
    for line in lines:
        setting = int(line["batch"].split()[0]) if "batch" in line else 0
        found = peak_memory(line["method"], setting, workload, vocab, tokenizer, threads)
        line |= {"peak_mib": found["mib"], "peak_read_from": found["how"], "peak_rows": found["rows"]}
        if line["method"] == "lm-eval" and setting > 1:
            line["peak_mib_batch_1"] = peak_memory("lm-eval", 1, workload, vocab, tokenizer, threads)["mib"]
    by_name = {line["method"]: line for line in lines}
    if "loglik" in by_name and "lm-eval" in by_name:
        ours, theirs = by_name["loglik"], by_name["lm-eval"]
        ours["memory_of_lm_eval"] = round(ours["peak_mib"] / theirs["peak_mib"], 3)
        if "peak_mib_batch_1" in theirs:
            ours["memory_of_lm_eval_batch_1"] = round(ours["peak_mib"] / theirs["peak_mib_batch_1"], 3)
        if workload.name == "d" and vocab == "128k":
            ours |= {"memory_target": MEMORY_TARGET, "memory_reached": ours["memory_of_lm_eval"] <= MEMORY_TARGET}


def _profile(model: Any, tokenizer: Any, workload: Workload) -> None:
    from torch.profiler import ProfilerActivity, profile

    loglik = PEERS["loglik"]
    print(f"== {workload.name}: {TITLES[workload.name]}, {len(workload.pairs)} rows")
    with torch.inference_mode():
        loglik.prepare(model, tokenizer, workload.name, 0)(workload.pairs[:1])
        score = loglik.prepare(model, tokenizer, workload.name, 0)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            score(workload.pairs)
    by_shape = recorded.key_averages(group_by_input_shape=True)
    for events, width in ((recorded.key_averages(), 40), (by_shape, 80)):
        print(events.table(sort_by="self_cpu_time_total", row_limit=18, max_shapes_column_width=width))


def _figure(value: float) -> float:
    return float(f"{value:.2g}")


def _show(line: dict[str, Any]) -> None:
    print("  " + "  ".join(f"{key} {value}" for key, value in line.items() if key != "batches_tried"), flush=True)


def _result(rows: list[dict[str, Any]], texts: Corpus, plan: Sequence[Settings]) -> dict[str, Any]:
    sizes = []
    for vocab in dict.fromkeys(v for s in plan for v in s.vocab.split(",")):
        with torch.device("meta"):
            count = sum(p.numel() for p in build_model(VOCABULARIES[vocab]).parameters())
        sizes.append(f"{count / 1e6:.1f}M ({vocab} vocabulary)")
    shapes = " and ".join(sizes)
    versions = {}
    for name, package in (("lm-eval", "lm_eval"), ("minicons", "minicons"), ("transformers", "transformers")):
        if name == "transformers" or PEERS[name].installed:
            versions[package] = version(package)
    result = {
        "what": f"text to nats, Llama shape of {shapes} parameters (tied embedding, random weights), "
        f"context {CONTEXT}, float32, {plan[0].threads} threads, {texts.source}",
        "versions": versions,
        "workloads": TITLES,
        "rows": rows,
    }
    result["table"] = markdown(rows)
    return result


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Figures as a Markdown table: a line per workload, vocabulary and method; ratios are over loglik's seconds."""
    head = ["Workload", "Vocabulary", "Method", "Rows", "Seconds", "Ratio", "Target", "Largest difference, nats"]
    head += ["Of the machine's products", "Peak MiB"]
    out = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for row in rows:
        cells = [f"{row['workload']}: {TITLES[row['workload']]}", row["vocab"], row["method"]]
        if "note" in row:
            out.append("| " + " | ".join(cells) + " | | | | | " + row["note"] + " | | |")
            continue
        cells[2] += f", batches of {row['batch']}" if "batch" in row else ""
        target = f"{row['target']:g} {'reached' if row['reached'] else 'missed'}" if "target" in row else ""
        cells += [row["rows"], f"{row['seconds']:.2f}", row.get("ratio", ""), target]
        cells += [row.get("max_difference_nats", ""), f"{row['efficiency']:.0%}" if "efficiency" in row else ""]
        share = f" ({row['memory_of_lm_eval']:.2g} of lm-eval)" if "memory_of_lm_eval" in row else ""
        cells.append(f"{row.get('peak_mib', '')}{share}")
        out.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(out) + "\n"


def main(settings: Settings) -> None:
    if settings.table:
        if not RESULTS.exists():
            sys.exit(f"no results at {RESULTS}: run benchmarks/run.py scoring first")
        print(json.loads(RESULTS.read_text(encoding="utf-8"))["table"])
        return
    rows = measure(settings, corpus())
    if rows:
        print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Settings))
