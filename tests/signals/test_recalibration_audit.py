"""Maps side by side: the figures are those of the single functions, on rows that no map was fitted on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from loglik.errors import InputError
from loglik.signals.adaptation import lame, lame_stream
from loglik.signals.calibration import (
    classwise_calibration_error,
    expected_calibration_error,
    multiclass_brier_score,
    top_label,
)
from loglik.signals.class_log_probs import class_log_probs
from loglik.signals.h_calibration import HCalibration
from loglik.signals.recalibration import IsotonicCalibration, TemperatureScaling, VectorScaling
from loglik.signals.recalibration_audit import class_figures, compare_recalibrations, make_map, split_rows

G = torch.Generator().manual_seed(0)
TRUE = (2 * torch.randn(1200, 3, generator=G, dtype=torch.float64)).log_softmax(1)
LABELS = torch.multinomial(TRUE.exp(), 1, generator=G)[:, 0]
STATED = (2.5 * TRUE).log_softmax(1)
FIT, JUDGE = (STATED[:600], LABELS[:600]), (STATED[600:], LABELS[600:])


def test_figures_are_those_of_the_functions():
    found = class_figures(*JUDGE, bins=10)
    confidence, correct = top_label(*JUDGE)
    assert found.nll == pytest.approx(log_loss(JUDGE[1], JUDGE[0].exp().numpy()))
    assert found.brier == multiclass_brier_score(*JUDGE)
    assert found.ece == expected_calibration_error(confidence, correct, bins=10)
    assert found.ece_mass == expected_calibration_error(confidence, correct, bins=10, scheme="mass")
    assert found.classwise == classwise_calibration_error(*JUDGE, bins=10)
    assert found.accuracy == pytest.approx((JUDGE[0].argmax(1) == JUDGE[1]).double().mean().item())
    assert found.confidence == pytest.approx(JUDGE[0].exp().max(1).values.mean().item())


def test_maps_are_fitted_on_one_part_and_judged_on_the_other():
    maps = {"temperature": TemperatureScaling(), "vector": VectorScaling()}
    found = compare_recalibrations(FIT, JUDGE, maps, bins=10)
    assert found.before == class_figures(*JUDGE, bins=10)
    for name, made in (("temperature", TemperatureScaling()), ("vector", VectorScaling())):
        mapped = made.fit(*FIT).predict_log_proba(JUDGE[0])
        assert torch.equal(found.log_probs[name], mapped)
        assert found.after[name] == class_figures(mapped, JUDGE[1], bins=10)
        assert found.maps[name] is maps[name]
    assert found.maps["temperature"].temperature_ == pytest.approx(2.5, rel=0.15)  # the distortion
    assert found.after["temperature"].accuracy == found.before.accuracy
    assert found.after["temperature"].nll < found.before.nll - 0.1
    assert not found.refused


def test_a_map_that_the_rows_do_not_determine_is_left_out_with_its_reason():
    few = (STATED[:20], LABELS[:20].clamp(max=1))  # no row of class 2
    found = compare_recalibrations(few, JUDGE, ["temperature", "vector", "h"])
    assert {*found.after} == {"temperature"} == {*found.maps} == {*found.log_probs}
    assert "class 2 has no row" in found.refused["vector"]
    assert "window" in found.refused["h"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("temperature", TemperatureScaling),
        ("vector", VectorScaling),
        ("isotonic", IsotonicCalibration),
        ("h", HCalibration),
        ("h_nll", HCalibration),
    ],
)
def test_names_of_maps(name, kind):
    made = make_map(name, penalty=0.5, window=11, steps=7)
    assert type(made) is kind
    if kind is HCalibration:
        assert (made.objective, made.window if name == "h" else 11, made.steps) == (name.replace("h_", ""), 11, 7)
    if kind is VectorScaling:
        assert made.penalty == 0.5


@pytest.mark.parametrize(("rows", "share", "count"), [(10, 0.5, 5), (10, 0.05, 1), (7, 0.5, 4), (3, 0.34, 1)])
def test_split_is_a_partition_by_lot(rows, share, count):
    fit, judge = split_rows(rows, share, seed=1)
    assert len(fit) == count
    assert sorted([*fit, *judge]) == list(range(rows))
    assert list(fit) == sorted(fit)
    assert list(judge) == sorted(judge)


def test_split_depends_on_the_seed_alone():
    first, again, other = (split_rows(100, 0.5, seed=seed)[0].tolist() for seed in (0, 0, 1))
    assert first == again != other
    counts = np.bincount(np.concatenate([split_rows(10, 0.3, seed=seed)[0] for seed in range(1000)]), minlength=10)
    assert abs(counts - 300).max() < 4 * np.sqrt(1000 * 0.3 * 0.7)  # each row has the same chance


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 0.01, 0.999])
def test_bad_shares(share):
    with pytest.raises(InputError, match="share"):
        split_rows(10, share, seed=0)


def test_bad_comparisons():
    with pytest.raises(InputError, match="no map to compare"):
        compare_recalibrations(FIT, JUDGE, [])
    with pytest.raises(InputError, match="a map must be one of"):
        compare_recalibrations(FIT, JUDGE, ["platt"])
    with pytest.raises(InputError, match="same classes, got 2 to fit on and 3 to judge"):
        compare_recalibrations((STATED[:, :2].log_softmax(1), LABELS.clamp(max=1)), JUDGE)
    with pytest.raises(InputError, match="10 rows cannot fill 15 bins"):
        compare_recalibrations(FIT, (STATED[:10], LABELS[:10]))


# ---------------------------------------------------------------------- scales of class scores, streams
def test_scales_of_class_scores_agree():
    logits = TRUE + 3.0
    for values, scale in ((logits, "logits"), (TRUE, "log_probs"), (TRUE.exp(), "probs")):
        assert class_log_probs(values, scale) == pytest.approx(TRUE.numpy(), abs=1e-9)
    assert class_log_probs([[0.0, 1.0]], "probs").tolist() == [[-np.inf, 0.0]]


@pytest.mark.parametrize(
    ("values", "scale", "sentence"),
    [
        ([[0.5, 0.5], [1.2, -0.2]], "probs", r"must lie in \[0, 1\], got 1.2 in row 1"),
        ([[0.5, float("nan")]], "probs", "got nan in row 0"),
        ([[0.5, 0.4]], "probs", "row 0 sum to 0.9 and not to 1"),
        ([[1.0, 2.0]], "log_probs", "in row 0 sum to"),
        ([[1.0, float("nan")]], "logits", "no distribution"),
        ([[0.5, 0.5]], "odds", "scale must be"),
    ],
)
def test_bad_class_scores(values, scale, sentence):
    with pytest.raises(InputError, match=sentence):
        class_log_probs(values, scale)


def test_a_stream_is_its_batches():
    features = torch.randn(130, 5, generator=G, dtype=torch.float64)
    rows = STATED[:129]
    found = lame_stream(rows, features[:129], batch_size=64, k=3)
    wanted = [lame(rows[a:b], features[a:b], k=3).log_probs for a, b in ((0, 64), (64, 128))]
    assert torch.equal(found[:128], torch.cat(wanted))
    assert torch.allclose(found[128], rows[128])  # alone in its batch
    rbf = lame_stream(rows[:64], features[:64], affinity="rbf", lam=0.5)
    assert torch.equal(rbf, lame(rows[:64], features[:64], affinity="rbf", lam=0.5).log_probs)


def test_bad_streams():
    with pytest.raises(InputError, match="each of 1200 rows needs its features"):
        lame_stream(STATED, torch.ones(3, 2))
    with pytest.raises(InputError, match="features of row 70 have norm 0"):
        lame_stream(STATED[:100], torch.arange(100.0).sub(70)[:, None])
    with pytest.raises(InputError, match="batch_size must be a whole number"):
        lame_stream(STATED, torch.ones(1200, 2), batch_size=0)
