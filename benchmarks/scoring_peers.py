"""loglik and its peers behind one function each: text in, nats per row out, with the same weights."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scoring_workloads import CONTEXT, Workload, token_rows

from loglik.models.causal import CausalLM
from loglik.scoring.engine import ScoreOptions, Scorer

Pairs = Sequence[tuple[str, str]]
Run = Callable[[Pairs], list[float]]

LOGITS_LIMIT = 6 * 2**30  # bytes of logits and log-probabilities that a batch may need when settings are tried
SAMPLE_TOKENS = 9000


@dataclass(frozen=True)
class Peer:
    """One way to score text.

    Args:
        name: in the results.
        prepare: (model, tokenizer, workload name, setting) to a function from pairs to nats.
        settings: batch sizes that are tried, in rows or tokens; empty if it chooses by itself.
        unit: of the setting.
        module: what must be installed.
        step: it gets every `step`-th question, because it is slow, and is compared on these rows.
    """

    name: str
    prepare: Callable[[Any, Any, str, int], Run]
    settings: tuple[int, ...] = ()
    unit: str = ""
    module: str = "torch"
    step: int = 1

    @property
    def installed(self) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(self.module) is not None

    def refuses(self, workload: str) -> str | None:
        """Why the peer cannot do a workload."""
        if not self.installed:
            return f"{self.module} is not installed"
        if self.name == "minicons" and workload == "e":
            return "no windows: text longer than the context cannot be scored"
        return None


def _loglik(model: Any, tokenizer: Any, workload: str, setting: int) -> Run:
    options = ScoreOptions(overflow="window", stride=CONTEXT) if workload == "e" else ScoreOptions()
    scorer = Scorer(CausalLM(model, tokenizer), options)

    def run(pairs: Pairs) -> list[float]:
        out = []
        for result in scorer.score_pairs(pairs):
            if isinstance(result, Exception):
                raise result
            out.append(result.log_prob)
        return out

    return run


def _harness(model: Any, tokenizer: Any, workload: str, setting: int) -> Run:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=setting, softmax_dtype="float32")

    def run(pairs: Pairs) -> list[float]:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar per batch of windows
            if workload == "e":
                texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, (_, text) in enumerate(pairs)]
                return list(peer.loglikelihood_rolling(texts, disable_tqdm=True))
            rows = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
            return [value for value, _ in peer.loglikelihood(rows, disable_tqdm=True)]

    return run


def _minicons(model: Any, tokenizer: Any, workload: str, setting: int) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from minicons.scorer import IncrementalLMScorer

        peer = IncrementalLMScorer(model, device="cpu", tokenizer=tokenizer)

    def run(pairs: Pairs) -> list[float]:
        """Rows sorted by length, which minicons leaves to its caller."""
        order = sorted(range(len(pairs)), key=lambda i: -len("".join(pairs[i])))
        out = [0.0] * len(pairs)
        for begin in range(0, len(order), setting):
            part = order[begin : begin + setting]
            prompts, completions = [pairs[i][0] for i in part], [pairs[i][1] for i in part]
            values = peer.conditional_score(prompts, completions, separator="", reduction=lambda x: x.sum(0).item())
            for i, value in zip(part, values, strict=True):
                out[i] = value
        return out

    return run


def _plain(model: Any, tokenizer: Any, workload: str, setting: int) -> Run:
    """Longest first, padded on the right, `setting` tokens per batch, full logits in float32."""

    def run(pairs: Pairs) -> list[float]:
        rows = sorted(token_rows(tokenizer, pairs), key=lambda row: -len(row[1]))
        sums: list[list[float]] = [[] for _ in pairs]
        for part in _budgeted(rows, setting):
            width = len(part[0][1])
            ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids, _ in part])
            logp = torch.log_softmax(model(input_ids=ids[:, :-1], use_cache=False).logits.float(), -1)
            picked = logp.gather(2, ids[:, 1:, None])[..., 0].double()
            for i, (index, row, start) in enumerate(part):
                sums[index].append(float(picked[i, start - 1 : len(row) - 1].sum()))
        return [math.fsum(terms) for terms in sums]

    return run


def _budgeted(rows: Iterable[Any], budget: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for row in rows:
        if batch and len(batch[0][1]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


PEERS = {
    peer.name: peer
    for peer in (
        Peer("loglik", _loglik),
        Peer("lm-eval", _harness, (1, 4, 8, 16), "rows", "lm_eval"),
        Peer("minicons", _minicons, (1, 4, 8), "rows", "minicons", step=4),
        Peer("plain", _plain, (1024, 2048, 4096), "tokens"),
    )
}


def choose(peer: Peer, model: Any, tokenizer: Any, workload: Workload) -> tuple[int, dict[int, float]]:
    """The fastest of a peer's settings on rows spread over the workload's lengths, with the seconds of each.

    Settings whose logits would not fit in memory, or whose batch the sample does not fill, are left out.
    """
    if not peer.settings:
        return 0, {}
    rows = token_rows(tokenizer, workload.pairs)
    longest = max(len(ids) for _, ids, _ in rows)
    sample = _sample(workload, [len(ids) for ids in tokenizer(["".join(p) for p in workload.pairs])["input_ids"]])
    have = token_rows(tokenizer, sample.pairs)
    tokens = sum(len(ids) for _, ids, _ in have)
    vocabulary = model.config.vocab_size
    seconds: dict[int, float] = {}
    warm_up(peer, model, tokenizer, workload, peer.settings[0])
    for setting in peer.settings:
        of_batch = max(setting, longest) if peer.unit == "tokens" else setting * longest
        filled = setting <= (tokens if peer.unit == "tokens" else len(have))
        if seconds and (not filled or of_batch * vocabulary * 8 > LOGITS_LIMIT):
            continue
        run = peer.prepare(model, tokenizer, workload.name, setting)
        with torch.inference_mode():
            begun = time.perf_counter()
            run(sample.pairs)
            seconds[setting] = round(time.perf_counter() - begun, 3)
    return min(seconds, key=lambda s: seconds[s]), seconds


def warm_up(peer: Peer, model: Any, tokenizer: Any, workload: Workload, setting: int) -> None:
    """Score the shortest row: lazy imports and first calls are not timed."""
    run = peer.prepare(model, tokenizer, workload.name, setting)
    with torch.inference_mode():
        run([min(workload.pairs, key=lambda pair: len("".join(pair)))])


def _sample(workload: Workload, lengths: Sequence[int]) -> Workload:
    """At most 16 rows, spread over the lengths, of at most `SAMPLE_TOKENS` tokens together (but two at least)."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    count = min(16, len(order))
    while count > 2 and count * sum(lengths) / len(lengths) > SAMPLE_TOKENS:
        count -= 1
    return workload.take([order[int((k + 0.5) * len(order) / count)] for k in range(count)])
