"""Whatever is shared, packed, cached and padded: the numbers are those of one row at a time through transformers."""

from __future__ import annotations

import math
import random

import pytest
import torch
import transformers as tf

from loglik.errors import InputError
from loglik.models import head
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.seq2seq import Seq2SeqLM
from loglik.scoring import batches, execute
from loglik.scoring.batches import BatchPlan
from loglik.scoring.budget import Budget, cache_bytes_per_token
from loglik.scoring.execute import NOTHING, Executor
from loglik.scoring.plan import Plan
from loglik.scoring.windows import Window
from zoo import CAUSAL, IDS, MASKED, MORE_CAUSAL, ROTARY, SEQ2SEQ, build

VOCABULARY = 50
NATS = 1e-4
SUBSET = torch.arange(VOCABULARY) % 3 == 0
EVERY = {**CAUSAL, **MORE_CAUSAL}
# Every path that an architecture can take.
PATHS = {
    "llama": ("packed", "cached", "padded"),
    "gpt2": ("packed", "cached", "padded"),
    "mistral": ("packed", "cached", "padded"),
    "gemma2": ("packed",),
    "gemma3": ("packed", "cached"),
    "opt": ("packed",),
    "granite": ("packed",),
    "qwen3_moe": ("packed",),
    "bloom": ("cached",),
    "gptj": ("cached",),
    "phimoe": ("cached",),
    "llama4": ("cached",),
    "lfm2": ("padded",),
    "mamba": ("padded",),
}


def window(ids, scored_from=1, scored_to=None, probes=(), branches=()):
    to = len(ids) if scored_to is None else scored_to
    return Window(ids, scored_from, scored_from, to, [-1] * len(ids), scored_from, 0, tuple(probes), tuple(branches))


def random_windows(seed: int, *, extras: bool = True) -> list[Window]:
    """Prompts with completions, prompts of prompts, BOS alone before a text, equal rows, parts of rows; any order."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    prompts = [[1], [1, *tokens(18, 22)], tokens(3, 6), [1, *tokens(1, 3)]]
    prompts.append(prompts[1] + tokens(3, 10))
    found = []
    for prompt in prompts:
        shared = tokens(1, 4)
        for _ in range(2):
            ids = prompt + (shared if rng.random() < 0.5 else []) + tokens(1, 9)
            found.append(window(ids, len(prompt)))
    long = found[-1].ids
    found += [window(long, 1, 5), window(long, 3, 12), window(long[:9], 2), window(long, 4, 4), window([7], 1)]
    found += rng.choices(found, k=4)
    if extras:
        found += [
            window(long, len(long) - 2, probes=(3, len(long) - 1)),
            window(long[:12], 12, probes=(0, 11, 5)),
            window(long[:8], 8, branches=(4, 9, 4)),
            window([*long[:10], 5], 10, branches=(8,), probes=(10,)),
        ]
    rng.shuffle(found)
    return found


@torch.no_grad()
def reference(model, w: Window):
    """Terms, choices, masses and branches of one row in one pass."""
    if not w.inputs:
        return [], [], [], []
    logits = model(input_ids=torch.tensor([w.inputs]), use_cache=False).logits[0].float()
    log_probs = torch.log_softmax(logits, -1)
    scored = range(w.scored_from, w.scored_to)
    return (
        [float(log_probs[t - 1, w.ids[t]]) for t in scored],
        [bool(logits[t - 1, w.ids[t]] == logits[t - 1].max()) for t in scored],
        [float(log_probs[p, SUBSET].logsumexp(0)) for p in w.probes],
        [float(log_probs[-1, token]) for token in w.branches],
    )


def assert_like_reference(got, want):
    assert len(got) == len(want)
    for scores, (terms, greedy, masses, branches) in zip(got, want, strict=True):
        assert scores.terms == pytest.approx(terms, abs=NATS)
        assert scores.greedy == greedy
        assert scores.masses == pytest.approx(masses, abs=NATS)
        assert scores.branches == pytest.approx(branches, abs=NATS)


@pytest.fixture
def short_beginnings(monkeypatch):
    """Cached passes keep beginnings of two tokens already."""
    monkeypatch.setattr(batches, "MIN_SHARED", 2)


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in PATHS.items() for path in paths])
def test_equals_one_row_at_a_time(name, path, short_beginnings, monkeypatch):
    """Budgets from one token up, with and without room for a cache, and few hidden states per head pass."""
    raw = build(EVERY[name], VOCABULARY, gain=4.0 if name == "mamba" else 10.0)
    model = CausalLM(raw)
    per_token = cache_bytes_per_token(model) or 1
    monkeypatch.setattr(head, "_CPU_TILE", (5, 16))  # rows of several blocks, tokens of several tiles
    settings = [(15, 1000, 7), (60, 12, 1024), (5000, 1000, 1)]
    for seed, (tokens, cached, head_rows) in enumerate(settings if name in ("llama", "gpt2") else settings[:2]):
        monkeypatch.setattr(execute, "HEAD_ROWS", head_rows)
        windows = random_windows(seed)
        want = [reference(raw, w) for w in windows]
        flat = [term for terms, *_ in want for term in terms]
        assert max(flat) - min(flat) > 1
        executor = Executor(model, path=path, budget=Budget(tokens, cached * per_token))
        assert executor.report is not None
        assert executor.report.path == path
        assert_like_reference(executor.run(windows, subset=SUBSET), want)


def test_choices_are_the_models_own():
    """Greedy continuations are marked greedy, token by token, and a changed token is not."""
    raw = build(EVERY["llama"], VOCABULARY, gain=10.0)
    rows = []
    for start in range(3, 9):
        row = [start]
        with torch.no_grad():
            for _ in range(5):
                row.append(int(raw(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        rows += [row, [*row[:3], (row[3] + 1) % VOCABULARY, *row[4:]]]
    got = Executor(CausalLM(raw), budget=Budget(20)).run([window(row) for row in rows])
    for i in range(0, len(rows), 2):
        assert got[i].greedy == [True] * 5
        assert got[i + 1].greedy[:3] == [True, True, False]


@pytest.mark.parametrize("path", ["packed", "cached", "padded"])
def test_a_value_does_not_depend_on_the_other_rows(path, short_beginnings):
    model = CausalLM(build(EVERY["gemma3"], VOCABULARY, gain=10.0))
    windows = random_windows(5, extras=False)
    executor = Executor(model, path=path, budget=Budget(40))
    together = executor.run(windows)
    for w, scores in zip(windows, together, strict=True):
        alone = executor.run([w])[0]
        assert scores.terms == pytest.approx(alone.terms, abs=NATS)


def test_shared_beginnings_are_computed_once():
    """The plan of packed and cached passes holds the distinct tokens."""
    model = CausalLM(build(EVERY["llama"], VOCABULARY))
    prompt = list(range(3, 33))
    windows = [window([*prompt, i, 7], 30) for i in range(3, 13)]
    packed = Executor(model, path="packed").plan(windows)
    cached = Executor(model, path="cached").plan(windows)
    padded = Executor(model, path="padded").plan(windows)
    assert isinstance(packed, Plan)
    assert isinstance(cached, BatchPlan)
    assert (packed.computed, cached.computed, padded.computed) == (40, 40, 310)


def test_budgets_reach_the_plan():
    model = CausalLM(build(EVERY["llama"], VOCABULARY))
    windows = random_windows(1)
    for tokens in (3, 17, 64):
        plan = Executor(model, budget=Budget(tokens)).plan(windows)
        assert max(pack.size for pack in plan.packs) <= tokens
        assert max(pack.size for pack in plan.packs) > tokens - 10
    per_token = cache_bytes_per_token(model)
    assert per_token is not None
    small = Executor(model, budget=Budget(5, 10 * per_token)).plan(windows)
    assert isinstance(small, Plan)
    assert small.alone
    assert max(pack.prefix + pack.keep for pack in small.packs) <= 10


def test_longrope_rows_do_not_mix_across_the_limit():
    """No batch holds rows on both sides of 8 tokens, and each row's numbers are its own."""
    raw = build(EVERY["phi3_longrope"], VOCABULARY, gain=10.0)
    executor = Executor(CausalLM(raw))
    rng = random.Random(0)
    windows = [window([rng.randrange(3, VOCABULARY) for _ in range(n)]) for n in (4, 8, 9, 10, 16, 30, 9, 10)]
    plan = executor.plan(windows)
    assert isinstance(plan, BatchPlan)
    for batch in plan.packs:
        assert len({end > 8 for _, _, end in batch.rows}) == 1
    assert len(plan.packs) == 2
    assert_like_reference(executor.run(windows), [reference(raw, w) for w in windows])


def test_longrope_row_that_is_the_beginning_of_a_longer_one():
    """Six tokens that another row continues beyond the limit: other frequencies, so a pass of their own."""
    raw = build(EVERY["phi3_longrope"], VOCABULARY, gain=10.0)
    long = [9, 4, 33, 21, 8, 17, 40, 5, 6, 30, 31, 11]
    windows = [window(long[:6]), window(long)]
    assert_like_reference(Executor(CausalLM(raw)).run(windows), [reference(raw, w) for w in windows])


def test_scored_ranges_may_overlap():
    raw = build(EVERY["gpt2"], VOCABULARY, gain=10.0)
    ids = [5, 9, 4, 33, 21, 8, 17, 40]
    windows = [window(ids, a, b) for a in range(1, 9, 2) for b in range(a, 9)]
    for tokens in (3, 100):
        got = Executor(CausalLM(raw), budget=Budget(tokens)).run(windows)
        assert_like_reference(got, [reference(raw, w) for w in windows])


def test_progress_adds_up():
    """Each scored token is reported once, whatever the path; a total, where one is given, is their sum."""
    causal = CausalLM(build(EVERY["gpt2"], VOCABULARY))
    masked = MaskedLM(build(MASKED["bert"], VOCABULARY), mask_token_id=4)
    windows = random_windows(2, extras=False)
    scored = sum(w.scored_to - w.scored_from for w in windows)
    for model, budget in ((causal, 8), (causal, 1000), (masked, 30)):
        calls: list[tuple[int, ...]] = []
        Executor(model, budget=Budget(budget)).run(windows, advance=lambda *call, calls=calls: calls.append(call))
        assert sum(call[0] for call in calls) == scored
        assert {call[1] for call in calls if len(call) > 1} <= {scored}


def test_progress_with_probes_reaches_its_total():
    windows = [window([5, 6, 7, 8], 1, probes=(0, 2)), window([5, 9], 1, branches=(3, 4))]
    calls: list[tuple[int, ...]] = []
    Executor(CausalLM(build(EVERY["gpt2"], VOCABULARY))).run(
        windows, subset=SUBSET, advance=lambda *call: calls.append(call)
    )
    done = sum(call[0] for call in calls)
    assert {call[1] for call in calls if len(call) > 1} <= {done}


def test_no_windows():
    for model in (CausalLM(build(EVERY["gpt2"])), MaskedLM(build(MASKED["bert"]), mask_token_id=4)):
        calls: list[tuple[int, ...]] = []
        assert Executor(model).run([], advance=lambda *call, calls=calls: calls.append(call)) == []
        assert calls == []


def test_windows_without_anything_to_score():
    scores = Executor(CausalLM(build(EVERY["gpt2"]))).run([window([5, 6], 2), window([5], 1)])
    assert [(s.terms, s.greedy, s.masses, s.branches) for s in scores] == [([], [], [], [])] * 2


@pytest.mark.parametrize(("first", "ids"), [(0, [5, 6, 7]), (0, [])])
def test_a_first_token_cannot_be_scored(first, ids):
    executor = Executor(CausalLM(build(EVERY["gpt2"])))
    with pytest.raises(ValueError, match="row 1: the first token cannot be scored"):
        executor.run([window([5, 6]), window(ids, first)])


@pytest.mark.parametrize("path", ["packed", "cached", "padded"])
@pytest.mark.parametrize("change", ["drop", "repeat"])
def test_rows_that_get_lost_are_never_a_number(path, change, monkeypatch):
    """A pass that returns one hidden state too few or too many stops the run."""
    name = "_PackRunner" if path == "packed" else "_BatchRunner"
    run = getattr(execute, name).run

    def broken(self, part, columns):
        hidden = run(self, part, columns)
        return hidden[:-1] if change == "drop" else torch.cat([hidden, hidden[-1:]])

    monkeypatch.setattr(getattr(execute, name), "run", broken)
    with pytest.raises(AssertionError, match="hidden states, the plan has"):
        Executor(CausalLM(build(EVERY["gpt2"])), path=path).run([window([5, 6, 7]), window([5, 8])])


@pytest.mark.parametrize("times", [0, 2])
def test_answers_that_are_computed_never_or_twice_are_no_numbers(times, monkeypatch):
    columns = Plan.columns

    def broken(self, sequence, begin, end):
        found = list(columns(self, sequence, begin, end))
        return found if sequence != 1 else found * times

    monkeypatch.setattr(Plan, "columns", broken)
    with pytest.raises(AssertionError, match="2 of 4 answers were not computed exactly once"):
        Executor(CausalLM(build(EVERY["gpt2"]))).run([window([5, 6, 7]), window([5, 8, 9])])


def test_a_path_that_is_shorter_than_the_plan_says_stops_the_run():
    model = CausalLM(build(EVERY["gpt2"]))
    executor = Executor(model, budget=Budget(3))
    assert model.trunk is not None
    plan = executor.plan([window([5, 6, 7, 8, 9, 10]), window([5, 6, 7, 8, 11, 10])])
    assert any(0 < pack.keep < pack.size for pack in plan.packs)
    assert isinstance(plan, Plan)
    runner = execute._PackRunner(model.trunk, plan)
    with torch.inference_mode(), pytest.raises(AssertionError, match="the path holds 0 tokens, the plan needs 3"):
        runner.run(plan.packs[1], NOTHING)
    with torch.inference_mode():
        for pack in plan.packs:
            runner.run(pack, NOTHING)
            assert runner.path.length == pack.prefix + pack.keep


def test_probes_without_a_subset_are_an_error():
    with pytest.raises(AssertionError, match="1 of 3 answers were not computed"):
        Executor(CausalLM(build(EVERY["gpt2"]))).run([window([5, 6, 7], 1, probes=(1,))])


@pytest.mark.parametrize("budget", [1, 24, 1000])
@pytest.mark.parametrize("name", ["t5", "bart", "bert", "ngram"])
def test_other_models_run_directly(name, budget):
    """Order, parts of rows and duplicates as for causal models; each row as it is alone."""
    if name == "ngram":
        model = NGramLM.train(["hello there", "the answer"], order=3)
    elif name == "bert":
        model = MaskedLM(build(MASKED[name], VOCABULARY, gain=10.0), mask_token_id=4)
    else:
        model = Seq2SeqLM(build(SEQ2SEQ[name], VOCABULARY, gain=10.0))
    rng = random.Random(3)
    windows = []
    for _ in range(12):
        ids = [rng.randrange(5, VOCABULARY) for _ in range(rng.randint(4, 14))]
        start = rng.randint(2, len(ids) - 1)
        windows.append(window(ids, start, rng.randint(start, len(ids))))
    windows += [windows[0], windows[3]]
    executor = Executor(model, budget=Budget(budget))
    assert executor.report is None
    assert executor.describe() == "padded batches of whole rows"
    got = executor.run(windows)
    for w, scores in zip(windows, got, strict=True):
        x = TokenBatch.from_lists([w.ids], starts=[w.start], scored_from=[w.scored_from])
        with torch.no_grad():
            likelihood, greedy = model.score_tokens(x)
        scored = slice(w.scored_from, w.scored_to)
        assert likelihood.per_unit is not None
        assert scores.terms == pytest.approx(likelihood.per_unit[0, scored].tolist(), abs=NATS)
        assert scores.greedy == greedy[0, scored].tolist()
        assert (scores.masses, scores.branches) == ([], [])


def test_nothing_but_the_scored_tokens_is_asked_for(monkeypatch):
    """A masked model runs once per scored token: what stands behind a window's range costs nothing."""
    model = MaskedLM(build(MASKED["bert"], VOCABULARY), mask_token_id=4)
    asked = []
    score_tokens = model.score_tokens

    def counted(x):
        asked.append(x.scored_mask.sum(1).tolist())
        return score_tokens(x)

    monkeypatch.setattr(model, "score_tokens", counted)
    Executor(model).run([window([5, 6, 7, 8, 9], 1, 3), window([5, 6, 7, 8], 2, 4), window([9, 8, 7], 1, 1)])
    assert sorted(count for batch in asked for count in batch) == [0, 2, 2]


def test_refusals():
    masked = MaskedLM(build(MASKED["bert"]), mask_token_id=4)
    for path in ("packed", "cached"):
        with pytest.raises(InputError, match=f"{path} passes need a causal model of transformers"):
            Executor(masked, path=path)
    executor = Executor(masked, path="padded")
    with pytest.raises(InputError, match="other models share no prefixes"):
        executor.plan([window([5, 6])])
    for extra in ({"probes": (0,)}, {"branches": (3,)}):
        with pytest.raises(InputError, match="need a causal model of transformers"):
            executor.run([window([5, 6], **extra)])
    with pytest.raises(InputError, match=r"cannot run packed passes: .* leave the path at auto"):
        Executor(CausalLM(build(EVERY["bloom"])), path="packed")


def test_what_runs_is_described():
    assert Executor(CausalLM(build(EVERY["gpt2"]))).describe().startswith("packed")
    assert "not packed: " in Executor(CausalLM(build(EVERY["bloom"]))).describe()


def test_bytes_of_keys_and_values():
    """Two matrices per layer, per key head, of the head's width, in the model's dtype: what a cache really takes."""
    for name in ("llama", "gpt2", "gemma3", "opt"):
        raw = build(EVERY[name], VOCABULARY)
        with torch.no_grad():
            cache = raw(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert cache_bytes_per_token(CausalLM(raw)) == held // 3
        half = cache_bytes_per_token(CausalLM(raw.to(torch.bfloat16)))
        assert half == held // 6


def test_budgets():
    model = CausalLM(build(EVERY["llama"], VOCABULARY))
    per_token = cache_bytes_per_token(model)
    assert per_token is not None
    resolved = Budget(7, 10 * per_token + 1).resolved(model)
    assert (resolved.pack_tokens, resolved.cache_tokens) == (7, 10)
    default = Budget().resolved(model)
    assert default.pack_tokens >= 256
    assert default.cache_tokens is not None
    assert default.cache_tokens > 0
    ngram = NGramLM.train(["hello"], order=2)
    assert cache_bytes_per_token(ngram) is None
    assert Budget(7, 100).resolved(ngram).cache_tokens is None
    for field in ("max_batch_tokens", "max_cache_bytes"):
        with pytest.raises(InputError, match=f"{field} must be at least 1, got 0"):
            Budget(**{field: 0})


def test_half_precision_terms_are_float32_and_never_above_zero():
    raw = build(EVERY["llama"], VOCABULARY, gain=10.0).to(torch.bfloat16)
    windows = random_windows(4, extras=False)[:8]
    got = Executor(CausalLM(raw), path="padded", budget=Budget(1)).run(windows)
    for w, scores in zip(windows, got, strict=True):
        if not scores.terms:
            continue
        with torch.no_grad():
            logits = raw(input_ids=torch.tensor([w.ids[:-1]]), use_cache=False).logits[0].double()
        log_probs = torch.log_softmax(logits, -1)
        want = [float(log_probs[t - 1, w.ids[t]]) for t in range(w.scored_from, w.scored_to)]
        assert scores.terms == pytest.approx(want, abs=2e-2)
        assert max(scores.terms) <= 0
        assert all(math.isfinite(term) for term in scores.terms)


def test_dropout_has_no_say():
    """A model that is being trained is scored without its dropout, and left in training."""
    raw = build(EVERY["gpt2"], VOCABULARY, gain=10.0)
    windows = [window([5, 6, 7, 8, 9])]
    want = [reference(raw, w) for w in windows]
    raw.train()
    assert raw.config.resid_pdrop > 0
    got = Executor(CausalLM(raw)).run(windows)
    assert raw.training
    assert_like_reference(got, want)


def test_token_outside_the_vocabulary_is_never_a_number():
    """A tokenizer may know more tokens than the model; 1,024 is a multiple of the head's tiles."""
    executor = Executor(CausalLM(build(EVERY["llama"], 1024)))
    with pytest.raises((ValueError, IndexError)):
        executor.run([window([5, 6, 1024])])


@pytest.mark.skipif(not hasattr(tf, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
def test_heads_whose_width_varies_by_layer():
    raw = build(
        lambda v: tf.Gemma4ForCausalLM(
            tf.Gemma4TextConfig(
                vocab_size=v,
                **{**ROTARY, "num_hidden_layers": 6},
                sliding_window=12,
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
                **IDS,
            )
        ),
        VOCABULARY,
    )
    windows = random_windows(6)
    got = Executor(CausalLM(raw), budget=Budget(50)).run(windows, subset=SUBSET)
    assert_like_reference(got, [reference(raw, w) for w in windows])
