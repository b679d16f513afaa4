"""Maps come back from JSON bit for bit, and files that are no maps are refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from torch import nn

from loglik.errors import InputError
from loglik.signals.h_calibration import HCalibration
from loglik.signals.map_files import load_map, map_from_record, map_record, save_map
from loglik.signals.monotone_maps import MonotoneNetwork, MonotonePiecewiseLinear, TemperatureEnsemble
from loglik.signals.recalibration import (
    IsotonicCalibration,
    IsotonicConfidence,
    TemperatureScaling,
    VectorScaling,
    binary_log_probs,
)

K = 4
G = torch.Generator().manual_seed(0)
TRUE = (2 * torch.randn(600, K, generator=G, dtype=torch.float64)).log_softmax(1)
LABELS = torch.multinomial(TRUE.exp(), 1, generator=G)[:, 0]
LOGITS = 1.7 * TRUE - 0.1 * TRUE**2
FRESH = 3 * torch.randn(50, K, generator=G, dtype=torch.float64)


def h(mapping, **options):
    return HCalibration(mapping, window=51, steps=4, **options)


MAPS = {
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "penalty": lambda: VectorScaling(0.1),
    "isotonic": IsotonicCalibration,
    "no floor": lambda: IsotonicCalibration(floor=0.0),
    "h": lambda: h("piecewise"),
    "h_nll": lambda: h(MonotonePiecewiseLinear(7, reach=3.0), objective="nll"),
    "temperatures": lambda: h("temperatures"),
    "one temperature": lambda: h(TemperatureEnsemble(1)),
    "network": lambda: h("network"),
    "small network": lambda: h(MonotoneNetwork(3, reach=2.5, seed=4)),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_comes_back_bit_for_bit(tmp_path, name):
    fitted = MAPS[name]().fit(LOGITS, LABELS)
    save_map(fitted, tmp_path / "map.json")
    back = load_map(tmp_path / "map.json")
    assert type(back) is type(fitted)
    for rows in (FRESH, LOGITS):
        assert torch.equal(back.predict_log_proba(rows), fitted.predict_log_proba(rows))
    with pytest.raises(InputError, match=f"fitted on {K} classes, got 3"):
        back.predict_log_proba(FRESH[:, :3])
    assert map_record(back) == map_record(fitted)


def test_two_classes_and_confidences_come_back(tmp_path):
    confidence = TRUE.exp().max(1).values
    correct = TRUE.argmax(1) == LABELS
    for fitted, given in (
        (IsotonicCalibration().fit(binary_log_probs(confidence), correct.long()), binary_log_probs(confidence)),
        (IsotonicConfidence().fit(confidence, correct), confidence),
    ):
        save_map(fitted, tmp_path / "map.json")
        assert torch.equal(load_map(tmp_path / "map.json").transform(given), fitted.transform(given))


def test_steps_are_those_of_scikit_learn():
    probs, hits = TRUE[:, 1].exp().numpy(), (LABELS == 1).double().numpy()
    peer = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(probs, hits)
    own = IsotonicCalibration().fit(TRUE, LABELS).maps_[1]
    grid = np.linspace(0, 1, 2001)
    assert own.predict(grid) == pytest.approx(peer.predict(grid), abs=1e-12)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="TemperatureScaling has no map yet: call fit first"):
        map_record(TemperatureScaling())
    for unfitted in (HCalibration(), IsotonicConfidence()):
        with pytest.raises(InputError, match="has no map yet"):
            map_record(unfitted)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return (self.t * x).log_softmax(-1)

    with pytest.raises(InputError, match="Own is a module of your own"):
        map_record(h(Own()).fit(LOGITS, LABELS))
    with pytest.raises(InputError, match="list is no map that can be written"):
        map_record([])
    with pytest.raises(InputError, match="cannot be written"):
        save_map(TemperatureScaling().fit(LOGITS, LABELS), tmp_path / "missing" / "map.json")


GOOD = {name: map_record(MAPS[name]().fit(LOGITS, LABELS)) for name in ("temperature", "vector", "isotonic", "network")}


def changed(name, **changes):
    record = json.loads(json.dumps(GOOD[name]))
    for key, value in changes.items():
        (record["parameters"] if key in record["parameters"] else record)[key] = value
    return record


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ([], "this is no recalibration map"),
        ({"temperature": 2.0}, "this is no recalibration map"),
        (changed("temperature", version=2), "has version 2, and version 1 is known"),
        (changed("temperature", map="os.system"), "'os.system' is not known"),
        (changed("temperature", map=["x"]), "is not known"),
        (changed("temperature", classes=0), "needs a number of classes"),
        (changed("temperature", classes=True), "needs a number of classes"),
        ({**GOOD["temperature"], "parameters": None}, "needs a number of classes and parameters"),
        (changed("temperature", temperature=-1.0), "the temperature of TemperatureScaling is -1.0"),
        (changed("temperature", temperature="2"), "is '2'"),
        (changed("temperature", temperature=float("nan")), "is nan"),
        ({**GOOD["temperature"], "parameters": {}}, "is None"),
        (changed("vector", weight=[1.0, 2.0]), "must be a list of 4 finite numbers"),
        (changed("vector", bias=[1.0, 2.0, 3.0, float("inf")]), "must be a list of 4 finite numbers"),
        (changed("isotonic", maps=[]), "needs one map per class, 4"),
        (changed("isotonic", floor=2.0), "the floor of IsotonicCalibration is 2.0"),
        (changed("isotonic", maps=[{"x": [0.0, 1.0], "y": [0.5, 0.2]}] * 4), "must rise"),
        (changed("isotonic", maps=[{"x": [1.0, 0.0], "y": [0.2, 0.5]}] * 4), "must rise"),
        (changed("isotonic", maps=[{"x": [0.0, 1.0], "y": [0.5, 1.2]}] * 4), r"lie in \[0, 1\]"),
        (changed("isotonic", maps=[{"x": [0.0, 1.0], "y": [0.5]}] * 4), "must be a list of 2 finite numbers"),
        (changed("network", mapping="linear"), "needs a mapping of piecewise, temperatures, network"),
        ({**GOOD["network"], "parameters": []}, "needs a number of classes and parameters"),
        ({**GOOD["network"], "parameters": {"mapping": "network", "reach": 1.0}}, "needs a mapping"),
        ({**GOOD["network"], "parameters": {"mapping": "network", "reach": 1.0, "parameters": {}}}, "the height of H"),
    ],
)
def test_bad_records(record, sentence):
    with pytest.raises(InputError, match=sentence):
        map_from_record(record)


def test_bad_files(tmp_path):
    path = tmp_path / "map.json"
    with pytest.raises(InputError, match=r"map.json cannot be read"):
        load_map(path)
    for text in (b"{broken", b"\xff\xfe", b""):
        path.write_bytes(text)
        with pytest.raises(InputError, match=r"map.json is not JSON"):
            load_map(path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"map.json: this is no recalibration map"):
        load_map(path)
