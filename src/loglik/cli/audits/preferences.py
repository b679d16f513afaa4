"""``loglik audit preferences``: pairs before training on them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from loglik.cli.audits.common import print_summary, write_table, write_text
from loglik.errors import InputError
from loglik.progress import stderr_console

__all__ = ["AuditPreferences"]


@dataclass(frozen=True)
class AuditPreferences:
    """Look at preference pairs before (or after) training on them: which will displace, what the model prefers."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A .jsonl(.gz) or .parquet file, or a directory of datasets.save_to_disk, with chosen and rejected."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"])]
    """tiny, a directory written by save_pretrained, or a name on the model hub."""
    reference: str | None = None
    """Reference model of the implicit reward, where MODEL has been trained."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write one JSON object per pair here (.jsonl)."""
    summary: str | None = None
    """Write the summary here (.json)."""
    plot: str | None = None
    """Draw the distribution of CHES here (.png, .svg, .pdf)."""
    keep: float | None = None
    """Share of the pairs to keep, those with the lowest length-normalised CHES; needs --filtered."""
    filtered: str | None = None
    """Write the kept rows of DATA here, as they were (.jsonl)."""
    k: int = 10
    """Tokens of the top-k indicators."""
    batch_size: int = 8
    """Pairs per forward pass; the numbers do not depend on it."""
    max_length: int | None = None
    """Tokens per sequence; the model's context by default."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a row that cannot be used, or leave it out and say so."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the weights."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""

    def run(self) -> None:
        """Audit the pairs and print the summary."""
        from loglik.models.causal import CausalLM
        from loglik.models.load import load
        from loglik.progress import bar
        from loglik.signals.preference import filter_by_ches
        from loglik.signals.preference_audit import audit_preferences, plot_audit
        from loglik.training.monitor import pair_batches
        from loglik.training.read import read_training_data

        if (self.keep is None) != (self.filtered is None):
            raise InputError("--keep and --filtered go together: the share to keep, and where to write it")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"--keep must be a share above 0 and at most 1, got {self.keep}")
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}")
        model = load(self.model, dtype=self.dtype, device=self.device)
        if not isinstance(model, CausalLM):
            raise InputError(
                f"CHES is read off the states of a causal language model, and {self.model} is another kind"
            )
        data = read_training_data(self.data, model, max_length=self.max_length, on_error=self.on_error)
        single = [row.name for row in data.rows if len(row.completions) != 2]
        if single:
            raise InputError(f"{single[0]} of {self.data} is no pair: give chosen and rejected")
        reference: Any = None
        if self.reference is not None:
            reference = load(self.reference, dtype=self.dtype, device=self.device)
        with bar("pairs", total=len(data.rows), unit="pairs") as advance:

            def counted() -> Any:
                for chosen, rejected in pair_batches(data.rows, self.batch_size):
                    yield chosen.to(model.device), rejected.to(model.device)
                    advance(len(chosen))

            audit = audit_preferences(model, counted(), reference=reference, k=self.k)
        names = [row.name for row in data.rows]
        if self.output is not None:
            records = [{"row": name, **asdict(pair)} for name, pair in zip(names, audit.pairs, strict=True)]
            write_table(self.output, records)
        summary = audit.summary() | {"left_out": len(data.skipped)}
        if self.keep is not None and self.filtered is not None:
            kept = filter_by_ches(_tensor(audit.column("ches_normalised")), float(self.keep)).tolist()
            summary["kept"] = len(kept)
            _write_kept(self.data, self.filtered, {names[i] for i in kept})
        if self.summary is not None:
            write_text(self.summary, json.dumps(summary, indent=1) + "\n")
        if self.plot is not None:
            plot_audit(audit, self.plot, keep=self.keep)
        for sentence in data.skipped[:20]:
            stderr_console().print(f"left out: {sentence}", soft_wrap=True, markup=False)
        print_summary(summary)


def _tensor(values: list[float]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float64)


def _write_kept(source: str, target: str, names: set[str]) -> None:
    from loglik.training.records import training_records

    write_table(target, [dict(r) for name, r in training_records(source) if name in names and isinstance(r, dict)])
