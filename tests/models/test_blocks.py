"""Blocks are found by what they do; parts are used only where they are all that a block writes."""

from __future__ import annotations

import pytest
import torch

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.blocks import changed, find_blocks
from loglik.models.causal import CausalLM
from zoo import CAUSAL, MORE_CAUSAL, build

EVERY = {**CAUSAL, **MORE_CAUSAL}
IDS = torch.tensor([[7, 3, 9, 31, 4], [2, 8, 41, 6, 6]])
WITHOUT_PARTS = {"mamba", "bloom", "lfm2"}


def model_of(name: str) -> CausalLM:
    return CausalLM(build(EVERY[name], 50))


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_has_its_blocks(name):
    """As many as configured, in their order, and their last states give the model's own distribution."""
    model = model_of(name)
    blocks = find_blocks(model, "a test")
    assert len(blocks) == model.model.config.num_hidden_layers
    table = model.next_log_probs(TokenBatch.from_lists(IDS.tolist()))
    torch.testing.assert_close(blocks.last_log_probs(IDS), table.detach(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        want = model.model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    found = []
    blocks.last_log_probs(IDS, changed(blocks.parts("residual"), lambda i, s: found.append((i, s.clone())) or s))
    assert [number for number, _ in found] == [0, 1]
    # Behind the last block the final norm follows, and Mamba does not tell its embeddings.
    torch.testing.assert_close(found[0][1], want[0 if name == "mamba" else 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_parts_are_all_that_a_block_writes(name):
    """The residual stream behind a block, less what it read, is what attention and MLP wrote (norms aside)."""
    blocks = find_blocks(model_of(name), "a test")
    if name in WITHOUT_PARTS:
        for part in ("mlp", "attention"):
            with pytest.raises(InputError, match="use the residual stream"):
                blocks.parts(part)
        return
    silent = [changed(blocks.parts(part), lambda _, s: torch.zeros_like(s)) for part in ("mlp", "attention")]
    states = []
    blocks.last_log_probs(
        IDS, *silent, changed([blocks.embedding, *blocks.layers], lambda _, s: states.append(s.clone()) or s)
    )
    torch.testing.assert_close(states[1], states[2], atol=1e-5, rtol=1e-4)
    if name in ("llama", "gpt_neox", "qwen2", "mistral", "falcon"):
        wrote = {}

        def note(part):
            return lambda i, s: wrote.__setitem__((part, i), s.clone()) or s

        parts = [changed(blocks.parts(part), note(part), length=5) for part in ("mlp", "attention")]
        blocks.last_log_probs(IDS, *parts, changed([blocks.embedding, *blocks.layers], note("stream")))
        for layer in range(2):
            added = wrote["mlp", layer] + wrote["attention", layer]
            torch.testing.assert_close(wrote["stream", layer + 1] - wrote["stream", layer], added, atol=1e-4, rtol=1e-4)


def test_flattened_states_are_seen_as_rows_of_tokens():
    """OPT's MLP writes (B * T, D); with the length it is (B, T, D), and what is changed arrives."""
    blocks = find_blocks(model_of("opt"), "a test")
    shapes = []

    def change(_, states):
        shapes.append(tuple(states.shape))
        new = states.clone()
        new[1, -1] += torch.arange(16) / 4.0  # a constant would not pass the norm
        return new

    before = blocks.last_log_probs(IDS)
    after = blocks.last_log_probs(IDS, changed(blocks.parts("mlp"), change, length=5))
    assert set(shapes) == {(2, 5, 16)}
    torch.testing.assert_close(after[0], before[0], atol=1e-6, rtol=1e-6)
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_cuts_concern_their_rows_and_layers():
    blocks = find_blocks(model_of("llama"), "a test")
    plain = blocks.last_log_probs(IDS)
    blocked = torch.tensor([True, True, False, False, False])
    layers = torch.tensor([[False, False], [True, False]])
    found = blocks.last_log_probs(IDS, blocks.cut(blocked, layers))
    torch.testing.assert_close(found[0], plain[0], atol=1e-5, rtol=1e-5)
    assert (found[1] - plain[1]).abs().max() > 1e-3
    both = blocks.last_log_probs(IDS, blocks.cut(blocked, torch.ones(2, 2, dtype=torch.bool)))
    assert (both[1] - found[1]).abs().max() > 1e-3
    blocks.require_cuts()
    torch.testing.assert_close(blocks.last_log_probs(IDS), plain, atol=0, rtol=0)  # nothing is left behind


def test_unknown_parts_and_models_are_refused():
    with pytest.raises(InputError, match="kind must be mlp, attention or residual, got 'head'"):
        find_blocks(model_of("gpt2"), "a test").parts("head")
    with pytest.raises(InputError, match="a test needs the blocks of a causal language model of transformers; object"):
        find_blocks(object(), "a test")
    model = model_of("llama")
    model.model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="a test needs blocks that follow each other, and LlamaForCausalLM has no"):
        find_blocks(model, "a test")
