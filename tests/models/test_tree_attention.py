"""A packed row in which every token sees its own ancestors gives the hidden states of plain forward passes."""

from __future__ import annotations

import random

import pytest
import torch

from loglik.models import tree_attention as tree_attention_module
from loglik.models.tree_attention import IMPLEMENTATION, KeyValuePath, TreeRow, tree_attention, tree_hidden
from loglik.models.trunk import Trunk
from loglik.scoring import plan as plan_module
from loglik.scoring.forest import Forest
from loglik.scoring.plan import make_plan
from zoo import CAUSAL, MORE_CAUSAL, build

VOCABULARY = 50
# Learned, offset and rotary positions; grouped keys; windows of 4 tokens; soft-caps; eager and PyTorch's own attention.
ARCHITECTURES = ["llama", "gpt2", "opt", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "cohere", "phi"]


# Root-mean-square norms, rotary tables and eager softmax may compute in float32 whatever the model's dtype: their
# rounding shows.
ALL_IN_FLOAT64 = ("gpt2", "opt")


def tolerance(name, implementation=None):
    return 1e-9 if name in ALL_IN_FLOAT64 and implementation != "eager" else 2e-5


def network(name, implementation=None, dtype=torch.float64):
    model = build({**CAUSAL, **MORE_CAUSAL}[name], VOCABULARY, gain=10.0).to(dtype)
    if name == "gemma2":  # large enough to bend this model's small scores
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 1.0
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def trunk_of(model):
    return Trunk(model, {"input_ids": torch.arange(3, 9)[None]})


def tree_of_texts(seed: int, count: int = 9, longest: int = 14) -> list[list[int]]:
    """Sequences that branch off one another again and again; some far longer than a window of 4."""
    rng = random.Random(seed)
    texts = [[rng.randrange(3, VOCABULARY) for _ in range(longest)]]
    for _ in range(count - 1):
        old = rng.choice(texts)
        texts.append(old[: rng.randrange(len(old) + 1)] + [rng.randrange(3, 8) for _ in range(rng.randint(1, longest))])
    return [text[:45] for text in texts]


def run(trunk, plan, read=None):
    """Hidden states of every pack, in order, through one path of keys and values; `read` gives the columns read."""
    path, out = KeyValuePath(), []
    for pack in plan.packs:
        assert path.length >= pack.prefix
        row = TreeRow(
            torch.from_numpy(pack.positions()),
            torch.from_numpy(pack.subtree_ends(plan.forest)),
            pack.groups,
            pack.prefix,
            path if pack.prefix or pack.keep else None,
            pack.keep,
            None if read is None else torch.tensor(read(pack), dtype=torch.long),
        )
        out.append(tree_hidden(trunk, torch.from_numpy(pack.tokens(plan.forest)), row))
        path.length = pack.prefix + pack.keep
    return out


@torch.no_grad()
def assert_like_plain(name, model, texts, **budget):
    trunk = trunk_of(model)
    bound = tolerance(name, model.config._attn_implementation)
    plan = make_plan(Forest(texts), **budget)
    found = run(trunk, plan)
    for i, text in enumerate(texts):
        got = [found[number][column : column + count] for number, column, _, count in plan.columns(i, 0, len(text))]
        want = trunk.hidden(input_ids=torch.tensor([text]), use_cache=False)[0]
        assert want.std() > 0.1
        torch.testing.assert_close(torch.cat(got), want, atol=bound, rtol=bound)
    return plan


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_random_trees_equal_plain_passes(name, implementation):
    """Everything in one pack; then packs so small that prefixes come in pieces and subtrees under long paths."""
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("PyTorch's own attention has no soft-cap: covered by eager")
    model = network(name, implementation)
    for seed, budget in enumerate(({"pack_tokens": 1000}, {"pack_tokens": 20}, {"pack_tokens": 9, "under_prefix": 7})):
        texts = tree_of_texts(seed)
        assert max(map(len, texts)) > 16
        plan = assert_like_plain(name, model, texts, **budget)
        assert plan.computed == plan.forest.distinct


def some_columns(seed: int):
    rng = random.Random(seed)
    return lambda pack: sorted(rng.sample(range(pack.size), rng.choice([0, 1, pack.size // 2, pack.size])))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_layer_only_where_it_is_read(name, implementation):
    """Columns that are read are those of plain passes, whatever else is left out; the rest are no numbers."""
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("PyTorch's own attention has no soft-cap: covered by eager")
    trunk = trunk_of(network(name, implementation))
    bound = tolerance(name, implementation)
    kinds = set()
    for seed, budget in enumerate(({"pack_tokens": 1000}, {"pack_tokens": 20}, {"pack_tokens": 9, "under_prefix": 7})):
        texts = tree_of_texts(seed + 10)
        plan = make_plan(Forest(texts), **budget)
        found = run(trunk, plan, some_columns(seed))
        columns = [some for _, some in zip(plan.packs, map(some_columns(seed), plan.packs), strict=True)]
        for pack, states, own in zip(plan.packs, found, columns, strict=True):
            unread = sorted(set(range(pack.size)) - set(own or [0]))
            assert states[own].isfinite().all()
            assert states[unread].isnan().all()
            kinds.add((len(own) == 0, len(own) == pack.size, pack.keep > 0, pack.prefix > 0))
        for i, text in enumerate(texts):
            want = trunk.hidden(input_ids=torch.tensor([text]), use_cache=False)[0]
            for number, column, first, count in plan.columns(i, 0, len(text)):
                for k in range(count):
                    if column + k in columns[number]:
                        torch.testing.assert_close(found[number][column + k], want[first + k], atol=bound, rtol=bound)
    assert len(kinds) > 5


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
@pytest.mark.parametrize("reads", [False, True])
def test_long_groups_attend_in_blocks(name, reads, monkeypatch):
    """As on a CPU with groups of many hundred tokens, here with blocks of three queries."""
    monkeypatch.setattr(tree_attention_module, "_CPU_QUERIES", 3)
    monkeypatch.setattr(tree_attention_module, "_CPU_CAUSAL", 10**9)
    model = network(name, "eager" if name == "gemma3" else "sdpa")
    for seed, budget in enumerate(({"pack_tokens": 1000}, {"pack_tokens": 20})):
        texts = tree_of_texts(seed + 20)
        if not reads:
            assert_like_plain(name, model, texts, **budget)
            continue
        plan = make_plan(Forest(texts), **budget)
        with torch.no_grad():
            all_of_it, some = run(trunk_of(model), plan), run(trunk_of(model), plan, lambda pack: range(1, pack.size))
        for one, other in zip(all_of_it, some, strict=True):
            torch.testing.assert_close(one[1:], other[1:], atol=tolerance(name), rtol=tolerance(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral"])
def test_long_chains_behind_few_tokens_attend_without_a_mask(name, monkeypatch):
    """As on a CPU with chains of a thousand tokens behind BOS; windows of 4 tokens need their mask all the same."""
    monkeypatch.setattr(plan_module, "GROUP_TOKENS", 0)
    monkeypatch.setattr(tree_attention_module, "_CPU_CAUSAL", 8)
    monkeypatch.setattr(tree_attention_module, "_CPU_QUERIES", 3)
    model = network(name)
    own, seen = tree_attention_module._own_function, []

    def spied(*args):
        def attend(module, query, key, value, mask, **kwargs):
            seen.append((kwargs.get("sliding_window"), mask is None, query.shape[2]))
            return own(*args)(module, query, key, value, mask, **kwargs)

        return attend

    monkeypatch.setattr(tree_attention_module, "_own_function", spied)
    rng = random.Random(6)
    rows = [[9, *(rng.randrange(3, VOCABULARY) for _ in range(length))] for length in (12, 9, 8, 7, 3, 11)]
    plan = assert_like_plain(name, model, rows, pack_tokens=14)
    assert {pack.prefix for pack in plan.packs} == {0, 1}
    unmasked = {length for window, plain, length in seen if plain and window is None}
    assert unmasked >= {13, 10, 9, 12} if name != "mistral" else not unmasked
    assert not any(plain and length > window for window, plain, length in seen if window is not None)


def test_gradients_through_a_last_layer_that_is_read_in_part():
    """Those of the same sum over the states of all columns."""
    model = network("llama")
    trunk, texts = trunk_of(model), tree_of_texts(4, count=5, longest=7)
    plan = make_plan(Forest(texts), pack_tokens=1000)
    own = list(range(1, plan.packs[0].size, 3))
    grads = []
    for read in (None, lambda _: own):
        model.zero_grad()
        run(trunk, plan, read)[0][own].square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-6)


def test_a_model_whose_last_layer_cannot_be_found():
    model = network("llama")
    model.model.more = torch.nn.ModuleList(model.model.layers)  # two stacks of the same length
    ids = torch.tensor([5, 6, 7])
    row = row_of(ids)
    row.read = torch.tensor([2])
    with pytest.raises(RuntimeError, match="LlamaForCausalLM does not say which layer is its last"):
        tree_hidden(trunk_of(model), ids, row)


def test_one_token_per_pass():
    assert_like_plain("gpt2", network("gpt2"), [[5, 6, 7, 8], [5, 6, 9], [5, 6, 9, 9, 4], [8]], pack_tokens=1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_rows_that_run_by_themselves_for_want_of_cache(name):
    model = network(name)
    for cache_tokens in (0, 8):
        plan = assert_like_plain(name, model, tree_of_texts(7), pack_tokens=10, cache_tokens=cache_tokens)
        assert plan.alone


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_deep_nesting(name):
    """Every text is the one before it and a branch: twenty-five levels."""
    model = network(name)
    texts = [[5] * depth + [9, 4] for depth in range(1, 26)]
    for budget in (5, 500):
        assert_like_plain(name, model, texts, pack_tokens=budget)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "mistral", "gemma2", "gemma3"])
def test_gradients_equal_those_of_plain_passes(name):
    """Parameters' gradients of the sum of log-probabilities over a small forest, without a path, in float64."""
    model = network(name, "eager" if name == "gemma2" else None)
    trunk, texts = trunk_of(model), tree_of_texts(3, count=5, longest=7)
    plan = make_plan(Forest(texts), pack_tokens=1000)
    assert len(plan.packs) == 1
    hidden = run(trunk, plan)[0]
    total = hidden.new_zeros(())
    for i, text in enumerate(texts):
        rows = [c + k for _, c, _, count in plan.columns(i, 0, len(text) - 1) for k in range(count)]
        total = total + trunk.log_probs(hidden[rows], torch.tensor(text[1:])).log_probs.sum()
    total.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = torch.zeros((), dtype=torch.float64)
    for text in texts:
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([text])).logits[0], -1)
        plain = plain + log_probs[torch.arange(len(text) - 1), text[1:]].sum()
    plain.backward()
    torch.testing.assert_close(total, plain, atol=1e-4, rtol=tolerance(name))
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert (got[key] - value).abs().max() <= tolerance(name) * value.abs().max() + 1e-9, key


def test_gradients_reach_every_branch():
    """The gradient of one branch with respect to the embeddings is zero at its siblings and not at its ancestors."""
    model = network("llama")
    trunk = trunk_of(model)
    plan = make_plan(Forest([[5, 6, 7], [5, 6, 8], [5, 9]]), pack_tokens=100)
    tokens = plan.packs[0].tokens(plan.forest).tolist()
    hidden = run(trunk, plan)[0]
    hidden[tokens.index(8)].sum().backward()
    touched = model.get_input_embeddings().weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == [5, 6, 8]


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_masks_by_their_definition(prefix, window):
    """A token sees the prefix, its ancestors and itself, no further back than the window."""
    parents = [-1, 0, 1, 1, 0, 4, -1, 6]  # two trees in preorder
    ends = torch.tensor([6, 4, 3, 4, 6, 6, 8, 8])
    depth = torch.tensor([0, 1, 2, 2, 1, 2, 0, 1]) + prefix
    groups = [(0, 8)] if prefix else [(0, 6), (6, 8)]
    row = TreeRow(depth, ends, groups, prefix)
    row.needs_mask = True
    for begin, end in groups:
        mask = row.mask(begin, end, prefix, window, torch.float32)
        assert mask is not None
        for i in range(begin, end):
            ancestors, j = set(), i
            while j >= 0:
                ancestors.add(j)
                j = parents[j]
            for j in range(-prefix, end - begin):
                seen = j < 0 or begin + j in ancestors
                position = prefix + j if j < 0 else int(depth[begin + j])
                seen = seen and (window is None or int(depth[i]) - position < window)
                assert (mask[0, 0, i - begin, prefix + j] == 0) == seen


def test_a_plain_row_needs_no_mask():
    """One chain: causal attention itself, unless the window cuts it or the kernel is not causal."""
    positions, ends = torch.arange(6), torch.full((6,), 6)
    assert TreeRow(positions, ends, [(0, 6)]).is_causal(0, 6, 0, None)
    assert TreeRow(positions, ends, [(0, 6)]).is_causal(0, 6, 0, 6)
    assert not TreeRow(positions, ends, [(0, 6)]).is_causal(0, 6, 0, 5)
    assert not TreeRow(positions, ends, [(0, 6)], needs_mask=True).is_causal(0, 6, 0, None)
    assert TreeRow(positions, ends, [(0, 6)], prefix=1).is_causal(0, 6, 1, 7)
    assert not TreeRow(positions, ends, [(0, 6)], prefix=1).is_causal(0, 6, 1, 6)
    branch = torch.tensor([6, 6, 3, 6, 6, 6])
    assert not TreeRow(positions, branch, [(0, 6)]).is_causal(0, 6, 0, None)


@pytest.mark.parametrize("capacity", [0, 3, 64])
def test_path_remembers_what_is_kept_and_forgets_the_rest(capacity):
    """Against plain lists: write behind any prefix, in two layers, while the buffers grow."""
    rng = random.Random(capacity)
    path, kept = KeyValuePath(capacity), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        prefix = rng.randint(0, path.length)
        new = [torch.randn(1, 2, rng.randint(1, 5), 3, generator=generator) for _ in range(2)]
        new[1] = new[1][:, :, :1].expand(1, 2, new[0].shape[2], 3) + 1
        for layer in range(2):
            keys, values = path.extended(layer, prefix, new[layer], -new[layer])
            want = torch.cat([*(part[layer] for part in kept[:prefix]), new[layer]], dim=2)
            torch.testing.assert_close(keys, want, atol=0, rtol=0)
            torch.testing.assert_close(values, -want, atol=0, rtol=0)
        keep = rng.randint(0, new[0].shape[2])
        kept = kept[:prefix] + [[layer[:, :, i : i + 1].clone() for layer in new] for i in range(keep)]
        path.length = prefix + keep


def test_path_given_its_room_at_once_never_moves():
    path = KeyValuePath(20)
    first, _ = path.extended(0, 0, torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    path.length = 4
    last, _ = path.extended(0, 4, torch.ones(1, 1, 16, 2), torch.ones(1, 1, 16, 2))
    assert first.data_ptr() == last.data_ptr()


def row_of(ids):
    return TreeRow(torch.arange(len(ids)), torch.full((len(ids),), len(ids)), [(0, len(ids))])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_implementation_is_restored(name, implementation):
    """After success and after an exception; another forward pass is as before."""
    model = network(name, implementation)
    trunk, ids = trunk_of(model), torch.tensor([5, 6, 7])
    before = model(input_ids=ids[None]).logits
    tree_hidden(trunk, ids, row_of(ids))
    assert model.config._attn_implementation == implementation
    with pytest.raises(IndexError):
        tree_hidden(trunk, torch.tensor([5, VOCABULARY + 1]), row_of([5, 6]))
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(model(input_ids=ids[None]).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["bloom", "gptj", "mamba"])
def test_architectures_that_do_not_reach_it_are_refused(name):
    model = network(name, dtype=torch.float32)
    ids = torch.tensor([5, 6, 7])
    with pytest.raises(RuntimeError, match="does not attend through transformers' attention interface"):
        tree_hidden(trunk_of(model), ids, row_of(ids))


def test_attention_without_a_tree_is_refused():
    """A layer that is not handed the tree, or handed that of another row."""
    module = torch.nn.Identity()
    states = torch.zeros(1, 1, 3, 2)
    lost = row_of([5, 6])
    lost.attend = lambda *_, **__: None
    for tree in (None, lost):
        with pytest.raises(RuntimeError, match="Identity does not pass the tree of a packed row"):
            tree_attention(module, states, states, states, None, loglik_tree=tree)


def test_an_ordinary_pass_under_the_implementation_is_refused():
    """The name is internal: a model set to it for good has no tree to go by."""
    model = network("llama")
    model.config._attn_implementation = IMPLEMENTATION
    with pytest.raises(RuntimeError, match="LlamaAttention does not pass the tree"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_layers_tell_their_windows():
    """Which the trial of a path compares with the configuration."""
    for name, want in (("llama", {0: None, 1: None}), ("mistral", {0: 4, 1: 4}), ("gemma2", {0: 4, 1: None})):
        row = row_of([5, 6, 7])
        tree_hidden(trunk_of(network(name)), torch.tensor([5, 6, 7]), row)
        assert row.windows == want
