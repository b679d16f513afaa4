"""Scores of traps are those of membership; traps that text cannot carry are told."""

from __future__ import annotations

import pytest
import torch

from loglik.errors import InputError
from loglik.kinds import Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.signals.membership import loss_score, min_k, reference_score
from loglik.signals.texts import text_log_probs
from loglik.signals.trap_scores import survives_decoding, trap_scores

G = torch.Generator().manual_seed(0)
TERMS = -torch.rand(5, 8, generator=G, dtype=torch.float64)
MASK = torch.arange(8) < torch.tensor([8, 7, 5, 2, 1])[:, None]
OWN = LogLikelihood.from_per_unit(TERMS, MASK)
OTHER = LogLikelihood.from_per_unit(2 * TERMS.flip(0), MASK)


def test_scores_are_those_of_membership():
    found = trap_scores(OWN, OTHER, k=0.5)
    wanted = {
        "loss": loss_score(OWN),
        "min_k": min_k(OWN, 0.5),
        "ratio": reference_score(OWN, OTHER),
        "reference_loss": loss_score(OTHER),
    }
    assert {*found} == {*wanted}
    for name, score in wanted.items():
        assert torch.equal(found[name].value, score.value)
        assert found[name].kind is score.kind


def test_a_bound_without_terms_has_no_min_k_and_a_reference_alike_a_ratio_of_0():
    bound = LogLikelihood(OWN.value, Kind.LOWER_BOUND, Unit.TOKEN, OWN.num_units)
    assert {*trap_scores(bound)} == {"loss"}
    assert trap_scores(bound)["loss"].kind is Kind.LOWER_BOUND
    assert trap_scores(OWN, OWN)["ratio"].value.tolist() == [0.0] * 5


def test_what_survives_is_scored_as_the_same_tokens(tiny):
    survives = survives_decoding(tiny.tokenizer)
    ids = tiny.tokenizer.encode("def zig(zag):\n    return zag", add_special_tokens=False)
    assert survives(ids)
    assert int(text_log_probs(tiny, [tiny.tokenizer.decode(ids)]).num_units[0]) == len(ids)
    apart = [i for letter in "return" for i in tiny.tokenizer.encode(letter, add_special_tokens=False)]
    assert len(apart) == 6
    assert not survives(apart)  # the tokenizer would join them
    assert not survives(tiny.tokenizer.encode("a = 1\n", add_special_tokens=False))  # ends in white space
    assert not survives([tiny.tokenizer.bos_token_id, *ids])


def test_no_tokenizer():
    with pytest.raises(InputError, match="the model has none"):
        survives_decoding(None)
