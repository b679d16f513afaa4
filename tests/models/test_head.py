"""The LM head without its logits equals the one with them: values, choices, masses and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from loglik.models.head import LinearHead, plain_token_log_probs, token_log_probs


def problem(seed, states, vocabulary, width, count, *, bias=True, scale=1.0, softcap=None, dtype=torch.float32):
    """Random hidden states, targets, ascending rows (some repeated, some without targets) and head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(states, width), normal(vocabulary, width)
    count = count if states else 0
    rows = torch.randint(max(states, 1), (count,), generator=generator).sort().values
    targets = torch.randint(vocabulary, (count,), generator=generator)
    return hidden, targets, rows, LinearHead(weight, normal(vocabulary) if bias else None, scale, softcap)


def mass_of(logits: torch.Tensor, subset: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1)[:, subset].logsumexp(-1)


@given(
    seed=st.integers(0, 2**31),
    states=st.integers(0, 9),
    vocabulary=st.integers(1, 40),
    width=st.integers(1, 5),
    count=st.integers(0, 14),
    tile=st.tuples(st.integers(1, 11), st.integers(1, 45)),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3, 2.5]),
    softcap=st.sampled_from([None, 0.7, 5.0]),
)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_equals_all_logits_for_any_shape_and_tile(seed, states, vocabulary, width, count, tile, bias, scale, softcap):
    """Repeated rows, rows without targets, no targets, no rows; tiles that divide nothing."""
    hidden, targets, rows, head = problem(
        seed, states, vocabulary, width, count, bias=bias, scale=scale, softcap=softcap, dtype=torch.float64
    )
    subset = torch.rand(vocabulary, generator=torch.Generator().manual_seed(seed)) < 0.5
    got = token_log_probs(hidden, targets, head, rows=rows, subset=subset, tile=tile)
    want = plain_token_log_probs(hidden, targets, head, rows)
    torch.testing.assert_close(got.log_probs, want.log_probs, atol=1e-12, rtol=1e-12)
    assert got.greedy.tolist() == want.greedy.tolist()
    assert got.log_mass is not None
    torch.testing.assert_close(got.log_mass, mass_of(head.logits(hidden), subset), atol=1e-12, rtol=1e-12)
    assert (got.log_probs <= 0).all()


def test_default_tile_and_default_rows():
    """More hidden states and tokens than one tile of the default size holds."""
    hidden, targets, rows, head = problem(0, 1100, 2500, 3, 1100)
    every = torch.arange(1100)
    assert rows.tolist() != every.tolist()
    subset = torch.arange(2500) % 3 == 0
    got = token_log_probs(hidden, targets, head, subset=subset)
    want = plain_token_log_probs(hidden, targets, head)
    torch.testing.assert_close(got.log_probs, want.log_probs, atol=2e-6, rtol=2e-6)
    assert got.log_mass is not None
    torch.testing.assert_close(got.log_mass, mass_of(head.logits(hidden), subset), atol=5e-6, rtol=5e-6)
    assert token_log_probs(hidden, targets, head).log_mass is None


@pytest.mark.parametrize("tile", [(2, 3), (8, 64)])
def test_greedy_counts_ties_within_and_across_tiles(tile):
    weight = torch.tensor([[1.0], [5.0], [0.0], [2.0], [5.0], [5.0 - 1e-6], [-1.0]])
    hidden = torch.ones(7, 1)
    got = token_log_probs(hidden, torch.arange(7), LinearHead(weight), tile=tile)
    assert got.greedy.tolist() == [False, True, False, False, True, False, False]


def test_values_by_hand():
    """Two tokens with logits 0 and log 3: probabilities 1/4 and 3/4; scale and soft-cap act before the softmax."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]])
    both = torch.tensor([0, 0])
    got = token_log_probs(hidden, torch.tensor([0, 1]), LinearHead(weight), rows=both)
    torch.testing.assert_close(got.log_probs.exp(), torch.tensor([0.25, 0.75]))
    double = token_log_probs(hidden, torch.tensor([1]), LinearHead(weight, scale=2.0))
    torch.testing.assert_close(double.log_probs.exp(), torch.tensor([0.9]))
    cap = LinearHead(weight * 1e6, softcap=math.log(3))
    torch.testing.assert_close(token_log_probs(hidden, torch.tensor([1]), cap).log_probs.exp(), torch.tensor([0.75]))


@pytest.mark.parametrize("tile", [(1, 2), (2, 5), (4, 64)])
def test_impossible_tokens(tile):
    """Logits of -inf: never NaN, a target of probability zero is -inf, and an impossible set has mass log 0."""
    bias = torch.zeros(11)
    bias[:6] = -math.inf
    hidden, weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.ones(11, 2)
    head = LinearHead(weight, bias)
    subset = torch.zeros(11, dtype=torch.bool)
    subset[:4] = True
    got = token_log_probs(hidden, torch.tensor([0, 7, 5]), head, subset=subset, tile=tile)
    assert got.log_probs.tolist() == [-math.inf, pytest.approx(-math.log(5)), -math.inf]
    assert got.greedy.tolist() == [False, True, False]
    assert got.log_mass is not None
    assert got.log_mass.tolist() == [-math.inf] * 3
    every = token_log_probs(hidden, torch.tensor([6]), head, subset=~subset, tile=tile)
    assert every.log_mass is not None
    torch.testing.assert_close(every.log_mass, torch.zeros(3))


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_extreme_logits_stay_accurate_and_never_exceed_zero(magnitude):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(64, 4, generator=generator), torch.randn(300, 4, generator=generator)
    head = LinearHead(weight * magnitude)
    targets = head.logits(hidden).argmax(1)
    targets[::2] = torch.randint(300, (32,), generator=generator)
    subset = torch.rand(300, generator=generator) < 0.9
    got = token_log_probs(hidden, targets, head, subset=subset, tile=(7, 13))
    logits = head.logits(hidden).double()
    want = torch.log_softmax(logits, -1)[torch.arange(64), targets]
    torch.testing.assert_close(got.log_probs.double(), want, atol=1e-5, rtol=1e-6)
    assert (got.log_probs <= 0).all()
    assert got.log_mass is not None
    assert (got.log_mass <= 1e-6).all()
    for dim in (1.0, -1.0):
        single = token_log_probs(torch.full((1, 1), dim), torch.tensor([0]), LinearHead(torch.tensor([[1e4], [-1e4]])))
        assert single.log_probs.item() == (0.0 if dim > 0 else -2e4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_half_precision_is_reduced_in_float32(dtype, softcap):
    """The matrix product is the model's own; everything after it is float32."""
    hidden, targets, rows, head = problem(2, 20, 3000, 8, 40, scale=0.5, softcap=softcap, dtype=dtype)
    got = token_log_probs(hidden, targets, head, rows=rows, tile=(6, 512))
    assert got.log_probs.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    assert logits.dtype == dtype
    logits = logits.double() * 0.5
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    want = torch.log_softmax(logits, -1)[rows, targets]
    torch.testing.assert_close(got.log_probs.double(), want, atol=1e-5, rtol=0)


def test_bf16_log_probs_never_exceed_zero():
    """A logit minus a log-sum-exp that was rounded apart from it comes out at up to +0.125 (maxtext #5231)."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(400, 8, generator=generator).bfloat16()
    weight = (2 * torch.randn(50, 8, generator=generator)).bfloat16()
    logits = hidden @ weight.T
    targets = logits.float().argmax(1)
    naive = (hidden.float() @ weight.float().T).gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    assert (naive > 0).any(), "the bug that this test is about did not show"
    got = token_log_probs(hidden, targets, LinearHead(weight), tile=(64, 7)).log_probs
    assert (got <= 0).all()


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_gradients_by_finite_differences(softcap, bias, scale):
    hidden, targets, rows, head = problem(4, 6, 11, 3, 8, bias=bias, dtype=torch.float64)
    assert rows.tolist() != sorted(set(rows.tolist()))
    inputs = [hidden, head.weight] + ([head.bias] if head.bias is not None else [])

    def function(h, w, b=None):
        return token_log_probs(h, targets, LinearHead(w, b, scale, softcap), rows=rows, tile=(4, 3)).log_probs

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


def gradients(function, hidden, targets, rows, head, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, head.weight, head.bias)]
    out = function(leaves[0], targets, LinearHead(leaves[1], leaves[2], head.scale, head.softcap), rows)
    return torch.autograd.grad(out.log_probs, leaves, upstream)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_float32_gradients_equal_those_through_all_logits(softcap):
    hidden, targets, rows, head = problem(5, 70, 500, 16, 90, scale=0.8, softcap=softcap)
    upstream = torch.randn(90, generator=torch.Generator().manual_seed(6))
    got = gradients(
        lambda h, t, f, r: token_log_probs(h, t, f, rows=r, tile=(16, 64)), hidden, targets, rows, head, upstream
    )
    want = gradients(plain_token_log_probs, hidden, targets, rows, head, upstream)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_equals_linear_cross_entropy_of_pytorch():
    """Values and gradients of torch.nn.functional.linear_cross_entropy without reduction."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no linear_cross_entropy")
    hidden, targets, rows, head = problem(7, 40, 200, 8, 40)
    rows = torch.arange(40)
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(8))

    def peer(h, t, f, r):
        nll = torch.nn.functional.linear_cross_entropy(h[r], f.weight, t, linear_bias=f.bias, reduction="none")
        return plain_token_log_probs(h, t, f, r)._replace(log_probs=-nll)

    want = peer(hidden, targets, head, rows).log_probs
    got = token_log_probs(hidden, targets, head, tile=(9, 33)).log_probs
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    ours = gradients(
        lambda h, t, f, r: token_log_probs(h, t, f, rows=r, tile=(9, 33)), hidden, targets, rows, head, upstream
    )
    for a, b in zip(ours, gradients(peer, hidden, targets, rows, head, upstream), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_half_precision_gradients_are_summed_in_float32():
    """Small contributions of hundreds of tiles do not vanish in bfloat16's eight bits."""
    hidden, targets, rows, head = problem(9, 40, 300, 4, 40, dtype=torch.bfloat16)
    upstream = torch.ones(40)
    tiled = gradients(
        lambda h, t, f, r: token_log_probs(h, t, f, rows=r, tile=(1, 1)), hidden, targets, rows, head, upstream
    )
    wide = LinearHead(head.weight.double(), head.bias.double())
    want = gradients(plain_token_log_probs, hidden.double(), targets, rows, wide, upstream.double())
    for a, b in zip(tiled, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() <= 0.02 * b.abs().max()


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, targets, rows, head = problem(10, 5, 9, 3, 6)
    for which in range(3):
        leaves = [hidden.clone(), head.weight.clone(), head.bias.clone()]
        leaves[which].requires_grad_()
        out = token_log_probs(leaves[0], targets, LinearHead(leaves[1], leaves[2]), rows=rows)
        out.log_probs.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == which for i in range(3)]
        assert not out.greedy.requires_grad
    frozen = token_log_probs(hidden, targets, head, rows=rows)
    assert not frozen.log_probs.requires_grad


def test_mass_is_given_beside_a_gradient():
    """The same numbers whether or not a gradient is recorded; the mass carries none."""
    hidden, targets, rows, head = problem(11, 5, 9, 3, 6)
    subset = torch.arange(9) < 4
    plain = token_log_probs(hidden, targets, head, rows=rows, subset=subset, tile=(2, 2))
    traced = token_log_probs(hidden.clone().requires_grad_(), targets, head, rows=rows, subset=subset, tile=(2, 2))
    torch.testing.assert_close(traced.log_probs, plain.log_probs, atol=0, rtol=0)
    assert traced.log_mass is not None
    assert not traced.log_mass.requires_grad
    torch.testing.assert_close(traced.log_mass, plain.log_mass, atol=0, rtol=0)


def test_gradient_of_an_impossible_target_is_finite():
    bias = torch.zeros(6)
    bias[2] = -math.inf
    hidden = torch.randn(2, 3, generator=torch.Generator().manual_seed(12)).requires_grad_()
    head = LinearHead(torch.randn(6, 3, generator=torch.Generator().manual_seed(13)), bias)
    token_log_probs(hidden, torch.tensor([1, 3]), head, tile=(1, 2)).log_probs.sum().backward()
    assert hidden.grad is not None
    want = hidden.detach().clone().requires_grad_()
    plain_token_log_probs(want, torch.tensor([1, 3]), head).log_probs.sum().backward()
    torch.testing.assert_close(hidden.grad, want.grad)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_holds_the_logits_of_all_positions():
    """Forward and backward: nothing larger than a tile, the hidden states or the weight."""
    states, vocabulary, width, tile = 96, 1024, 4, (32, 128)
    hidden, targets, rows, head = problem(14, states, vocabulary, width, 120)
    leaves = [x.clone().requires_grad_() for x in (hidden, head.weight, head.bias)]
    subset = torch.arange(vocabulary) % 2 == 0
    with Largest() as largest:
        out = token_log_probs(
            leaves[0], targets, LinearHead(leaves[1], leaves[2], 0.5, 3.0), rows=rows, subset=subset, tile=tile
        )
        out.log_probs.sum().backward()
    bound = max(tile[0] * tile[1], states * width, vocabulary * width)
    assert bound * 8 <= states * vocabulary
    assert largest.elements <= bound
    with Largest() as plain:
        plain_token_log_probs(hidden, targets, head, rows)
    assert plain.elements >= states * vocabulary, "the check sees no logits at all"


def test_nothing_of_the_vocabulary_is_kept_for_the_backward_pass():
    hidden, targets, rows, head = problem(15, 64, 512, 4, 64)
    kept: list[int] = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    leaves = [x.clone().requires_grad_() for x in (hidden, head.weight, head.bias)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_log_probs(leaves[0], targets, LinearHead(leaves[1], leaves[2]), rows=rows)
    assert max(kept) <= 512 * 4
    assert sum(kept) < 64 * 512


@pytest.mark.parametrize("target", [-1, -100, 8, 5000])
def test_targets_outside_the_vocabulary_are_refused(target):
    hidden, weight = torch.randn(3, 2), torch.randn(8, 2)
    with pytest.raises((IndexError, ValueError)):
        token_log_probs(hidden, torch.tensor([1, target, 2]), LinearHead(weight), tile=(4, 4))
