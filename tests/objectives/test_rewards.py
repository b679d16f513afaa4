"""Rewards from feedback against torch, scikit-learn, transformers' greedy decoding and brute force."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import sklearn.metrics
import torch

from loglik.errors import InputError, RowError
from loglik.kinds import Kind, Unit
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.objectives import MaximumLikelihood, rewards
from loglik.objectives.rewards import Seq2SeqReward, binary_feedback, correction_pairs, downsampling_correction
from zoo import CAUSAL, MASKED, SEQ2SEQ, build

V, EOS = 12, 2


# --------------------------------------------------------------------------------------------------- binary feedback
def reactions(seed=0, count=50, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, generator=g, dtype=dtype), torch.rand(count, generator=g) < 0.3


def test_loss_is_that_of_torch_and_scikit_learn_in_value_and_gradient():
    z, labels = reactions()
    z.requires_grad_()
    loss = binary_feedback(z, labels).mean()
    (grad,) = torch.autograd.grad(loss, z)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(z, labels.double())
    (their_grad,) = torch.autograd.grad(theirs, z)
    torch.testing.assert_close(loss, theirs, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grad, their_grad, atol=1e-12, rtol=1e-12)
    p = torch.sigmoid(z.detach()).numpy()
    assert loss.item() == pytest.approx(sklearn.metrics.log_loss(labels.numpy(), p), rel=1e-12)


def test_metrics_are_detached_and_those_of_scikit_learn():
    z, labels = reactions(1)
    metrics = binary_feedback(z.requires_grad_(), labels).metrics
    assert not any(value.requires_grad for value in metrics.values())
    assert metrics["reward"].equal(z.detach())
    torch.testing.assert_close(metrics["probability"], torch.sigmoid(z.detach()))
    expected = sklearn.metrics.accuracy_score(labels.numpy(), (z.detach() > 0).numpy())
    assert metrics["accuracy"].mean().item() == pytest.approx(expected)
    assert 0 < expected < 1


def test_labels_may_be_numbers_and_terms_are_added_up_like_any_mean():
    z, labels = reactions(2)
    as_numbers = binary_feedback(z, labels.int())
    torch.testing.assert_close(as_numbers.loss, binary_feedback(z, labels.float()).loss)
    parts = [binary_feedback(z[:7], labels[:7]), binary_feedback(z[7:], labels[7:])]
    cut = sum(p.loss.sum() for p in parts) / sum(p.weight.sum() for p in parts)
    torch.testing.assert_close(cut, as_numbers.mean())


def test_extreme_rewards_stay_finite_in_value_and_gradient():
    """A sigmoid followed by a logarithm would give infinity from 17 on in float32."""
    z = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    terms = binary_feedback(z, torch.tensor([True, True, False, False]))
    assert terms.loss.tolist() == [0.0, 1e4, 1e4, 0.0]
    (grad,) = torch.autograd.grad(terms.loss.sum(), z)
    assert grad.tolist() == [0.0, -1.0, 1.0, 0.0]


def test_half_precision_rewards_are_widened():
    z, labels = reactions(3)
    terms = binary_feedback(z.bfloat16(), labels)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss.double(), binary_feedback(z.bfloat16().double(), labels).loss)


def test_feedback_that_is_none_is_refused():
    with pytest.raises(RowError, match=r"row 1: the label is 0\.5"):
        binary_feedback(torch.zeros(2), torch.tensor([1.0, 0.5]))
    with pytest.raises(RowError, match="row 1: the reward is NaN"):
        binary_feedback(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(InputError, match=r"shape \(B,\), got \(2,\) and \(3,\)"):
        binary_feedback(torch.zeros(2), torch.zeros(3))
    with pytest.raises(InputError, match=r"shape \(B,\)"):
        binary_feedback(torch.zeros(2, 1), torch.zeros(2, 1))


# -------------------------------------------------------------------------------------------------- down-sampling
LOVED = {"a": (30, 970), "b": (200, 800), "c": (1, 999)}  # positives and negatives for each value of a feature
RHO = 0.1


def test_corrected_logits_of_a_fitted_model_give_the_base_rate():
    """Maximum likelihood on all positives and a tenth of the negatives, then the correction: exact, feature by feature.

    (970 negatives give 97, 800 give 80, and 999 give 99.9, as weights.)
    """
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    positives, negatives = (torch.tensor(x, dtype=torch.float64) for x in zip(*LOVED.values(), strict=True))
    optimiser = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        yes = binary_feedback(z, torch.ones(3, dtype=torch.bool)).loss
        no = binary_feedback(z, torch.zeros(3, dtype=torch.bool)).loss
        loss = (positives * yes + RHO * negatives * no).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    rate = torch.sigmoid(downsampling_correction(z.detach(), RHO))
    true = positives / (positives + negatives)
    torch.testing.assert_close(rate, true, atol=1e-6, rtol=1e-5)
    share = (positives + negatives) / (positives + negatives).sum()
    assert (share * rate).sum().item() == pytest.approx(231 / 3000, abs=1e-6)
    uncorrected = (share * torch.sigmoid(z.detach())).sum().item()
    assert uncorrected > 3 * 231 / 3000  # what forgetting the correction does


def test_correction_is_a_shift_of_the_exact_logit():
    p = torch.tensor([0.001, 0.2, 0.9], dtype=torch.float64)
    sampled = p / (p + RHO * (1 - p))
    torch.testing.assert_close(torch.sigmoid(downsampling_correction(torch.logit(sampled), RHO)), p)
    z = torch.randn(4, 5)
    assert downsampling_correction(z, 1).equal(z)
    assert downsampling_correction(z.bfloat16(), 0.5).dtype == torch.float32
    for rate in (0.0, 1.5, -1.0, math.nan):
        with pytest.raises(InputError, match="keep_rate"):
            downsampling_correction(z, rate)


# ------------------------------------------------------------------------------------------------ training pairs
def test_pairs_are_correction_and_identity():
    rows = [{"prompt": "Q: hi\n", "chosen": "good", "rejected": "bad"}]
    assert correction_pairs(rows, separator="\nBetter: ", end="</s>") == [
        {"prompt": "Q: hi\nbad</s>\nBetter: ", "completion": "good</s>"},
        {"prompt": "Q: hi\ngood</s>\nBetter: ", "completion": "good</s>"},
    ]
    assert correction_pairs(rows)[0] == {"prompt": "Q: hi\nbad", "completion": "good"}


def test_pairs_of_token_ids_end_once():
    rows = [{"prompt": [1, 5], "chosen": [7, EOS], "rejected": [8, 9]}, {"prompt": [], "chosen": [4], "rejected": [3]}]
    assert correction_pairs(rows, separator=[11], end=[EOS]) == [
        {"prompt": [1, 5, 8, 9, EOS, 11], "completion": [7, EOS]},
        {"prompt": [1, 5, 7, EOS, 11], "completion": [7, EOS]},
        {"prompt": [3, EOS, 11], "completion": [4, EOS]},
        {"prompt": [4, EOS, 11], "completion": [4, EOS]},
    ]
    assert rows[0]["chosen"] == [7, EOS]  # the data are left alone


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 1: has no rejected"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "row 1: its chosen response is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "row 1: its rejected response is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 1: its chosen response is its rejected one"),
        ({"prompt": "a", "chosen": "b.", "rejected": "b"}, "row 1: its chosen response is its rejected one"),
    ],
)
def test_pairs_refuse_rows_that_teach_nothing(row, match):
    with pytest.raises(RowError, match=match):
        correction_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}, row], end=".")


def test_maximum_likelihood_on_pairs_is_the_cross_entropy_of_labels():
    """Output tokens only, EOS included: transformers' own loss with -100 on the source."""
    raw = build(CAUSAL["llama"], V)
    pairs = correction_pairs([{"prompt": [1, 5], "chosen": [7, 6], "rejected": [8, 9, 9]}], separator=[11], end=[EOS])
    rows = [p["prompt"] + p["completion"] for p in pairs]
    batch = TokenBatch.from_lists(rows, starts=[len(p["prompt"]) for p in pairs])
    with torch.no_grad():
        got = MaximumLikelihood()(CausalLM(raw).log_prob(batch)).mean()
        theirs = raw(input_ids=batch.ids, labels=batch.ids.masked_fill(~batch.scored_mask, -100)).loss
    torch.testing.assert_close(got, theirs, atol=1e-5, rtol=0)
    assert batch.scored_mask.sum() == 6


# --------------------------------------------------------------------------------------------- the rewriting model
class Choices:
    """A rewriting model as a table of logits for every context, of which only the first choices are known."""

    kind, unit, layout, tokenizer, max_length = Kind.EXACT, Unit.TOKEN, "causal", None, None

    def __init__(self, rule):
        self.rule = rule  # (tokens before) -> (V,) logits

    def score_tokens(self, x: TokenBatch):
        first = torch.zeros_like(x.scored_mask)
        for r, c in x.scored_mask.nonzero().tolist():
            logits = self.rule(x.ids[r, :c][x.attention_mask[r, :c]].tolist())
            first[r, c] = logits[x.ids[r, c]] >= logits.max()
        return None, first


class Table(Choices):
    """The same with its probabilities."""

    def next_log_probs(self, prefix: TokenBatch) -> torch.Tensor:
        rows = [ids[real].tolist() for ids, real in zip(prefix.ids, prefix.attention_mask, strict=True)]
        return torch.log_softmax(torch.stack([self.rule(row) for row in rows]), -1)


def arbitrary(context: list[int]) -> torch.Tensor:
    """Logits drawn from the context; a response token that stands in the source is often the first choice."""
    g = torch.Generator().manual_seed(hash(tuple(context)) % 2**31)
    logits = torch.randn(V, generator=g, dtype=torch.float64)
    if 0 in context:  # the separator: copy the source's next token most of the time
        cut = context.index(0)
        done = len(context) - cut - 1
        if done + 2 < cut and torch.rand((), generator=g) < 0.8:
            logits[context[2 + done]] += 10
    return logits


def always(output: list[int]):
    """A rule that writes the same output after the separator 0, whatever was written so far."""

    def rule(context: list[int]) -> torch.Tensor:
        done = len(context) - context.index(0) - 1
        return torch.nn.functional.one_hot(torch.tensor(output[min(done, len(output) - 1)]), V).double()

    return rule


def copy(context: list[int]) -> torch.Tensor:
    """A rule that writes the response of the source: prompts are two tokens, 0 separates."""
    cut = context.index(0)
    done = len(context) - cut - 1
    return torch.nn.functional.one_hot(torch.tensor(context[:cut][min(2 + done, cut - 1)]), V).double()


def brute_force(rule, prompt, response, pos=1.0, neg=-1.0) -> tuple[list[float], int]:
    """Greedy decoding, comparison, then teacher forcing, as written in the paper."""
    source = [*prompt, *response, 0]
    greedy: list[int] = []
    while len(greedy) < len(response):
        greedy.append(int(rule([*source, *greedy]).argmax()))
    agree = [g == y for g, y in zip(greedy, response, strict=True)]
    first = agree.index(False) if False in agree else len(response)
    out = [pos] * first
    for t in range(first, len(response)):
        choice = int(rule([*source, *response[:t]]).argmax())
        out.append(neg if choice != response[t] else 0.0)
    return out, first


def responses(seed: int, count: int):
    rng = random.Random(seed)
    prompts = [[rng.randrange(1, V) for _ in range(2)] for _ in range(count)]
    return prompts, [[rng.randrange(1, V) for _ in range(rng.randint(1, 6))] for _ in range(count)]


@pytest.mark.parametrize(("pos", "neg"), [(1.0, -1.0), (0.25, -2.0)])
def test_rewards_equal_greedy_decoding_and_teacher_forcing(pos, neg):
    prompts, answers = responses(0, 60)
    got = Seq2SeqReward(Table(arbitrary), pos, neg, separator=[0]).token_rewards(prompts, answers)
    kinds = set()
    for i, (prompt, response) in enumerate(zip(prompts, answers, strict=True)):
        expected, first = brute_force(arbitrary, prompt, response, pos, neg)
        assert got.value[i][got.mask[i]].tolist() == expected
        assert got.divergence[i] == first
        assert got.mask[i].sum() == len(response)
        kinds |= set(expected)
    assert kinds == {pos, neg, 0.0}
    assert bool((got.value[~got.mask] == 0).all())


def test_scores_are_sums_and_means():
    prompts, answers = responses(1, 20)
    reward = Seq2SeqReward(Table(arbitrary), separator=(0,))
    totals = [sum(brute_force(arbitrary, p, y)[0]) for p, y in zip(prompts, answers, strict=True)]
    assert reward.score(prompts, answers).tolist() == totals
    means = [t / len(y) for t, y in zip(totals, answers, strict=True)]
    np.testing.assert_allclose(reward.score(prompts, answers, aggregate="mean").numpy(), means, rtol=1e-6)
    with pytest.raises(InputError, match="aggregate must be one of sum, mean"):
        reward.score(prompts, answers, aggregate="max")


def test_a_model_that_copies_rewards_every_token():
    prompts, answers = responses(2, 10)
    got = Seq2SeqReward(Table(copy), separator=[0]).token_rewards(prompts, answers)
    assert got.value.equal(got.mask.float())
    assert got.divergence.tolist() == [len(y) for y in answers]


def test_a_model_that_always_writes_the_chosen_response():
    """+1 on the common beginning, then -1 at each position that differs and 0 where it agrees by chance."""
    chosen = [5, 6, 7, 8, EOS]
    cases = {
        (5, 6, 7, 8, EOS): [1, 1, 1, 1, 1],
        (5, 6, 9, 8, EOS): [1, 1, -1, 0, 0],
        (9, 6, 7, 8, EOS): [-1, 0, 0, 0, 0],
        (5, 6, 7, EOS): [1, 1, 1, -1],  # ended early: one mismatch, at the end token
        (5, 6, 7, 8): [1, 1, 1, 1],  # cut off: the end token was not written and is not judged
        (6, 7, 8, EOS): [-1, -1, -1, -1],  # a deletion shifts everything
    }
    reward = Seq2SeqReward(Table(always(chosen)), separator=[0])
    got = reward.token_rewards([[3, 4]] * len(cases), [list(y) for y in cases])
    for row, mask, expected in zip(got.value, got.mask, cases.values(), strict=True):
        assert row[mask].tolist() == expected


def test_a_tie_counts_as_agreement():
    flat = Seq2SeqReward(Table(lambda _: torch.zeros(V, dtype=torch.float64)), separator=[0])
    assert flat.token_rewards([[1, 1]], [[3, 4]]).value.tolist() == [[1.0, 1.0]]
    assert flat.soft_rewards([[1, 1]], [[3, 4]]).value.tolist() == [[0.0, 0.0]]


FAMILIES = {
    "causal": lambda: CausalLM(build(CAUSAL["llama"], V)),
    "seq2seq": lambda: Seq2SeqLM(build(SEQ2SEQ["t5"], V)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_decoding_with_transformers(family):
    """`generate` for the rewrite, full logits for the second phase; responses that agree for a while."""
    model = FAMILIES[family]()
    prompts, answers = responses(3, 12)
    separator = [0, EOS]

    def decoded(source, length):
        inputs = torch.tensor([source])
        out = model.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=length,
            min_new_tokens=length,
            eos_token_id=None,
        )
        return out[0, -length:].tolist()

    def logits(source, response):
        with torch.no_grad():
            if family == "causal":
                return model.model(input_ids=torch.tensor([[*source, *response]])).logits[0, len(source) - 1 : -1]
            start = [model.start_id, *response[:-1]]
            return model.model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([start])).logits[0]

    # Follow the rewrite for a few tokens where that is possible, so that the first phase is not always empty.
    for i, (prompt, response) in enumerate(zip(prompts, answers, strict=True)):
        for t in range(min(i % 4, len(response))):
            response[t] = int(logits([*prompt, *response, *separator], response)[t].argmax())
    reward = Seq2SeqReward(model, separator=separator)
    got, soft = reward.token_rewards(prompts, answers), reward.soft_rewards(prompts, answers)
    for i, (prompt, response) in enumerate(zip(prompts, answers, strict=True)):
        source = [*prompt, *response, *separator]
        rewrite, table = decoded(source, len(response)), logits(source, response)
        same = [a == b for a, b in zip(rewrite, response, strict=True)]
        first = same.index(False) if False in same else len(same)
        later = [-1.0 if int(table[t].argmax()) != response[t] else 0.0 for t in range(first, len(response))]
        assert got.value[i][got.mask[i]].tolist() == [1.0] * first + later
        log_p = torch.log_softmax(table, -1)
        gap = log_p.gather(1, torch.tensor(response)[:, None])[:, 0] - log_p.amax(1)
        torch.testing.assert_close(soft.value[i][soft.mask[i]], gap, atol=1e-4, rtol=0)


def test_soft_rewards_of_any_chain_rule_and_of_a_table():
    """Zero exactly where the hard comparison agrees, and the log-probability below the first choice elsewhere."""
    prompts, answers = responses(4, 15)
    reward = Seq2SeqReward(Table(arbitrary), separator=[0])
    soft, hard = reward.soft_rewards(prompts, answers), reward.token_rewards(prompts, answers)
    for i, (prompt, response) in enumerate(zip(prompts, answers, strict=True)):
        for t, token in enumerate(response):
            logits = arbitrary([*prompt, *response, 0, *response[:t]])
            assert soft.value[i, t].item() == pytest.approx(float(logits[token] - logits.max()), abs=1e-6)
    assert (soft.value == 0).equal((hard.value >= 0) | ~hard.mask)
    assert soft.divergence.equal(hard.divergence)
    ngram = NGramLM.train(["abab", "abba", "baab"], order=3)
    ids = [ngram.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("ab", "aba", "b")]
    got = Seq2SeqReward(ngram).soft_rewards([[5]] * 3, ids)
    one = ngram.next_log_probs(TokenBatch.from_lists([[5, *ids[1], *ids[1][:2]]]))[0]
    assert got.value[1, 2].item() == pytest.approx(float(one[ids[1][2]] - one.max()), abs=1e-6)


def test_chunks_of_the_head_change_nothing(monkeypatch):
    prompts, answers = responses(5, 6)
    reward = Seq2SeqReward(FAMILIES["causal"](), separator=[0])
    whole = reward.soft_rewards(prompts, answers).value
    for size in (1, 2 * V, 5 * V + 3):
        monkeypatch.setattr(rewards, "_CHUNK_LOGITS", size)
        torch.testing.assert_close(reward.soft_rewards(prompts, answers).value, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_does_not_depend_on_the_others(family):
    prompts, answers = responses(6, 8)
    reward = Seq2SeqReward(FAMILIES[family](), separator=[0, EOS])
    together, soft = reward.token_rewards(prompts, answers), reward.soft_rewards(prompts, answers)
    for i, (prompt, response) in enumerate(zip(prompts, answers, strict=True)):
        alone = reward.token_rewards([prompt], [response])
        assert alone.value[0].tolist() == together.value[i, : len(response)].tolist()
        own = reward.soft_rewards([prompt], [response]).value[0]
        torch.testing.assert_close(own, soft.value[i, : len(response)], atol=1e-4, rtol=0)


def test_the_model_is_frozen():
    """Dropout is off meanwhile, and nothing carries a gradient."""
    model = CausalLM(build(CAUSAL["gpt2"], V))
    for module in model.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    reward, prompts, answers = Seq2SeqReward(model, separator=[0]), *responses(7, 40)
    hard, soft = reward.token_rewards(prompts, answers), reward.soft_rewards(prompts, answers)
    model.model.train()
    for expected, call in ((hard, reward.token_rewards), (soft, reward.soft_rewards)):
        got = call(prompts, answers)
        assert got.value.equal(expected.value)
        assert got.value.dtype == torch.float32
        assert not got.value.requires_grad
    assert model.model.training


def test_bad_input_is_refused():
    model = FAMILIES["causal"]()
    reward = Seq2SeqReward(model, separator=[0])
    for call in (reward.token_rewards, reward.score, reward.soft_rewards):
        with pytest.raises(InputError, match="got 1 and 2"):
            call([[1]], [[2], [3]])
        with pytest.raises(InputError, match="got 0 and 0"):
            call([], [])
        with pytest.raises(RowError, match="response 1: is empty"):
            call([[1], [1]], [[2], []])
        with pytest.raises(RowError, match=r"response 1: needs 65 tokens .* context is 64"):
            call([[1], [1]], [[2] * 31, [2] * 32])
    seq2seq = Seq2SeqReward(Seq2SeqLM(build(SEQ2SEQ["bart"], V)))
    assert seq2seq.token_rewards([[1] * 10], [[2] * 54]).mask.sum() == 54
    with pytest.raises(RowError, match="response 0: needs 65 tokens"):
        seq2seq.token_rewards([[1] * 10], [[2] * 55])
    for option in ({"pos": math.nan}, {"neg": -math.inf}):
        with pytest.raises(InputError, match=f"{next(iter(option))} must be finite"):
            Seq2SeqReward(model, **option)
    with pytest.raises(InputError, match="from left to right: use a causal model"):
        Seq2SeqReward(MaskedLM(build(MASKED["bert"], V), mask_token_id=4))
    with pytest.raises(InputError, match="the soft reward needs per-token conditionals"):
        Seq2SeqReward(Choices(arbitrary)).soft_rewards([[1]], [[2]])
