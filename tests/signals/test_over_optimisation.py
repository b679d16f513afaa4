"""The reading rule on courses whose reading is known, and one evaluation against full logits."""

from __future__ import annotations

import itertools
import math
import random
import sys

import matplotlib.axes
import pytest
import torch

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.signals.over_optimisation import (
    Evaluation,
    Event,
    Indicators,
    LikelihoodMonitor,
    indicators,
    plot_monitor,
)
from loglik.signals.uncertainty import top_k_indicators
from zoo import CAUSAL, build


def run(courses: list[tuple[float, float, float]], **options) -> tuple[LikelihoodMonitor, list[tuple[str, int, int]]]:
    """Feed (chosen, entropy, mass) at steps 0, 10, 20, ...; the events as (kind, since, step)."""
    monitor = LikelihoodMonitor(**options)
    seen = []
    for i, (chosen, entropy, mass) in enumerate(courses):
        seen += monitor.update(10 * i, Indicators(chosen, chosen - 1.0, entropy, mass))
    assert seen == monitor.events
    return monitor, [(e.kind, e.since, e.step) for e in seen]


def line(*points: float, each: int = 6) -> list[float]:
    """A course through the points, `each` evaluations from one to the next."""
    out = [points[0]]
    for a, b in itertools.pairwise(points):
        out += [a + (b - a) * (i + 1) / each for i in range(each)]
    return out


def together(chosen, entropy, mass):
    return list(zip(line(*chosen), line(*entropy), line(*mass), strict=True))


def test_falling_likelihood_with_rising_entropy_is_displacement_and_healthy():
    monitor, events = run(together((-2, -4), (1.0, 2.0), (0.8, 0.8)))
    assert [kind for kind, _, _ in events] == ["displacement"]
    assert not monitor.should_stop


def test_entropy_that_rises_and_falls_has_turned():
    """The DPO and IPO kind: mass moves onto tokens that are not the data's."""
    monitor, events = run(together((-2, -3, -6), (1.0, 2.0, 0.2), (0.8, 0.8, 0.95)))
    assert [kind for kind, _, _ in events] == ["displacement", "entropy_turned"]
    turned = monitor.events[1]
    assert 60 < turned.since < turned.step == turned.since + 20
    assert "after rising by" in turned.message
    assert monitor.should_stop


def test_entropy_that_falls_from_the_start_says_so():
    monitor, events = run(together((-2, -6), (2.0, 0.2), (0.6, 0.99)))
    assert [kind for kind, _, _ in events] == ["displacement", "entropy_turned"]
    assert "without having risen before" in monitor.events[1].message


def test_mass_that_falls_under_rising_entropy_is_leaking():
    """The hinge kind: mass leaves the top k for random tokens."""
    monitor, events = run(together((-2, -3, -6), (1.0, 2.0, 3.0), (0.8, 0.8, 0.3)))
    assert [kind for kind, _, _ in events] == ["displacement", "mass_leaking"]
    assert monitor.should_stop


def test_mass_that_falls_under_falling_entropy_is_not_leaking():
    _, events = run(together((-2, -6), (2.0, 1.0), (0.8, 0.3)))
    assert "mass_leaking" not in [kind for kind, _, _ in events]


@pytest.mark.parametrize("chosen", [(-2, -1), (-2, -2)])
def test_nothing_is_read_while_the_likelihood_does_not_fall(chosen):
    """Maximum likelihood sharpens too: entropy and mass alone say nothing."""
    assert run(together(chosen, (2.0, 0.2), (0.8, 0.99)))[1] == []
    assert run(together(chosen, (1.0, 3.0), (0.8, 0.3)))[1] == []


def test_first_evaluation_that_shows_it_and_patience():
    """Without smoothing: chosen falls below its start at step 10 and is reported at the third evaluation in a row."""
    course = [(c, 1.0, 0.8) for c in (-2.0, -2.5, -2.5, -2.5, -2.5)]
    for patience in (1, 2, 3):
        _, events = run(course, window=1, patience=patience)
        assert events == [("displacement", 10, 10 * patience)]


def test_an_interruption_starts_the_count_again_and_a_new_fall_is_reported_again():
    chosen = (-2.0, -3.0, -3.0, -2.0, -3.0, -3.0, -3.0, -3.0, -2.0, -3.0, -3.0, -3.0)
    _, events = run([(c, 1.0, 0.8) for c in chosen], window=1)
    assert events == [("displacement", 40, 60), ("displacement", 90, 110)]


def test_tolerances_are_exceeded_not_met():
    course = [(-2.0, 2.0, 0.75)] + [(-2.5, 1.5, 0.5)] * 4
    options = {"window": 1, "patience": 1, "likelihood_tolerance": 0.5}
    assert run(course, **options)[1] == []
    options["likelihood_tolerance"] = 0.49
    assert [k for k, _, _ in run(course, **options, entropy_tolerance=0.5)[1]] == ["displacement"]
    kinds = [k for k, _, _ in run(course, **options, entropy_tolerance=0.49)[1]]
    assert kinds == ["displacement", "entropy_turned"]
    rising = [(-2.0, 2.0, 0.75), (-2.5, 2.25, 0.5)]
    assert [k for k, _, _ in run(rising, **options, mass_tolerance=0.25)[1]] == ["displacement"]
    assert [k for k, _, _ in run(rising, **options, mass_tolerance=0.24)[1]] == ["displacement", "mass_leaking"]


def test_events_are_those_of_the_rule_applied_to_all_evaluations_at_once():
    """A plain second reading of the rule, on random courses."""
    for seed in range(20):
        rng = random.Random(seed)
        course, now = [], [-2.0, 1.5, 0.7]
        for _ in range(40):
            course.append(tuple(now))
            now = [x + rng.gauss(d, s) for x, d, s in zip(now, (-0.02, 0.0, 0.0), (0.1, 0.1, 0.03), strict=True)]
        smooth = [
            [sum(x) / len(x) for x in zip(*course[max(0, t - 2) : t + 1], strict=True)] for t in range(len(course))
        ]
        expected = []
        flags = {"displacement": [], "entropy_turned": [], "mass_leaking": []}
        for t, (c, h, m) in enumerate(smooth):
            fell = course[0][0] - c > 0.01
            flags["displacement"].append(fell)
            flags["entropy_turned"].append(fell and max(s[1] for s in smooth[: t + 1]) - h > 0.05)
            flags["mass_leaking"].append(fell and course[0][2] - m > 0.01 and t > 0 and h > smooth[t - 1][1])
            for kind, flag in flags.items():
                if flag[-3:] == [True] * 3 and (len(flag) == 3 or not flag[-4]):
                    expected.append((kind, 10 * (t - 2), 10 * t))
        assert run(course)[1] == expected


def test_history_keeps_what_was_given():
    monitor, _ = run([(-2.0, 1.0, 0.5), (-3.0, 1.1, 0.6)])
    assert [e.step for e in monitor.history] == [0, 10]
    assert monitor.history[1].indicators == Indicators(-3.0, -4.0, 1.1, 0.6)
    assert monitor.history[1].indicators.margin == 1.0


def test_bad_evaluations_are_refused_and_not_taken_in():
    monitor = LikelihoodMonitor()
    good = Indicators(-1.0, -2.0, 1.0, 0.5)
    monitor.update(5, good)
    for step in (5, 4):
        with pytest.raises(InputError, match=f"step {step} follows step 5"):
            monitor.update(step, good)
    with pytest.raises(InputError, match="entropy of step 6 is nan"):
        monitor.update(6, Indicators(-1.0, -2.0, math.nan, 0.5))
    with pytest.raises(InputError, match="chosen of step 6 is -inf"):
        monitor.update(6, Indicators(-math.inf, -2.0, 1.0, 0.5))
    assert len(monitor.history) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window", 0),
        ("window", 1.5),
        ("patience", 0),
        ("patience", True),
        ("likelihood_tolerance", -0.1),
        ("entropy_tolerance", math.nan),
        ("mass_tolerance", math.inf),
    ],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(InputError, match=option):
        LikelihoodMonitor(**{option: value})


# ------------------------------------------------------------------------------------------------------ one evaluation
CHOSEN = TokenBatch.from_lists([[1, 5, 9, 2], [1, 7, 8, 4, 4, 11]], starts=[2, 1])
REJECTED = TokenBatch.from_lists([[1, 5, 3], [1, 7, 8, 2]], starts=[2, 1], padding_side="left")


def test_indicators_are_means_per_completion_and_then_over_completions():
    model = CausalLM(build(CAUSAL["llama"], 30))
    got = indicators(model, CHOSEN, REJECTED, 4)
    with torch.no_grad():
        chosen, rejected = (model.log_prob(b).mean_per_unit().value.mean().item() for b in (CHOSEN, REJECTED))
    top = top_k_indicators(model, CHOSEN, 4)
    assert got.chosen == pytest.approx(chosen, abs=1e-5)
    assert got.rejected == pytest.approx(rejected, abs=1e-5)
    assert got.entropy == pytest.approx(top.entropy.mean().item(), abs=1e-6)
    assert got.mass == pytest.approx(top.mass.mean().item(), abs=1e-6)


def test_indicators_do_not_touch_mode_or_gradients():
    model = CausalLM(build(CAUSAL["llama"], 30).train())
    indicators(model, CHOSEN, REJECTED, 4)
    assert model.model.training
    assert all(p.grad is None for p in model.model.parameters())


def test_indicators_refuse_empty_sets_and_rows():
    model = CausalLM(build(CAUSAL["llama"], 30))
    nothing = TokenBatch.from_lists([])
    for pair in ((nothing, REJECTED), (CHOSEN, nothing)):
        with pytest.raises(InputError, match="no pairs to evaluate"):
            indicators(model, *pair)
    bare = TokenBatch(REJECTED.ids, REJECTED.attention_mask, torch.zeros_like(REJECTED.scored_mask))
    with pytest.raises(RowError, match="row 0: has no scored token"):
        indicators(model, CHOSEN, bare)


def test_training_against_the_chosen_completion_is_seen():
    """Gradient descent on the chosen completion's own likelihood: the monitor reports displacement from a model."""
    model = CausalLM(build(CAUSAL["llama"], 30))
    monitor = LikelihoodMonitor(window=1, patience=2)
    optimiser = torch.optim.SGD(model.model.parameters(), lr=0.01)
    for step in range(5):
        monitor.update(step, indicators(model, CHOSEN, REJECTED))
        model.log_prob(CHOSEN).value.mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert monitor.events[0].kind == "displacement"
    assert monitor.events[0].since == 1


# ------------------------------------------------------------------------------------------------------------- the plot
@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot_is_written(tmp_path, suffix, magic):
    monitor, _ = run(together((-2, -3, -6), (1.0, 2.0, 0.2), (0.8, 0.8, 0.95)))
    path = tmp_path / f"monitor.{suffix}"
    plot_monitor(monitor.history, path, events=monitor.events)
    assert path.read_bytes().startswith(magic)
    assert path.stat().st_size > 2_000


def test_plot_names_its_courses_and_events(tmp_path):
    monitor, _ = run(together((-2, -3, -6), (1.0, 2.0, 0.2), (0.8, 0.8, 0.95)))
    path = tmp_path / "monitor.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        plot_monitor(monitor.history, path, events=[Event("entropy_turned", 20, 10, "")])
    drawn = path.read_text(encoding="utf-8")
    for text in ("nats per token", "top-k entropy (bits)", "top-k mass", "chosen", "rejected", "entropy_turned at 20"):
        assert text in drawn
    assert drawn.count("stroke-dasharray: 3.7,1.6") == 3  # one line per panel
    plot_monitor(monitor.history[:1], tmp_path / "one.png")


def test_events_are_drawn_at_the_step_that_reported_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "axvline", lambda _, x, **__: drawn.append(x))
    history = [Evaluation(step, Indicators(-1.0, -2.0, 1.0, 0.5)) for step in (0, 10, 20)]
    plot_monitor(history, tmp_path / "a.png", events=[Event("mass_leaking", 20, 10, "")])
    assert drawn == [20] * 3


def test_plot_refuses_what_it_cannot_write(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no evaluation to plot"):
        plot_monitor([], tmp_path / "a.png")
    history = [Evaluation(0, Indicators(-1.0, -2.0, 1.0, 0.5))]
    with pytest.raises(InputError, match=r"cannot be written to .*a\.xyz.*png"):
        plot_monitor(history, tmp_path / "a.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"install loglik\[plots\]"):
        plot_monitor(history, tmp_path / "a.png")
