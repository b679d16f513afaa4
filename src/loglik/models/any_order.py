r"""Any-order marginals of discrete vectors: :math:`\log p(x_S)` of every subset S of the entries in one pass (MaM).

A vector x has D entries with values 0 to K - 1. A mask `known` beside it, bool of shape (D,) or (B, D), says which of
entries are known; what stands at unknown entries is ignored (it may be -1). An *order* is a permutation of the
entries: ``order[t]`` is the entry that becomes known t-th. Its inverse, ``order.argsort()``, holds the *rank* of every
entry; the two are different things wherever the permutation is no involution.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from loglik.errors import InputError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood

__all__ = ["AnyOrderMarginals", "StateMLP", "random_orders"]

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS = "loglik_any_order.json", "loglik_any_order.safetensors"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class StateMLP(nn.Module):
    r"""A residual network on partial states: :math:`h \leftarrow h + W_2\,\text{silu}(W_1\,\text{norm}(h))` per layer.

    Args:
        dims: D, entries of a state.
        values: K; an entry is one-hot over K + 1 channels, the first for "unknown".
        shape: of the output of one row; () for a number.
        layers: residual blocks.
        width: of the hidden vector.
    """

    def __init__(self, dims: int, values: int, *, shape: tuple[int, ...], layers: int, width: int) -> None:
        super().__init__()
        self.symbols, self.shape, self.layers, self.width = values + 1, shape, layers, width
        self.first = nn.Linear(dims * self.symbols, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(layers)
        )
        self.last = nn.Linear(width, prod(shape))

    def forward(self, states: Tensor) -> Tensor:
        """(B, D) long, 0 where unknown and value + 1 where known, to (B, *shape)."""
        hidden = self.first(F.one_hot(states, self.symbols).flatten(1).to(self.first.weight.dtype))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        out: Tensor = self.last(F.silu(hidden))
        return out.reshape(len(states), *self.shape)


class AnyOrderMarginals(nn.Module):
    r"""Two networks on partial states: one of marginals, one of any-order conditionals.

    .. math:: l_\theta(x_S) \approx \log p(x_S) + \log Z, \qquad p_\phi(x_d \mid x_S), \quad d \notin S

    The marginal network gives one number per state, so that any marginal is :math:`l(x_S) - l(\emptyset)` and any
    conditional :math:`l(x_{A \cup B}) - l(x_B)`, in two passes. Training makes the two networks agree
    (`loglik.objectives.any_order`); nothing makes the numbers of the marginal network sum to one, which is why they are
    SURROGATE. The conditional network is a normalised model in every single order, and what is sampled from.

    Args:
        dims: D, entries of a vector.
        values: K, values of an entry.
        layers: residual blocks of each network.
        width: of each network.
        dtype: of the weights, float32 or float64.
        seed: of the initial weights; the global generator is left alone.
        marginal_network: states (B, D) long (0 unknown, value + 1 known) to (B,); instead of a `StateMLP`.
        conditional_network: states to logits (B, D, K); instead of a `StateMLP`.

    Raises:
        InputError: for sizes below one or another dtype.

    Source: arXiv 2310.12920.
    """

    kind = Kind.SURROGATE
    unit = Unit.DIM

    def __init__(
        self,
        dims: int,
        values: int,
        *,
        layers: int = 4,
        width: int = 2048,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        marginal_network: nn.Module | None = None,
        conditional_network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dims", dims), ("values", values), ("layers", layers), ("width", width)):
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        if dtype not in _DTYPES.values():
            raise InputError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.dims, self.values = dims, values

        def fresh(*shape: int) -> nn.Module:
            return StateMLP(dims, values, shape=shape, layers=layers, width=width).to(dtype)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.marginal_network = fresh() if marginal_network is None else marginal_network
            self.conditional_network = fresh(dims, values) if conditional_network is None else conditional_network

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # ------------------------------------------------------------------ marginal network
    def log_marginal(self, x: Tensor, known: Tensor) -> Tensor:
        r"""(B,) :math:`l(x_S)`, nats, unnormalised: `log_normalizer` is to be subtracted; one pass.

        Raises:
            InputError: for shapes that do not fit, or a known entry that is no value.
        """
        value: Tensor = self.marginal_network(self._states(x, known))
        return value

    def log_normalizer(self) -> Tensor:
        r"""() :math:`l(\emptyset)`, nats: the model's :math:`\log Z`; one pass over one row."""
        value: Tensor = self.marginal_network(torch.zeros(1, self.dims, dtype=torch.long, device=self.device))
        return value[0]

    def log_prob(self, x: Tensor, *, draws: DrawsKey | None = None) -> LogLikelihood:
        r"""SURROGATE :math:`l(x) - l(\emptyset)` (B,) of whole vectors (B, D): two passes, no sum to one guaranteed.

        `order_log_prob` is exact, in D passes.

        Raises:
            InputError: for a shape that does not fit, or an entry that is no value.
        """
        return self.marginal(x, x.new_ones(x.shape, dtype=torch.bool))

    def marginal(self, x: Tensor, known: Tensor) -> LogLikelihood:
        r"""SURROGATE :math:`\log p(x_S) = l(x_S) - l(\emptyset)` (B,) of the known entries, nats: two passes.

        Raises:
            InputError: for shapes that do not fit, or a known entry that is no value.
        """
        value = self.log_marginal(x, known) - self.log_normalizer()
        return LogLikelihood(value, self.kind, self.unit, known.expand(x.shape).sum(-1))

    def conditional(self, x: Tensor, query: Tensor, evidence: Tensor) -> LogLikelihood:
        r"""SURROGATE :math:`\log p(x_A \mid x_B) = l(x_{A \cup B}) - l(x_B)` (B,), nats: two passes.

        Args:
            x: (B, D) long.
            query: (D,) or (B, D) bool, A; what is in both sets counts as given.
            evidence: (D,) or (B, D) bool, B.

        Raises:
            InputError: for shapes that do not fit, or an entry of either set that is no value.
        """
        given = self.log_marginal(x, evidence)
        self._states(x, query)
        value = self.log_marginal(x, query | evidence) - given
        return LogLikelihood(value, self.kind, self.unit, (query & ~evidence).expand(x.shape).sum(-1))

    # ------------------------------------------------------------------ conditional network
    def log_conditionals(self, x: Tensor, known: Tensor) -> Tensor:
        r"""(B, D, K) :math:`\log p_\phi(x_d = k \mid x_S)`, normalised over k, nats; one pass.

        Rows d of entries that are known are numbers that nothing was trained on.

        Raises:
            InputError: for shapes that do not fit, or a known entry that is no value.
        """
        logits: Tensor = self.conditional_network(self._states(x, known))
        return logits.log_softmax(-1)

    def order_log_prob(self, x: Tensor, order: Tensor) -> LogLikelihood:
        r"""EXACT log-likelihood (B,) of the conditional network's chain rule in one order: D passes.

        .. math:: \log p_\phi(x; \sigma) = \sum_t \log p_\phi(x_{\sigma_t} \mid x_{\sigma_{<t}})

        Every order is a distribution of its own; they agree only as far as training made them.

        Args:
            x: (B, D) long.
            order: (D,) or (B, D) long, permutations.

        Returns:
            The likelihood with terms (B, D): column d is the term of entry d, wherever it stands in the order.

        Raises:
            InputError: for shapes that do not fit, an entry that is no value, or an order that is no permutation.
        """
        self.require_complete(x)
        orders = self._orders(order, len(x))
        ranks, rows = orders.argsort(-1), torch.arange(len(x), device=x.device)
        terms = []
        for step in range(self.dims):
            entry = orders[:, step]
            terms.append(self.log_conditionals(x, ranks < step)[rows, entry, x[rows, entry]])
        by_entry = torch.stack(terms, 1).gather(1, ranks)
        mask = torch.ones_like(x, dtype=torch.bool)
        return LogLikelihood.from_per_unit(by_entry, mask, kind=Kind.EXACT, unit=self.unit)

    def sample(self, n: int, *, generator: torch.Generator | None = None, order: Tensor | None = None) -> Tensor:
        """(n, D) long, ancestral draws from the conditional network: D passes.

        Args:
            n: how many.
            generator: of all random numbers.
            order: (D,) or (n, D) permutations; by default a random one for every row, so that the draws come from the
                mixture over all orders.

        Raises:
            InputError: for an order that is no permutation.
        """
        if n < 0:
            raise InputError(f"n must not be negative, got {n}")
        if order is None:
            orders = random_orders(n, self.dims, generator=generator, device=self.device)
        else:
            orders = self._orders(order, n)
        blank = torch.zeros(n, self.dims, dtype=torch.long, device=self.device)
        return self._redraw(blank, orders, 0, generator)

    def gibbs(self, x: Tensor, block: int, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, D) long: every row of `x` with `block` random entries erased and drawn again, one by one.

        The target stays invariant if the conditionals are those of one joint distribution.

        Args:
            x: (B, D) long; left as it is.
            block: m, entries to draw again, 1 to D; m passes.
            generator: of all random numbers.

        Raises:
            InputError: for a shape that does not fit, an entry that is no value, or a block out of range.
        """
        self.require_complete(x)
        if not 1 <= block <= self.dims:
            raise InputError(f"block must lie between 1 and {self.dims}, the entries of a vector, got {block}")
        orders = random_orders(len(x), self.dims, generator=generator, device=x.device)
        return self._redraw(x, orders, self.dims - block, generator)

    @torch.no_grad()
    def _redraw(self, x: Tensor, orders: Tensor, first: int, generator: torch.Generator | None) -> Tensor:
        """The entries from rank `first` on, drawn one after the other; those before are kept."""
        x = x.clone()
        ranks, rows = orders.argsort(-1), torch.arange(len(x), device=x.device)
        for step in range(first, self.dims):
            entry = orders[:, step]
            x[rows, entry] = _drawn(self.log_conditionals(x, ranks < step)[rows, entry], generator)
        return x

    # ------------------------------------------------------------------ checks
    def require_complete(self, x: Tensor) -> None:
        """Every entry must be a value.

        Raises:
            InputError: naming the first entry that is none, or the shape.
        """
        self._states(x, torch.ones(self.dims, dtype=torch.bool, device=x.device))

    def _states(self, x: Tensor, known: Tensor) -> Tensor:
        """(B, D) long: 0 where unknown, value + 1 where known."""
        if x.dim() != 2 or x.shape[1] != self.dims or x.dtype != torch.long:
            raise InputError(f"x must be long of shape (B, {self.dims}), got {x.dtype} of shape {tuple(x.shape)}")
        if known.dtype != torch.bool or known.shape not in (x.shape, x.shape[1:]):
            raise InputError(
                f"a mask must be bool of shape ({self.dims},) or {tuple(x.shape)}, got {known.dtype} of shape "
                f"{tuple(known.shape)}"
            )
        wrong = known & ((x < 0) | (x >= self.values))
        if bool(wrong.any()):
            row, entry = wrong.nonzero()[0].tolist()
            raise InputError(
                f"row {row}: entry {entry} is {int(x[row, entry])}, and values go from 0 to {self.values - 1}: mark it "
                "as unknown or give a value"
            )
        return torch.where(known, x + 1, 0)

    def _orders(self, order: Tensor, n: int) -> Tensor:
        """(n, D) permutations."""
        if order.dtype != torch.long or tuple(order.shape) not in ((self.dims,), (n, self.dims)):
            raise InputError(
                f"order must be long of shape ({self.dims},) or ({n}, {self.dims}), got {order.dtype} of shape "
                f"{tuple(order.shape)}"
            )
        orders = order.to(self.device).expand(n, self.dims)
        if not bool((orders.sort(-1).values == torch.arange(self.dims, device=self.device)).all()):
            raise InputError(f"order must hold each of 0 to {self.dims - 1} once in every row")
        return orders

    # ------------------------------------------------------------------ files
    def save_pretrained(self, directory: str | Path) -> None:
        """Write weights (safetensors) and settings (JSON) into `directory`, made if it is not there.

        Raises:
            InputError: if `directory` is a file, or for networks that are not `StateMLP`s.
        """
        net = self.marginal_network
        if not (isinstance(net, StateMLP) and isinstance(self.conditional_network, StateMLP)):
            raise InputError("only a model on networks of its own can be saved: save the state of yours with it")
        target = Path(directory)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{str(directory)!r} is or lies below a file; give a directory to save to") from None
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, str(target / _WEIGHTS))
        sizes = {"dims": self.dims, "values": self.values, "layers": net.layers, "width": net.width}
        dtype = str(net.first.weight.dtype).removeprefix("torch.")
        settings = {"format_version": FORMAT_VERSION, **sizes, "dtype": dtype}
        # Last, because it is what makes the directory a model.
        (target / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> AnyOrderMarginals:
        """Read what `save_pretrained` wrote; the values are the same to the last bit.

        Raises:
            InputError: for missing, damaged or truncated files, or another version of the format.
        """
        source = Path(directory)
        try:
            settings = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{str(source)!r} has no {_CONFIG}, so it holds no any-order model; save one") from None
        except ValueError:
            raise InputError(f"{_CONFIG} in {str(source)!r} is damaged or truncated; copy it again") from None
        version = settings.get("format_version") if isinstance(settings, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{_CONFIG} in {str(source)!r} has format version {version}, and this version of loglik reads "
                f"{FORMAT_VERSION}; train the model again"
            )
        sizes = {name: settings.get(name) for name in ("dims", "values", "layers", "width")}
        odd = [name for name, size in sizes.items() if type(size) is not int or size < 1]
        odd += [] if settings.get("dtype") in _DTYPES else ["dtype"]
        if odd:
            raise InputError(f"{_CONFIG} in {str(source)!r} gives no usable {odd[0]!r}; copy it again")
        try:
            weights = load_file(str(source / _WEIGHTS))
        except FileNotFoundError:
            raise InputError(f"{str(source)!r} has no {_WEIGHTS}; copy the whole directory of the model") from None
        except (SafetensorError, OSError):
            raise InputError(f"{_WEIGHTS} in {str(source)!r} is damaged or truncated; copy it again") from None
        model = cls(**sizes, dtype=_DTYPES[settings["dtype"]])
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            raise InputError(f"{_WEIGHTS} in {str(source)!r} does not fit {_CONFIG}; copy both again") from None
        return model


def random_orders(
    n: int, dims: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """(n, dims) long, independent uniform permutations."""
    return _uniform((n, dims), generator, device).argsort(-1)


def _drawn(log_probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B,) one draw from each row of (B, K) log-probabilities, by inversion."""
    cumulative = log_probs.double().exp().cumsum(-1)
    threshold = _uniform((len(log_probs), 1), generator, log_probs.device) * cumulative[:, -1:]
    return (cumulative <= threshold).sum(-1).clamp_max(log_probs.shape[-1] - 1)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Uniform numbers in float64, where ties do not happen, drawn where the generator lives."""
    home = device if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=home).to(device)
