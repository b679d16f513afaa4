r"""Whether a model says yes more often than it should: shares before and after calibration, and against the truth.

A model can know the answers and still say yes too often: then yes is likelier after wrong questions than no after
right ones, while its log-odds still order the questions well. Contextual calibration (arXiv 2102.09690) divides what
the model says to no content at all out of its answers; yes/no bias itself is the subject of arXiv 2501.16356.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import scipy.stats
import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.kinds import Kind
from loglik.signals.binary_decisions import BinaryProbability
from loglik.signals.choice import contextual_calibration
from loglik.signals.detection import auroc

__all__ = ["LabelBias", "LabelShares", "label_bias"]

_LOW_COVERAGE = 0.9


@dataclass(frozen=True, slots=True)
class LabelShares:
    """How often yes is said, and how often rightly.

    Args:
        probability: (B,) of yes.
        share: of prompts with a probability of yes above 1/2.
        mean: probability of yes.
        imbalance: `share` minus the share of prompts that yes is right for, in [-1, 1]; None without right answers, as
            all below.
        p_value: exact test (McNemar) that a wrong yes is as frequent as a wrong no.
        accuracy: share right.
        right_yes: share right among prompts that yes is right for; None if there are none.
        right_no: the same for no.
    """

    probability: Tensor
    share: float
    mean: float
    imbalance: float | None
    p_value: float | None
    accuracy: float | None
    right_yes: float | None
    right_no: float | None


@dataclass(frozen=True, slots=True)
class LabelBias:
    """Yes/no answers to B prompts.

    Args:
        raw: as the model gives them.
        calibrated: after calibration.
        calibration: ``content-free``, or ``batch`` (by the mean over the prompts themselves).
        prior: probability of yes that calibration takes out.
        coverage: mean probability of yes and no before renormalising.
        low_coverage: share of prompts where it is below 0.9: the forced reading is doubtful there.
        gold_share: share of prompts that yes is right for; None without right answers.
        auroc: how well log-odds of yes order prompts by the right answer, whatever the bias; None without right
            answers, or if they are all the same.
        kind: what the probabilities promise.
    """

    raw: LabelShares
    calibrated: LabelShares
    calibration: Literal["content-free", "batch"]
    prior: float
    coverage: float
    low_coverage: float
    gold_share: float | None
    auroc: float | None
    kind: Kind


def label_bias(
    found: BinaryProbability, gold: Sequence[bool] | None = None, *, content_free: BinaryProbability | None = None
) -> LabelBias:
    r"""Report the bias of yes/no answers, raw and calibrated.

    .. math:: \hat p(y \mid q) \propto p(y \mid q) / \bar p(y), \qquad
              \bar p = \text{mean of } p(\cdot \mid c) \text{ over content-free prompts } c

    Without content-free prompts, :math:`\bar p` is the mean over the prompts themselves (batch calibration), which
    assumes that yes is right for half of them: where it is not, this calibration adds a bias.

    Args:
        found: of B prompts (`binary_answers`, `binary_probability`).
        gold: (B,) whether yes is right.
        content_free: of prompts without content, such as ``Question: N/A`` in the same wording.

    Raises:
        InputError: for a gold of another length or with other values, batch calibration of a single prompt, or an
            answer that has probability 0 after every content-free prompt.

    Source: arXiv 2501.16356; calibration: arXiv 2102.09690, 2309.17249.
    """
    if gold is not None:
        if len(gold) != len(found.probability):
            raise InputError(f"gold must have an entry per prompt: got {len(gold)} for {len(found.probability)}")
        for number, value in enumerate(gold):
            if value not in (True, False):
                raise InputError(f"gold must be true or false: that of prompt {number} is {value!r}")
    if content_free is None and len(found.probability) < 2:
        raise InputError("batch calibration needs at least two prompts: give content-free prompts instead")
    free = found if content_free is None else content_free
    calibrated = contextual_calibration(_two_labels(found), _two_labels(free))[:, 1].exp()
    right = None if gold is None else torch.tensor([bool(value) for value in gold])
    mixed = right is not None and bool(right.any()) and not bool(right.all())
    return LabelBias(
        _shares(found.probability.detach().double().cpu(), right),
        _shares(calibrated, right),
        "batch" if content_free is None else "content-free",
        float(free.probability.double().mean()),
        float(found.coverage.double().mean()),
        float((found.coverage < _LOW_COVERAGE).double().mean()),
        None if right is None else float(right.double().mean()),
        float(auroc(found.logit.detach().double().cpu(), right)) if mixed and right is not None else None,
        found.kind,
    )


def _two_labels(found: BinaryProbability) -> Tensor:
    """(B, 2) log-probabilities of no and of yes."""
    odds = found.logit.detach().double().cpu()
    return torch.nn.functional.logsigmoid(torch.stack([-odds, odds], 1))


def _shares(probability: Tensor, right: Tensor | None) -> LabelShares:
    says = probability > 0.5
    share, mean = float(says.double().mean()), float(probability.mean())
    if right is None:
        return LabelShares(probability, share, mean, None, None, None, None, None)
    too_often, too_rarely = int((says & ~right).sum()), int((~says & right).sum())
    wrong = too_often + too_rarely
    return LabelShares(
        probability,
        share,
        mean,
        share - float(right.double().mean()),
        float(scipy.stats.binomtest(too_often, wrong).pvalue) if wrong else 1.0,
        1 - wrong / len(right),
        float(says[right].double().mean()) if bool(right.any()) else None,
        float((~says)[~right].double().mean()) if not bool(right.all()) else None,
    )
