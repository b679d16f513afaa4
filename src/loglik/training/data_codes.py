"""Two-part codes of a data set: small language models trained on it from scratch, one pass each, on a CPU.

The texts become one stream of tokens, cut into windows. Some windows are held out; each model of a grid reads the
others once. Every (model, checkpoint) is a point of bits against compute, from which `loglik.signals.epiplexity` takes
the frontier.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loglik.errors import InputError, LoglikError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.progress import bar
from loglik.signals.epiplexity import CodeLength, Epiplexity
from loglik.training.config import TrainConfig
from loglik.training.data import StepSampler
from loglik.training.kept_runs import load_run, save_run
from loglik.training.one_pass import PrequentialRun, RequentialRun, prequential_run, requential_run
from loglik.training.token_data import TokenData

__all__ = [
    "CodeGrid",
    "DataRun",
    "Windows",
    "code_windows",
    "data_code_runs",
    "draw_windows",
    "small_language_model",
]

CodeMethod = Literal["prequential", "requential"]
_HEAD = 16  # dimensions of an attention head


@dataclass(frozen=True, slots=True)
class CodeGrid:
    """Which models read the data, and how.

    Args:
        widths: of the models, multiples of 16.
        layers: of each.
        seeds: models of each width, which differ in their first weights and the order of the windows.
        methods: ``prequential``, ``requential`` or both.
        window: tokens that a model sees at once.
        batch_size: windows per step.
        learning_rate: constant after the warm-up.
        warmup_steps: of linear warm-up.
        max_tokens: tokens that are read at most, held-out ones included; None: all.
        held_out: share of the windows that gives the final losses, in (0, 1).
        checkpoints: points per run, at numbers of steps that double; the last step is one of them.
        max_kl: nats per token above which a teacher waits for its student. Large models over billions of tokens take
            0.1; in a few hundred steps such a teacher waits until the end.

    Raises:
        InputError: for settings out of range.
    """

    widths: tuple[int, ...] = (32, 64, 128)
    layers: int = 2
    seeds: int = 1
    methods: tuple[CodeMethod, ...] = ("prequential", "requential")
    window: int = 64
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    max_tokens: int | None = 300_000
    held_out: float = 0.05
    checkpoints: int = 6
    max_kl: float = 0.5

    def __post_init__(self) -> None:
        if not self.widths or len(set(self.widths)) < len(self.widths) or any(w < 1 or w % _HEAD for w in self.widths):
            raise InputError(f"widths must be different multiples of {_HEAD}, got {self.widths}")
        if not self.methods or not {*self.methods} <= {"prequential", "requential"}:
            raise InputError(f"methods must be prequential, requential or both, got {self.methods}")
        for name in ("layers", "seeds", "window", "batch_size", "checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be a share of the windows between 0 and 1, got {self.held_out}")
        if not self.max_kl > 0:
            raise InputError(f"max_kl must be positive, got {self.max_kl}")
        self.config(1, 0)

    def config(self, steps: int, seed: int) -> TrainConfig:
        """Settings of one run."""
        return TrainConfig(
            steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="constant",
            warmup_steps=self.warmup_steps,
            seed=seed,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """A data set in windows, each led by the separator.

    Args:
        train: (W, 1 + T) windows that are learned from, each once.
        held_out: (H, 1 + T) windows that give the final losses.
        steps: whole batches in `train`.
    """

    train: Tensor
    held_out: Tensor
    steps: int


def code_windows(data: TokenData, grid: CodeGrid) -> Windows:
    """Cut a stream into windows, and keep some aside; which ones depends on the data's size alone.

    Raises:
        InputError: where the data have no whole batch beside the held-out windows.
    """
    count = len(data.ids) // grid.window
    order = np.random.default_rng(0).permutation(count)
    if grid.max_tokens is not None:
        order = order[: grid.max_tokens // grid.window]
    aside = max(1, round(grid.held_out * len(order)))
    steps = (len(order) - aside) // grid.batch_size
    if steps < 1:
        read = f", of which at most {grid.max_tokens:,} are read" if grid.max_tokens is not None else ""
        raise InputError(
            f"the data have {len(data.ids):,} tokens{read}, too few for one batch of {grid.batch_size} windows of "
            f"{grid.window} beside the held-out ones: give more text, smaller batches or shorter windows"
        )
    rows = torch.from_numpy(data.ids[: count * grid.window].reshape(count, grid.window))
    led = torch.cat([torch.full((count, 1), data.separator), rows], 1)
    return Windows(led[order[aside:]], led[order[:aside]], steps)


@dataclass(frozen=True, slots=True, eq=False)
class DataRun:
    """One model's pass over a data set.

    Args:
        width: of the model.
        seed: of the run.
        parameters: of the model; all of them multiply at every token, since table and head are one.
        run: what was recorded.
    """

    width: int
    seed: int
    parameters: int
    run: PrequentialRun | RequentialRun

    @property
    def method(self) -> CodeMethod:
        """How the run gives a code."""
        return "prequential" if isinstance(self.run, PrequentialRun) else "requential"

    def area(self) -> tuple[Tensor, Tensor, float]:
        """Whose area is structure: (S,) tokens of each step, (S,) bits per token at it, and the level below the area.

        Of a prequential run losses and the final loss; of a requential one divergences and 0.
        """
        run = self.run
        if isinstance(run, PrequentialRun):
            losses = -run.curve.mean_per_unit().value / math.log(2)
            return run.curve.num_units, losses, run.code(max(run.finals)).bits_per_token
        return run.tokens, run.divergences / run.tokens / math.log(2), 0.0

    def codes(self, *, overhead: bool = False) -> dict[int, CodeLength]:
        """The model's bits by the number of steps; `overhead` makes requential ones a bound."""
        run = self.run
        if isinstance(run, PrequentialRun):
            return {step: run.code(step) for step in run.finals}
        return {step: run.code(step, overhead=overhead) for step in run.finals}

    def points(self, data_tokens: float, *, overhead: bool = False) -> dict[int, Epiplexity]:
        """Two-part codes of `data_tokens` tokens by the number of steps."""
        codes = self.codes(overhead=overhead).items()
        return {s: code.two_part(parameters=self.parameters, data_tokens=data_tokens) for s, code in codes}


def data_code_runs(
    data: TokenData,
    grid: CodeGrid | None = None,
    *,
    device: str = "cpu",
    keep: str | Path | None = None,
) -> Iterator[DataRun]:
    """Train the models of a grid on a data set, and give each run as soon as it is whole.

    Args:
        data: from `token_data`.
        grid: which models; the default one if None.
        device: of the models.
        keep: directory of finished runs: what lies there (of the same data and settings) is not trained again, so that
            an interrupted grid goes on where it was.

    Raises:
        InputError: for too few data, or a kept run that cannot be read.
        LoglikError: if a loss is not finite, with its step.

    Source: arXiv 2601.03220.
    """
    grid = CodeGrid() if grid is None else grid
    windows = code_windows(data, grid)
    key = hashlib.sha256(windows.train.numpy().tobytes() + windows.held_out.numpy().tobytes()).hexdigest()
    for method in grid.methods:
        for width in grid.widths:
            for seed in range(grid.seeds):
                yield _one_run(data, grid, windows, (method, width, seed), device, key, keep)


def small_language_model(vocabulary: int, *, width: int, layers: int, window: int, seed: int) -> CausalLM:
    """A LLaMA with random weights; the table of its tokens is its head as well.

    Args:
        vocabulary: number of tokens.
        width: a multiple of 16.
        layers: of attention and MLP.
        window: tokens of context.
        seed: of the weights.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_HEAD * math.ceil(8 * width / 3 / _HEAD),
        num_hidden_layers=layers,
        num_attention_heads=width // _HEAD,
        num_key_value_heads=width // _HEAD,
        max_position_embeddings=window + 1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Any = LlamaForCausalLM(config)
        return CausalLM(network.eval())


@torch.no_grad()
def draw_windows(model: CausalLM, first: int, *, count: int, length: int, generator: torch.Generator) -> TokenBatch:
    """`count` sequences of exactly `length` tokens behind the token `first`, at temperature 1; those are scored.

    No token ends a sequence, and keys and values are kept, so that a token costs one step of the network.
    """
    last = torch.full((count, 1), first)
    drawn, past = [last], None
    for _ in range(length):
        out = model.model(input_ids=last.to(model.device), past_key_values=past, use_cache=True)
        past = out.past_key_values
        last = torch.multinomial(out.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator)
        drawn.append(last)
    return _batch(torch.cat(drawn, 1))


def _one_run(
    data: TokenData,
    grid: CodeGrid,
    windows: Windows,
    which: tuple[CodeMethod, int, int],
    device: str,
    key: str,
    keep: str | Path | None,
) -> DataRun:
    method, width, seed = which
    model = small_language_model(data.vocabulary, width=width, layers=grid.layers, window=grid.window, seed=seed)
    parameters = sum(p.numel() for p in model.model.parameters())
    # Everything that decides the result, but not what other runs there are.
    own = {name: value for name, value in asdict(grid).items() if name not in ("widths", "seeds", "methods")}
    told = {"data": key, "vocabulary": data.vocabulary, "method": method, "width": width, "seed": seed, **own}
    path = None
    if keep is not None:
        name = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()[:12]
        path = Path(keep) / f"{method}-{width}-{seed}-{name}.npz"
        if path.is_file():
            return DataRun(width, seed, parameters, load_run(path))
    network: Any = model.model
    network.to(device)
    config = grid.config(windows.steps, seed)
    held_out = [_batch(part) for part in torch.split(windows.held_out, grid.batch_size)]
    options: dict[str, Any] = {"held_out": held_out, "checkpoints": _checkpoints(windows.steps, grid.checkpoints)}
    title = f"{method}, width {width}, seed {seed}"
    with bar(title, total=windows.steps, unit="steps") as advance:
        options["advance"] = advance
        try:
            run = _trained(method, model, data.separator, grid, _batches(windows, config), config, options)
        except LoglikError as error:
            raise LoglikError(f"{title}: {error}") from None
    if path is not None:
        save_run(path, run)
    return DataRun(width, seed, parameters, run)


def _trained(
    method: CodeMethod,
    model: CausalLM,
    separator: int,
    grid: CodeGrid,
    batches: Iterator[TokenBatch],
    config: TrainConfig,
    options: dict[str, Any],
) -> PrequentialRun | RequentialRun:
    if method == "prequential":
        return prequential_run(model, batches, config, **options)
    student = CausalLM(copy.deepcopy(model.model))
    generator = torch.Generator().manual_seed(config.seed)

    def sample() -> TokenBatch:
        return draw_windows(model, separator, count=grid.batch_size, length=grid.window, generator=generator)

    return requential_run(model, student, batches, sample, config, max_kl=grid.max_kl, **options)


def _batches(windows: Windows, config: TrainConfig) -> Iterator[TokenBatch]:
    """Each window once at most, in an order that the seed gives."""
    size, rows = config.batch_size, len(windows.train)
    picks = StepSampler(rows, batch_size=size, micro_batch_size=size, first=0, last=windows.steps, seed=config.seed)
    return (_batch(windows.train[pick]) for pick in picks)


def _batch(ids: Tensor) -> TokenBatch:
    """Windows whose first token only leads."""
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    return TokenBatch(ids, torch.ones_like(scored), scored)


def _checkpoints(steps: int, count: int) -> list[int]:
    """Numbers of steps that halve from the last one, rounded, without repetition."""
    return sorted({max(1, round(steps / 2**i)) for i in range(count)})
