"""The reproductions' harness: verdicts by rule, finite results, names that are found, and results that are on disk."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tyro

from loglik.cli.reproduce import Reproduce, choose, find
from loglik.errors import InputError
from loglik.papers import papers
from loglik.papers.catalogue import verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reproductions"))

from harness import FIRST_SEED, Check, Claim, Measured, Report, reproduce, spread

REPRODUCTIONS = Path(__file__).resolve().parents[1] / "reproductions"
PAPER_FOLDERS = sorted(path.parent for path in REPRODUCTIONS.glob("P*/run.py"))
SECOND_LOOKS = [REPRODUCTIONS / name for name in ("embedded_ood", "embedded_traps")]  # a paper's claim on real text
JUDGED = [f for f in PAPER_FOLDERS + SECOND_LOOKS if (f / "results.json").is_file()]  # the others say "not run"
VERDICTS = ("reproduced", "partly", "not reproduced")


def check(name: str = "small", limit: float = 1.0, **options) -> Check:
    return Check(name, f"value < {limit}", lambda m: m["value"] < limit, ("value",), **options)


def claim(*checks: Check, seeds: int = 3) -> Claim:
    return Claim("P023", "A claim.", "A set-up.", checks or (check(),), seeds)


def report(*values: float, checks: tuple[Check, ...] = (), **options) -> Report:
    measured = tuple(Measured({"value": v}) for v in values)
    return Report(claim(*checks), tuple(range(len(values))), measured, **options)


def draw(figure, drawn: Report) -> None:
    figure.subplots().plot(drawn.per_seed("value"))


# ------------------------------------------------------------------ verdicts
@pytest.mark.parametrize(
    ("limits", "expected"),
    [((1, 2), "reproduced"), ((1, -1), "partly"), ((-1, -2), "not reproduced"), ((1,), "reproduced")],
)
def test_verdict_is_all_some_or_none_of_the_main_checks(limits, expected):
    checks = tuple(check(f"below {limit}", limit) for limit in limits)
    assert report(0.0, 0.5, checks=checks).verdict == expected
    beside = check("beside", 1 if expected == "not reproduced" else -1, main=False)
    assert report(0.0, 0.5, checks=(*checks, beside)).verdict == expected


@pytest.mark.parametrize(
    ("share", "seeds", "needed"), [((1, 1), 3, 3), ((4, 5), 5, 4), ((4, 5), 3, 3), ((4, 5), 10, 8), ((1, 2), 1, 1)]
)
def test_share_of_seeds_is_rounded_up(share, seeds, needed):
    rule = check(share=share)
    assert rule.needed(seeds) == needed
    enough = report(*[0.0] * needed, *[2.0] * (seeds - needed), checks=(rule,)).outcomes[0]
    assert (enough.passed, enough.needed, enough.holds) == (needed, needed, True)
    short = report(*[0.0] * (needed - 1), *[2.0] * (seeds - needed + 1), checks=(rule,)).outcomes[0]
    assert not short.holds


def test_a_check_on_the_mean_looks_once():
    (outcome,) = report(0.0, 1.5, checks=(check(on_mean=True),)).outcomes
    assert outcome.per_seed == (True,)
    assert outcome.holds
    assert not report(0.0, 2.5, checks=(check(on_mean=True),)).outcomes[0].holds


def test_claims_that_cannot_be_judged_are_refused():
    with pytest.raises(InputError, match="no main check"):
        claim(check(main=False))
    with pytest.raises(InputError, match="two checks named 'small'"):
        claim(check(), check())


# ------------------------------------------------------------------ numbers
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match=r"'value' of seed 1 is (nan|-?inf)"):
        report(0.0, bad)


def test_measurements_must_fit():
    with pytest.raises(InputError, match="2 measurements for 1 seeds"):
        Report(claim(), (1,), (Measured({"value": 0.0}),) * 2)
    with pytest.raises(InputError, match="0 measurements for 0 seeds"):
        Report(claim(), (), ())
    with pytest.raises(InputError, match=r"'more' was not measured in every seed \(seed 2 differs\)"):
        Report(claim(), (1, 2), (Measured({"value": 0.0}), Measured({"value": 0.0, "more": 1.0})))
    with pytest.raises(InputError, match="a check shows 'value'"):
        Report(claim(), (1,), (Measured({"other": 0.0}),))


def test_spread():
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(math.sqrt(7)), "min": 1.0, "max": 6.0}
    assert spread([2.0]) == {"mean": 2.0, "std": 0.0, "min": 2.0, "max": 2.0}
    made = report(0.25, 0.125)
    assert made.range("value") == "0.125 to 0.25"
    assert report(0.5, 0.5).range("value") == "0.5"
    assert made.mean("value") == 0.1875


# ------------------------------------------------------------------ running
def test_seeds_are_new_seeded_and_recorded(tmp_path, capsys):
    import torch

    drawn = []

    def measure(seed: int) -> Measured:
        drawn.append((seed, torch.rand(()).item()))
        return Measured({"value": 0.1 * seed - 1}, {"curve": [1.0, 2.0]})

    two_of_three = claim(check(share=(2, 3)))
    done = reproduce(two_of_three, measure, folder=tmp_path, plot=draw, notes=lambda r: [r.range("value")])
    assert done == "reproduced"
    assert [seed for seed, _ in drawn] == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
    torch.manual_seed(FIRST_SEED)
    assert drawn[0][1] == torch.rand(()).item()
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    require_record(record)
    assert record["seeds"] == [11, 12, 13]
    assert record["measurements"]["value"]["per_seed"] == [0.1, 0.2, 0.3]
    assert record["measurements"]["value"]["mean"] == 0.2
    assert record["notes"] == ["0.1 to 0.3"]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for shown in ("A claim.", "A set-up.", "value < 1.0", "3/3 (≥ 2)", "note: 0.1 to 0.3", "verdict: reproduced"):
        assert shown in out


def test_fewer_seeds_than_claimed_write_nothing(tmp_path, capsys):
    assert reproduce(claim(), lambda s: Measured({"value": 0.0}), folder=tmp_path, plot=draw, seeds=1) == "reproduced"
    assert not list(tmp_path.iterdir())
    assert "results.json was left alone" in capsys.readouterr().out
    reproduce(claim(), lambda s: Measured({"value": 0.0}), folder=tmp_path, plot=draw, seeds=4)
    assert len(json.loads((tmp_path / "results.json").read_text())["seeds"]) == 4
    with pytest.raises(InputError, match="--seeds must be at least 1, got 0"):
        reproduce(claim(), lambda s: Measured({"value": 0.0}), folder=tmp_path, plot=draw, seeds=0)


def test_a_run_that_is_not_finite_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="must be finite"):
        reproduce(claim(), lambda s: Measured({"value": math.nan}), folder=tmp_path, plot=draw)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ command line
@pytest.fixture
def toys(tmp_path) -> Path:
    """A folder of reproductions: two that work, one that fails, one without seeds."""
    bodies = {
        "P023_ches": "def main(seeds=None):\n    return f'partly {seeds}'\n",
        "P101_rso": "from shared import VERDICT\n\ndef main(seeds=None):\n    return VERDICT\n",
        "P102_brain": "def main(seeds=None):\n    raise RuntimeError('diverged')\n",
        "plain": "def main():\n    return 'reproduced'\n",
    }
    folder = tmp_path / "reproductions"
    for name, body in bodies.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "run.py").write_text(body, encoding="utf-8")
    (folder / "shared.py").write_text("VERDICT = 'not reproduced'\n", encoding="utf-8")
    return folder


def command(*words: object) -> None:
    tyro.cli(Reproduce, args=[str(word) for word in words]).run()


def test_papers_and_folders_are_run(toys, capsys):
    before = list(sys.path)
    command("p023", "P101_rso", "plain", "--reproductions", toys)
    out = capsys.readouterr().out
    assert out[out.index("verdicts") :].splitlines()[1:] == [
        "P023_ches: partly None",
        "P101_rso: not reproduced",
        "plain: reproduced",
    ]
    command("P023", "P023_ches", "plain", "--seeds", "7", "--reproductions", toys)
    out = capsys.readouterr().out
    assert out.count("P023_ches: partly 7") == 1  # named twice, run once
    assert sys.path == before


def test_one_failure_does_not_stop_the_rest(toys, capsys):
    with pytest.raises(SystemExit) as stop:
        command("--all", "--reproductions", toys)
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert "P102_brain: failed" in out
    assert "plain: reproduced" in out
    assert "diverged" in err
    assert "1 of 4 reproductions failed: P102_brain" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["P024"], r"'P024' has no reproduction yet; the nearest is P0?[\w]+"),
        (["P0233"], "'P0233' is no reproduction; the nearest is P023"),
        (["P101_rzo"], "'P101_rzo' is no reproduction; the nearest is P101_rso"),
        (["plane"], "'plane' is no reproduction; the nearest is plain"),
        ([], "name a paper, or use --all; there are P023_ches, P101_rso, P102_brain, plain"),
        (["P023", "--all"], "give papers or --all, not both"),
        (["P023", "--seeds", "0"], "--seeds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(toys, words, message):
    with pytest.raises(InputError) as error:
        command(*words, "--reproductions", toys)
    assert re.fullmatch(message, str(error.value))


def test_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no reproductions at reproductions: they live in the repository"):
        command("P023")


def test_run_all_exits_with_two_and_a_suggestion():
    """The script of ``make reproduce``, from outside."""
    done = subprocess.run(
        [sys.executable, str(REPRODUCTIONS / "run_all.py"), "embeded_tiny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "'embeded_tiny' is no reproduction; the nearest is embedded_tiny\n"


# ------------------------------------------------------------------ what is on disk
def require_record(record: dict) -> None:
    """The schema of results.json, with every number finite."""
    assert list(record) == [
        "paper",
        "claim",
        "setup",
        "seeds",
        "measurements",
        "checks",
        "verdict",
        "notes",
        "seconds",
        "versions",
    ]
    assert record["verdict"] in VERDICTS
    assert len(record["seeds"]) == len(set(record["seeds"])) > 0
    assert min(record["seeds"]) >= FIRST_SEED
    for measured in record["measurements"].values():
        assert len(measured["per_seed"]) == len(record["seeds"])
        numbers = [*measured["per_seed"], *(measured[key] for key in ("mean", "std", "min", "max"))]
        assert all(math.isfinite(number) for number in numbers)
        # Numbers are written with six digits.
        assert measured["min"] <= measured["mean"] + 2e-5 * abs(measured["mean"])
    main = [c["holds"] for c in record["checks"] if c["main"]]
    assert record["verdict"] == ("reproduced" if all(main) else "partly" if any(main) else "not reproduced")
    for c in record["checks"]:
        assert c["rule"]
        assert c["passed"] == sum(c["per_seed"])
        assert c["holds"] == (c["passed"] >= c["needed"])
        assert set(c["shows"]) <= set(record["measurements"])
    assert set(record["versions"]) >= {"python", "torch", "loglik"}
    assert all(isinstance(note, str) for note in record["notes"])


def load(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"run_{folder.name}", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_paper_has_one_folder():
    ids = [folder.name.split("_")[0] for folder in PAPER_FOLDERS]
    assert len(ids) == len(set(ids))
    assert set(ids) <= {p.id for p in papers()}
    assert choose(ids, find(REPRODUCTIONS)) == [folder.name for folder in PAPER_FOLDERS]


@pytest.mark.parametrize("folder", PAPER_FOLDERS, ids=lambda folder: folder.name)
def test_every_run_imports_and_names_its_paper(folder):
    run = load(folder)
    assert callable(run.main)
    assert run.CLAIM.paper == folder.name.split("_")[0]
    assert run.CLAIM.checks


@pytest.mark.parametrize("folder", JUDGED, ids=lambda folder: folder.name)
def test_results_are_those_of_the_claim(folder):
    """The claim and the rules are the ones that the results were judged by."""
    run = load(folder)
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    require_record(record)
    assert record["paper"] == run.CLAIM.paper
    assert (record["claim"], record["setup"]) == (run.CLAIM.text, run.CLAIM.setup)
    assert [(c["name"], c["rule"], c["main"]) for c in record["checks"]] == [
        (c.name, c.rule, c.main) for c in run.CLAIM.checks
    ]
    assert len(record["seeds"]) >= run.CLAIM.seeds
    assert (folder / "results.png").is_file()
    if folder in PAPER_FOLDERS:
        paper = next(p for p in papers() if p.id == record["paper"])
        assert verdict(paper, REPRODUCTIONS) == record["verdict"]


def test_the_site_shows_every_verdict():
    spec = importlib.util.spec_from_file_location("site_hooks", REPRODUCTIONS.parent / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    table = hooks.papers_table()
    for paper in papers():
        (row,) = re.findall(rf"<tr><td>{paper.id}</td>.*</tr>", table)
        assert f"<td>{verdict(paper, REPRODUCTIONS)}</td>" in row
