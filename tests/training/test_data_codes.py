"""Codes of data sets: noise has no structure, periods no entropy; windows are used once, runs are kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.signals.epiplexity import code_compute, epiplexity_frontier
from loglik.training import data_codes
from loglik.training.data_codes import CodeGrid, code_windows, data_code_runs, draw_windows, small_language_model
from loglik.training.kept_runs import load_run, save_run
from loglik.training.token_data import TokenData, read_tokenizer, token_data

SMALL = CodeGrid(widths=(32,), layers=1, window=16, batch_size=16, learning_rate=1e-2, warmup_steps=2, checkpoints=3)


def stream(ids, vocabulary=257) -> TokenData:
    ids = np.asarray(ids, dtype=np.int64)
    return TokenData(ids, vocabulary, vocabulary - 1, len(ids))


# ------------------------------------------------------------------ texts as tokens
def test_bytes_are_the_default_tokens():
    data = token_data(["ab", "é"])
    assert data.ids.tolist() == [97, 98, 256, 0xC3, 0xA9, 256]
    assert (data.vocabulary, data.separator, data.num_bytes) == (257, 256, 4)


def test_a_tokenizer_gives_its_own_tokens(tiny):
    texts = ["import os\n", "def f(x):\n    return x\n"]
    data = token_data(texts, tiny.tokenizer)
    ids = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert data.ids.tolist() == [*ids[0], len(tiny.tokenizer), *ids[1], len(tiny.tokenizer)]
    assert data.num_bytes == sum(map(len, texts))


def test_tokenizers_by_name(tiny, tmp_path):
    assert read_tokenizer("bytes") is None
    tiny.tokenizer.save_pretrained(tmp_path)
    for name in ("tiny", str(tmp_path)):
        assert read_tokenizer(name)("import os")["input_ids"] == tiny.tokenizer("import os")["input_ids"]
    with pytest.raises(InputError, match="there is no tokenizer in nowhere"):
        read_tokenizer("nowhere")


def test_windows_are_led_by_the_separator_and_used_once():
    data = stream(np.arange(1003) % 251)
    grid = replace(SMALL, window=10, batch_size=7, held_out=0.1)
    found = code_windows(data, grid)
    assert (len(found.held_out), len(found.train), found.steps) == (10, 90, 12)
    rows = torch.cat([found.train, found.held_out])
    assert (rows[:, 0] == data.separator).all()
    assert sorted(map(tuple, rows[:, 1:].tolist())) == sorted(map(tuple, data.ids[:1000].reshape(100, 10).tolist()))
    for seed in (0, 1):
        config = grid.config(found.steps, seed)
        batches = list(data_codes._batches(found, config))
        used = [tuple(row) for batch in batches for row in batch.ids.tolist()]
        assert len(used) == len(set(used)) == 12 * 7
        assert set(used) <= set(map(tuple, found.train.tolist()))
        assert all(not b.scored_mask[:, 0].any() and b.scored_mask[:, 1:].all() for b in batches)
    fewer = code_windows(data, replace(grid, max_tokens=509))
    assert len(fewer.train) + len(fewer.held_out) == 50


def test_samples_have_the_distribution_of_the_model():
    """40,000 windows of two of three symbols against all nine probabilities; nothing ends a window."""
    model = small_language_model(3, width=16, layers=2, window=2, seed=0)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(4)  # far from uniform
    pairs = [[2, a, b] for a in range(3) for b in range(3)]
    with torch.no_grad():
        p = model.log_prob(TokenBatch.from_lists(pairs)).value.double().exp().numpy()
    assert p.max() > 8 * p.min() > 0.01
    drawn = draw_windows(model, 2, count=40_000, length=2, generator=torch.Generator().manual_seed(0))
    assert drawn.ids.shape == (40_000, 3)
    assert (drawn.ids[:, 0] == 2).all()
    counts = np.bincount((3 * drawn.ids[:, 1] + drawn.ids[:, 2]).numpy(), minlength=9)
    assert stats.chisquare(counts, 40_000 * p / p.sum()).pvalue > 1e-3


def test_parameters_are_those_that_multiply():
    model = small_language_model(257, width=32, layers=2, window=8, seed=0)
    inner = 96  # 8/3 of the width, rounded up to a multiple of 16
    own = 257 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * inner + 2 * 32) + 32
    assert sum(p.numel() for p in model.model.parameters()) == own
    again, other = (small_language_model(257, width=32, layers=2, window=8, seed=s) for s in (0, 1))
    assert torch.equal(model.model.get_input_embeddings().weight, again.model.get_input_embeddings().weight)
    assert not torch.equal(model.model.get_input_embeddings().weight, other.model.get_input_embeddings().weight)


# ------------------------------------------------------------------ data of known structure
@pytest.fixture(scope="module")
def codes():
    """Both codes of noise and of a period, about seventy steps each."""
    r = np.random.default_rng(0)
    noise = stream(r.integers(0, 256, 20_000))
    period = stream(np.resize(r.permutation(16), 20_000))
    found = {}
    for name, data, rate in (("noise", noise, 2e-3), ("period", period, 1e-2)):
        for run in data_code_runs(data, replace(SMALL, learning_rate=rate)):
            last = max(run.run.finals)
            found[name, run.method] = run.codes()[last], run.points(len(data.ids))[last], len(data.ids)
    return found


@pytest.mark.parametrize("method", ["prequential", "requential"])
def test_uniform_bytes_have_no_structure_and_all_entropy(codes, method):
    """S is below 1 % of the data's bits, H within 1 % of 8 bits per byte."""
    _, point, tokens = codes["noise", method]
    assert point.entropy == pytest.approx(8 * tokens, rel=0.01)
    assert abs(point.structure) < 0.01 * 8 * tokens


@pytest.mark.parametrize("method", ["prequential", "requential"])
def test_a_period_has_little_entropy_and_more_structure_than_noise(codes, method):
    _, point, tokens = codes["period", method]
    assert point.entropy < 0.05 * 8 * tokens
    assert point.structure > 3 * abs(codes["noise", method][1].structure)


def test_points_account_for_their_compute(codes):
    for code, point, tokens in codes.values():
        assert point.compute == code_compute(point.parameters, code.tokens, tokens)
        assert point.entropy == pytest.approx(code.bits_per_token * tokens)
        assert point.structure == code.model.item()
    stream_bits = codes["period", "prequential"][0]
    bits = stream_bits.model.item() + stream_bits.tokens * stream_bits.bits_per_token
    assert stream_bits.stream.item() == pytest.approx(bits, rel=1e-9)


def test_every_run_of_the_grid_comes_with_its_checkpoints():
    grid = replace(SMALL, widths=(16, 32), seeds=2, batch_size=4, checkpoints=10, methods=("prequential",))
    data = stream(np.resize(np.arange(7), 700), vocabulary=8)
    runs = list(data_code_runs(data, grid))
    assert [(r.method, r.width, r.seed) for r in runs] == [("prequential", w, s) for w in (16, 32) for s in (0, 1)]
    assert [sorted(r.run.finals) for r in runs] == [[1, 2, 5, 10]] * 4
    assert len({float(r.run.curve.value.sum()) for r in runs}) == 4
    frontier = epiplexity_frontier([p for r in runs for p in r.points(700).values()])
    assert frontier[-1].total == min(p.total for r in runs for p in r.points(700).values())
    again = list(data_code_runs(data, grid))
    assert all(torch.equal(a.run.curve.value, b.run.curve.value) for a, b in zip(runs, again, strict=True))


# ------------------------------------------------------------------ interrupted grids
def test_finished_runs_are_kept(tmp_path, monkeypatch):
    data = stream(np.resize(np.arange(7), 700), vocabulary=8)
    grid = replace(SMALL, widths=(16,), batch_size=4)
    first = next(iter(data_code_runs(data, grid, keep=tmp_path / "kept")))  # interrupted behind the first run
    assert len(list((tmp_path / "kept").iterdir())) == 1
    trained = []
    own = data_codes.prequential_run
    monkeypatch.setattr(data_codes, "prequential_run", lambda *a, **k: trained.append(1) or own(*a, **k))
    both = list(data_code_runs(data, grid, keep=tmp_path / "kept"))
    assert [run.method for run in both] == ["prequential", "requential"]
    assert not trained
    assert both[0].points(700) == first.points(700)
    fresh = list(data_code_runs(data, grid))
    assert both[1].points(700) == fresh[1].points(700)
    assert trained == [1]
    for changed in (replace(grid, learning_rate=1e-3), replace(grid, window=8), replace(grid, layers=2)):
        next(iter(data_code_runs(data, changed, keep=tmp_path / "kept")))
    other = stream(np.resize(np.arange(6), 700), vocabulary=8)
    next(iter(data_code_runs(other, grid, keep=tmp_path / "kept")))
    assert len(trained) == 5
    wider = replace(grid, widths=(16, 32), methods=("prequential",))  # what else is in the grid changes nothing
    list(data_code_runs(data, wider, keep=tmp_path / "kept"))
    assert len(trained) == 6


def test_kept_runs_are_what_was_saved(tmp_path):
    data = stream(np.resize(np.arange(7), 700), vocabulary=8)
    for run in data_code_runs(data, replace(SMALL, widths=(16,), batch_size=4)):
        save_run(tmp_path / "run.npz", run.run)
        found = load_run(tmp_path / "run.npz")
        assert type(found) is type(run.run)
        for step, rows in run.run.finals.items():
            assert torch.equal(found.finals[step].value, rows.value)
            assert (found.finals[step].kind, found.finals[step].unit) == (rows.kind, rows.unit)
            assert found.code(step).model.item() == run.run.code(step).model.item()
    assert found.teacher_steps == run.run.teacher_steps
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_run_is_refused(tmp_path, content):
    (tmp_path / "run.npz").write_bytes(content)
    with pytest.raises(InputError, match="is no finished run: delete it"):
        load_run(tmp_path / "run.npz")


def test_a_file_with_other_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "run.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="is no finished run"):
        load_run(tmp_path / "run.npz")
    (tmp_path / "file").write_text(json.dumps({}))
    run = next(iter(data_code_runs(stream(np.zeros(700), 8), replace(SMALL, widths=(16,), batch_size=4))))
    with pytest.raises(InputError, match="cannot be written"):
        save_run(tmp_path / "file" / "run.npz", run.run)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], InputError, "several texts"),
        ("one", InputError, "several texts"),
        (["a", ""], RowError, "line 2: the text is empty"),
        (["a", "b\ud800"], RowError, "line 2: the text has a lone surrogate"),
    ],
)
def test_texts_that_are_none(texts, error, message):
    with pytest.raises(error, match=message):
        token_data(texts, names=["line 1", "line 2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "widths must be different multiples of 16"),
        ({"widths": (20,)}, "multiples of 16"),
        ({"widths": (32, 32)}, "different"),
        ({"methods": ()}, "methods must be"),
        ({"methods": ("both",)}, "methods must be"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        ({"checkpoints": 0}, "checkpoints must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"held_out": 0.0}, "held_out must be a share"),
        ({"held_out": 1.0}, "held_out must be a share"),
        ({"held_out": math.nan}, "held_out must be a share"),
        ({"max_kl": 0.0}, "max_kl must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **options)


def test_too_little_data_for_one_batch():
    assert code_windows(stream(np.zeros(17 * 16)), SMALL).steps == 1
    with pytest.raises(InputError, match=r"the data have 271 tokens, .* too few for one batch of 16 windows of 16"):
        code_windows(stream(np.zeros(17 * 16 - 1)), SMALL)
    with pytest.raises(InputError, match="of which at most 100 are read"):
        code_windows(stream(np.zeros(5000)), replace(SMALL, max_tokens=100))
    with pytest.raises(InputError, match="too few"):
        next(iter(data_code_runs(stream(np.zeros(10)), SMALL)))
