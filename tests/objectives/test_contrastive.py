"""InfoNCE and CLAPS against torch's cross-entropy, loops and limits; who gets a gradient and who does not."""

from __future__ import annotations

import math

import pytest
import torch

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.dense import encoder_decoder_states, output_head
from loglik.models.seq2seq import Seq2SeqLM
from loglik.objectives import MaximumLikelihood
from loglik.objectives.contrastive import Claps, claps, info_nce
from loglik.objectives.perturbations import kl_preserving_perturbation, likelihood_adversarial
from zoo import CAUSAL, SEQ2SEQ, build


def vectors(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


# ------------------------------------------------------------------ InfoNCE
@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_info_nce_is_cross_entropy_of_the_similarities(negatives):
    queries, keys, extra = vectors(0, 4, 5), vectors(1, 4, 5), vectors(2, 4, negatives, 5)
    matrix = cosine(queries[:, None], torch.cat([keys.expand(4, 4, 5), extra], dim=1)) / 0.2
    want = torch.nn.functional.cross_entropy(matrix, torch.arange(4), reduction="none")
    given = None if negatives == 0 else extra if negatives > 1 else extra[:, 0]
    torch.testing.assert_close(info_nce(queries, keys, tau=0.2, extra_negatives=given), want)
    products = (queries[:, None] * torch.cat([keys.expand(4, 4, 5), extra], dim=1)).sum(-1) / 0.2
    want = torch.nn.functional.cross_entropy(products, torch.arange(4), reduction="none")
    torch.testing.assert_close(info_nce(queries, keys, tau=0.2, extra_negatives=given, cosine=False), want)


def test_positives_take_the_place_of_the_own_key():
    queries, keys, positives = vectors(0, 4, 5), vectors(1, 4, 5), vectors(2, 4, 5)
    matrix = cosine(queries[:, None], keys)
    matrix[torch.arange(4), torch.arange(4)] = cosine(queries, positives)
    want = torch.nn.functional.cross_entropy(matrix / 0.1, torch.arange(4), reduction="none")
    torch.testing.assert_close(info_nce(queries, keys, positives=positives), want)


def test_keys_of_the_same_thing_are_no_negatives():
    queries, keys = vectors(0, 3, 5), vectors(1, 3, 5)
    same = torch.eye(3, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    got = info_nce(queries, keys, same=same)
    torch.testing.assert_close(got[1], info_nce(queries, keys)[1])
    torch.testing.assert_close(got[0], info_nce(queries[:2], keys[:2])[0])
    every = torch.ones(3, 3, dtype=torch.bool)
    torch.testing.assert_close(info_nce(queries, keys, same=every), torch.zeros(3, dtype=torch.float64))


def test_one_query_and_one_negative_is_softplus():
    query, key, negative = vectors(0, 1, 5), vectors(1, 1, 5), vectors(2, 1, 5)
    want = torch.nn.functional.softplus((cosine(query, negative) - cosine(query, key)) / 0.1)
    torch.testing.assert_close(info_nce(query, key, extra_negatives=negative), want)
    assert info_nce(query, key).item() == 0


def test_vectors_of_zeros_are_at_a_right_angle_and_keep_gradients_finite():
    queries = torch.zeros(3, 5, requires_grad=True)
    keys = vectors(1, 3, 5, dtype=torch.float32).requires_grad_()
    loss = info_nce(queries, keys)
    torch.testing.assert_close(loss, torch.full((3,), math.log(3)))
    loss.sum().backward()
    assert queries.grad.abs().max() < 100
    assert keys.grad.isfinite().all()
    tiny = torch.full((3, 5), 1e-30, requires_grad=True)
    info_nce(tiny, keys).sum().backward()
    assert tiny.grad.isfinite().all()


def test_info_nce_gradients_by_finite_differences_and_extremes():
    inputs = [vectors(i, 3, 4).requires_grad_() for i in range(4)]

    def function(q, k, p, n):
        return info_nce(q, k, tau=0.5, positives=p, extra_negatives=n)

    assert torch.autograd.gradcheck(function, inputs)
    far = info_nce(1e4 * inputs[0], inputs[1], tau=1e-3, cosine=False)
    assert far.isfinite().all()
    assert info_nce(inputs[0].bfloat16(), inputs[1].bfloat16()).dtype == torch.float32


def test_info_nce_refusals():
    queries, keys = vectors(0, 3, 5), vectors(1, 3, 5)
    with pytest.raises(InputError, match="tau must be positive"):
        info_nce(queries, keys, tau=0.0)
    with pytest.raises(InputError, match=r"needs queries \(B, D\), at least one"):
        info_nce(queries[:0], keys[:0])
    with pytest.raises(InputError, match=r"needs keys of shape \(3, 5\), got \(2, 5\)"):
        info_nce(queries, keys[:2])
    with pytest.raises(InputError, match="needs positives of shape"):
        info_nce(queries, keys, positives=keys[:2])
    with pytest.raises(InputError, match="needs extra_negatives"):
        info_nce(queries, keys, extra_negatives=keys[:2])
    with pytest.raises(InputError, match="needs same of shape"):
        info_nce(queries, keys, same=torch.eye(3))


# ------------------------------------------------------------------ CLAPS on tensors
WIDTH, VOCABULARY = 6, 9
OPTIONS = {"eps_neg": 0.4, "eps_pos": 0.7, "tau": 0.3}


class Problem:
    """Random states of B pairs, a linear head and a projection, in float64."""

    def __init__(self, rows=4, dtype=torch.float64):
        generator = torch.Generator().manual_seed(rows)
        self.encoder = vectors(1, rows, 5, WIDTH, dtype=dtype).requires_grad_()
        self.decoder = vectors(2, rows, 6, WIDTH, dtype=dtype).requires_grad_()
        self.weight = vectors(3, VOCABULARY, WIDTH, dtype=dtype).requires_grad_()
        self.matrix = vectors(4, 7, WIDTH, dtype=dtype).requires_grad_()
        self.labels = torch.randint(VOCABULARY, (rows, 6), generator=generator)
        self.source_mask = torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=generator)
        self.target_mask = torch.arange(6) < torch.randint(1, 7, (rows, 1), generator=generator)

    def head(self, hidden):
        return hidden @ self.weight.T

    def project(self, states):
        return torch.relu(states @ self.matrix.T)

    def terms(self, **options):
        masks = {"source_mask": self.source_mask, "target_mask": self.target_mask}
        return claps(
            self.encoder, self.decoder, self.head, self.labels, self.project, **masks, **{**OPTIONS, **options}
        )

    def pooled(self, states, mask):
        return torch.stack([self.project(states[b, mask[b]]).mean(0) for b in range(len(states))])


def by_hand(p, *, eps_neg, eps_pos, tau, tau_positive):
    """The whole loss from the sheet's formulas, by closed forms and torch's own functions."""
    mask, labels = p.target_mask, p.labels
    nll = torch.nn.functional.cross_entropy(p.head(p.decoder)[mask], labels[mask])
    with torch.no_grad():
        h, w = p.decoder.detach(), p.weight.detach()
        g = ((h @ w.T).softmax(-1) - torch.nn.functional.one_hot(labels, VOCABULARY)) @ w
        imposter = h + eps_neg * g / g.norm(dim=-1, keepdim=True)
    leaf = h.clone().requires_grad_()
    z_x = p.pooled(p.encoder.detach(), p.source_mask)
    plain = cosine(z_x[:, None], p.pooled(leaf, mask)) / tau
    loss = torch.nn.functional.cross_entropy(plain, torch.arange(len(h)))
    (f,) = torch.autograd.grad(loss, leaf)
    with torch.no_grad():
        norm = f.norm(dim=-1, keepdim=True)
        away = h + eps_pos * f / norm.clamp_min(1e-300)
        k = ((away @ w.T).softmax(-1) - (h @ w.T).softmax(-1)) @ w
        distant = away - eps_pos * k / k.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    z_x, z_y = p.pooled(p.encoder, p.source_mask), p.pooled(p.decoder, mask)
    s_neg, s_pos = (cosine(z_x, p.pooled(states, mask)) for states in (imposter, distant))
    matrix = cosine(z_x[:, None], z_y)
    own = torch.arange(len(h))
    l_neg = torch.nn.functional.cross_entropy(torch.cat([matrix, s_neg[:, None]], 1) / tau, own)
    replaced = torch.where(torch.eye(len(h), dtype=torch.bool), s_pos[:, None], matrix)
    l_pos = torch.nn.functional.cross_entropy(replaced / tau_positive, own)
    return nll + 0.5 * (l_neg + l_pos), matrix.diagonal(), s_neg, s_pos


@pytest.mark.parametrize("temperature_on_positive", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_loss_and_gradients_by_hand(relative, temperature_on_positive):
    p = Problem()
    unit = p.decoder.detach()[p.target_mask].norm(dim=-1).mean().item() if relative else 1.0
    tau = OPTIONS["tau"]
    want, own, s_neg, s_pos = by_hand(
        p, eps_neg=0.4 * unit, eps_pos=0.7 * unit, tau=tau, tau_positive=tau if temperature_on_positive else 1.0
    )
    terms = p.terms(relative=relative, temperature_on_positive=temperature_on_positive)
    got = terms.mean()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    for name, value in (("", own), ("_negative", s_neg), ("_positive", s_pos)):
        torch.testing.assert_close(terms.metrics[f"similarity{name}"], value.detach(), atol=1e-6, rtol=1e-6)
    leaves = [p.encoder, p.decoder, p.weight, p.matrix]
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_small_steps_duplicate_the_positive():
    """eps to 0: both moved states are the target's own, and the hard negative is the positive once more."""
    p = Problem()
    terms = p.terms(eps_neg=1e-9, eps_pos=1e-9)
    own = terms.metrics["similarity"]
    torch.testing.assert_close(terms.metrics["similarity_negative"], own, atol=1e-8, rtol=0)
    torch.testing.assert_close(terms.metrics["similarity_positive"], own, atol=1e-8, rtol=0)
    z_x, z_y = p.pooled(p.encoder, p.source_mask), p.pooled(p.decoder, p.target_mask)
    duplicated = info_nce(z_x, z_y, tau=0.3, extra_negatives=z_y).detach()
    torch.testing.assert_close(terms.metrics["contrast_negative"], duplicated, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        terms.metrics["contrast_positive"], info_nce(z_x, z_y, tau=0.3).detach(), atol=1e-7, rtol=0
    )


def test_one_pair():
    """B = 1: softplus of the gap to the hard negative; no other key, so the positive does not move."""
    p = Problem(rows=1)
    terms = p.terms()
    gap = terms.metrics["similarity_negative"] - terms.metrics["similarity"]
    torch.testing.assert_close(terms.metrics["contrast_negative"], torch.nn.functional.softplus(gap / 0.3))
    torch.testing.assert_close(terms.metrics["similarity_positive"], terms.metrics["similarity"])
    assert terms.metrics["contrast_positive"].item() == 0


def test_the_distant_target_is_a_harder_positive_and_keeps_the_prediction():
    p = Problem(rows=8)
    terms = p.terms(eps_pos=0.2)
    assert (terms.metrics["similarity_positive"] < terms.metrics["similarity"]).double().mean() > 0.5
    assert (
        terms.metrics["contrast_positive"].mean()
        > info_nce(p.pooled(p.encoder, p.source_mask), p.pooled(p.decoder, p.target_mask), tau=0.3).mean()
    )


def test_moved_states_carry_gradients_to_the_projection_only():
    """With the plain similarities cut off, nothing is left for decoder and head, and something for the projection."""
    p = Problem(rows=1)
    contrast = p.terms().also[0].loss.sum()
    z_x = p.pooled(p.encoder, p.source_mask)
    imposter = likelihood_adversarial(p.decoder, p.head, p.labels, p.target_mask, eps=0.4)
    distant = kl_preserving_perturbation(p.decoder, imposter, p.head, p.target_mask, eps=0.7)
    for states in (imposter, distant):
        similarity = cosine(z_x, p.pooled(states, p.target_mask)).sum()
        found = torch.autograd.grad(
            similarity, [p.decoder, p.weight, p.matrix, p.encoder], retain_graph=True, allow_unused=True
        )
        assert found[0] is None
        assert found[1] is None
        assert found[2].abs().sum() > 0
        assert found[3].abs().sum() > 0
    # The head gets nothing from the contrast at all; the likelihood is another mean.
    (head,) = torch.autograd.grad(contrast, [p.weight], allow_unused=True)
    assert head is None


def test_gradients_that_were_there_stay():
    p = Problem()
    for leaf in (p.encoder, p.decoder, p.weight, p.matrix):
        leaf.grad = torch.full_like(leaf, 7.0)
    terms = p.terms()
    assert all((leaf.grad == 7.0).all() for leaf in (p.encoder, p.decoder, p.weight, p.matrix))
    assert not any(value.requires_grad for value in terms.metrics.values())
    assert not any(part.weight.requires_grad for part in terms.parts())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_same_numbers(context):
    p = Problem()
    want = p.terms().mean().detach()
    with context():
        p.encoder, p.decoder = p.encoder * 1, p.decoder * 1
        torch.testing.assert_close(p.terms().mean(), want)


def test_padding_changes_nothing():
    p = Problem()
    want = p.terms()
    p.encoder = torch.cat([p.encoder, torch.full((4, 2, WIDTH), 1e3, dtype=torch.float64)], dim=1)
    p.source_mask = torch.cat([p.source_mask, torch.zeros(4, 2, dtype=torch.bool)], dim=1)
    p.decoder = torch.cat([torch.full((4, 3, WIDTH), 1e3, dtype=torch.float64), p.decoder], dim=1)
    p.target_mask = torch.cat([torch.zeros(4, 3, dtype=torch.bool), p.target_mask], dim=1)
    p.labels = torch.cat([torch.full((4, 3), -100), p.labels], dim=1)
    got = p.terms()
    torch.testing.assert_close(got.mean(), want.mean())
    for name, value in want.metrics.items():
        torch.testing.assert_close(got.metrics[name], value)


def test_rows_of_one_source_are_no_negatives_and_the_weight_scales_the_contrast():
    p = Problem()
    every = p.terms(same_source=torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(every.metrics["contrast_positive"], torch.zeros(4, dtype=torch.float64))
    # Nothing to move away from.
    torch.testing.assert_close(every.metrics["similarity_positive"], every.metrics["similarity"])
    plain, double = p.terms(), p.terms(contrast_weight=2.0)
    torch.testing.assert_close(double.also[0].loss, 2 * plain.also[0].loss)
    torch.testing.assert_close(double.loss, plain.loss)


def test_claps_refusals():
    p = Problem()
    for options in ({"tau": 0.0}, {"eps_neg": 0.0}, {"eps_pos": -1.0}, {"contrast_weight": math.nan}):
        with pytest.raises(InputError, match=f"CLAPS: {next(iter(options))} must be positive"):
            p.terms(**options)
    p.target_mask[2] = False
    with pytest.raises(InputError, match="row 2 has no target token"):
        p.terms()
    p.source_mask[1] = False
    with pytest.raises(InputError, match="row 1 has no source token"):
        p.terms()
    p.source_mask = p.source_mask[:, 1:]
    with pytest.raises(InputError, match="needs source states"):
        p.terms()


# ------------------------------------------------------------------ CLAPS on a model
ROWS = [[5, 9, 4, 12, 17, 3], [6, 11, 19, 4, 8], [7, 3, 13, 14], [5, 9, 8, 2]]
STARTS = [3, 2, 1, 2]


def batch(side="right"):
    return TokenBatch.from_lists(ROWS, starts=STARTS, padding_side=side, pad_id=9)


def objective(**options):
    torch.manual_seed(3)
    return Claps(16, **options)


@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_training_form_is_the_tensor_form_on_the_models_states(name):
    model = Seq2SeqLM(build(SEQ2SEQ[name], 20, gain=2.0))
    trained = objective(eps_neg=0.2, eps_pos=0.5, tau=0.2)
    x = batch()
    terms = trained(model, x)
    both = encoder_decoder_states(model, x)
    want = claps(
        both.encoder,
        both.decoder,
        output_head(model),
        x.ids,
        trained.project,
        source_mask=both.source_mask,
        target_mask=x.scored_mask,
        eps_neg=0.2,
        eps_pos=0.5,
        tau=0.2,
    )
    torch.testing.assert_close(terms.mean(), want.mean())
    mle = MaximumLikelihood()(model.log_prob(x))
    torch.testing.assert_close(terms.loss, mle.loss, atol=1e-4, rtol=1e-5)
    assert terms.weight.tolist() == mle.weight.tolist()
    terms.mean().backward()
    assert trained.linear.weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.model.parameters())


def test_only_scored_targets_are_pooled_and_trained_on():
    model, trained = Seq2SeqLM(build(SEQ2SEQ["t5"], 20)), objective(relative=False)
    x = batch()
    ends = x.attention_mask.sum(1, keepdim=True) - 1
    partly = TokenBatch(x.ids, x.attention_mask, x.scored_mask & (torch.arange(6) < ends), x.starts)
    short = TokenBatch.from_lists([row[:-1] for row in ROWS], starts=STARTS)
    with torch.no_grad():
        got, want = (trained(model, y) for y in (partly, short))
    torch.testing.assert_close(got.mean(), want.mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(SEQ2SEQ))
def test_side_of_the_padding_changes_nothing(name):
    model, trained = Seq2SeqLM(build(SEQ2SEQ[name], 20)), objective()
    with torch.no_grad():
        left, right = (trained(model, batch(side)).mean() for side in ("left", "right"))
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_steps_along_the_gradient_lower_the_loss():
    model, trained = Seq2SeqLM(build(SEQ2SEQ["t5"], 20, gain=1.0)), objective()
    optimizer = torch.optim.Adam([*model.model.parameters(), *trained.parameters()], lr=3e-3)
    losses = []
    for _ in range(25):
        terms = trained(model, batch())
        optimizer.zero_grad()
        terms.mean().backward()
        optimizer.step()
        losses.append(terms.mean().item())
    assert losses[-1] < 0.8 * losses[0]


def test_equal_sources_are_found():
    rows = [[5, 9, 4, 12], [5, 9, 8, 2, 3], [6, 9, 8, 2]]
    x = TokenBatch.from_lists(rows, starts=[2, 2, 2])
    model = Seq2SeqLM(build(SEQ2SEQ["t5"], 20))
    with torch.no_grad():
        dropped, kept = (objective(drop_same_source=flag)(model, x) for flag in (True, False))
    assert (dropped.metrics["contrast_positive"][:2] < kept.metrics["contrast_positive"][:2]).all()
    torch.testing.assert_close(dropped.metrics["similarity"], kept.metrics["similarity"])


def test_model_refusals():
    with pytest.raises(InputError, match="CLAPS needs the states of an encoder; CausalLM"):
        objective()(CausalLM(build(CAUSAL["llama"], 20)), batch())
    model = Seq2SeqLM(build(SEQ2SEQ["t5"], 20))
    with pytest.raises(InputError, match="made for states of width 8, and this model's have 16"):
        Claps(8)(model, batch())
    x = batch()
    stray = TokenBatch(x.ids, x.attention_mask, x.attention_mask, x.starts)
    with pytest.raises(InputError, match="row 0 scores a token of its source"):
        objective()(model, stray)
