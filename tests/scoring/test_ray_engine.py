"""A run on a local Ray cluster: the rows of a local run, whatever dies in the middle."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from loglik.cli import main
from loglik.errors import InputError, RowError
from loglik.models.load import load
from loglik.scoring import run
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.ray_engine import (
    AHEAD,
    ATTEMPTS,
    QUEUED,
    LostChunkError,
    RayCluster,
    RayScorer,
    _device,
    _loader,
    _plan,
    _Started,
    ray_scorer,
)
from loglik.scoring.rows import InputRow, ScoredRow
from loglik.scoring.run import ScoreJob, score_file

TWO = RayCluster(workers=2)
LOAD = functools.partial(load, "tiny", device="cpu")


@pytest.fixture(scope="module")
def ray():
    """A cluster of three cores; after it, no process of Ray is left."""
    ray = pytest.importorskip("ray")
    before = set(psutil.Process().children(recursive=True))
    ray.init(
        address="local",
        num_cpus=3,  # two for the shared workers, one for a test with its own
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=2**27,
    )
    yield ray
    started = set(psutil.Process().children(recursive=True)) - before
    ray.shutdown()
    assert started
    assert not psutil.wait_procs(started, timeout=20)[1]


@pytest.fixture(scope="module")
def engine(ray, tmp_path_factory):
    """Two workers with the embedded model, and the file to which each that has loaded it adds its process."""
    path = tmp_path_factory.mktemp("engine") / "loaded"

    def loader():
        model = load("tiny", device="cpu")
        with path.open("a") as handle:
            handle.write(f"{os.getpid()}\n")
        return model

    with ray_scorer(loader, ScoreOptions(), TWO) as engine:
        engine.loaded = path
        yield engine
    assert ray.is_initialized()  # the caller's connection is left alone


@pytest.fixture
def shared(engine, monkeypatch):
    """Runs use the workers that are there: each takes seconds to start."""
    _use(monkeypatch, engine)
    return engine


def _use(monkeypatch, engine) -> None:
    @contextmanager
    def given(*_):
        yield engine

    monkeypatch.setattr(run, "ray_scorer", given)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Many chunks from few rows, and one thread here as in each of the workers."""
    monkeypatch.setattr(run, "CHUNK_ROWS", 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count: int) -> list[dict]:
    return [
        {"id": f"q{i}", "prompt": f"x{i} = ", "completion": f"def f{i}(): return {i}" * (1 + i % 5)}
        for i in range(count)
    ]


def read_chunks(count: int) -> list[list[InputRow]]:
    rows = [InputRow(t["id"], f"line {i + 1}", t["prompt"], t["completion"]) for i, t in enumerate(texts(8 * count))]
    return [rows[8 * i : 8 * i + 8] for i in range(count)]


def local_run(source: str, tmp_path: Path, **job: object) -> bytes:
    score_file(ScoreJob(source, str(tmp_path / "local.jsonl"), **job), LOAD)
    return (tmp_path / "local.jsonl").read_bytes()


# ------------------------------------------------------------------ what the pool does, on a cluster made of chance
class GoneError(Exception):
    """Stands for `ray.exceptions.RayError`."""


class RaisedError(GoneError):
    """Stands for `ray.exceptions.RayTaskError`."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@dataclass(eq=False)
class Call:
    """A reference to a result."""

    work: Callable[[], object]
    chunk: list[InputRow] | None = None
    value: object = None
    done: bool = False


class Handle:
    """An actor: its calls run one after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self.calls: list[Call] = []
        self.dead = False
        self.start = SimpleNamespace(remote=lambda: self._add(Call(cluster.start)))
        self.score = SimpleNamespace(
            remote=lambda chunk, *, per_token: self._add(Call(functools.partial(cluster.score, chunk), chunk))
        )

    def _add(self, call: Call) -> Call:
        self.calls.append(call)
        if self.dead:
            call.done, call.value = True, GoneError()
        assert len([call for call in self.calls if not call.done]) <= QUEUED
        return call

    def step(self) -> None:
        call = next(call for call in self.calls if not call.done)
        try:
            call.value = call.work()
        except RaisedError as error:
            call.value = error
        except GoneError:
            self.die()
        call.done = True

    def die(self) -> None:
        self.dead = True
        for call in self.calls:
            if not call.done:
                call.done, call.value = True, GoneError()


class Cluster:
    """What `RayScorer` asks of Ray, with random timing, and deaths where `fatal` says so."""

    exceptions = SimpleNamespace(RayError=GoneError, RayTaskError=RaisedError)

    def __init__(self, seed: int = 0, *, fatal: Callable[[str, int], bool] = lambda chunk, deaths: False) -> None:
        self.random = random.Random(seed)
        self.handles: list[Handle] = []
        self.fatal = fatal
        self.deaths: Counter[str] = Counter()
        self.scored: Counter[str] = Counter()
        self.started: Callable[[], object] = lambda: _Started(bos="<s>")

    def create(self) -> Handle:
        self.handles.append(Handle(self))
        return self.handles[-1]

    def start(self) -> object:
        return self.started()

    def score(self, chunk: list[InputRow]) -> list[ScoredRow]:
        name = chunk[0].id
        if self.fatal(name, self.deaths[name]):
            self.deaths[name] += 1
            raise GoneError
        self.scored[name] += 1
        return [ScoredRow(id=row.id) for row in chunk]

    def _step(self) -> None:
        busy = [handle for handle in self.handles if not all(call.done for call in handle.calls)]
        if busy:
            self.random.choice(busy).step()

    def wait(self, refs: list[Call], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Call], None]:
        while self.random.random() < 0.5:
            self._step()
        while timeout is None and not any(ref.done for ref in refs):
            self._step()
        ready = [ref for ref in refs if ref.done]
        return self.random.sample(ready, min(num_returns, len(ready))), None

    def get(self, ref: Call) -> object:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def kill(self, handle: Handle) -> None:
        handle.die()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(20))
def test_every_chunk_comes_back_once_in_order_with_bounded_reading(seed, workers):
    chance = random.Random(seed)
    # A worker may die over a chunk once less than it takes to give the chunk up.
    cluster = Cluster(seed, fatal=lambda _, deaths: deaths < ATTEMPTS - 1 and chance.random() < 0.2)
    scorer = RayScorer(cluster, cluster.create, workers)
    scorer.wait_until_ready()
    assert scorer.bos == "<s>"
    chunks, read, most = read_chunks(40), 0, 0

    def source():
        nonlocal read
        for chunk in chunks:
            read += 1
            yield chunk

    for i, (chunk, scored) in enumerate(scorer.score(source())):
        most = max(most, read - i)
        assert chunk == chunks[i]
        assert [row.id for row in scored] == [row.id for row in chunk]
    assert i == 39
    assert most <= AHEAD * workers
    assert sum(cluster.deaths.values()) > 0
    assert set(cluster.scored.values()) == {1}  # what a worker had returned before it died is not scored again
    assert len(cluster.handles) == workers + sum(cluster.deaths.values())
    scorer.close()
    assert all(handle.dead for handle in cluster.handles)


@pytest.mark.parametrize("seed", range(10))
def test_a_slow_chunk_is_waited_for_while_others_go_ahead_to_the_bound(seed):
    cluster = Cluster(seed)
    held = True
    step = Handle.step

    def slow(handle: Handle) -> None:
        call = next(call for call in handle.calls if not call.done)
        if not (held and call.chunk is not None and call.chunk[0].id == "q0"):
            step(handle)

    read = 0

    def source():
        nonlocal read, held
        for chunk in read_chunks(40):
            read += 1
            held = read < AHEAD * 2
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handle, "step", slow)
        results = RayScorer(cluster, cluster.create, 2).score(source())
        next(results)
    assert read == AHEAD * 2


@pytest.mark.parametrize("seed", range(10))
def test_a_chunk_that_kills_its_workers_is_given_up_after_those_before_it(seed, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", *texts(80))
    cluster = Cluster(seed, fatal=lambda name, _: name == "q40")
    scorer = RayScorer(cluster, cluster.create, 2)
    _use(monkeypatch, scorer)
    message = (
        r"^3 ray workers died .*line 41 \(id q40\) to line 48 \(id q47\).*\(40 rows before it are kept.*--resume\)$"
    )
    with pytest.raises(InputError, match=message):
        score_file(ScoreJob(source, str(tmp_path / "o.jsonl"), cluster=TWO), LOAD)
    assert cluster.deaths == {"q40": ATTEMPTS}
    assert max(cluster.scored.values()) == 1
    after = read_chunks(3)
    with pytest.raises(LostChunkError):  # again: the pool has forgotten the run before
        list(scorer.score(iter(read_chunks(20))))
    assert not scorer._waiting
    assert [chunk for chunk, _ in scorer.score(iter(after))] == after


@pytest.mark.parametrize("seed", range(5))
def test_a_chunk_given_up_is_an_error_only_when_its_turn_comes(seed, monkeypatch):
    cluster = Cluster(seed, fatal=lambda name, _: name == "q8")
    step = Handle.step

    def first_is_last(handle: Handle) -> None:
        names = [call.chunk[0].id if call.chunk else "start" for call in handle.calls if not call.done]
        if names[0] != "q0" or "q8" in names or cluster.deaths["q8"] == ATTEMPTS:  # q8 may stand behind q0
            step(handle)

    monkeypatch.setattr(Handle, "step", first_is_last)
    scorer = RayScorer(cluster, cluster.create, 3)
    while any(worker.starting for worker in scorer._workers):
        scorer._collect(block=True)
    results = scorer.score(iter(read_chunks(4)))
    assert next(results)[0][0].id == "q0"
    with pytest.raises(LostChunkError):
        next(results)


@pytest.mark.parametrize("seed", range(5))
def test_errors_of_the_input_come_after_what_was_read_before_them(seed):
    cluster = Cluster(seed)

    def source():
        yield from read_chunks(7)
        raise InputError("the input is damaged")

    results = RayScorer(cluster, cluster.create, 2).score(source())
    assert [next(results)[0] for _ in range(7)] == read_chunks(7)
    with pytest.raises(InputError, match="damaged"):
        next(results)


def test_workers_that_die_while_they_load_end_the_run():
    cluster = Cluster()

    def fails():
        raise GoneError

    cluster.started = fails
    with pytest.raises(InputError, match=f"{ATTEMPTS} ray workers died before the model was loaded"):
        RayScorer(cluster, cluster.create, 1).wait_until_ready()
    assert len(cluster.handles) == ATTEMPTS


def test_what_a_worker_says_is_raised_here():
    cluster = Cluster()
    cluster.started = lambda: _Started(error="no such model")
    with pytest.raises(InputError, match=r"^no such model$"):
        RayScorer(cluster, cluster.create, 1).wait_until_ready()
    cluster.started = lambda: _Started(version="0.0.1")
    with pytest.raises(InputError, match=r"a ray worker has loglik 0\.0\.1"):
        RayScorer(cluster, cluster.create, 1).wait_until_ready()

    def broken():
        raise RaisedError(KeyError("a bug"))

    cluster.started = broken
    with pytest.raises(KeyError, match="a bug"):
        RayScorer(cluster, cluster.create, 1).wait_until_ready()


# ------------------------------------------------------------------ on Ray
@pytest.mark.slow
def test_rows_are_those_of_a_local_run(shared, tmp_path):
    rows = texts(150)
    rows[70] = {"id": "bad", "completion": 3}
    rows[71] = {"id": "long", "completion": "word " * 5000}
    rows[72] = {"completion": "漢字 é ñ", "prompt": ""}
    source = write(tmp_path / "in.jsonl", *rows)
    how = {"on_error": "row", "per_token": True}
    job = ScoreJob(source, str(tmp_path / "ray.jsonl"), cluster=TWO, report=str(tmp_path / "r.html"), **how)
    summary = score_file(job, LOAD)
    assert (tmp_path / "ray.jsonl").read_bytes() == local_run(source, tmp_path, **how)
    assert (summary.rows, summary.errors) == (150, 2)
    assert summary.bos == Scorer(LOAD()).encoder.describe_bos()
    assert "q149" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_first_bad_row_stops_the_run_and_those_before_it_are_kept(shared, tmp_path):
    rows = texts(60)
    source = write(tmp_path / "in.jsonl", *rows[:45], {"completion": 3}, *rows[46:])
    output = tmp_path / "ray.jsonl"
    with pytest.raises(RowError, match=r"line 46: .*45 rows before it are kept"):
        score_file(ScoreJob(source, str(output), cluster=TWO), LOAD)
    write(tmp_path / "in.jsonl", *rows)
    summary = score_file(ScoreJob(source, str(output), resume=True), LOAD)  # in this process
    assert (summary.resumed, summary.rows) == (45, 15)
    got, expected = (
        [json.loads(line) for line in data.splitlines()] for data in (output.read_bytes(), local_run(source, tmp_path))
    )
    for row, want in zip(got, expected, strict=True):  # chunks are cut elsewhere: equal to float accuracy
        assert row["id"] == want["id"]
        assert row["log_prob"] == pytest.approx(want["log_prob"], abs=1e-4)


@pytest.mark.slow
def test_killed_workers_are_replaced_and_their_rows_scored_once(shared, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", *texts(160))
    original = run._chunks
    killed: list[int] = []

    def chunks(rows):
        for i, chunk in enumerate(original(rows)):
            if i == 10:
                killed.extend(map(int, shared.loaded.read_text().split()))
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(run, "_chunks", chunks)
        summary = score_file(ScoreJob(source, str(tmp_path / "ray.jsonl"), cluster=TWO), LOAD)
    assert (tmp_path / "ray.jsonl").read_bytes() == local_run(source, tmp_path)
    assert summary.rows == 160
    assert killed
    assert len(shared.loaded.read_text().split()) > len(killed)


class _Process:
    """A command with all that it starts; nothing of it is left after the block."""

    def __init__(self, command: list[str]) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.popen = subprocess.Popen(command, start_new_session=True, **pipes)
        self.started: set[psutil.Process] = set()

    def __enter__(self) -> _Process:
        return self

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while self.popen.poll() is None and not condition():
            time.sleep(0.02)
        if self.popen.poll() is not None:
            err = self.popen.communicate()[1]
            if "could not be started here" in err:
                pytest.skip("Ray gives its processes 30 s to start, which was not enough on this machine")
            pytest.fail(err)
        self.started.update(psutil.Process(self.popen.pid).children(recursive=True))

    def said(self) -> tuple[str, str]:
        """What is on standard output and error, once it and its workers have gone."""
        agents = {child for child in self.started if child.is_running() and "Agent" in child.name()}
        self.popen.wait(timeout=60)
        assert not psutil.wait_procs(self.started - agents, timeout=60)[1]
        for child in agents:  # they hold no model, and take a minute to see that the rest of Ray was killed
            if child.is_running():
                child.kill()
        return self.popen.communicate(timeout=60)

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.started.update(psutil.Process(self.popen.pid).children(recursive=True))
            self.popen.kill()
        for child in self.started:
            if child.is_running():
                child.kill()
        self.popen.communicate()


@pytest.mark.slow
def test_interrupted_and_killed_runs_resume(shared, tmp_path, monkeypatch):
    """Ctrl-C gives its sentence; SIGKILL of the process that reads takes the workers along; the rest follows."""
    source = write(tmp_path / "in.jsonl", *texts(2400))
    output, parts = tmp_path / "ray.jsonl", tmp_path / "ray.jsonl.parts"
    small = "from loglik.scoring import run; run.CHUNK_ROWS = 64; from loglik.cli import main; main()"
    command = [sys.executable, "-c", small, "score", source, "--model", "tiny", "--output", str(output), "--resume"]
    command += ["--engine", "ray", "--workers", "2", "--device", "cpu"]

    def parts_done() -> int:
        return len(list(parts.glob("part-*.json")))

    with _Process(command) as process:
        process.wait_for(lambda: parts_done() >= 2)
        os.killpg(process.popen.pid, signal.SIGINT)  # as a terminal sends it: to every process of the group
        sentence = f"loglik: interrupted; finished rows are kept, pass --resume to continue {output}"
        assert process.said() == ("", sentence + "\n")
        assert process.popen.returncode == 2

    there = parts_done()
    with _Process(command) as process:
        process.wait_for(lambda: parts_done() >= there + 1)
        next(child for child in process.started if "_Replica" in child.name()).kill()
        process.wait_for(lambda: parts_done() >= there + 3)
        process.popen.kill()
        assert process.said()[0] == ""  # nothing of Ray on standard output
    assert not output.exists()
    settings = {"model": "tiny", "dtype": "float32", "family": None, "pll": "original"}
    monkeypatch.setattr(run, "CHUNK_ROWS", 64)
    summary = score_file(ScoreJob(source, str(output), resume=True, cluster=TWO, settings=settings), LOAD)
    assert summary.resumed >= 5 * 64
    assert summary.resumed + summary.rows == 2400
    assert output.read_bytes() == local_run(source, tmp_path)


@pytest.mark.slow
def test_errors_in_loading_are_those_of_a_local_run(ray, tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", *texts(2))
    said = []
    for options in ([], ["--engine", "ray", "--workers", "3"]):
        with pytest.raises(SystemExit) as stop:
            main(["score", source, "-m", "no/such-model", "-o", str(tmp_path / "o.jsonl"), *options])
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        said.append(err)
        assert out == ""
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 1
    assert not list(tmp_path.glob("o.jsonl*"))


# ------------------------------------------------------------------ what is refused
def test_ray_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    job = ScoreJob(write(tmp_path / "in.jsonl", *texts(1)), str(tmp_path / "o.jsonl"), cluster=TWO)
    with pytest.raises(InputError, match=r"pip install 'loglik\[scale\]'"):
        score_file(job, LOAD)
    assert not list(tmp_path.glob("o.jsonl*"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, r"^a ray cluster could not be started here \(timed out\): mend that or check --ray-address$"),
        ("auto", r"^the ray cluster at auto cannot be reached \(timed out\)"),
    ],
)
def test_a_cluster_that_does_not_answer_is_a_sentence(address, message, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    asked = {}

    def init(**options):
        asked.update(options, usage=os.environ["RAY_USAGE_STATS_ENABLED"])
        raise Exception("timed out\nwith details")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with (
        pytest.raises(InputError, match=message),
        ray_scorer(LOAD, ScoreOptions(), RayCluster(2, address)),
    ):
        pytest.fail("there is no cluster")
    assert asked["address"] == (address or "local")
    assert ("num_cpus" in asked) == (address is None)
    assert asked["usage"] == "0"
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ


def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch):
    asked = []
    fake = SimpleNamespace(is_initialized=lambda: False, shutdown=list, init=lambda **o: asked.append(o["address"]))
    monkeypatch.setitem(sys.modules, "ray", fake)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(AttributeError), ray_scorer(LOAD, ScoreOptions(), RayCluster(2, f"127.0.0.1:{port}")):
            pytest.fail("the fake has no nodes")
    assert asked == [f"127.0.0.1:{port}"]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):  # closed now
        with (
            pytest.raises(InputError, match=f"^the ray cluster at {address} cannot be reached"),
            ray_scorer(LOAD, ScoreOptions(), RayCluster(2, address)),
        ):
            pytest.fail("nothing listens there")
    assert len(asked) == 1


def test_a_model_must_be_given_as_what_loads_it(tmp_path):
    job = ScoreJob(write(tmp_path / "in.jsonl", *texts(1)), str(tmp_path / "o.jsonl"), cluster=TWO)
    with pytest.raises(InputError, match="a function that does so"):
        score_file(job, LOAD())


def test_options_of_ray_need_ray(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", *texts(1))
    for options, message in (
        (["--workers", "2"], "options of --engine ray"),
        (["--ray-address", "auto"], "options of --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["score", source, "-m", "tiny", *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_directories_travel_as_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "tiny"):
        (tmp_path / name).mkdir()
    assert _loader(functools.partial(load, "m", dtype="float64")).args == (str(tmp_path / "m"),)
    assert _loader(functools.partial(load, name_or_dir=Path("m"))).keywords == {"name_or_dir": str(tmp_path / "m")}
    assert _loader(functools.partial(load, "tiny")).args == ("tiny",)  # the embedded one, here as there
    assert _loader(functools.partial(load, "org/name")).args == ("org/name",)
    assert _device(functools.partial(load, "m", device=torch.device("cpu"))) == "cpu"


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "expected"),
    [
        ([{"CPU": 8}], 2, None, (2, 0, 4)),
        ([{"CPU": 8}], 3, None, (3, 0, 2)),
        ([{"CPU": 8}], None, None, (1, 0, 8)),
        ([{"CPU": 3}, {"CPU": 3}, {}], 3, None, (3, 0, 1)),  # not 2 each: then only two fit
        ([{"CPU": 3}, {"CPU": 9}], 3, None, (3, 0, 3)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 1}], None, None, (3, 1, 1)),
        ([{"CPU": 8, "GPU": 2}, {"CPU": 64}], 2, "cuda", (2, 1, 1)),
        ([{"CPU": 8, "GPU": 2}], 2, "cpu", (2, 0, 4)),
    ],
)
def test_workers_share_what_the_cluster_has(nodes, workers, device, expected):
    count, resources = _plan(nodes, workers, device=device)
    assert (count, resources["num_gpus"], resources["num_cpus"]) == expected


@pytest.mark.parametrize(
    ("nodes", "workers", "device", "message"),
    [
        ([{"CPU": 2}], 3, None, "3 workers of one CPU each do not fit the ray cluster, which has 2"),
        ([{"CPU": 8, "GPU": 1}], 2, None, "2 workers of one GPU each do not fit the ray cluster, which has 1"),
        ([{"CPU": 8, "GPU": 4}], 2, "cuda:1", "pass --device cuda"),
        ([{"CPU": 8}], 2, "cuda", "no GPU: drop --device cuda"),
        ([{}], None, None, "do not fit"),
    ],
)
def test_what_a_cluster_has_no_room_for_is_refused(nodes, workers, device, message):
    with pytest.raises(InputError, match=message):
        _plan(nodes, workers, device=device)
