"""Shares of right answers by several ways of answering, into the rows, the summary and the page of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loglik.signals.pages import AuditPage

__all__ = ["add_shares"]


def add_shares(
    hits: Mapping[str, Sequence[float]],
    summary: dict[str, Any],
    page: AuditPage | None,
    *,
    name: str,
    resamples: int,
    seed: int,
) -> None:
    """Mean of each way with a bootstrap interval (where there are two rows and more), and bars of them.

    Args:
        hits: by way, 1 for each row that is right, 0 for others, or a share of it.
        summary: gets ``name_way``, ``name_way_low`` and ``name_way_high``.
        page: gets the bars.
        name: of the figure, such as ``accuracy``.
        resamples: of the rows.
        seed: of the resampling.
    """
    import torch

    from loglik.signals.intervals import mean_intervals
    from loglik.signals.plots import plot_bars

    table = torch.tensor([list(map(float, found)) for found in hits.values()], dtype=torch.float64)
    spans: dict[str, tuple[float, float]] = {}
    if table.shape[1] > 1:
        means = mean_intervals(table, resamples=resamples, seed=seed)
        spans = {way: (float(a), float(b)) for way, (a, b) in zip(hits, means.interval, strict=True)}
    bars = dict(zip(hits, table.mean(1).tolist(), strict=True))
    for way, mean in bars.items():
        summary[f"{name}_{way}"] = mean
        if way in spans:
            summary |= {f"{name}_{way}_low": spans[way][0], f"{name}_{way}_high": spans[way][1]}
    if page is not None:
        drawn = plot_bars(bars, label="share right", intervals=spans)
        page.figure(name.replace("_", " ").capitalize(), drawn, "With 95 % intervals.")
