"""Causal tracing and attention knockout: exact on linear networks, by hand on GPT-2, and by laws on architectures."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.signals.attribution import (
    CausalTrace,
    attention_knockout,
    causal_trace,
    embedding_spread,
    restored_probability,
)
from loglik.signals.pooled_traces import pool_traces
from loglik.signals.subject_prompts import SubjectPosition, SubjectPrompt, subject_prompt
from zoo import CAUSAL, MASKED, MORE_CAUSAL, SEQ2SEQ, build, byte_level_tokenizer, llama_tokenizer

EVERY = {**CAUSAL, **MORE_CAUSAL}
# Experts are computed in float32 at most, and some blocks have no attention or MLP by themselves.
TRACED = [name for name in EVERY if name not in ("mamba", "bloom", "lfm2", "qwen3_moe", "phimoe")]
PROMPT = SubjectPrompt((7, 3, 9, 31, 4, 12), (1, 4), 40)
T = len(PROMPT.ids)
_BUILT: dict[str, CausalLM] = {}


def model_of(name: str, dtype=torch.float64) -> CausalLM:
    if name not in _BUILT:
        _BUILT[name] = CausalLM(build(EVERY[name], 50, gain=6.0).to(dtype))
    return _BUILT[name]


def clean(model, prompt=PROMPT) -> float:
    with torch.no_grad():
        return float(model.next_log_probs(TokenBatch.from_lists([prompt.ids]))[0, prompt.target].exp())


def everywhere(layers: int, rows: int = 1) -> torch.Tensor:
    return torch.ones(rows, T, layers, dtype=torch.bool)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ------------------------------------------------------------------ a network of matrices
class Mixing(nn.Module):
    """Attention whose weights are given: each token reads fixed shares of those up to it."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.randn(length, length).tril() / 2)
        self.value = nn.Parameter(torch.randn(width, width) / 2)

    def forward(self, hidden_states):
        n = hidden_states.shape[1]
        return self.shares[:n, :n] @ hidden_states @ self.value.T, None


class LinearBlock(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Mixing(width, length), nn.Linear(width, width, bias=False)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.self_attn(hidden_states)[0]
        return hidden_states + self.mlp(hidden_states)


class LinearNetwork(nn.Module):
    """Softmax of a linear function of the embeddings: every effect is a sum of products of matrices."""

    def __init__(self, vocabulary: int = 5, width: int = 3, length: int = 8, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(LinearBlock(width, length) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        text = SimpleNamespace(num_hidden_layers=layers, vocab_size=vocabulary)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.double()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return SimpleNamespace(logits=self.head(states))


LINEAR = SubjectPrompt((1, 4, 2, 0, 3), (1, 3), 2)


def linear_model(**options):
    return SimpleNamespace(model=LinearNetwork(**options), layout="causal")


def by_hand(network: LinearNetwork, prompt: SubjectPrompt, noise: torch.Tensor, kind: str, restored: set) -> float:
    """The run layer by layer, clean and corrupted side by side; `restored` holds (token, layer)."""
    with torch.no_grad():
        own = network.embed.weight[list(prompt.ids)]
        other = own.clone()
        other[prompt.span[0] : prompt.span[1]] += noise
        for number, layer in enumerate(network.layers):
            n = len(own)
            mix, value, mlp = layer.self_attn.shares[:n, :n], layer.self_attn.value, layer.mlp.weight
            here = [t for t, where in restored if where == number]

            def put(new, old, part, here=here):
                new = new.clone()
                if part == kind:
                    new[here] = old[here]
                return new

            read, given = mix @ own @ value.T, mix @ other @ value.T
            given = put(given, read, "attention")
            own, other = own + read, other + given
            wrote, given = own @ mlp.T, put(other @ mlp.T, own @ mlp.T, "mlp")
            own, other = own + wrote, other + given
            other = put(other, own, "residual")
        return float((network.head.weight @ other[-1]).softmax(0)[prompt.target])


@pytest.mark.parametrize("kind", ["mlp", "attention", "residual"])
@pytest.mark.parametrize("window", [1, 2, 3, None])
def test_traces_of_a_linear_network_are_those_by_hand(kind, window):
    model, draws = linear_model(), 4
    found = causal_trace(model, LINEAR, kind=kind, window=window, noise=2.0, spread=0.7, draws=draws, seed=5)
    noise = torch.randn(draws, 2, 3, generator=torch.Generator().manual_seed(5)) * 1.4
    size = {"residual": 1}.get(kind, 10) if window is None else window
    assert found.window == size
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for token in range(5):
        for layer in range(3):
            near = range(max(0, layer - size // 2), min(3, layer - (-size // 2)))  # as released by ROME
            places = {(token, where) for where in near}
            expected[token, layer] = np.mean([by_hand(model.model, LINEAR, d.double(), kind, places) for d in noise])
    torch.testing.assert_close(found.score, expected, atol=1e-12, rtol=0)
    none = np.mean([by_hand(model.model, LINEAR, d.double(), kind, set()) for d in noise])
    assert found.low == pytest.approx(none, abs=1e-12)
    assert found.high == pytest.approx(by_hand(model.model, LINEAR, 0 * noise[0].double(), kind, set()), abs=1e-12)
    assert found.score[0].tolist() == pytest.approx([found.low] * 3)
    assert not torch.allclose(found.score[1:], torch.full((4, 3), found.low, dtype=torch.float64), atol=1e-3)
    assert found.total_effect == found.high - found.low
    torch.testing.assert_close(found.indirect_effect, found.score - found.low)


def test_noise_has_the_stated_size():
    """Two tokens, no layer that mixes: p is a logistic function of a Gaussian, whose mean is an integral; 4 s.e."""
    model = linear_model(vocabulary=2, layers=1)
    network = model.model
    with torch.no_grad():
        network.layers[0].self_attn.shares.zero_()
    prompt, draws, noise, spread = SubjectPrompt((1, 0), (1, 2), 1), 20_000, 1.5, 0.4
    with torch.no_grad():
        gap = (network.head.weight[1] - network.head.weight[0]) @ (torch.eye(3).double() + network.layers[0].mlp.weight)
        mean, deviation = float(gap @ network.embed.weight[0]), noise * spread * float(gap.norm())

    def p(z):
        return 1 / (1 + math.exp(-(mean + deviation * z)))

    first, second = (integrate.quad(lambda z, k=k: p(z) ** k * stats.norm.pdf(z), -9, 9)[0] for k in (1, 2))
    mask = torch.zeros(1, 2, 1, dtype=torch.bool)
    found = restored_probability(
        model, prompt, {"mlp": mask}, noise=noise, spread=spread, draws=draws, seed=1, batch_size=5000
    )
    assert float(found) == pytest.approx(first, abs=4 * math.sqrt((second - first**2) / draws))
    assert deviation > 0.3


def test_several_parts_may_be_restored_at_once():
    """Restoring tokens and layers of two parts, against restoring them in the run by hand one part at a time."""
    model = linear_model(layers=1)
    places = torch.zeros(1, 5, 1, dtype=torch.bool)
    places[0, 4] = True
    options = {"noise": 1.0, "spread": 1.0, "draws": 3}
    both = restored_probability(model, LINEAR, {"mlp": places, "attention": places}, **options)
    # In one layer, the last token is not of the subject: attention restored there makes its MLP's input clean.
    alone = restored_probability(model, LINEAR, {"attention": places}, **options)
    full = restored_probability(model, LINEAR, {"residual": places}, **options)
    torch.testing.assert_close(both, alone, atol=1e-12, rtol=0)
    torch.testing.assert_close(both, full, atol=1e-12, rtol=0)


# ------------------------------------------------------------------ laws
@pytest.mark.parametrize("name", TRACED)
def test_restoring_everything_is_the_clean_run_and_nothing_the_corrupted_one(name):
    model = model_of(name)
    layers = model.model.config.num_hidden_layers
    high = clean(model)
    options = {"noise": 3.0, "draws": 3, "seed": 2}
    every, none = everywhere(layers), ~everywhere(layers)
    embedding = torch.ones(1, T, dtype=torch.bool)
    low = restored_probability(model, PROMPT, {"mlp": none}, **options)
    assert abs(float(low) - high) > 1e-6  # corruption does something
    for parts in (
        {"residual": every},
        {"mlp": every, "attention": every, "embedding": embedding},
        {"embedding": embedding},
    ):
        found = restored_probability(model, PROMPT, parts, **options)
        assert float(found) == pytest.approx(high, abs=1e-10)
    for parts in ({"attention": none}, {"residual": none, "embedding": ~embedding}):
        torch.testing.assert_close(restored_probability(model, PROMPT, parts, **options), low, atol=1e-12, rtol=0)
    # Without the embeddings, clean parts do not bring back the residual stream of the subject, but that of the last.
    parts = restored_probability(model, PROMPT, {"mlp": every, "attention": every}, **options)
    assert float(parts) == pytest.approx(high, abs=1e-10)
    assert hooks(model.model) == 0


@pytest.mark.parametrize("name", TRACED)
def test_laws_of_traces(name):
    """No noise, no effect; the last token's last stream is the prediction; tokens before the subject do nothing."""
    model = model_of(name)
    quiet = causal_trace(model, PROMPT, noise=0.0, draws=2)
    assert quiet.total_effect == pytest.approx(0, abs=1e-12)
    assert float(quiet.indirect_effect.abs().max()) < 1e-12
    found = causal_trace(model, PROMPT, kind="residual", draws=3)
    assert found.high == pytest.approx(clean(model), abs=1e-12)
    assert float(found.score[-1, -1]) == pytest.approx(found.high, abs=1e-10)
    assert found.score[0].eq(found.low).all()
    assert found.score[1:-1, -1].tolist() == pytest.approx([found.low] * (T - 2), abs=1e-12)


@pytest.mark.parametrize("name", ["bloom", "lfm2", "mamba"])
def test_blocks_of_any_kind_have_a_residual_stream(name):
    model = model_of(name)
    found = causal_trace(model, PROMPT, kind="residual", draws=2)
    assert float(found.score[-1, -1]) == pytest.approx(found.high, abs=1e-10)
    with pytest.raises(InputError, match="use the residual stream"):
        causal_trace(model, PROMPT, kind="attention")


def test_the_batch_changes_nothing_and_the_seed_does():
    model = model_of("llama")
    found = [causal_trace(model, PROMPT, draws=3, batch_size=n) for n in (1, 7, 64)]
    for other in found[1:]:
        torch.testing.assert_close(other.score, found[0].score, atol=1e-12, rtol=0)
        assert other.low == pytest.approx(found[0].low, abs=1e-12)
    again, another = (causal_trace(model, PROMPT, draws=3, seed=s) for s in (0, 1))
    assert again.score.equal(found[2].score)
    assert abs(another.low - again.low) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = CausalLM(build(CAUSAL["llama"], 50).to(dtype))
    found = causal_trace(model, PROMPT, kind="residual", draws=2)
    assert float(found.score[-1, -1]) == pytest.approx(found.high, rel=1e-4 if dtype == torch.float32 else 0.1)
    knocked = attention_knockout(model, PROMPT, [])
    assert knocked.relative_change.abs().max() < (0.01 if dtype == torch.float32 else 10)


def test_adapters_and_training_mode():
    network = build(CAUSAL["llama"], 50).double()
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    model = CausalLM(adapted)
    plain = CausalLM(build(CAUSAL["llama"], 50).double())
    found, expected = (causal_trace(m, PROMPT, draws=2) for m in (model, plain))  # B = 0: the adapter adds nothing
    torch.testing.assert_close(found.score, expected.score, atol=1e-10, rtol=0)
    cut, want = (attention_knockout(m, PROMPT, "subject") for m in (model, plain))
    torch.testing.assert_close(cut.probability, want.probability, atol=1e-10, rtol=0)
    assert adapted.training
    assert hooks(adapted) == 0


# ------------------------------------------------------------------ knockout
def gpt2_by_hand(network, prompt: SubjectPrompt, blocked: list[int], layers: set[int]) -> float:
    """GPT-2 written out: the last query does not see `blocked` in `layers`."""
    body, n = network.transformer, len(prompt.ids)
    heads = network.config.n_head
    with torch.no_grad():
        x = body.wte.weight[list(prompt.ids)] + body.wpe.weight[:n]
        for number, block in enumerate(body.h):
            q, k, v = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
            q, k, v = (part.reshape(n, heads, -1).transpose(0, 1) for part in (q, k, v))
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
            if number in layers:
                scores[:, -1, blocked] = -math.inf
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
            x = x + block.attn.c_proj(mixed)
            x = x + block.mlp(block.ln_2(x))
        return float(network.lm_head(body.ln_f(x))[-1].softmax(0)[prompt.target])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("blocked", ["subject", "non-subject", "last", [0, 2, 5], []])
def test_knockout_is_gpt2_written_out(attention, blocked):
    model = model_of("gpt2")
    model.model.set_attn_implementation(attention)
    places = {"subject": [1, 2, 3], "non-subject": [0, 4], "last": [5]}.get(str(blocked), blocked)
    for window, near in ((1, [{0}, {1}]), (2, [{0}, {0, 1}]), (3, [{0, 1}] * 2)):
        found = attention_knockout(model, PROMPT, blocked, window=window)
        expected = [gpt2_by_hand(model.model, PROMPT, places, layers) for layers in near]
        assert found.probability.tolist() == pytest.approx(expected, abs=1e-12)
        assert found.base == pytest.approx(gpt2_by_hand(model.model, PROMPT, [], set()), abs=1e-12)
        change = 100 * (found.probability - found.base) / found.base
        torch.testing.assert_close(found.relative_change, change)
        assert (found.blocked, found.window) == (tuple(places), window)
    if places:
        assert found.relative_change.abs().max() > 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in TRACED if name != "llama4"] + ["bloom"])
def test_without_earlier_tokens_the_last_stands_alone_at_its_position(name, attention):
    """Everything cut in every layer: the last token by itself, with its position; nothing cut: the base."""
    model = model_of(name)
    network = model.model
    if name in ("bloom", "gemma2") and attention == "sdpa":
        pytest.skip("has eager attention only")
    network.set_attn_implementation(attention)
    depth = network.config.num_hidden_layers
    found = attention_knockout(model, PROMPT, range(T - 1), window=2 * depth)
    last = torch.tensor([[PROMPT.ids[-1]]])
    with torch.no_grad():
        # Rotary and relative positions say nothing of a token that sees itself alone.
        place = {"position_ids": torch.tensor([[T - 1]])} if name in ("gpt2", "opt") else {}
        alone = network(input_ids=last, use_cache=False, **place).logits[0, -1].softmax(-1)[PROMPT.target]
    assert found.probability.tolist() == pytest.approx([float(alone)] * depth, abs=1e-10)
    assert abs(float(alone) - found.base) > 1e-6
    nothing = attention_knockout(model, PROMPT, [])
    assert nothing.probability.tolist() == pytest.approx([clean(model)] * depth, abs=1e-10)
    assert nothing.base == pytest.approx(clean(model), abs=1e-12)
    split = attention_knockout(model, PROMPT, "subject", batch_size=1)
    whole = attention_knockout(model, PROMPT, "subject")
    torch.testing.assert_close(split.probability, whole.probability, atol=1e-12, rtol=0)
    assert hooks(network) == 0


def test_sliding_windows_stay():
    """Mistral with a window of 4 does not see token 0 from token 5: cutting it changes nothing, cutting 3 does."""
    model = model_of("mistral")
    for attention in ("eager", "sdpa"):
        model.model.set_attn_implementation(attention)
        unseen = attention_knockout(model, PROMPT, [0], window=1)
        assert unseen.relative_change.abs().max() < 1e-8
        assert attention_knockout(model, PROMPT, [3], window=1).relative_change.abs().max() > 0.1


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_what_is_not_attention_cannot_be_knocked_out(name):
    with pytest.raises(InputError, match=r"block 0 of .* has no attention that can be reached"):
        attention_knockout(model_of(name), PROMPT, "subject")


def test_attention_that_takes_no_mask_is_refused():
    with pytest.raises(InputError, match="does not take a mask per layer"):
        attention_knockout(linear_model(), LINEAR, "subject")


class Masked(Mixing):
    def forward(self, hidden_states, attention_mask=None):
        return super().forward(hidden_states)


def test_attention_that_heeds_no_mask_is_refused():
    model = linear_model()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.__class__ = Masked

        def forward(hidden_states, layer=layer):
            hidden_states = hidden_states + layer.self_attn(hidden_states, attention_mask=None)[0]
            return hidden_states + layer.mlp(hidden_states)

        layer.forward = forward
    with pytest.raises(InputError, match="sees others in more ways than by masked attention"):
        attention_knockout(model, LINEAR, "subject")


# ------------------------------------------------------------------ prompts
def test_positions_are_six_classes():
    p = SubjectPosition
    prompt = SubjectPrompt(tuple(range(9)), (1, 5), 0)
    assert prompt.positions() == {
        p.FIRST_SUBJECT: [1],
        p.MIDDLE_SUBJECT: [2, 3],
        p.LAST_SUBJECT: [4],
        p.FIRST_LATER: [5],
        p.FURTHER_LATER: [6, 7],
        p.LAST: [8],
    }
    assert SubjectPrompt((1, 2, 3), (0, 1), 0).positions() == {p.LAST_SUBJECT: [0], p.FIRST_LATER: [1], p.LAST: [2]}
    assert SubjectPrompt((1, 2, 3), (0, 2), 0).positions() == {
        p.FIRST_SUBJECT: [0],
        p.LAST_SUBJECT: [1],
        p.LAST: [2],
    }
    assert SubjectPrompt((1, 2), (0, 2), 0).positions() == {p.FIRST_SUBJECT: [0], p.LAST_SUBJECT: [1]}
    for length in range(1, 9):
        for begin in range(length):
            for end in range(begin + 1, length + 1):
                places = SubjectPrompt(tuple(range(length)), (begin, end), 0).positions().values()
                assert sorted(i for part in places for i in part) == list(range(begin, length))


@pytest.mark.parametrize("make", [byte_level_tokenizer, llama_tokenizer])
def test_subjects_are_found_in_tokens(make):
    tokenizer = make()
    model = CausalLM(build(CAUSAL["llama"], len(tokenizer)), tokenizer)
    for prompt, subject in (
        ("The answer hello world is so", "hello world"),
        ("hello world yes", "hello world"),
        ("yes, hello is", "hello"),
        ("The ñandú 漢字 there", "漢字"),
        ("The 語 there is", "語"),  # a character of three tokens
        ("so it so is", "so"),
    ):
        found = subject_prompt(model, prompt, subject, " yes")
        text = prompt + " yes"
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        lead = len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
        assert list(found.ids[lead:]) == whole[: len(found.ids) - lead]
        assert found.target == whole[len(found.ids) - lead]
        named = tokenizer.decode(found.ids[slice(*found.span)])
        assert subject in named
        assert len(named.strip()) <= len(subject) + 2  # whole tokens, which may reach a little further
        begin, end = found.span
        assert subject not in tokenizer.decode(found.ids[begin + 1 : end])
        own = subject_prompt(model, prompt, subject)
        assert list(own.ids) == tokenizer(prompt)["input_ids"]
        assert own.span == found.span
        with torch.no_grad():
            table = model.next_log_probs(TokenBatch.from_lists([own.ids]))
        assert own.target == int(table.argmax())
    assert subject_prompt(model, "so it so is", "so", " yes").span[0] > 1  # the last occurrence
    if make is llama_tokenizer:  # a token of this one ends in the space that the answer begins with
        with pytest.raises(InputError, match="'hello' shares its last token with the answer"):
            subject_prompt(model, "yes, hello", "hello", " yes")


def test_prompts_refuse_what_they_cannot_hold():
    tokenizer = byte_level_tokenizer()
    model = CausalLM(build(CAUSAL["llama"], len(tokenizer)), tokenizer)
    for subject in ("Rome", "", " "):
        with pytest.raises(InputError, match="is not in the prompt"):
            subject_prompt(model, "The answer is", subject, " yes")
    with pytest.raises(InputError, match="no tokenizer"):
        subject_prompt(CausalLM(model.model), "The answer is", "answer")
    with pytest.raises(RowError, match="nothing to score"):
        subject_prompt(model, "The answer is", "answer", "")
    no_chain = SimpleNamespace(tokenizer=tokenizer, layout="causal")
    with pytest.raises(InputError, match="a prompt without its answer needs per-token conditionals"):
        subject_prompt(no_chain, "The answer is", "answer")
    for span in ((0, 0), (-1, 2), (2, 4), (3, 2)):
        with pytest.raises(InputError, match="the subject must be tokens of the prompt, from 0 to 3"):
            SubjectPrompt((1, 2, 3), span, 0)
    for ids, target in (((1, -2), 0), ((1, 2), -1)):
        with pytest.raises(InputError, match="must not be negative"):
            SubjectPrompt(ids, (0, 1), target)


def test_spread_is_that_of_all_subject_tokens():
    model = model_of("gpt2")
    other = SubjectPrompt((5, 6, 7), (0, 2), 0)
    weight = model.model.transformer.wte.weight.detach()
    expected = float(weight[[3, 9, 31, 5, 6]].float().std())
    assert embedding_spread(model, [PROMPT, other]) == pytest.approx(expected, rel=1e-6)
    given = causal_trace(model, PROMPT, spread=expected, draws=2)
    alone = causal_trace(model, PROMPT, draws=2)
    assert (given.spread, alone.spread) == (expected, pytest.approx(float(weight[[3, 9, 31]].float().std())))
    assert given.low != alone.low


# ------------------------------------------------------------------ shares and pools
def trace(score, high=0.9, low=0.1, ids=(1, 2, 3), span=(0, 2), kind="mlp") -> CausalTrace:
    values = torch.tensor(score, dtype=torch.float64)
    return CausalTrace(SubjectPrompt(ids, span, 0), kind, 10, 3.0, 1.0, 10, high, low, values)


def test_shares_of_the_total_effect_are_clipped_and_counted():
    found = trace([[0.5, 0.9], [1.0, 0.1], [0.0, 0.1]])
    share, outside = found.normalised(clip=False)
    torch.testing.assert_close(share, torch.tensor([[0.5, 1.0], [1.125, 0.0], [-0.125, 0.0]]).double())
    assert outside == 1
    share, outside = found.normalised()
    assert (float(share.max()), outside) == (1.0, 1)
    # Where corruption helps, the sign of the effect stays that of what putting back does.
    negative, outside = trace([[0.5, 0.1], [0.1, 0.1], [0.9, 1.0]], high=0.1, low=0.9).normalised()
    assert outside == 0
    assert float(negative[0, 1]) == -1.0
    assert float(negative[2, 1]) == pytest.approx(0.125)
    with pytest.raises(InputError, match="corruption changes the probability by 0, of which there are no shares"):
        trace([[0.1], [0.1], [0.1]], high=0.1, low=0.1).normalised()


def test_pools_are_means_over_prompts():
    p = SubjectPosition
    one = trace([[0.5, 0.1], [0.9, 0.1], [0.1, 1.3]])
    two = trace([[0.1, 0.1], [0.3, 0.1], [0.1, 0.1], [0.5, 0.5], [0.1, 0.9]], ids=(1, 2, 3, 4, 5), span=(0, 1))
    found = pool_traces([one, two])
    assert found.count == {p.FIRST_SUBJECT: 1, p.LAST_SUBJECT: 2, p.FIRST_LATER: 1, p.FURTHER_LATER: 1, p.LAST: 2}
    assert list(found.effect) == list(found.count)
    assert found.effect[p.FIRST_SUBJECT].tolist() == pytest.approx([0.4, 0.0])
    assert found.effect[p.LAST_SUBJECT].tolist() == pytest.approx([0.4, 0.0])
    assert found.effect[p.FURTHER_LATER].tolist() == pytest.approx([0.2, 0.2])  # of two tokens
    assert found.effect[p.LAST].tolist() == pytest.approx([0.0, 1.0])
    assert found.clipped is None
    shares = pool_traces([one, two], normalise=True)
    assert shares.clipped == 1
    assert shares.effect[p.LAST].tolist() == pytest.approx([0.0, 1.0])
    assert pool_traces([one, two], normalise=True, clip=False).effect[p.LAST].tolist() == pytest.approx([0.0, 1.25])
    with pytest.raises(InputError, match="of one kind, window and model, got 0"):
        pool_traces([])
    with pytest.raises(InputError, match="got 2 settings"):
        pool_traces([one, trace([[0.1, 0.2]] * 3, kind="residual")])


# ------------------------------------------------------------------ bad input
def test_models_without_blocks_are_refused():
    ngram = NGramLM.train(["abc"], order=2)
    for model in (ngram, object(), Seq2SeqLM(build(SEQ2SEQ["t5"])), MaskedLM(build(MASKED["bert"]), mask_token_id=4)):
        for method in (causal_trace, lambda m, p: attention_knockout(m, p, "subject")):
            with pytest.raises(InputError, match="needs the blocks of a causal language model of transformers"):
                method(model, PROMPT)
    loose = linear_model()
    loose.model.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(loose.model.layers)})
    loose.model.forward = lambda input_ids, use_cache=False: SimpleNamespace(
        logits=loose.model.head(loose.model.embed(input_ids))
    )
    with pytest.raises(InputError, match="has no such stack"):
        causal_trace(loose, LINEAR)


def test_blocks_are_those_that_read_each_other():
    """A list as long as the stack, whose modules all read the embeddings, is not taken for it."""
    model = linear_model()
    network, beside = model.model, nn.ModuleList(LinearBlock(3, 8).double() for _ in range(3))
    own = causal_trace(model, LINEAR, draws=2).score

    class Beside(LinearNetwork):
        def forward(self, input_ids, use_cache=False):
            states = self.embed(input_ids)
            for layer in self.beside:
                layer(states)
            for layer in self.layers if self.is_deep else ():
                states = layer(states)
            return SimpleNamespace(logits=self.head(states))

    network.__class__, network.beside, network.is_deep = Beside, beside, True
    torch.testing.assert_close(causal_trace(model, LINEAR, draws=2).score, own)
    network.is_deep = False
    with pytest.raises(InputError, match="needs blocks that follow each other, and Beside has no such stack"):
        causal_trace(model, LINEAR)


def test_options_out_of_range_are_refused():
    model = model_of("gpt2")
    for options, message in (
        ({"kind": "head"}, "kind must be mlp, attention or residual, got 'head'"),
        ({"window": 0}, "window must be at least 1 layer, got 0"),
        ({"window": True}, "window must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"noise": math.nan}, "noise must be at least 0"),
        ({"spread": 0.0}, "spread positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            causal_trace(model, PROMPT, **options)
    with pytest.raises(InputError, match="token 50 is not among the 50"):
        causal_trace(model, SubjectPrompt((1, 50), (0, 1), 0))
    with pytest.raises(InputError, match="token 99 is not among the 50"):
        attention_knockout(model, SubjectPrompt((1, 2), (0, 1), 99), "subject")
    with pytest.raises(InputError, match="the prompt has 65 tokens and the model a context of 64"):
        causal_trace(model, SubjectPrompt((1,) * 65, (0, 1), 0))
    for blocked, message in (
        ("verb", "blocked must be subject, non-subject, last or numbers"),
        ([6], "blocked tokens must be from 0 to 5, got 6 to 6"),
        ([-1], "blocked tokens must be from 0 to 5"),
        (range(6), "must see at least one token"),
    ):
        with pytest.raises(InputError, match=message):
            attention_knockout(model, PROMPT, blocked)
    with pytest.raises(InputError, match="window must be at least 1 layer"):
        attention_knockout(model, PROMPT, "subject", window=0)
    for parts in (
        {"mlp": torch.ones(1, T, 3, dtype=torch.bool)},
        {"mlp": torch.ones(1, T, 2)},
        {"embedding": torch.ones(1, T, 2, dtype=torch.bool)},
        {"mlp": torch.ones(0, T, 2, dtype=torch.bool)},
    ):
        with pytest.raises(InputError, match="must be bool of shape"):
            restored_probability(model, PROMPT, parts)
    with pytest.raises(InputError, match="there are no prompts"):
        embedding_spread(model, [])
    blank = linear_model()
    with torch.no_grad():
        blank.model.embed.weight.fill_(1.0)
    with pytest.raises(InputError, match="do not differ"):
        causal_trace(blank, LINEAR)
    with pytest.raises(InputError, match="probability 0"):
        _ = attention_knockout_of_nothing().relative_change


def attention_knockout_of_nothing():
    from loglik.signals.attribution import KnockoutEffect

    return KnockoutEffect(PROMPT, (), 1, 0.0, torch.zeros(2))
