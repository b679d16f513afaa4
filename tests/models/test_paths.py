"""The forward path of a model is the fastest that gives its own numbers, and each refusal has its reason."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from loglik.models.causal import CausalLM
from loglik.models.paths import cached_hidden, find_path, scaled_rope_start
from loglik.models.trunk import Trunk
from zoo import CAUSAL, IDS, MORE_CAUSAL, ROTARY, SMALL, build

VOCABULARY = 50
EVERY = {**CAUSAL, **MORE_CAUSAL}
INTERFACE = "does not attend through transformers' attention interface"
ROPE = "rotary frequencies depend on the length of the whole row"
# The path, and what is said about the ones before it; everything else is packed.
EXPECTED = {
    "bloom": ("cached", {"packed": INTERFACE}),
    "gptj": ("cached", {"packed": INTERFACE}),
    "falcon": ("cached", {"packed": "the architecture refuses it"}),
    "phimoe": ("cached", {"packed": "layer 0 does not say whether its window slides"}),
    "llama4": ("cached", {"packed": "cut into chunks by absolute position"}),
    "phi3_longrope": ("padded", {"packed": ROPE, "cached": ROPE}),
    "lfm2": (
        "padded",
        {
            "packed": "some of its layers mix tokens",
            "cached": "the architecture refuses it",
        },
    ),
    "mamba": ("padded", {"packed": INTERFACE, "cached": "the architecture refuses it"}),
}


def trunk_of(model):
    return Trunk(model, {"input_ids": torch.arange(3, 9)[None]})


@pytest.mark.parametrize("name", EVERY)
def test_the_path_of_every_architecture(name):
    model = build(EVERY[name], VOCABULARY, gain=10.0)
    path, refused = EXPECTED.get(name, ("packed", {}))
    report = find_path(trunk_of(model))
    assert report.path == path
    assert report.refused.keys() == refused.keys()
    for key, reason in refused.items():
        assert reason in report.refused[key]
        assert f"not {key}: {report.refused[key]}" in report.describe()
    assert report.describe().startswith(path)
    assert report.difference < 1e-5
    assert report.narrows == (path == "packed")


def test_a_last_layer_that_must_see_all_tokens_does():
    """A layer that adds something of its own where it is given four tokens: packed, each whole."""
    model = build(EVERY["llama"], VOCABULARY, gain=10.0)
    assert find_path(trunk_of(model)).narrows
    last = model.model.layers[-1]
    own = last.forward
    last.forward = lambda hidden, **kwargs: own(hidden, **kwargs) + (hidden.shape[1] == 4)
    report = find_path(trunk_of(model))
    assert (report.path, report.narrows) == ("packed", False)
    model = build(EVERY["llama"], VOCABULARY, gain=10.0)
    model.model.more = torch.nn.ModuleList(model.model.layers)  # which of two stacks is the model's?
    report = find_path(trunk_of(model))
    assert (report.path, report.narrows) == ("packed", False)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "llama"])
def test_a_path_can_be_asked_for(name):
    trunk = trunk_of(build(EVERY[name], VOCABULARY))
    for wanted in ("packed", "cached", "padded"):
        report = find_path(trunk, wanted)
        assert report.path == wanted
        assert report.refused == {}


@pytest.mark.parametrize(("name", "wanted"), [("bloom", "packed"), ("lfm2", "packed"), ("phi3_longrope", "cached")])
def test_a_path_that_is_not_possible_says_why(name, wanted):
    model = CausalLM(build(EVERY[name], VOCABULARY, gain=10.0))
    with pytest.raises(ValueError, match=f"cannot run {wanted} passes: .*{EXPECTED[name][1][wanted]}"):
        model.forward_path(wanted)
    assert model.forward_path("padded").path == "padded"


class NoPositions(tf.LlamaForCausalLM):
    """Counts positions from the row's begin, whatever it is told."""

    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class Forgets(tf.LlamaForCausalLM):
    """Ignores its cache."""

    def forward(self, *args, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


class OneRoot(tf.GPT2LMHeadModel):
    """Takes positions that begin anew in the middle of a row for a mistake, and counts on."""

    def forward(self, *args, position_ids=None, **kwargs):
        if position_ids is not None and int((position_ids == 0).sum()) > 1:
            position_ids = torch.arange(position_ids.shape[1])[None]
        return super().forward(*args, position_ids=position_ids, **kwargs)


class SpoilsTree(tf.LlamaForCausalLM):
    """Does not hand keyword arguments on to its layers."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return super().forward(input_ids, position_ids=position_ids, past_key_values=past_key_values)


@pytest.mark.parametrize(
    ("cls", "path", "refused"),
    [
        (NoPositions, "cached", {"packed": "its values differ by"}),
        (OneRoot, "cached", {"packed": "its values differ by"}),
        (Forgets, "packed", {}),
        (SpoilsTree, "cached", {"packed": "LlamaAttention does not pass the tree of a packed row"}),
    ],
)
def test_models_that_break_a_path_are_found_out(cls, path, refused):
    config = tf.LlamaConfig(vocab_size=VOCABULARY, **ROTARY, **IDS)
    if cls is OneRoot:
        config = tf.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, **IDS)
    model = build(lambda _: cls(config), gain=10.0)
    report = find_path(trunk_of(model))
    assert report.path == path
    assert report.refused.keys() == refused.keys()
    for key, reason in refused.items():
        assert reason in report.refused[key]
    if cls is Forgets:
        with pytest.raises(ValueError, match="cannot run cached passes: its values differ by"):
            find_path(trunk_of(model), "cached")


def test_a_window_that_attention_is_not_told_of():
    """A layer that says it slides where the configuration says it does not, or the other way round."""
    model = build(EVERY["mistral"], VOCABULARY)
    model.config.sliding_window = None
    assert "packed" not in find_path(trunk_of(model)).refused
    model = build(EVERY["gemma2"], VOCABULARY)
    model.config.layer_types = ["sliding_attention", "sliding_attention"]
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4 if layer.self_attn.layer_idx == 0 else None
    assert "layer 1 does not say whether its window slides" in find_path(trunk_of(model)).refused["packed"]


@pytest.mark.parametrize("name", ["llama", "bloom", "lfm2", "gpt2"])
def test_the_trial_leaves_the_model_alone(name):
    """Modes, implementation, weights, hooks and numbers are what they were."""
    model = build(EVERY[name], VOCABULARY)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    model.train()
    implementation = model.config._attn_implementation
    find_path(trunk_of(model))
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == implementation
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "bloom", "gptj", "phimoe", "llama4"])
@torch.no_grad()
def test_caches_of_prefixes_longer_than_a_window(name):
    """Prefix upon prefix, then rows of different lengths over the last; the cache is left alone, so twice."""
    model = build(EVERY[name], VOCABULARY, gain=10.0)
    trunk = trunk_of(model)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCABULARY, (1, 30), generator=generator)
    cache = None
    for begin, end in ((0, 11), (11, 12), (12, 22)):
        hidden, cache = cached_hidden(trunk, text[:, begin:end], cache)
        want = trunk.hidden(input_ids=text[:, :end], use_cache=False)
        torch.testing.assert_close(hidden, want[:, begin:end], atol=1e-4, rtol=1e-4)
    rows = torch.randint(3, VOCABULARY, (3, 8), generator=generator)
    lengths = [8, 3, 1]
    for _ in range(2):
        hidden, _ = cached_hidden(trunk, rows, cache, repeat=3)
        for i, length in enumerate(lengths):
            whole = torch.cat([text[:, :22], rows[i : i + 1, :length]], dim=1)
            want = trunk.hidden(input_ids=whole, use_cache=False)[0, 22:]
            assert want.std() > 0.1
            torch.testing.assert_close(hidden[i, :length], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "start"),
    [
        (None, None),
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, None),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64),
    ],
)
def test_where_rotary_frequencies_begin_to_depend_on_the_length(parameters, start):
    config = tf.LlamaConfig(vocab_size=VOCABULARY, **ROTARY, rope_parameters=parameters, **IDS)
    assert scaled_rope_start(config) == start


def test_where_longrope_begins():
    assert scaled_rope_start(build(EVERY["phi3_longrope"]).config) == 8
    for name in ("gpt2", "gemma3", "mamba", "llama"):
        assert scaled_rope_start(build(EVERY[name]).config) is None


def test_dynamic_frequencies_within_the_context_are_no_objection():
    """They change beyond the longest text that is scored, so every path is right."""
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    make = {
        "dynamic": lambda v: tf.LlamaForCausalLM(
            tf.LlamaConfig(vocab_size=v, **ROTARY, rope_parameters=parameters, **IDS)
        )
    }
    assert find_path(trunk_of(build(make["dynamic"], VOCABULARY))).path == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_packed(dtype):
    """Rounding alone does not refuse a path."""
    for name in ("llama", "gpt2", "gemma3"):
        assert find_path(trunk_of(build(EVERY[name], VOCABULARY).to(dtype))).path == "packed"


def test_a_leak_is_found_in_half_precision():
    """Convolutions mix neighbours of a packed row, in bfloat16 as in float32."""
    model = build(EVERY["lfm2"], VOCABULARY).to(torch.bfloat16)
    assert find_path(trunk_of(model)).path == "padded"


def test_a_network_that_looks_ahead_is_no_causal_model():
    """BERT without `is_decoder`: its values depend on what stands to the right, padding included."""
    model = build(
        lambda v: tf.BertLMHeadModel(tf.BertConfig(vocab_size=v, **SMALL, max_position_embeddings=64)), gain=10.0
    )
    with pytest.raises(ValueError, match=r"causal|padded"):
        find_path(trunk_of(model))


def test_masks_of_the_architecture_itself_are_not_lost():
    """Doge masks all but its most important tokens once a row is longer than `keep_window_size`: 16 here."""
    model = build(
        lambda v: tf.DogeForCausalLM(tf.DogeConfig(vocab_size=v, **ROTARY, keep_window_size=16, **IDS)), gain=10.0
    )
    assert find_path(trunk_of(model)).path != "packed"


@pytest.mark.parametrize("what", ["vocabulary", "context"])
def test_models_smaller_than_the_trial(what):
    """Five tokens, or a context of four: still a model."""
    vocabulary, context = {"vocabulary": (5, 64), "context": (50, 4)}[what]
    model = build(
        lambda v: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=v, n_embd=16, n_layer=2, n_head=2, n_positions=context, **IDS)
        ),
        vocabulary,
    )
    assert CausalLM(model).forward_path().path in ("packed", "padded")


def test_a_leak_beside_attention_is_found_in_half_precision():
    """Falcon-H1 has a state-space model beside the attention of every layer: it mixes neighbours of a packed row."""
    model = build(
        lambda v: tf.FalconH1ForCausalLM(
            tf.FalconH1Config(
                vocab_size=v,
                **ROTARY,
                mamba_d_ssm=16,
                mamba_n_heads=4,
                mamba_d_head=4,
                mamba_d_state=4,
                mamba_n_groups=1,
                mamba_chunk_size=8,
                **IDS,
            )
        ),
        VOCABULARY,
    )
    assert find_path(trunk_of(model)).path == "padded"
    assert find_path(trunk_of(model.to(torch.bfloat16))).path == "padded"


def test_a_network_that_looks_ahead_is_found_in_half_precision():
    model = build(lambda v: tf.BertLMHeadModel(tf.BertConfig(vocab_size=v, **SMALL, max_position_embeddings=64)))
    with pytest.raises(ValueError, match="causal"):
        find_path(trunk_of(model.to(torch.bfloat16)))
