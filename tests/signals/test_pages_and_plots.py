"""Pages are whole, escaped and closed to the outside; plots show the numbers they are given."""

from __future__ import annotations

import re

import numpy as np
import pytest

from loglik.errors import InputError
from loglik.signals.calibration import reliability_diagram
from loglik.signals.detection import auroc
from loglik.signals.metacognition import risk_coverage_curve
from loglik.signals.pages import AuditPage, new_figure, shown
from loglik.signals.plots import plot_by_class, plot_order, plot_reliability, plot_risk_coverage, plot_roc

EVIL = '<script>alert("x")</script>'


def test_nothing_of_the_data_becomes_markup(tmp_path):
    page = AuditPage(EVIL, EVIL)
    page.facts(EVIL, {EVIL: EVIL, "nothing": None})
    page.table(EVIL, [{"a": EVIL, "b": 1.5}, {"a": "plain", "b": 2}])
    page.figure(EVIL, new_figure(), EVIL)
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 7
    assert "nothing" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert not list(tmp_path.glob("*.partial"))


def test_the_page_says_what_it_leaves_out():
    page = AuditPage("t")
    page.table("Rows", [{"n": i} for i in range(1500)])
    text = page.text()
    assert "The first 1,000 of 1,500 rows." in text
    assert text.count("<tr>") == 1001


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        AuditPage("t").write(tmp_path / "missing" / "page.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (float("inf"), "inf"),
        ({"a": 0.5, "b": None}, "a 0.5, b "),
        ([1, "x"], "1, x"),
        ("y" * 200, "y" * 159 + "…"),
    ],
)
def test_values_as_people_read_them(value, text):
    assert shown(value) == text


# ---------------------------------------------------------------------- plots
random = np.random.default_rng(0)
POSITIVE = random.uniform(size=80) < 0.4
SCORES = random.normal(size=80) + POSITIVE


def lines(figure, place=0):
    return figure.axes[place].get_lines()


def test_roc_has_the_area_of_auroc():
    drawn = plot_roc({"one": SCORES, "two": -SCORES}, POSITIVE)
    labels = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert labels == [f"one ({auroc(SCORES, POSITIVE):.3f})", f"two ({1 - auroc(SCORES, POSITIVE):.3f})"]
    curve = lines(drawn)[1]
    assert np.trapezoid(curve.get_ydata(), curve.get_xdata()) == pytest.approx(auroc(SCORES, POSITIVE))


def test_reliability_has_the_bins():
    confidence = random.uniform(size=300)
    diagram = reliability_diagram(confidence, random.uniform(size=300) < confidence, bins=10)
    drawn = plot_reliability(diagram)
    points = next(line for line in lines(drawn) if len(line.get_xdata()) == len(diagram.count))
    assert points.get_xdata() == pytest.approx(diagram.confidence)
    assert points.get_ydata() == pytest.approx(diagram.accuracy)
    assert [bar.get_height() for bar in drawn.axes[1].patches] == diagram.count.tolist()


def test_risk_coverage_has_the_curve():
    curve = risk_coverage_curve(SCORES, POSITIVE)
    (line,) = lines(plot_risk_coverage({"score": curve}))
    assert line.get_ydata() == pytest.approx(curve.risk)


def test_histograms_are_shares_of_each_class():
    drawn = plot_by_class(SCORES, POSITIVE, names=("in", "out"), label="score")
    heights = np.array([patch.get_height() for patch in drawn.axes[0].patches])
    assert heights[:40].sum() == pytest.approx(1)
    assert heights[40:].sum() == pytest.approx(1)


def test_order_shows_every_row_and_the_means_of_parts():
    order = random.permutation(100)
    drawn = plot_order(order, 2.0 * order, label="value")
    assert len(drawn.axes[0].collections[0].get_offsets()) == 100
    (means,) = lines(drawn)
    assert means.get_xdata() == pytest.approx(np.arange(2, 100, 5))
    assert means.get_ydata() == pytest.approx(2 * np.arange(2, 100, 5))
