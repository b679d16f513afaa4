"""Follow-up likelihood against transformers by hand and against Bayes' rule; pairs and policy values against loops."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
import scipy.stats
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.kinds import Kind
from loglik.models.causal import CausalLM
from loglik.models.ngram import NGramLM
from loglik.scoring.score import score
from loglik.signals import intervals
from loglik.signals.feedback import follow_up_likelihood, mine_pairs, offline_policy_value, plain_template
from loglik.signals.follow_ups import DEFAULT_FOLLOW_UPS
from zoo import CAUSAL, build, byte_level_tokenizer, llama_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
PROMPTS = ["hello world.", "The answer?", "The answer?"]
RESPONSES = ["yes yes", "it is 42, so", "漢字"]
GOOD, BAD = ["yes it is.", "then so"], ["wer", "é the Answer is there, no", "not 42"]


def causal(tokenizer, name="gpt2") -> CausalLM:
    return CausalLM(build(CAUSAL[name], len(tokenizer)), tokenizer)


def chatty(tokenizer=None):
    tokenizer = tokenizer or byte_level_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def by_hand(model: CausalLM, text: str, begin: int, *, bos: bool) -> list[float]:
    """log_softmax(logits[:, t - 1])[f_t] of the tokens of `text` that reach behind character `begin`."""
    full = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = full["input_ids"], [end for _, end in full["offset_mapping"]]
    if bos:
        ids, ends = [model.tokenizer.bos_token_id, *ids], [0, *ends]
    with torch.no_grad():
        log_p = torch.log_softmax(model.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return [float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)) if ends[t] > begin]


def expected(model, texts, aggregate="mean", *, bos=False) -> torch.Tensor:
    """(N, F) by hand from (context, follow-up) pairs."""
    out = []
    for row in texts:
        terms = [by_hand(model, context + f, len(context), bos=bos) for context, f in row]
        out.append([sum(t) / (len(t) if aggregate == "mean" else 1) for t in terms])
    return torch.tensor(out, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- against transformers
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_plain_template_equals_a_hand_computation(name, aggregate):
    """Shared prefixes, caches and padding change nothing; only the follow-up's own tokens count."""
    model = causal(byte_level_tokenizer(), name)
    contexts = [f"User: {p}\nAssistant: {r}\nUser: " for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    good = expected(model, [[(c, f) for f in GOOD] for c in contexts], aggregate)
    bad = expected(model, [[(c, f) for f in BAD] for c in contexts], aggregate)
    got = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD, aggregate=aggregate)
    torch.testing.assert_close(got.positive, good, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.negative, bad, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.reward.value, good.mean(1) - bad.mean(1), atol=1e-4, rtol=0)
    assert got.reward.kind is Kind.EXACT


def test_chat_template_writes_the_context_and_what_follows_is_left_out():
    """BOS comes from the template, once; the end of the turn is not scored."""
    model = causal(chatty())
    end = model.tokenizer.eos_token
    contexts = [f"{end}[user]\n{p}{end}[assistant]\n{r}{end}[user]\n" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    got = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD)
    torch.testing.assert_close(
        got.positive, expected(model, [[(c, f) for f in GOOD] for c in contexts]), atol=1e-4, rtol=0
    )
    plain = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD, template="plain")
    assert not torch.allclose(plain.positive, got.positive)


def test_a_tokenizer_that_adds_bos_itself_does_so_except_under_a_chat_template():
    tokenizer = llama_tokenizer()
    model = causal(tokenizer, "llama")
    contexts = [f"User: {p}\nAssistant: {r}\nUser: " for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    got = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD)
    wanted = expected(model, [[(c, f) for f in GOOD] for c in contexts], bos=True)
    torch.testing.assert_close(got.positive, wanted, atol=1e-4, rtol=0)
    tokenizer.chat_template = CHAT.replace("{{ bos_token }}", "")
    chat = follow_up_likelihood(model, PROMPTS[:1], RESPONSES[:1], positive=GOOD, negative=())
    context = f"[user]\n{PROMPTS[0]}</s>[assistant]\n{RESPONSES[0]}</s>[user]\n"
    wanted = expected(model, [[(context, f) for f in GOOD]])
    torch.testing.assert_close(chat.positive, wanted, atol=1e-4, rtol=0)
    own = follow_up_likelihood(model, ["a"], ["b"], positive=GOOD, negative=(), template=lambda _: "hello\n")
    wanted = expected(model, [[("hello\n", f) for f in GOOD]], bos=True)
    torch.testing.assert_close(own.positive, wanted, atol=1e-4, rtol=0)


def test_conversations_and_own_templates():
    model = causal(byte_level_tokenizer())
    talk = [
        {"role": "system", "content": "so it is"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "The answer?"},
    ]
    got = follow_up_likelihood(model, [talk], ["42"], positive=GOOD, negative=BAD)
    context = "System: so it is\nUser: hello\nAssistant: yes\nUser: The answer?\nAssistant: 42\nUser: "
    assert context == plain_template([*talk, {"role": "assistant", "content": "42"}])
    wanted = expected(model, [[(context, f) for f in BAD]])
    torch.testing.assert_close(got.negative, wanted, atol=1e-4, rtol=0)
    own = follow_up_likelihood(
        model, [talk], ["42"], positive=GOOD, negative=BAD, template=lambda m: f"{len(m)} {m[-1]['content']}\n"
    )
    torch.testing.assert_close(own.negative, expected(model, [[("5 42\n", f) for f in BAD]]), atol=1e-4, rtol=0)


def test_a_response_does_not_depend_on_the_others():
    model = causal(chatty())
    together = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD)
    for i in range(3):
        alone = follow_up_likelihood(model, PROMPTS[i : i + 1], RESPONSES[i : i + 1], positive=GOOD, negative=BAD)
        torch.testing.assert_close(alone.reward.value, together.reward.value[i : i + 1], atol=1e-4, rtol=0)
    backwards = follow_up_likelihood(model, PROMPTS[::-1], RESPONSES[::-1], positive=GOOD[::-1], negative=BAD)
    torch.testing.assert_close(backwards.reward.value, together.reward.value.flip(0), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------- what it means
def test_equal_sides_cancel_and_swapped_sides_change_the_sign():
    model = causal(byte_level_tokenizer())
    same = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=GOOD)
    assert same.reward.value.tolist() == [0.0] * 3
    one = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD)
    other = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=BAD, negative=GOOD)
    torch.testing.assert_close(one.reward.value, -other.reward.value, atol=1e-12, rtol=0)


def test_one_side_alone():
    model = causal(byte_level_tokenizer())
    both = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD)
    up = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=())
    down = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=[], negative=BAD)
    torch.testing.assert_close(up.reward.value, both.positive.mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(down.reward.value, -both.negative.mean(1), atol=1e-4, rtol=0)
    assert up.negative.shape == (3, 0)
    torch.testing.assert_close(both.reward.value, up.reward.value + down.reward.value, atol=1e-4, rtol=0)


def test_follow_ups_that_do_not_depend_on_the_response_tell_nothing():
    """A unigram model: the reward is the same for every response."""
    model = NGramLM.train(["hello world. yes it is.", "The answer is 42, no."], order=1)
    got = follow_up_likelihood(model, PROMPTS, RESPONSES, positive=GOOD, negative=BAD)
    assert (got.reward.value - got.reward.value[0]).abs().max() < 1e-12
    assert got.reward.value[0] != 0


LETTERS = "abcde"


def letters() -> PreTrainedTokenizerFast:
    """One token per letter, so that every string of letters is one string of tokens."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, **{c: i + 1 for i, c in enumerate(LETTERS)}}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_sums_differ_by_pointwise_mutual_information():
    """l(f | c, y) - log p(f | c) = log p(y | c, f) - log p(y | c), with p(f | c) by enumeration of all responses.

    The right side comes from likelihoods of response and follow-up together.
    """
    model = CausalLM(build(CAUSAL["llama"], 6), letters())
    context, follow_up = "ab", "ced"
    # Responses are two tokens long; those with <s> are no text, but have a probability.
    responses = ["".join(y) for y in product(LETTERS, repeat=2)]
    joint = score(model, [(context, y + follow_up) for y in responses]).value
    prior = score(model, [(context, y) for y in responses]).value
    rest = []
    with torch.no_grad():
        for y in product(range(6), repeat=2):
            if 0 in y:
                ids = torch.tensor([[1, 2, *y, 3, 5, 4]])
                log_p = torch.log_softmax(model.model(input_ids=ids[:, :-1]).logits[0].double(), -1)
                rest.append(log_p[1:].gather(1, ids[0, 2:, None]).sum())
    evidence = torch.logsumexp(torch.cat([joint, torch.stack(rest)]), 0)
    got = follow_up_likelihood(
        model,
        [context] * len(responses),
        responses,
        positive=[follow_up],
        negative=(),
        aggregate="sum",
        template=lambda m: m[0]["content"] + m[1]["content"],
    ).reward.value
    assert got.std() > 0.1
    torch.testing.assert_close(got - evidence, (joint - evidence) - prior, atol=1e-4, rtol=0)


def test_a_model_of_dialogues_with_feedback_ranks_responses_that_their_likelihood_does_not():
    """Wrong answers are the frequent ones, follow-ups tell which are wrong (a small form of the paper's claim)."""
    rng = random.Random(0)
    dialogues = []
    for _ in range(300):
        number = rng.randrange(5)
        right = rng.random() < 0.3
        answer = number if right else (number + 3) % 5
        said = rng.choice(["yes", "good"] if right else ["no", "bad"])
        dialogues.append(f"System: numbers\nUser: {number}\nAssistant: {answer}\nUser: {said}")
    model = NGramLM.train(dialogues, order=24)
    system = {"role": "system", "content": "numbers"}
    prompts = [[system, {"role": "user", "content": str(n)}] for n in range(5) for _ in "rw"]
    responses = [str(a) for n in range(5) for a in (n, (n + 3) % 5)]
    reward = follow_up_likelihood(model, prompts, responses, positive=["yes", "good"], negative=["no", "bad"])
    chosen, rejected = mine_pairs(reward.reward.value, torch.arange(5).repeat_interleave(2))
    assert chosen.tolist() == [0, 2, 4, 6, 8]
    assert rejected.tolist() == [1, 3, 5, 7, 9]
    contexts = [plain_template(p).removesuffix("User: ") + "Assistant: " for p in prompts]
    likelihood = score(model, list(zip(contexts, responses, strict=True))).value
    assert bool((likelihood[0::2] < likelihood[1::2]).all())


def test_default_follow_ups_are_six_balanced_categories():
    assert len(DEFAULT_FOLLOW_UPS) == 6
    phrases = [text for both in DEFAULT_FOLLOW_UPS.values() for text in both.positive + both.negative]
    assert len(phrases) == len(set(phrases)) >= 48
    assert all(len(both.positive) == len(both.negative) >= 4 for both in DEFAULT_FOLLOW_UPS.values())
    assert all(text == text.strip() for text in phrases)
    with pytest.raises(TypeError):
        DEFAULT_FOLLOW_UPS["understanding"] = None


def test_defaults_are_all_categories(tiny):
    got = follow_up_likelihood(tiny, ["What is 2 + 2?"], ["4"])
    own = follow_up_likelihood(
        tiny, ["What is 2 + 2?"], ["4"], positive=DEFAULT_FOLLOW_UPS["correctness"].positive, negative=()
    )
    assert got.positive.shape == got.negative.shape == (1, 24)
    torch.testing.assert_close(own.positive, got.positive[:, 8:12], atol=1e-4, rtol=0)
    assert float(got.reward.value) == pytest.approx(float(got.positive.mean() - got.negative.mean()), abs=1e-9)


def test_the_kind_is_that_of_a_difference():
    """Follow-ups with tokens unknown to the vocabulary have upper bounds, and a difference of those is none."""
    model = CausalLM(build(CAUSAL["llama"], 6), letters())
    model.tokenizer.unk_token = "a"

    def kind(positive, negative):
        """Of two responses: what one row is holds for all."""
        got = follow_up_likelihood(
            model,
            ["bb", "bb"],
            ["cc", "dd"],
            positive=positive,
            negative=negative,
            template=lambda m: m[0]["content"] + m[1]["content"],
        )
        return got.reward.kind

    assert kind(["bcd"], ["ecb"]) is Kind.EXACT
    assert kind(["bad"], ["ecb"]) is Kind.UPPER_BOUND
    assert kind(["bcd"], ["bad", "ecb"]) is Kind.LOWER_BOUND
    assert kind(["bad"], ["dab"]) is Kind.SURROGATE


# -------------------------------------------------------------------------------------------------------- bad input
def test_long_contexts_are_an_error_or_read_from_a_later_token_on():
    model = causal(byte_level_tokenizer())  # context 64
    long = " ".join(["hello"] * 100)
    with pytest.raises(RowError, match=r"response 1: with follow-up 'yes it is.': has \d+ tokens.*'window'"):
        follow_up_likelihood(model, ["The", long], ["yes", "yes"], positive=GOOD, negative=BAD)
    got = follow_up_likelihood(model, [long], ["yes"], positive=["wer"], negative=(), overflow="window")
    text = plain_template([{"role": "user", "content": long}, {"role": "assistant", "content": "yes"}])
    ids = model.tokenizer(text + "wer", add_special_tokens=False)["input_ids"][-65:]
    with torch.no_grad():
        log_p = torch.log_softmax(model.model(input_ids=torch.tensor([ids[:-1]])).logits[0], -1)
    count = len(by_hand(model, "so: wer", 3, bos=False))
    own = sum(float(log_p[t - 1, ids[t]]) for t in range(65 - count, 65)) / count
    assert got.positive.item() == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "responses", "options", "match"),
    [
        (["a"], ["b", "c"], {}, "got 1 and 2"),
        ([], [], {}, "got 0 and 0"),
        ("a", ["b"], {}, "not one string"),
        (["a"], "b", {}, "not one string"),
        (["a", "a"], ["b", " "], {}, "response 1: is empty"),
        ([[{"role": "user"}]], ["b"], {}, "response 0: its conversation must be messages"),
        ([["a"]], ["b"], {}, "response 0: its conversation must be messages"),
        ([[]], ["b"], {}, "must end with a turn"),
        ([[{"role": "assistant", "content": "x"}]], ["b"], {}, "must end with a turn"),
        (["a"], ["b"], {"positive": (), "negative": ()}, "no follow-ups"),
        (["a"], ["b"], {"positive": "yes"}, "positive must be several follow-ups"),
        (["a"], ["b"], {"negative": ["no", ""]}, "negative follow-up 1 must be a text"),
        (["a"], ["b"], {"aggregate": "max"}, "aggregate must be one of mean, sum"),
        (["a"], ["b"], {"overflow": "skip"}, "overflow must be one of error, window"),
        (["a"], ["b"], {"template": "chat"}, "has no chat template"),
        (["a"], ["b"], {"template": "own"}, "template must be"),
    ],
)
def test_bad_input_is_refused(prompts, responses, options, match):
    with pytest.raises((InputError, RowError), match=match):
        follow_up_likelihood(causal(byte_level_tokenizer()), prompts, responses, **options)


def test_chat_templates_that_cannot_render_are_refused():
    tokenizer = chatty()
    model = causal(tokenizer)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    talk = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(RowError, match=r"response 0: the chat template refuses its conversation \(no system\)"):
        follow_up_likelihood(model, [talk], ["z"], positive=GOOD, negative=BAD)
    with pytest.raises(InputError, match="leaves the user's last turn out"):
        follow_up_likelihood(model, ["y"], ["z"], positive=GOOD, negative=BAD)
    tokenizer.chat_template = CHAT.replace("trim", "lower")
    with pytest.raises(InputError, match="changes the follow-up 'Yes'"):
        follow_up_likelihood(model, ["y"], ["z"], positive=["yes", "Yes"], negative=())


def test_a_message_that_holds_the_marker_changes_nothing():
    model = causal(chatty())
    got = follow_up_likelihood(model, ["a follow-up-up"], ["the follow-up"], positive=GOOD, negative=())
    end = model.tokenizer.eos_token
    context = f"{end}[user]\na follow-up-up{end}[assistant]\nthe follow-up{end}[user]\n"
    torch.testing.assert_close(got.positive, expected(model, [[(context, f) for f in GOOD]]), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ pairs
def test_pairs_are_best_and_worst_of_each_prompt():
    rng = random.Random(0)
    for gap in (0.0, 0.8):
        groups = [rng.randrange(12) for _ in range(60)]
        scores = [round(rng.gauss(0, 1), 1) for _ in groups]
        chosen, rejected = mine_pairs(torch.tensor(scores), torch.tensor(groups), gap=gap)
        pairs = []
        for group in sorted(set(groups)):
            own = [i for i, g in enumerate(groups) if g == group]
            best, worst = max(scores[i] for i in own), min(scores[i] for i in own)
            if best - worst > gap + 1e-6:
                pairs.append((group, best, worst))
        got = [
            (groups[c], scores[c], scores[r])
            for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
            if groups[c] == groups[r]
        ]
        assert got == pairs
        assert len(chosen) == len(pairs)


def test_a_gap_is_exceeded_not_met_and_ties_give_no_pair():
    scores, groups = torch.tensor([0.0, 0.5, 1.0, 1.0, 3.0]), torch.tensor([7, 7, 2, 2, 5])
    assert [t.tolist() for t in mine_pairs(scores, groups)] == [[1], [0]]
    assert [t.tolist() for t in mine_pairs(scores, groups, gap=0.5)] == [[], []]
    assert [t.tolist() for t in mine_pairs(scores, groups, gap=0.49)] == [[1], [0]]
    assert [t.tolist() for t in mine_pairs(torch.empty(0), torch.empty(0, dtype=torch.long))] == [[], []]


def test_pairs_refuse_bad_scores():
    with pytest.raises(RowError, match="row 1: the score is nan"):
        mine_pairs(torch.tensor([0.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(InputError, match=r"shape \(N,\), got \(2,\) and \(1,\)"):
        mine_pairs(torch.zeros(2), torch.zeros(1).long())
    for gap in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="gap must be"):
            mine_pairs(torch.zeros(2), torch.zeros(2).long(), gap=gap)


# ------------------------------------------------------------------------------------------------------ policy values
def samples(seed=0, prompts=40):
    """Two policies on shared prompts of very different levels; three, one or two responses each, in random order."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, prompts)
    groups = np.repeat(rng.permutation(prompts) * 3, counts)
    level = np.repeat(rng.uniform(0.1, 0.8, prompts), counts)
    noise = rng.uniform(0, 0.1, (2, len(groups)))
    rows = np.stack([level, level + 0.05]) + noise
    order = rng.permutation(len(groups))
    return torch.tensor(rows[:, order]), torch.tensor(groups[order])


def per_prompt(rows, groups) -> np.ndarray:
    """(K, G) means."""
    return np.array([[row[groups == g].mean().item() for g in sorted(set(groups.tolist()))] for row in rows])


def test_value_is_the_mean_over_prompts_of_the_means_of_their_responses():
    rows, groups = samples()
    means = per_prompt(rows, groups)
    got = offline_policy_value(rows, groups)
    np.testing.assert_allclose(got.value.numpy(), means.mean(1), atol=1e-12)
    np.testing.assert_allclose(got.difference.numpy(), [0.0, means[1].mean() - means[0].mean()], atol=1e-12)
    assert got.num_groups == 40
    assert not np.isclose(means.mean(1)[0], rows[0].mean().item())  # prompts weigh alike, not responses
    one = offline_policy_value(rows[1], groups)
    assert one.value.shape == (1,)
    assert one.value[0] == got.value[1]


def test_intervals_are_those_of_scipy():
    """Percentile bootstrap over prompts, 20,000 resamples each: the ends agree to .04 of the width (about 6 sigma).

    An end of a 95 % interval has a Monte-Carlo error of .019 bootstrap standard errors, the difference of two .027, and
    the width is about 3.9 of them.
    """
    rows, groups = samples()
    means = per_prompt(rows, groups)
    got = offline_policy_value(rows, groups, resamples=20_000, level=0.95)
    cases = (
        (means[0], got.interval[0]),
        (means[1], got.interval[1]),
        (means[1] - means[0], got.difference_interval[1]),
    )
    for data, interval in cases:
        theirs = scipy.stats.bootstrap(
            (data,), np.mean, n_resamples=20_000, method="percentile", confidence_level=0.95, rng=1
        ).confidence_interval
        width = theirs.high - theirs.low
        np.testing.assert_allclose(interval.numpy(), [theirs.low, theirs.high], atol=0.04 * width)
    assert got.difference_interval[0].tolist() == [0.0, 0.0]


def test_every_prompt_is_drawn():
    """Two prompts of 0 and 1: means of 0, 1/2 and 1 with probability 1/4, 1/2 and 1/4."""
    got = offline_policy_value(torch.tensor([0.0, 1.0]), torch.tensor([4, 9]), level=0.9)
    assert got.interval.tolist() == [[0.0, 1.0]]
    assert offline_policy_value(torch.tensor([0.0, 1.0]), torch.tensor([4, 9]), level=0.2).interval.tolist() == [
        [0.5] * 2
    ]


def test_pairing_takes_out_what_prompts_have_in_common():
    rows, groups = samples()
    got = offline_policy_value(rows, groups)
    assert (got.difference_interval[1, 1] - got.difference_interval[1, 0]) < 0.2 * (
        got.interval[1, 1] - got.interval[1, 0]
    )
    assert got.difference_interval[1, 0] > 0  # a gain of .05 that the intervals of the values do not show
    assert got.interval[0, 1] > got.interval[1, 0]


def test_intervals_repeat_grow_with_the_level_and_do_not_depend_on_chunks(monkeypatch):
    rows, groups = samples()
    first, again = (offline_policy_value(rows, groups, seed=3, resamples=501) for _ in range(2))
    assert first.interval.equal(again.interval)
    assert not first.interval.equal(offline_policy_value(rows, groups, seed=4, resamples=501).interval)
    wide = offline_policy_value(rows, groups, seed=3, resamples=501, level=0.99).interval
    assert bool((wide[:, 0] < first.interval[:, 0]).all())
    assert bool((wide[:, 1] > first.interval[:, 1]).all())
    monkeypatch.setattr(intervals, "_RESAMPLED", 7 * rows.numel())
    assert offline_policy_value(rows, groups, seed=3, resamples=501).interval.equal(first.interval)


def test_corrected_predictions_of_a_known_user_give_the_true_rate():
    """Simulated users with one binary feature: the value of a policy is its exact expectation of P(love)."""
    love = torch.tensor([0.02, 0.30], dtype=torch.float64)
    share = (0.1, 0.7)  # of warm responses under the two policies
    responses = torch.tensor([[0] * round(10 * (1 - s)) + [1] * round(10 * s) for s in share])
    rows = love[responses].repeat(1, 5)
    got = offline_policy_value(rows, torch.arange(5).repeat_interleave(10))
    expected_rates = [(1 - s) * 0.02 + s * 0.30 for s in share]
    torch.testing.assert_close(got.value, torch.tensor(expected_rates, dtype=torch.float64), atol=1e-12, rtol=0)


def test_policy_values_refuse_bad_input():
    groups = torch.tensor([0, 1])
    with pytest.raises(RowError, match=r"row 1: the probability under policy 0 is 1\.5"):
        offline_policy_value(torch.tensor([0.5, 1.5]), groups)
    with pytest.raises(RowError, match="row 0: the probability under policy 1 is nan"):
        offline_policy_value(torch.tensor([[0.5, 0.5], [math.nan, 0.5]]), groups)
    with pytest.raises(InputError, match="at least two prompts, got 1"):
        offline_policy_value(torch.tensor([0.5, 0.5]), torch.zeros(2).long())
    with pytest.raises(InputError, match=r"need groups \(N,\)"):
        offline_policy_value(torch.tensor([0.5, 0.5]), torch.zeros(3).long())
    for options in ({"level": 1.0}, {"level": 0.0}, {"resamples": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            offline_policy_value(torch.tensor([0.5, 0.5]), groups, **options)
