"""Objectives by name, for the command line and `loglik.fit`."""

from __future__ import annotations

import importlib
import inspect
from difflib import get_close_matches
from functools import partial
from typing import Any, cast

from loglik.errors import InputError
from loglik.objectives.base import Objective

__all__ = ["OBJECTIVES", "objective", "settings_of"]

_HOMES = {
    "preference": (
        "apo_down",
        "apo_zero",
        "bco_pair",
        "bradley_terry",
        "dpo",
        "exo_pair",
        "hinge_norm",
        "ipo",
        "length_normalised_dpo",
        "nca_pair",
        "robust_dpo",
        "sigmoid_norm",
        "sppo_hard",
    ),
    "reference_free": ("cpo", "hinge", "orpo", "simpo", "slic"),
    "token_preference": ("tab_po",),
    "rewards": ("binary_feedback",),
    "density_ratio": ("ddo",),
    "unpaired": ("implicit_reward_ce", "kto"),
    "diffusion_policy": ("bgpo", "gdpo"),
    "policy": ("brain", "dpg", "gdc_pp", "nash_md_pg", "ppo_clip", "reinforce"),
    "weighted": ("best_of_n", "reward_weighted_regression"),
    "smoothing": ("label_smoothed_nll",),
    "edit_invariant": ("edit_invariant",),
}

# Names and where they live; imported at first use. A name is a function, or a class whose objects are objectives.
OBJECTIVES: dict[str, str] = {
    "mle": "loglik.objectives.supervised.MaximumLikelihood",
    "sequence_match": "loglik.objectives.sequence_match.SequenceMatch",
    **{name: f"loglik.objectives.{home}.{name}" for home, names in _HOMES.items() for name in names},
}


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """The settings of an objective: what may be bound by name.

    Raises:
        InputError: for an unknown name, with the nearest one.
    """
    found = inspect.signature(_find(name)).parameters
    if isinstance(_find(name), type):
        return dict(found)
    return {key: value for key, value in found.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}


def objective(name: str, **settings: Any) -> Objective:
    """The objective called `name`, with some of its settings bound.

    Raises:
        InputError: for an unknown objective or setting, with the nearest one, or a value of the wrong type.
    """
    known, found = settings_of(name), _find(name)
    for key, value in settings.items():
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{name} has no setting {key!r}{hint} (it has {', '.join(known) or 'none'})")
        default = known[key].default
        if isinstance(default, bool) != isinstance(value, bool) and isinstance(default, int | float):
            raise InputError(f"{name}: {key} must be a {type(default).__name__}, got {value!r}")
        if isinstance(default, int | float) and not isinstance(value, int | float):
            raise InputError(f"{name}: {key} must be a number, got {value!r}")
    made = found(**settings) if isinstance(found, type) else partial(found, **settings) if settings else found
    return cast("Objective", made)


def _find(name: str) -> Any:
    if name not in OBJECTIVES:
        near = get_close_matches(name.lower().replace("-", "_"), OBJECTIVES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown objective {name!r}; {hint}choose from {', '.join(sorted(OBJECTIVES))}")
    module, attribute = OBJECTIVES[name].rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)
