"""Backspaces: masked passes equal plain prefixes, branches equal trees, samples have the exact distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from loglik.decoding.backspace import (
    backspace_logits,
    generate_with_backspace,
    visible_prefixes,
    visible_states,
)
from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.objectives.imitation import Trajectories, insert_backspaces
from zoo import CAUSAL, MASKED, MORE_CAUSAL, SEQ2SEQ, build

VOCABULARY = 40
BACK = 39
# Prompts of different lengths; deletions of several tokens, down to the prompt, at the end and none at all.
ROWS = [
    [3, 7, 9, 4, 5, BACK, 6, 8, BACK, BACK, BACK, 11, 12],
    [5, 6, BACK, 7, BACK, 8, 9],
    [4, 8, BACK, 10, 11, 12],
    [9, 9, 10, 11, 12, 13, BACK, BACK],
]
STARTS = [3, 1, 3, 2]


def action_batch(side="right"):
    if side != "inside":
        return TokenBatch.from_lists(ROWS, starts=STARTS, padding_side=side, pad_id=BACK)
    ids = torch.full((len(ROWS), 31), BACK)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    starts = []
    generator = torch.Generator().manual_seed(5)
    for i, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        columns = torch.randperm(31, generator=generator)[: len(row)].sort().values
        ids[i, columns], real[i, columns] = torch.tensor(row), True
        starts.append(int(columns[start]))
    return TokenBatch(ids, real, real & (torch.arange(31) >= torch.tensor(starts)[:, None]), torch.tensor(starts))


def states(row, start):
    """The visible prefix before each action and after the last, by a plain stack."""
    stack, found = list(row[:start]), [list(row[:start])]
    for token in row[start:]:
        if token == BACK:
            stack.pop()
        else:
            stack.append(token)
        found.append(list(stack))
    return found


def network(name):
    if name in SEQ2SEQ:
        return Seq2SeqLM(build(SEQ2SEQ[name], VOCABULARY))
    return CausalLM(build({**CAUSAL, **MORE_CAUSAL}[name], VOCABULARY))


def naive(model, prefix, start):
    """Logits after a prefix, by one plain forward pass."""
    if isinstance(model, CausalLM):
        return model.model(input_ids=torch.tensor([prefix])).logits[0, -1]
    first = model.model.config.decoder_start_token_id
    decoder = torch.tensor([[first, *prefix[start:]]])
    return model.model(input_ids=torch.tensor([prefix[:start]]), decoder_input_ids=decoder).logits[0, -1]


# ------------------------------------------------------------------ the environment
@pytest.mark.parametrize("side", ["right", "left", "inside"])
def test_visible_states_equal_a_stack(side):
    x = action_batch(side)
    found = visible_states(x, backspace_id=BACK)
    for b, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        columns = x.attention_mask[b].nonzero().flatten().tolist()
        after = [row[: i + 1] for i in range(start)] + states(row, start)[1:]
        for i, (column, prefix) in enumerate(zip(columns, after, strict=True)):
            assert found.length[b, column] == len(prefix)
            top = int(found.top[b, column])
            assert x.ids[b, top] == prefix[-1]
            # The row of the mask at the top is the state itself, in order.
            assert x.ids[b, found.attention[b, top]].tolist() == prefix
            if i < start or row[i] != BACK:
                assert top == column
                assert found.position_ids[b, column] == len(prefix) - 1
            else:
                assert found.attention[b, column].nonzero().flatten().tolist() == [column]
                assert not found.attention[b, :, column].sum() > 1
        hidden = ~x.attention_mask[b]
        assert found.attention[b][:, hidden].sum() == hidden.sum(), "padding is seen by itself alone"
        assert (found.length[b, hidden] == 0).all()


@pytest.mark.parametrize("side", ["right", "left", "inside"])
def test_visible_prefixes_are_what_is_left(side):
    got = visible_prefixes(action_batch(side), backspace_id=BACK)
    for b, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        want = states(row, start)[-1]
        assert got.ids[b, got.attention_mask[b]].tolist() == want
        assert got.scored_mask[b].sum() == len(want) - start
    assert got.starts.tolist() == STARTS


def test_a_row_of_padding_leaves_nothing():
    x = TokenBatch.from_lists([[3, 4, BACK], []], starts=[1, 0])
    got = visible_prefixes(x, backspace_id=BACK)
    assert got.ids[got.attention_mask].tolist() == [3]
    assert not got.scored_mask.any()


def test_corrupted_demonstrations_leave_the_data():
    rows = [[5, 6, 7, 8, 2], [9, 5, 6, 2]]
    x = TokenBatch.from_lists(rows, starts=[2, 1])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        noisy = insert_backspaces(x, backspace_id=BACK, tokens=range(3, 30), rate=0.6, generator=generator)
        left = visible_prefixes(noisy, backspace_id=BACK)
        assert left.ids.equal(x.ids)
        assert left.scored_mask.equal(x.scored_mask)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_masked_transformer_equals_plain_prefixes_at_every_depth(name):
    """One forward pass with the mask and the positions; 'a b <bkspc> c' has the states of 'a c' in every layer."""
    raw, x = network(name).model, action_batch()
    found = visible_states(x, backspace_id=BACK)
    mask = torch.zeros(found.attention.shape).masked_fill(~found.attention, torch.finfo(torch.float32).min)
    inputs = {"attention_mask": mask[:, None], "position_ids": found.position_ids, "use_cache": False}
    out = raw(input_ids=x.ids, output_hidden_states=True, **inputs)
    for b, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        for i, prefix in enumerate(states(row, start)[1:], start):
            plain = raw(input_ids=torch.tensor([prefix]), output_hidden_states=True)
            top = int(found.top[b, i])
            for got, want in zip(out.hidden_states, plain.hidden_states, strict=True):
                assert (got[b, top] - want[0, -1]).abs().max() <= 1e-5 * max(1.0, want.abs().max())
            torch.testing.assert_close(out.logits[b, top], plain.logits[0, -1], atol=1e-5, rtol=1e-5)
    alone = raw(input_ids=torch.tensor([[3, 7]])).logits[0, -1]
    again = TokenBatch.from_lists([[3, 9, BACK, 7]], starts=[1])
    found = visible_states(again, backspace_id=BACK)
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~found.attention[:, None], torch.finfo(torch.float32).min)
    short = raw(input_ids=again.ids, attention_mask=mask, position_ids=found.position_ids, use_cache=False).logits
    torch.testing.assert_close(short[0, -1], alone, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------ logits
@pytest.mark.parametrize("name", [*CAUSAL, "phi3_longrope", "lfm2", *SEQ2SEQ])
@torch.no_grad()
def test_logits_equal_plain_forward_passes(name):
    """In one packed pass or branch by branch; -inf for the backspace at the prompt, 0 where nothing acts."""
    model = network(name)
    for side in ("right", "inside"):
        x = action_batch(side)
        got = backspace_logits(model, x, backspace_id=BACK)
        acted = torch.zeros_like(x.attention_mask)
        for b, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
            columns = x.attention_mask[b].nonzero().flatten()[start:]
            acted[b, columns] = True
            for column, prefix in zip(columns.tolist(), states(row, start)[:-1], strict=True):
                want = naive(model, prefix, start)
                if len(prefix) == start:
                    assert got[b, column, BACK] == -math.inf
                    want[BACK] = -math.inf
                torch.testing.assert_close(got[b, column], want, atol=1e-4, rtol=1e-4)
        assert (got[~acted] == 0).all()


def without_trees(model):
    """The same network, which says that it cannot attend in a tree."""
    other = CausalLM(model.model)
    other._paths[None] = other.forward_path("padded")
    return other


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_trees_equal_branches_in_value_and_gradient(name):
    model, x = network(name), action_batch()
    assert model.forward_path().path == "packed"
    weights = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    results = []
    for one in (model, without_trees(model)):
        logits = backspace_logits(one, x, backspace_id=BACK)
        finite = logits.masked_fill(logits == -math.inf, 0.0)
        (torch.tanh(finite / 10) @ weights).sum().backward()
        results.append((logits.detach(), {k: p.grad.clone() for k, p in one.model.named_parameters()}))
        one.model.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][key], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_branches_that_others_continue_are_not_computed():
    model, seen = network("mamba"), []
    assert model.forward_path().path != "packed"
    handle = model.model.register_forward_pre_hook(
        lambda *args: seen.append(args[2]["input_ids"].shape[0]), with_kwargs=True
    )
    backspace_logits(model, action_batch(), backspace_id=BACK)
    handle.remove()
    assert max(seen) == 3 + 3 + 1 + 1


@torch.no_grad()
def test_without_backspaces_the_logits_give_the_log_likelihood():
    """But for the backspace's share at the empty completion."""
    rows = [[3, 7, 9, 4], [5, 6, 7, 8, 9]]
    x = TokenBatch.from_lists(rows, starts=[2, 1])
    model = network("llama")
    terms = backspace_logits(model, x, backspace_id=BACK).log_softmax(-1).gather(-1, x.ids[..., None])[..., 0]
    want = model.log_prob(x).per_unit
    later = x.scored_mask & (torch.arange(5) > torch.tensor([2, 1])[:, None])
    torch.testing.assert_close(terms[later], want[later], atol=1e-4, rtol=1e-5)
    for b, start in ((0, 2), (1, 1)):
        share = model.next_log_probs(TokenBatch.from_lists([rows[b][:start]]))[0, BACK].exp()
        torch.testing.assert_close(terms[b, start], want[b, start] - torch.log1p(-share), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_the_value_after_a_backspace_is_that_of_the_shortened_prefix():
    model, x = network("llama"), action_batch()
    logits = backspace_logits(model, x, backspace_id=BACK)
    found = Trajectories.from_logits(logits, x.ids, x.scored_mask)
    for b, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        after = states(row, start)[1:-1]
        for i, prefix in enumerate(after, start):
            logits_after = naive(model, prefix, start)
            if len(prefix) == start:
                logits_after[BACK] = -math.inf
            torch.testing.assert_close(found.next_values[b, i], logits_after.logsumexp(-1), atol=1e-4, rtol=1e-4)
        assert found.next_values[b, len(row) - 1] == 0


def test_logits_refusals():
    model = network("llama")
    for rows, starts in (([[3, 4], [3, BACK]], [1, 1]), ([[3, 4], [3, 5, 6, BACK, BACK, BACK]], [1, 1])):
        x = TokenBatch.from_lists(rows, starts=starts)
        column = len(rows[1]) - 1
        for function in (visible_states, visible_prefixes):
            with pytest.raises(InputError, match=f"row 1: the backspace in column {column} has nothing to delete"):
                function(x, backspace_id=BACK)
        with pytest.raises(InputError, match="nothing to delete: the prompt stays"):
            backspace_logits(model, x, backspace_id=BACK)
    with pytest.raises(InputError, match="no row of this batch has an action"):
        backspace_logits(model, TokenBatch.from_lists([[3, 4]], starts=[2]), backspace_id=BACK)
    with pytest.raises(InputError, match="row 0: the first action follows on nothing: put BOS"):
        backspace_logits(model, TokenBatch.from_lists([[3, 4]], starts=[0]), backspace_id=BACK)
    with pytest.raises(InputError, match="token 40, is no token of the vocabulary of 40"):
        backspace_logits(model, TokenBatch.from_lists([[3, 4]], starts=[1]), backspace_id=40)
    masked = MaskedLM(build(MASKED["bert"], VOCABULARY), mask_token_id=1)
    with pytest.raises(InputError, match="needs a causal or encoder-decoder network, got MaskedLM"):
        backspace_logits(masked, TokenBatch.from_lists([[3, 4]], starts=[1]), backspace_id=BACK)


# ------------------------------------------------------------------ generation
A, B, END, DELETE = range(4)


class Toy:
    """Four tokens whose distribution depends on the whole prefix."""

    tokenizer = None

    def next_log_probs(self, prefix):
        rows = [ids[real].tolist() for ids, real in zip(prefix.ids, prefix.attention_mask, strict=True)]
        return torch.stack([self.log_probs(tuple(row)) for row in rows])

    def log_probs(self, prefix):
        seed = sum((3 * token + 1) * 5**i for i, token in enumerate(prefix)) % 2**31
        logits = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return logits.log_softmax(-1)


def exact(model, prompt, cap):
    """Probability of every sequence of actions."""
    found, open_ = {}, {(): (tuple(prompt), 1.0)}
    for _ in range(cap):
        following = {}
        for actions, (visible, mass) in open_.items():
            probs = model.log_probs(visible).exp()
            if len(visible) == len(prompt):
                probs[DELETE] = 0.0
                probs = probs / probs.sum()
            for token in range(4):
                share = mass * float(probs[token])
                if share == 0:
                    continue
                after = visible[:-1] if token == DELETE else (*visible, token)
                (found if token == END else following)[(*actions, token)] = (after, share)
        open_ = following
    return {actions: share for actions, (_, share) in (found | open_).items()}


def completions(batch):
    return [
        tuple(ids[real].tolist()[start:])
        for ids, real, start in zip(batch.ids, batch.attention_mask, batch.starts.tolist(), strict=True)
    ]


def test_samples_have_the_exact_distribution():
    """All sequences of up to four actions; chi-square at level 1e-4, one seed, cells of fewer than 5 put together."""
    prompt, count = [B, A], 4000
    want = exact(Toy(), prompt, 4)
    assert sum(want.values()) == pytest.approx(1.0)
    assert not any(actions[0] == DELETE for actions in want)
    got = generate_with_backspace(
        Toy(),
        TokenBatch.from_lists([prompt] * count),
        backspace_id=DELETE,
        max_actions=4,
        eos_id=END,
        generator=torch.Generator().manual_seed(0),
    )
    drawn = completions(got.actions)
    assert set(drawn) <= set(want)
    common = [actions for actions, share in want.items() if share * count >= 5]
    observed = [drawn.count(actions) for actions in common]
    frequencies = [want[actions] * count for actions in common]
    rest, rare = count - sum(observed), count - sum(frequencies)
    assert rare > 5
    assert chisquare([*observed, rest], [*frequencies, rare]).pvalue > 1e-4


def test_samples_end_at_eos_or_the_cap_and_show_what_is_left():
    prompts = [[B, A], [A], [B, B, A]]
    x = TokenBatch.from_lists(prompts * 20, padding_side="left")
    generator = torch.Generator().manual_seed(1)
    options = {"backspace_id": DELETE, "max_actions": 7, "eos_id": END, "generator": generator}
    got = generate_with_backspace(Toy(), x, **options)
    assert got.actions.starts.tolist() == [len(p) for p in prompts] * 20
    lengths = []
    for b, (actions, visible) in enumerate(zip(completions(got.actions), completions(got.visible), strict=True)):
        assert (END in actions) == bool(got.ended[b])
        assert END not in actions[:-1]
        assert len(actions) == 7 or got.ended[b]
        stack = []
        for token in actions:
            stack = stack[:-1] if token == DELETE else [*stack, token]
        assert tuple(stack) == visible
        lengths.append(len(actions))
    assert got.ended.any()
    assert not got.ended.all()
    assert got.actions.scored_mask.sum(1).tolist() == lengths
    left = visible_prefixes(got.actions, backspace_id=DELETE)
    assert left.ids.equal(got.visible.ids)
    assert left.scored_mask.equal(got.visible.scored_mask)


def test_without_eos_the_cap_ends_every_row():
    x = TokenBatch.from_lists([[A]] * 5)
    got = generate_with_backspace(Toy(), x, backspace_id=DELETE, max_actions=3)
    assert got.actions.scored_mask.sum(1).tolist() == [3] * 5
    assert not got.ended.any()


def test_samples_repeat_with_their_generator():
    x = TokenBatch.from_lists([[A]] * 9)
    one, two = (
        generate_with_backspace(Toy(), x, backspace_id=DELETE, generator=torch.Generator().manual_seed(4)).actions.ids
        for _ in range(2)
    )
    assert one.equal(two)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_samples_of_networks_are_likely_where_the_logits_say(name):
    """A network with large weights, which is nearly deterministic, takes the actions that the logits rank first."""
    model = network(name)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(1e3)
    x = TokenBatch.from_lists([[3, 5, 7], [9, 4]], starts=[3, 2])
    got = generate_with_backspace(model, x, backspace_id=BACK, max_actions=6, eos_id=2)
    logits = backspace_logits(model, got.actions, backspace_id=BACK)
    first = logits.argmax(-1)
    assert first[got.actions.scored_mask].equal(got.actions.ids[got.actions.scored_mask])


class Stuck(Toy):
    """Wants nothing but to delete."""

    def __init__(self, *, only):
        self.only = only

    def log_probs(self, prefix):
        logits = torch.full((4,), -math.inf if self.only else -500.0, dtype=torch.float64)
        logits[DELETE] = 0.0
        return logits


def test_backspace_where_nothing_can_be_deleted_gives_its_probability_away():
    x = TokenBatch.from_lists([[A]] * 30)
    options = {"backspace_id": DELETE, "max_actions": 1, "generator": torch.Generator().manual_seed(5)}
    got = generate_with_backspace(Stuck(only=False), x, **options)
    assert {actions[0] for actions in completions(got.actions)} == {A, B, END}
    with pytest.raises(InputError, match="row 0 has no possible action"):
        generate_with_backspace(Stuck(only=True), x, **options)


def test_endless_loops_are_cut():
    """Append and delete for ever: the cap counts both."""

    class Undecided(Toy):
        def log_probs(self, prefix):
            wanted = DELETE if len(prefix) > 1 else A
            return torch.full((4,), -math.inf, dtype=torch.float64).index_fill(0, torch.tensor([wanted]), 0.0)

    got = generate_with_backspace(Undecided(), TokenBatch.from_lists([[B]]), backspace_id=DELETE, max_actions=9)
    assert completions(got.actions) == [tuple(itertools.islice(itertools.cycle([A, DELETE]), 9))]
    assert completions(got.visible) == [(A,)]


def test_generation_refusals():
    x = TokenBatch.from_lists([[A]])
    with pytest.raises(InputError, match="max_actions must be at least 1"):
        generate_with_backspace(Toy(), x, backspace_id=DELETE, max_actions=0)
    with pytest.raises(InputError, match="cannot both delete and end"):
        generate_with_backspace(Toy(), x, backspace_id=DELETE, eos_id=DELETE)
    with pytest.raises(InputError, match="token 4, is no token of the vocabulary"):
        generate_with_backspace(Toy(), x, backspace_id=4)
    with pytest.raises(InputError, match="needs per-token conditionals"):
        generate_with_backspace(object(), x, backspace_id=DELETE)
