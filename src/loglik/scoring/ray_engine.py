"""Score chunks of rows on a Ray cluster: one replica of the model per worker, results in the order of the input.

Workers are actors of Ray's core and not a `ray.data` pipeline, because the input is a stream that this process reads
(it may be a pipe, and the rows are needed here for the digest). A `ray.data` pipeline must read it on a worker, which
takes a core beside the replicas and waits for ever on a cluster that they fill; feeding it window by window loads the
model anew for each window; and it retries a chunk that kills its worker without end. Here, at most `AHEAD` chunks per
worker are between input and output at any time, and a chunk whose workers die is given up after `ATTEMPTS`.

Rows travel as plain dataclasses and the model as the function that loads it; Ray serialises both.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loglik import __version__
from loglik.errors import InputError, LoglikError
from loglik.models.load import EMBEDDED
from loglik.models.protocol import TextModel
from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.rows import InputRow, ScoredRow

__all__ = ["LostChunkError", "RayCluster", "RayScorer", "ray_scorer"]

AHEAD = 4  # chunks per worker that are read and not yet yielded: waiting, being scored, or ahead of a slower one
QUEUED = 2  # chunks per worker sent at a time: the next one is there when a worker finishes, whatever this process does
ATTEMPTS = 3  # workers that may die over one chunk, or one after the other while they load the model


class LostChunkError(InputError):
    """Every worker that was given a chunk died over it."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Which workers score.

    Args:
        workers: replicas of the model; None: one per GPU of the cluster or, without GPUs, one per machine.
        address: of a running cluster, such as ``auto`` or ``host:6379``; None: the one in ``RAY_ADDRESS``, else a new
            one on this machine that ends with the run. A connection that the caller has made already is used as it is.

    Raises:
        InputError: for a number of workers below 1.
    """

    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers must be at least 1, got {self.workers}")


@contextmanager
def ray_scorer(
    model: TextModel | Callable[[], TextModel], options: ScoreOptions, cluster: RayCluster
) -> Iterator[RayScorer]:
    """A `RayScorer` whose first replica is loaded; its workers, and a cluster started for it, end with the block.

    Args:
        model: what loads it in each worker, such as ``functools.partial(load, "tiny")``; must be serialisable.
        options: how text is scored.
        cluster: where.

    Raises:
        InputError: if Ray is missing, the cluster cannot be reached or has no room, `model` is not a function, or
            loading it fails, with the sentence that `load` gives.
    """
    loader = _loader(model)
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise InputError("--engine ray needs ray: pip install 'loglik[scale]'") from None
    # Ray reports dead workers on standard output, where the rows may be going (by a handle that is open already).
    with redirect_stdout(sys.stderr), _connected(ray, cluster) as owned:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, resources = _plan(nodes, cluster.workers, device=_device(loader))
        threads = int(resources["num_cpus"])
        extra: dict[str, Any] = {}
        if owned:
            threads = min(threads, torch.get_num_threads())  # what OMP_NUM_THREADS or the caller has asked for
        elif "HF_HUB_OFFLINE" in os.environ:  # workers of another's cluster do not inherit that
            extra["runtime_env"] = {"env_vars": {"HF_HUB_OFFLINE": os.environ["HF_HUB_OFFLINE"]}}
        # Restarts are made by RayScorer, which knows the chunk to blame.
        replica = ray.remote(**resources, **extra, max_restarts=0, scheduling_strategy="SPREAD")(_Replica)
        scorer = RayScorer(ray, partial(replica.remote, loader, options, threads), workers)
        try:
            scorer.wait_until_ready()
            yield scorer
        finally:
            scorer.close()


class _Replica:
    """What runs in a worker: a `Scorer`."""

    def __init__(self, loader: Callable[[], TextModel], options: ScoreOptions, threads: int) -> None:
        self._loader, self._options, self._threads = loader, options, threads

    def start(self) -> _Started:
        """Load the model. A sentence for the user comes back as a value: Ray wraps exceptions in its traceback."""
        torch.set_num_threads(self._threads)
        try:
            self._scorer = Scorer(self._loader(), self._options)
        except LoglikError as error:
            return _Started(error=str(error))
        return _Started(bos=self._scorer.encoder.describe_bos(), path=self._scorer.executor.describe())

    def score(self, chunk: list[InputRow], *, per_token: bool) -> list[ScoredRow]:
        return self._scorer.score_rows(chunk, per_token=per_token)


@dataclass(frozen=True, slots=True)
class _Started:
    error: str | None = None
    bos: str = ""
    path: str = ""
    version: str = __version__


@dataclass(eq=False, slots=True)
class _Task:
    chunk: list[InputRow]
    deaths: int = 0
    result: list[ScoredRow] | LostChunkError | None = None


@dataclass(eq=False, slots=True)
class _Worker:
    handle: Any
    starting: Any  # reference to what `start` will return; None once it has
    calls: dict[Any, _Task] = field(default_factory=dict)  # by reference to the result, in the order they run
    deaths: int = 0  # while starting, one after the other


class RayScorer:
    """Scores chunks on a pool of replicas; made by `ray_scorer`.

    Attributes:
        bos: `TextEncoder.describe_bos` of the replicas.
    """

    def __init__(self, ray: Any, create: Callable[[], Any], workers: int) -> None:
        self.bos = self.path = ""
        self._ray, self._create = ray, create
        self._waiting: deque[_Task] = deque()
        self._workers: list[_Worker] = []
        for _ in range(workers):
            handle = create()
            self._workers.append(_Worker(handle, handle.start.remote()))

    def wait_until_ready(self) -> None:
        """Until one replica is loaded; the others join when they are.

        Raises:
            InputError: if the model cannot be loaded.
        """
        while all(worker.starting is not None for worker in self._workers):
            self._collect(block=True)

    def score(
        self, chunks: Iterator[list[InputRow]], *, per_token: bool = False
    ) -> Iterator[tuple[list[InputRow], list[ScoredRow]]]:
        """Each chunk with its scored rows, in order. Chunks are read as they are needed.

        Raises:
            LostChunkError: if workers keep dying over a chunk, after the chunks before it were yielded; whatever
                `chunks` raises comes as late.
        """
        order: deque[_Task] = deque()
        broken: Exception | None = None
        reading = True
        try:
            while reading or order:
                if reading and len(order) < AHEAD * len(self._workers):
                    try:
                        chunk = next(chunks, None)
                    except Exception as error:  # raised below, when what was read before it has been yielded
                        chunk, broken = None, error
                    reading = chunk is not None
                    if chunk is not None:
                        order.append(_Task(chunk))
                        self._waiting.append(order[-1])
                self._assign(per_token)
                may_read = reading and len(order) < AHEAD * len(self._workers)
                self._collect(block=bool(order) and order[0].result is None and not may_read)
                while order and (result := order[0].result) is not None:
                    if isinstance(result, LostChunkError):
                        raise result
                    yield order.popleft().chunk, result
        finally:
            self._waiting.clear()
        if broken is not None:
            raise broken

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            with suppress(Exception):  # it, or the whole cluster, may be gone
                self._ray.kill(worker.handle)

    def _assign(self, per_token: bool) -> None:
        """Give waiting chunks to the workers that have least to do."""
        ready = [worker for worker in self._workers if worker.starting is None]
        while ready and self._waiting:
            worker = min(ready, key=lambda w: len(w.calls))
            if len(worker.calls) >= QUEUED:
                return
            task = self._waiting.popleft()
            worker.calls[worker.handle.score.remote(task.chunk, per_token=per_token)] = task

    def _collect(self, *, block: bool) -> None:
        """Take what has come back; with `block`, wait for something."""
        owners = {
            ref: w for w in self._workers for ref in (*w.calls, *([w.starting] if w.starting is not None else []))
        }
        if not owners:
            return
        done, _ = self._ray.wait(list(owners), num_returns=1, timeout=None if block else 0)
        for ref in done:
            worker = owners[ref]
            try:
                value = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:  # raised by the code in the worker, as it would be here
                raise (error.cause or error) from error
            except self._ray.exceptions.RayError:  # the worker or its machine is gone, or out of reach
                self._replace(worker)
            else:
                if ref == worker.starting:
                    self._started(worker, value)
                else:
                    worker.calls.pop(ref).result = value

    def _started(self, worker: _Worker, started: _Started) -> None:
        if started.error is not None:
            raise InputError(started.error)
        if started.version != __version__:
            raise InputError(
                f"a ray worker has loglik {started.version} and this process {__version__}: install the same version "
                "on every machine of the cluster"
            )
        worker.starting, worker.deaths = None, 0
        self.bos, self.path = started.bos, started.path

    def _replace(self, worker: _Worker) -> None:
        """Take back what a dead worker had and start another; the chunk it was at may be what killed it."""
        with suppress(Exception):
            self._ray.kill(worker.handle)  # one that is only out of reach must not keep its place
        back = []
        for ref, task in worker.calls.items():
            task.result = self._result(ref)
            if task.result is None:
                back.append(task)
        worker.calls.clear()
        if back:
            back[0].deaths += 1
            if back[0].deaths >= ATTEMPTS:
                first, last = back[0].chunk[0].where, back[0].chunk[-1].where
                back.pop(0).result = LostChunkError(
                    f"{ATTEMPTS} ray workers died while they scored {first} to {last}, for want of memory most likely: "
                    "give them more or run fewer on a machine"
                )
            self._waiting.extendleft(reversed(back))
        if worker.starting is not None:
            worker.deaths += 1
            if worker.deaths >= ATTEMPTS:
                raise InputError(
                    f"{ATTEMPTS} ray workers died before the model was loaded: check that it fits into the memory of "
                    f"the machines and that each of them has loglik {__version__}"
                )
        worker.handle = self._create()
        worker.starting = worker.handle.start.remote()

    def _result(self, ref: Any) -> list[ScoredRow] | None:
        """What a worker that is dead now returned in time, or None."""
        if not self._ray.wait([ref], timeout=0)[0]:
            return None
        try:
            rows: list[ScoredRow] = self._ray.get(ref)
        except self._ray.exceptions.RayError:
            return None
        return rows


# ---------------------------------------------------------------------- the model
def _loader(model: TextModel | Callable[[], TextModel]) -> Callable[[], TextModel]:
    """`model` as workers can call it: they have their own working directory."""
    if isinstance(model, TextModel) or not callable(model):
        raise InputError(
            "--engine ray loads the model in every worker: give a function that does so, such as "
            "functools.partial(load, 'tiny'), and not the model itself"
        )
    if not isinstance(model, partial):
        return model
    args, keywords = [*model.args], dict(model.keywords)
    place: tuple[Any, Any] = (args, 0) if args else (keywords, "name_or_dir")
    name = args[0] if args else keywords.get("name_or_dir")
    if isinstance(name, str | Path) and str(name) not in EMBEDDED and Path(name).exists():
        place[0][place[1]] = os.path.abspath(name)
    return partial(model.func, *args, **keywords)


def _device(loader: Callable[[], TextModel]) -> str | None:
    device = loader.keywords.get("device") if isinstance(loader, partial) else None
    return None if device is None else str(device)


# ---------------------------------------------------------------------- the cluster
@contextmanager
def _connected(ray: Any, cluster: RayCluster) -> Iterator[bool]:
    """A connection to the cluster; yields whether the cluster was started here."""
    if ray.is_initialized():
        yield False
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    owned = address == "local"
    size = {"num_cpus": max(_cores(), cluster.workers or 1), "include_dashboard": False} if owned else {}
    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **size)
    except Exception as error:  # Ray raises plain ones too, as when its processes take more than 30 s to start
        what = "a ray cluster could not be started here" if owned else f"the ray cluster at {address} cannot be reached"
        raise InputError(f"{what} ({(str(error).splitlines() or [''])[0]}): mend that or check --ray-address") from None
    finally:
        if before is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        else:
            os.environ["RAY_USAGE_STATS_ENABLED"] = before
    try:
        yield owned
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fail within seconds where nothing answers: Ray itself tries for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan(
    nodes: Sequence[Mapping[str, float]], workers: int | None, *, device: str | None
) -> tuple[int, dict[str, float]]:
    """How many workers, and what each takes: a GPU where there are any, or else an equal share of the cores.

    Args:
        nodes: ``CPU`` and ``GPU`` of each machine.
        workers: as asked for; None: one per GPU, or per machine.
        device: as asked for.
    """
    if device is not None and device.startswith("cuda:"):
        raise InputError(f"--device {device} names one GPU, but every ray worker gets its own: pass --device cuda")
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [min(int(node.get("GPU", 0)), count) for node, count in zip(nodes, cores, strict=True)]
    if device is not None and device.startswith("cuda") and not any(gpus):
        raise InputError(f"the ray cluster has no GPU: drop --device {device}")
    on_gpus = any(gpus) and (device is None or device.startswith("cuda"))
    room = sum(gpus if on_gpus else cores)
    count = workers if workers is not None else room if on_gpus else sum(core > 0 for core in cores)
    if count > room or not count:
        unit = "GPU" if on_gpus else "CPU"
        raise InputError(
            f"{count} workers of one {unit} each do not fit the ray cluster, which has {room}: pass fewer --workers or "
            "add machines"
        )
    if on_gpus:
        return count, {"num_gpus": 1, "num_cpus": 1}
    share = max(size for size in range(1, max(cores) + 1) if sum(core // size for core in cores) >= count)
    return count, {"num_gpus": 0, "num_cpus": share}
