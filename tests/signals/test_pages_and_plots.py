"""Pages are whole, escaped and closed to the outside; plots show the numbers they are given."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from loglik.errors import InputError
from loglik.signals.calibration import reliability_diagram
from loglik.signals.detection import auroc
from loglik.signals.metacognition import risk_coverage_curve
from loglik.signals.pages import AuditPage, new_figure, shown
from loglik.signals.plots import (
    plot_bars,
    plot_by_class,
    plot_heat_map,
    plot_lines,
    plot_order,
    plot_reliability,
    plot_risk_coverage,
    plot_roc,
)

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


# ---------------------------------------------------------------------- heat maps
def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_heat_map_has_the_matrix_its_names_and_its_numbers():
    matrix = np.array([[0.5, -1.0, np.nan], [2.0, 0.25, 3.0]])
    axes = plot_heat_map(matrix, rows=["a", "b"], columns=["x", "y", "z"], label="nats", title="T").axes[0]
    (image,) = axes.get_images()
    assert np.array_equal(np.ma.filled(image.get_array(), np.nan), matrix, equal_nan=True)
    assert (ticks(axes.xaxis), ticks(axes.yaxis)) == (["x", "y", "z"], ["a", "b"])
    assert axes.get_title() == "T"
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "0.5", (1, 0): "-1", (0, 1): "2", (1, 1): "0.25", (2, 1): "3"}  # none in the empty cell
    assert image.get_clim() == (-1, 3)
    assert axes.figure.axes[1].get_ylabel() == "nats"  # of the colours


def test_a_diverging_heat_map_has_its_middle_at_0():
    axes = plot_heat_map([[0.5, -2.0]], rows=["r"], columns=["x", "y"], label="v", diverging=True).axes[0]
    (image,) = axes.get_images()
    assert image.get_clim() == (-2, 2)
    assert image.get_cmap().name.startswith("RdBu")
    zero = plot_heat_map([[0.0]], rows=["r"], columns=["x"], label="v", diverging=True).axes[0].get_images()[0]
    assert zero.get_clim() == (-1, 1)


@pytest.mark.parametrize(("size", "numbers"), [((12, 12), 144), ((13, 2), 0), ((2, 13), 0)])
def test_numbers_are_written_in_small_heat_maps_only(size, numbers):
    names = [[f"n{i}" for i in range(count)] for count in size]
    axes = plot_heat_map(torch.rand(size), rows=names[0], columns=names[1], label="v").axes[0]
    assert len(axes.texts) == numbers


def test_long_and_many_names_are_shortened(tmp_path):
    names = ["x" * 50, "a\nb", "$\\bad{$", "\ud800", *(f"n{i}" for i in range(96))]
    axes = plot_heat_map(np.eye(100), rows=names, columns=names, label="v").axes[0]
    shown_names = ticks(axes.yaxis)
    assert len(shown_names) == 34  # every third
    assert shown_names[0] == "x" * 27 + "…"
    assert list(axes.get_yticks()) == list(range(0, 100, 3))
    small = plot_heat_map(np.eye(4), rows=names[:4], columns=["漢", *names[1:4]], label="v", title="$\\bad{$")
    assert ticks(small.axes[0].yaxis) == ["x" * 27 + "…", "a\\nb", "$\\bad{$", "\\ud800"]
    page = AuditPage("t")
    page.figure("h", small)  # neither a formula, nor a letter that the font lacks, stops the page
    page.write(tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("matrix", "rows", "sentence"),
    [
        ([[1.0, 2.0]], ["a", "b"], "of that shape"),
        ([1.0, 2.0], ["a"], "of that shape"),
        ([[np.nan, np.nan]], ["a"], "finite"),
        ([[np.inf, 0.0]], ["a"], "finite"),
        (np.zeros((0, 2)), [], "finite"),
    ],
)
def test_bad_heat_maps(matrix, rows, sentence):
    with pytest.raises(InputError, match=sentence):
        plot_heat_map(matrix, rows=rows, columns=["x", "y"], label="v")


# ---------------------------------------------------------------------- bars and lines
def test_bars_have_the_values_and_their_intervals():
    axes = plot_bars({"one": 0.5, "two": -1.0, "three": 2.0}, label="AUROC", intervals={"three": (1.5, 1.75)}).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.5, -1.0, 2.0]
    assert [bar.get_y() + bar.get_height() / 2 for bar in axes.patches] == pytest.approx([0, 1, 2])
    assert ticks(axes.yaxis) == ["one", "two", "three"]
    assert axes.yaxis_inverted()  # the first on top
    span = axes.get_lines()[0]
    assert (list(span.get_xdata()), list(span.get_ydata())) == ([1.5, 1.75], [2, 2])
    assert len(axes.get_lines()) == 2  # the interval and the line at 0
    assert axes.get_xlabel() == "AUROC"


@pytest.mark.parametrize(
    ("values", "intervals", "sentence"),
    [
        ({}, None, "one value or more"),
        ({"a": float("nan")}, None, "that of a is nan"),
        ({"a": 1.0}, {"a": (2.0, 1.0)}, "interval of a"),
        ({"a": 1.0}, {"a": (0.0, float("nan"))}, "interval of a"),
        ({"a": 1.0}, {"b": (0.0, 1.0)}, "interval of b"),
    ],
)
def test_bad_bars(values, intervals, sentence):
    with pytest.raises(InputError, match=sentence):
        plot_bars(values, label="v", intervals=intervals)


def test_lines_have_the_curves():
    curves = {"$one": ([1, 2, 3], [0.5, 0.25, 4.0]), "two": (torch.arange(2.0), torch.tensor([1.0, -1.0]))}
    axes = plot_lines(curves, x_label="repetitions", y_label="AUROC").axes[0]
    for line, (x, y) in zip(axes.get_lines(), curves.values(), strict=True):
        assert list(line.get_xdata()) == list(x)
        assert list(line.get_ydata()) == list(y)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["$one", "two"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("repetitions", "AUROC")


@pytest.mark.parametrize(
    ("curves", "sentence"),
    [
        ({}, "one curve or more"),
        ({"a": ([1, 2], [1])}, "a needs as many places as values"),
        ({"a": ([], [])}, "a needs as many places as values"),
        ({"a": ([[1]], [[1]])}, "a needs as many places as values"),
        ({"a": ([1, 2], [1, np.nan])}, "a has places or values that are not finite"),
    ],
)
def test_bad_lines(curves, sentence):
    with pytest.raises(InputError, match=sentence):
        plot_lines(curves, x_label="x", y_label="y")
