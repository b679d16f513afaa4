"""Completions of one prompt in one packed row give the values and gradients of rows on their own."""

from __future__ import annotations

import pytest
import torch

from loglik.models import shared_prompt
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from zoo import CAUSAL, build

PACKED = ["gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "gemma2", "gemma3"]
SHAPES = [(5, (3, 4)), (2, (1, 6, 2)), (4, (2,)), (1, (1, 1))]


def rows(seed: int = 0) -> tuple[list[list[int]], list[int], list[int]]:
    """Token rows of several prompts, where their completions start, and whose they are."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 20, (count,), generator=generator).tolist()

    tokens, starts, groups = [], [], []
    for number, (prompt_length, lengths) in enumerate(SHAPES):
        prompt = ids(prompt_length)
        for length in lengths:
            tokens.append(prompt + ids(length))
            starts.append(prompt_length)
            groups.append(number)
    return tokens, starts, groups


def graded(model: CausalLM, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Values, and gradients of a weighted sum of all terms."""
    model.model.zero_grad()
    found = model.log_prob(batch)
    weights = torch.linspace(-1, 2, len(batch))
    (found.value * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    return found.value.detach(), gradients


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_values_and_gradients_of_rows_on_their_own(name, side):
    model = CausalLM(build(CAUSAL[name], 20))
    tokens, starts, groups = rows()
    assert model.forward_path().path == "packed"
    value, gradients = graded(model, TokenBatch.from_lists(tokens, starts=starts, groups=groups, padding_side=side))
    expected, plain = graded(model, TokenBatch.from_lists(tokens, starts=starts))
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    assert set(gradients) == set(plain)
    for key, gradient in plain.items():
        torch.testing.assert_close(gradients[key], gradient, atol=2e-5, rtol=1e-4)


def test_the_prompt_is_computed_once(monkeypatch):
    """The packed row holds each prompt once, and completions without their last token."""
    lengths = []
    run = shared_prompt.tree_hidden
    monkeypatch.setattr(
        shared_prompt, "tree_hidden", lambda t, ids, row: (lengths.append(len(ids)), run(t, ids, row))[1]
    )
    tokens, starts, groups = rows()
    CausalLM(build(CAUSAL["llama"], 20)).log_prob(TokenBatch.from_lists(tokens, starts=starts, groups=groups))
    assert lengths == [sum(prompt + sum(n - 1 for n in after) for prompt, after in SHAPES)]


def test_what_completions_share_is_computed_once_too(monkeypatch):
    model = CausalLM(build(CAUSAL["llama"], 20))
    tokens = [[3, 4, 5, 6, 7], [3, 4, 5, 6, 8], [3, 4, 5, 6]]  # the third is a beginning of the others
    shared = TokenBatch.from_lists(tokens, starts=[2] * 3, groups=[0] * 3)
    apart = TokenBatch.from_lists(tokens, starts=[2] * 3)
    lengths = []
    run = shared_prompt.tree_hidden
    monkeypatch.setattr(
        shared_prompt, "tree_hidden", lambda t, ids, row: (lengths.append(len(ids)), run(t, ids, row))[1]
    )
    torch.testing.assert_close(model.log_prob(shared).per_unit, model.log_prob(apart).per_unit, atol=1e-5, rtol=0)
    assert lengths == [5]  # the common 3 tokens and one more for each of the first two


def test_equal_rows_and_single_rows():
    model = CausalLM(build(CAUSAL["llama"], 20))
    tokens = [[3, 4, 5], [3, 4, 5], [6, 7]]
    shared = model.log_prob(TokenBatch.from_lists(tokens, starts=[1] * 3, groups=[0, 0, 1]))
    apart = model.log_prob(TokenBatch.from_lists(tokens, starts=[1] * 3))
    torch.testing.assert_close(shared.value, apart.value, atol=1e-5, rtol=0)
    assert shared.value[0] == shared.value[1]


def test_groups_change_nothing_where_prompts_cannot_be_shared():
    model = CausalLM(build(CAUSAL["mamba"], 20))
    assert model.forward_path().path != "packed"
    tokens, starts, groups = rows()
    one = model.log_prob(TokenBatch.from_lists(tokens, starts=starts, groups=groups)).value
    other = model.log_prob(TokenBatch.from_lists(tokens, starts=starts)).value
    assert torch.equal(one, other)


def test_groups_must_be_one_number_per_row():
    with pytest.raises(ValueError, match="groups must have shape"):
        TokenBatch.from_lists([[1, 2], [1, 3]], groups=[0])
