"""What was written is read back, from parts and from finished files."""

from __future__ import annotations

import math

import pytest

from loglik.scoring.rows import ScoredRow
from loglik.scoring.sink import open_sink

ROWS = [
    ScoredRow(
        "a", -1.5, "exact", None, 3, 9, 0.1 + 0.2, True, "none", 0, None, ["x", ' "y",\n', "é"], [None, -1.0, -0.5]
    ),
    ScoredRow("b", -math.inf, "lower_bound", 0.25, 1, 2, math.inf, False, "aligned", 7, None, ["日本"], [-math.inf]),
    ScoredRow('d,"e"', error="is empty: fill it"),
    ScoredRow("", -2.0, "exact", None, 0, 2**40, 1.0, False, "straddled", 1, None, [], []),
]


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_committed_rows_come_back(tmp_path, extension, per_token):
    bare = [ScoredRow(*[getattr(r, c) for c in r.__slots__[:11]]) for r in ROWS]
    expected = ROWS if per_token else bare
    output = tmp_path / f"out.{extension}"

    def opened(**how: bool):
        return open_sink(output, settings={}, per_token=per_token, **{"resume": False, "overwrite": False, **how})

    sink = opened()
    sink.commit(ROWS[:3], "one")
    assert list(sink.committed()) == expected[:3]
    sink = opened(resume=True)
    assert list(sink.committed()) == expected[:3]
    sink.commit(ROWS[3:], "two")
    sink.finish()
    assert list(sink.committed()) == expected
    assert list(opened(resume=True).committed()) == expected
