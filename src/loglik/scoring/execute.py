"""Windows of token ids in, log-probabilities of their scored tokens out, by the fastest path the model can run.

`packed`, `cached` and `padded` compute every distinct (prefix, token) of a causal model once, or as near to it as the
path allows (`loglik.models.paths`); `direct` hands batches of whole windows to any other model. Only hidden states
that predict a scored token reach the LM head. Every answer is counted: a token that no pass computed, or that two did,
is an error and never a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loglik.errors import InputError
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.paths import PathReport, cached_hidden, scaled_rope_start
from loglik.models.protocol import TextModel
from loglik.models.tree_attention import KeyValuePath, TreeRow, tree_hidden
from loglik.models.trunk import Trunk, evaluating
from loglik.scoring.answers import Answers, Demand, WindowScores, joined
from loglik.scoring.batches import Batch, BatchPlan, make_batches
from loglik.scoring.budget import Budget
from loglik.scoring.forest import Forest
from loglik.scoring.plan import Pack, Plan, make_plan
from loglik.scoring.windows import Window

__all__ = ["EnginePath", "Executor"]

EnginePath = Literal["auto", "packed", "cached", "padded"]

# Hidden states wait for the head until there are this many: reading a large head for a few rows is slow.
HEAD_ROWS = 1024

NOTHING = np.empty(0, dtype=np.int64)


class _Runner(Protocol):
    def run(self, part: Pack | Batch, columns: NDArray[np.int64]) -> Tensor:
        """(size, D) hidden states of one pass, of which only these columns are read."""


class Executor:
    """Runs windows through a model.

    Args:
        model: any text model; causal models of transformers share prefixes.
        path: `auto`, or one that the model must be able to run.
        budget: tokens and bytes per pass; found from device and model if None.

    Raises:
        InputError: for a path that this model cannot run.
    """

    def __init__(self, model: TextModel, *, path: EnginePath = "auto", budget: Budget | None = None) -> None:
        self.model = model
        self.budget = (budget or Budget()).resolved(model)
        self.report: PathReport | None = None
        self._trunk: Trunk | None = None
        if isinstance(model, CausalLM) and model.trunk is not None:
            try:
                self.report = model.forward_path(None if path == "auto" else path)
            except ValueError as error:
                raise InputError(f"{error}" + ("" if path == "auto" else "; leave the path at auto")) from None
            self._trunk = model.trunk
        elif path not in ("auto", "padded"):
            raise InputError(f"{path} passes need a causal model of transformers; leave the path at auto")

    def describe(self) -> str:
        """Which path runs, and why not a faster one."""
        if self.report is None:
            return "padded batches of whole rows"
        return self.report.describe()

    @property
    def shares_prefixes(self) -> bool:
        """Whether equal beginnings are computed once; `plan` says how."""
        return self._trunk is not None

    def batches(self, windows: Sequence[Window]) -> list[list[int]]:
        """The windows of each forward pass of a model that shares no prefixes."""
        return list(_length_batches(windows, self.budget.pack_tokens))

    def plan(self, windows: Sequence[Window]) -> Plan | BatchPlan:
        """The passes that a causal model's windows need.

        Raises:
            InputError: for a model that is not causal: its rows share nothing.
        """
        if self._trunk is None or self.report is None:
            raise InputError("a plan exists for causal models of transformers only: other models share no prefixes")
        forest = Forest([window.inputs for window in windows])
        budget = self.budget
        if self.report.path == "packed":
            return make_plan(
                forest,
                pack_tokens=budget.pack_tokens,
                under_prefix=budget.pack_tokens,
                cache_tokens=budget.cache_tokens,
            )
        start = scaled_rope_start(self._trunk.inner.config)
        cache_tokens = budget.cache_tokens if self.report.path == "cached" else None
        limits = () if start is None else (start,)
        return make_batches(forest, batch_tokens=budget.pack_tokens, cache_tokens=cache_tokens, limits=limits)

    @torch.inference_mode()
    def run(
        self,
        windows: Sequence[Window],
        *,
        subset: Tensor | None = None,
        advance: Callable[[int, int], None] | None = None,
    ) -> list[WindowScores]:
        """Scores of each window, in order.

        Args:
            windows: any number, in any order; equal beginnings are computed once.
            subset: (V,) bool, for windows with probes.
            advance: called with the number of scored tokens each time some are done, and with their total.

        Raises:
            InputError: for probes of a model that shares no prefixes.
        """
        if not windows:
            return []
        if self._trunk is None:
            if any(window.probes or window.branches for window in windows):
                raise InputError("probabilities of words and of bytes need a causal model of transformers: use one")
            network = getattr(self.model, "model", None)
            with evaluating(network) if isinstance(network, torch.nn.Module) else nullcontext():
                return self._direct(windows, advance)
        start = scaled_rope_start(self._trunk.inner.config)
        long = [start is not None and len(window.inputs) > start for window in windows]
        with evaluating(self._trunk.model):
            if all(long) or not any(long):
                return self._shared(self._trunk, windows, subset, advance)
            total = sum(w.scored_to - w.scored_from + len(w.probes) + len(w.branches) for w in windows)
            both = None if advance is None else lambda count, _: advance(count, total)
            # Frequencies depend on the length of the whole row: a short row is no beginning of a long one.
            sides = {
                side: iter(
                    self._shared(
                        self._trunk, [w for w, s in zip(windows, long, strict=True) if s is side], subset, both
                    )
                )
                for side in (False, True)
            }
        return [next(sides[side]) for side in long]

    def _shared(
        self,
        trunk: Trunk,
        windows: Sequence[Window],
        subset: Tensor | None,
        advance: Callable[[int, int], None] | None,
    ) -> list[WindowScores]:
        """Windows of a causal model, whose equal beginnings are computed once."""
        answers = Answers(windows)
        plan = self.plan(windows)
        demands = answers.demands(plan)
        narrows = self.report is not None and self.report.narrows
        runner: _Runner = _PackRunner(trunk, plan, narrows) if isinstance(plan, Plan) else _BatchRunner(trunk, plan)
        head = _Head(trunk, answers, subset, advance)
        parts: Sequence[Pack | Batch] = plan.packs
        for number, part in enumerate(parts):
            hidden = runner.run(part, demands[number].column if number in demands else NOTHING)
            if hidden.shape[0] != part.size:
                raise AssertionError(f"pass {number} gave {hidden.shape[0]} hidden states, the plan has {part.size}")
            if number in demands:
                head.add(hidden, demands[number])
        head.flush()
        return answers.collect()

    def _direct(self, windows: Sequence[Window], advance: Callable[[int, int], None] | None) -> list[WindowScores]:
        """Whole windows in padded batches through `TextModel.score_tokens`."""
        results: dict[int, WindowScores] = {}
        total = sum(window.scored_to - window.scored_from for window in windows)
        for batch in self.batches(windows):
            cut = [windows[i] for i in batch]
            x = TokenBatch.from_lists(
                [w.ids for w in cut],
                starts=[w.start for w in cut],
                scored_from=[w.scored_from for w in cut],
                words=[w.words for w in cut],
            )
            for i, window in enumerate(cut):
                x.scored_mask[i, window.scored_to :] = False
            likelihood, first = self.model.score_tokens(x)
            for i, window in enumerate(cut):
                results[batch[i]] = _window_scores(likelihood, first, i, window)
            if advance is not None:
                advance(sum(w.scored_to - w.scored_from for w in cut), total)
        return [results[i] for i in range(len(windows))]


def _window_scores(likelihood: LogLikelihood, first: Tensor | None, row: int, window: Window) -> WindowScores:
    """One row of a model's answer: terms per token, or a total with its standard error where it has none."""
    columns = slice(window.scored_from, window.scored_to)
    greedy = [] if first is None else first[row, columns].tolist()
    if likelihood.per_unit is not None:
        return WindowScores(likelihood.per_unit[row, columns].tolist(), greedy, [], [])
    stderr = None if likelihood.stderr is None else float(likelihood.stderr[row])
    return WindowScores([], greedy, [], [], float(likelihood.value[row]), stderr)


class _Head:
    """Collects the hidden states that are read and sends them through the LM head in large blocks."""

    def __init__(
        self, trunk: Trunk, answers: Answers, subset: Tensor | None, advance: Callable[[int, int], None] | None
    ) -> None:
        self.trunk = trunk
        self.answers = answers
        self.subset = subset
        self.advance = advance
        self._hidden: list[Tensor] = []
        self._rows = 0
        self._demands: list[Demand] = []

    def add(self, hidden: Tensor, demand: Demand) -> None:
        """Keep what is read of a pass; equal columns are kept, and sent through the head, once."""
        columns, row = np.unique(demand.column, return_inverse=True)
        self._hidden.append(hidden[torch.from_numpy(columns).to(hidden.device)])
        self._demands.append(Demand(row + self._rows, demand.flat, demand.target))
        self._rows += len(columns)
        if self._rows >= HEAD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Compute what has been collected."""
        if not self._hidden:
            return
        hidden, demand = torch.cat(self._hidden), joined(self._demands)
        self._hidden, self._demands, self._rows = [], [], 0
        is_term = demand.target >= 0
        order = np.argsort(demand.column[is_term], kind="stable")
        rows, targets, flat = (part[is_term][order] for part in (demand.column, demand.target, demand.flat))
        scores = self.trunk.log_probs(
            hidden,
            torch.from_numpy(targets).to(hidden.device),
            rows=torch.from_numpy(rows).to(hidden.device),
            subset=None if is_term.all() or self.subset is None else self.subset.to(hidden.device),
        )
        self.answers.fill(flat, scores.log_probs, scores.greedy)
        if scores.log_mass is not None:
            wanted = torch.from_numpy(demand.column[~is_term]).to(hidden.device)
            self.answers.fill(demand.flat[~is_term], scores.log_mass[wanted], None)
        if self.advance is not None:
            self.advance(len(demand.flat), len(self.answers.values))


class _PackRunner:
    """Packed rows with tree attention; the path's keys and values stay in one buffer."""

    def __init__(self, trunk: Trunk, plan: Plan, narrows: bool = False) -> None:
        self.trunk = trunk
        self.plan = plan
        self.narrows = narrows
        self.device = trunk.model.device
        # Room for the longest path at once: growing would need the old and the new buffer side by side.
        self.path = KeyValuePath(max((p.prefix + p.size for p in plan.packs if p.keep or p.prefix), default=0))

    def run(self, part: Pack | Batch, columns: NDArray[np.int64]) -> Tensor:
        assert isinstance(part, Pack)
        if part.prefix > self.path.length:
            raise AssertionError(f"the path holds {self.path.length} tokens, the plan needs {part.prefix}")
        forest = self.plan.forest
        row = TreeRow(
            torch.from_numpy(part.positions()).to(self.device),
            torch.from_numpy(part.subtree_ends(forest)).to(self.device),
            part.groups,
            part.prefix,
            self.path if part.prefix or part.keep else None,
            part.keep,
            torch.from_numpy(np.unique(columns)).to(self.device) if self.narrows else None,
        )
        hidden = tree_hidden(self.trunk, torch.from_numpy(part.tokens(forest)).to(self.device), row)
        self.path.length = part.prefix + part.keep
        return hidden


class _BatchRunner:
    """Padded batches, over caches of shared beginnings where the plan keeps any."""

    def __init__(self, trunk: Trunk, plan: BatchPlan) -> None:
        self.trunk = trunk
        self.plan = plan
        self.caches: dict[int, object] = {}

    def run(self, part: Pack | Batch, columns: NDArray[np.int64]) -> Tensor:
        assert isinstance(part, Batch)
        ids = torch.from_numpy(part.tokens(self.plan.forest)).to(self.trunk.model.device)
        if part.prefix < 0 and part.keep < 0:
            hidden = self.trunk.hidden(input_ids=ids, use_cache=False)
        else:
            before = self.caches[part.prefix] if part.prefix >= 0 else None
            hidden, cache = cached_hidden(self.trunk, ids, before, repeat=len(part.rows))
            if part.keep >= 0:
                self.caches[part.keep] = cache
        for node in part.frees:
            del self.caches[node]
        return hidden.flatten(0, 1)


def _length_batches(windows: Sequence[Window], budget: int) -> Iterator[list[int]]:
    """Windows of similar length, those with the same prompt together, longest first, at most `budget` tokens."""
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i].ids), windows[i].ids))
    batch: list[int] = []
    for i in order:
        if batch and len(windows[batch[0]].ids) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
