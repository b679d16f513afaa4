"""Beam search against exhaustive search, greedy decoding, a plain reference and transformers' own."""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from loglik.decoding.beam import Beams, beam_search
from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.seq2seq import Seq2SeqLM
from zoo import CAUSAL, SEQ2SEQ, build

EOS = 2


class Random:
    """Distributions drawn anew after every prefix."""

    def __init__(self, vocabulary: int, seed: int = 0, sharpness: float = 1.5) -> None:
        self.vocabulary, self.seed, self.sharpness = vocabulary, seed, sharpness
        self.calls = 0

    def after(self, tokens: list[int]) -> torch.Tensor:
        place = self.seed
        for token in tokens:
            place = (place * 31 + token + 1) % 1_000_003
        z = torch.randn(self.vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(place))
        return (self.sharpness * z).log_softmax(0)

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        self.calls += 1
        return torch.stack(
            [self.after(ids[real].tolist()) for ids, real in zip(prefix.ids, prefix.attention_mask, strict=True)]
        )


def log_prob(model: Random, prompt: list[int], completion: tuple[int, ...]) -> float:
    return sum(float(model.after([*prompt, *completion[:t]])[token]) for t, token in enumerate(completion))


def everything(vocabulary: int, longest: int, eos: int | None) -> list[tuple[int, ...]]:
    others = [token for token in range(vocabulary) if token != eos]
    full = list(product(others, repeat=longest))
    return full if eos is None else [(*s, eos) for n in range(longest) for s in product(others, repeat=n)] + full


def completions_of(beams: Beams) -> list[tuple[int, ...]]:
    return [tuple(ids[m].tolist()) for ids, m in zip(beams.sequences.ids, beams.sequences.scored_mask, strict=True)]


def plain_beam(model: Random, prompt: list[int], width: int, longest: int, penalty: float, eos: int | None):
    """The same search without any batching: finished hypotheses compete with extensions for their place."""

    def score(h):
        return h[1] / len(h[0]) ** penalty

    beam = [((), 0.0)]
    for _ in range(longest):
        pool = []
        for tokens, total in beam:
            if tokens and tokens[-1] == eos:
                pool.append((tokens, total))
            else:
                after = model.after([*prompt, *tokens])
                pool += [((*tokens, v), total + float(after[v])) for v in range(model.vocabulary)]
        beam = sorted(pool, key=score, reverse=True)[:width]
    return [(tokens, score((tokens, total))) for tokens, total in beam]


@pytest.mark.parametrize("eos", [None, EOS])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_wide_beam_is_exhaustive(eos, penalty):
    """Width V^T returns every sequence there is, in the order of its score."""
    model, prompt = Random(4), [1, 3]
    wanted = sorted(((log_prob(model, prompt, s) / len(s) ** penalty, s) for s in everything(4, 3, eos)), reverse=True)
    beams = beam_search(
        model, TokenBatch.from_lists([prompt]), width=4**3, max_tokens=3, eos_id=eos, length_penalty=penalty
    )
    assert completions_of(beams) == [s for _, s in wanted]
    assert beams.scores.tolist() == pytest.approx([score for score, _ in wanted], abs=1e-12)
    assert beams.best() == [list(wanted[0][1])]


@pytest.mark.parametrize("eos", [None, EOS])
def test_width_one_is_greedy(eos):
    for seed in range(10):
        model = Random(5, seed)
        tokens: list[int] = []
        while len(tokens) < 6 and (not tokens or tokens[-1] != eos):
            tokens.append(int(model.after([1, *tokens]).argmax()))
        assert beam_search(model, TokenBatch.from_lists([[1]]), width=1, max_tokens=6, eos_id=eos).best() == [tokens]


@pytest.mark.parametrize("width", [2, 3, 5, 9])
@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, -0.5])
@pytest.mark.parametrize("eos", [None, EOS])
def test_against_a_plain_search(width, penalty, eos):
    """Three prompts of different lengths at once, each as if it were alone."""
    model, prompts = Random(5, seed=width, sharpness=1.0), [[1], [1, 4, 4, 0], [3, 0]]
    beams = beam_search(
        model,
        TokenBatch.from_lists(prompts, padding_side="left"),
        width=width,
        max_tokens=5,
        length_penalty=penalty,
        eos_id=eos,
    )
    wanted = [plain_beam(model, prompt, width, 5, penalty, eos) for prompt in prompts]
    assert completions_of(beams) == [tokens for beam in wanted for tokens, _ in beam]
    assert beams.scores.tolist() == pytest.approx([score for beam in wanted for _, score in beam], abs=1e-12)
    assert beams.groups.tolist() == [row for row in range(3) for _ in range(width)]
    assert beams.best() == [list(beam[0][0]) for beam in wanted]


def test_scores_are_labelled_log_likelihoods():
    model, prompt = Random(5, seed=3), [1, 4]
    beams = beam_search(model, TokenBatch.from_lists([prompt]), width=4, max_tokens=4, eos_id=EOS, length_penalty=1.0)
    value = beams.log_prob
    assert value.kind is Kind.EXACT
    found = completions_of(beams)
    assert value.value.tolist() == pytest.approx([log_prob(model, prompt, s) for s in found], abs=1e-12)
    assert value.num_units.tolist() == [len(s) for s in found]
    assert beams.scores.tolist() == pytest.approx((value.value / value.num_units).tolist())
    assert value.per_unit is not None
    for row, s in enumerate(found):
        wanted = [float(model.after([*prompt, *s[:t]])[token]) for t, token in enumerate(s)]
        assert value.per_unit[row, 2 : 2 + len(s)].tolist() == pytest.approx(wanted)


def test_a_network_scores_its_beams_as_it_scores_text():
    model = CausalLM(build(CAUSAL["llama"], 12))
    beams = beam_search(model, TokenBatch.from_lists([[1, 3], [1, 7, 9]]), width=3, max_tokens=4, eos_id=EOS)
    with torch.no_grad():
        again = model.log_prob(beams.sequences)
    torch.testing.assert_close(again.value.double(), beams.log_prob.value, atol=1e-4, rtol=0)
    assert not beams.log_prob.value.requires_grad


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_equal_to_generate_on_outputs_of_one_length(name, width):
    """transformers' num_beams with length_penalty=0: the same sequences in the same order, and the same scores."""
    if name == "llama":
        raw = build(CAUSAL[name], 20)
        model: CausalLM | Seq2SeqLM = CausalLM(raw)
    else:
        raw = build(SEQ2SEQ[name], 20)
        model = Seq2SeqLM(raw)
    raw.generation_config.eos_token_id = None
    prompt = torch.tensor([[1, 5, 9], [1, 11, 4]])
    out = raw.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=0.0,
        do_sample=False,
        max_new_tokens=5,
        output_scores=True,
        return_dict_in_generate=True,
    )
    beams = beam_search(model, TokenBatch.from_lists(prompt.tolist()), width=width, max_tokens=5, eos_id=-1)
    start = 3 if name == "llama" else 1
    assert completions_of(beams) == [tuple(row[start:]) for row in out.sequences.tolist()]
    if width > 1:
        torch.testing.assert_close(beams.scores.float(), out.sequences_scores, atol=1e-4, rtol=0)


def test_finished_hypotheses_keep_their_place():
    """A sure end of probability 0.6 stays first while two others grow, and nothing after EOS is asked for."""

    class Ends:
        tokenizer = SimpleNamespace(eos_token_id=EOS)
        asked: list[list[int]] = []  # noqa: RUF012

        def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
            self.asked += [ids[real].tolist() for ids, real in zip(prefix.ids, prefix.attention_mask, strict=True)]
            return torch.tensor([0.3, 0.1, 0.6]).log().expand(len(prefix), -1)

    model = Ends()
    beams = beam_search(model, TokenBatch.from_lists([[0]]), width=3, max_tokens=9)  # EOS of the tokenizer
    assert completions_of(beams)[0] == (EOS,)
    assert beams.scores[0].item() == pytest.approx(math.log(0.6))
    assert all(EOS not in row for row in model.asked)
    # Without an end every sequence has all tokens.
    endless = beam_search(model, TokenBatch.from_lists([[0]]), width=3, max_tokens=4, eos_id=-1)
    assert [len(s) for s in completions_of(endless)] == [4, 4, 4]


def test_the_search_ends_when_all_have_ended():
    class Over:
        calls = 0

        def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
            self.calls += 1
            return torch.tensor([0.01, 0.01, 0.98]).log().expand(len(prefix), -1)

    model = Over()
    beams = beam_search(model, TokenBatch.from_lists([[0], [1]]), width=1, max_tokens=50, eos_id=EOS)
    assert model.calls == 1
    assert beams.best() == [[EOS], [EOS]]


def test_impossible_tokens_are_never_chosen():
    """Two of four tokens have probability 0: a beam of ten holds the four sequences that exist."""

    class Half:
        def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
            return torch.tensor([0.7, 0.0, 0.3, 0.0]).log().expand(len(prefix), -1)

    beams = beam_search(Half(), TokenBatch.from_lists([[0]]), width=10, max_tokens=2)
    assert set(completions_of(beams)) == {(0, 0), (0, 2), (2, 0), (2, 2)}
    assert beams.scores.isfinite().all()


def test_no_prompts():
    beams = beam_search(Random(4), TokenBatch.from_lists([]), width=2, max_tokens=2)
    assert len(beams.sequences) == len(beams.scores) == 0
    assert beams.best() == []


def test_refusals():
    prompt = TokenBatch.from_lists([[1], [1]])
    with pytest.raises(InputError, match="must be at least 1, got 0 and 3"):
        beam_search(Random(4), prompt, width=0, max_tokens=3)
    with pytest.raises(InputError, match="must be at least 1, got 2 and 0"):
        beam_search(Random(4), prompt, width=2, max_tokens=0)
    with pytest.raises(InputError, match="length_penalty must be finite, got nan"):
        beam_search(Random(4), prompt, width=2, max_tokens=2, length_penalty=math.nan)
    with pytest.raises(InputError, match="beam search needs per-token conditionals"):
        beam_search(object(), prompt, width=2, max_tokens=2)
    with pytest.raises(
        InputError, match="prompt 1 has 60 tokens, and 6 more do not fit into the model's context of 64"
    ):
        beam_search(CausalLM(build(CAUSAL["gpt2"], 20)), TokenBatch.from_lists([[1], [1] * 60]), width=1, max_tokens=6)
    full = beam_search(CausalLM(build(CAUSAL["gpt2"], 20)), TokenBatch.from_lists([[1] * 60]), width=1, max_tokens=5)
    assert full.log_prob.num_units.item() <= 5

    class Broken:
        def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
            z = torch.zeros(len(prefix), 3).log_softmax(1)
            z[prefix.ids[:, 0] == 1] = math.nan
            return z

    with pytest.raises(RowError, match="prompt 1: the model gives NaN after 0 tokens"):
        beam_search(Broken(), TokenBatch.from_lists([[0], [1]]), width=2, max_tokens=2)
