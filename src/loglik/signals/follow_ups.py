"""What users write after a response they like or dislike: phrases of our own, by category."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loglik.errors import InputError

__all__ = ["DEFAULT_FOLLOW_UPS", "FollowUps", "read_follow_ups"]


@dataclass(frozen=True, slots=True)
class FollowUps:
    """What a satisfied (`positive`) and a dissatisfied (`negative`) user might write next."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


DEFAULT_FOLLOW_UPS: Mapping[str, FollowUps] = MappingProxyType(
    {
        "understanding": FollowUps(
            (
                "Yes, that is exactly what I was asking.",
                "You got my question right away, thank you.",
                "Right, you understood what I need.",
                "Good, you see where I am coming from.",
            ),
            (
                "No, that is not what I was asking.",
                "You misread my question.",
                "I think you did not understand what I need.",
                "Let me say it again, you got me wrong.",
            ),
        ),
        "relevance": FollowUps(
            (
                "Great, this is all about what I wanted to know.",
                "Thanks, every part of this helps with my problem.",
                "That is right on the subject.",
                "Perfect, you kept to the point.",
            ),
            (
                "What has this to do with my question?",
                "You are drifting off the subject.",
                "Most of this does not help with my problem.",
                "Please come back to the point.",
            ),
        ),
        "correctness": FollowUps(
            (
                "Yes, that is right.",
                "I checked it, and it is correct.",
                "That agrees with what I have read elsewhere.",
                "Thanks, there is no mistake in it.",
            ),
            (
                "No, that is wrong.",
                "I checked it, and it is not correct.",
                "That contradicts what I have read elsewhere.",
                "There is a mistake in your answer.",
            ),
        ),
        "engagingness": FollowUps(
            (
                "That was fun to read, tell me more!",
                "How interesting, please go on.",
                "I enjoy talking with you about this.",
                "Wow, I had not looked at it that way.",
            ),
            (
                "That was dull to read.",
                "I am losing interest, let us stop here.",
                "You sound like a machine.",
                "Never mind, this conversation goes nowhere.",
            ),
        ),
        "informativeness": FollowUps(
            (
                "Thank you, I have learned a lot from this.",
                "That has all the details I was looking for.",
                "Very thorough, nothing is left open.",
                "The examples made it clear.",
            ),
            (
                "That tells me nothing new.",
                "This is too vague, where are the details?",
                "You left out what matters most.",
                "Can you be more specific?",
            ),
        ),
        "instruction following": FollowUps(
            (
                "Thanks, you did just what I asked for.",
                "Perfect, you kept to all of my conditions.",
                "That is the format I wanted.",
                "Well done, every step was followed.",
            ),
            (
                "You did not do what I asked for.",
                "You ignored one of my conditions.",
                "That is not the format I wanted.",
                "Please read my instructions again and follow them.",
            ),
        ),
    }
)


def read_follow_ups(path: str | Path) -> dict[str, FollowUps]:
    """Follow-ups of a JSON file, by category.

    The file is an object with ``positive`` and ``negative``, each a list of texts, or an object of such objects by
    category. One of the two lists may be left out, in all categories or in none.

    Raises:
        InputError: for a file that cannot be read or holds anything else, naming the category and the side.

    Source: arXiv 2409.13948 (categories).
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read as JSON: check the path and the file") from None
    if isinstance(given, dict) and given and set(given) <= {"positive", "negative"}:
        given = {"all": given}
    if not isinstance(given, dict) or not given:
        raise InputError(f"{path} must be an object with positive and negative, or such objects by category")
    found = {str(name): _category(each, f"{name!r} of {path}") for name, each in given.items()}
    for side in ("positive", "negative"):
        having = [name for name, each in found.items() if getattr(each, side)]
        if having and len(having) < len(found):
            lacking = next(name for name in found if name not in having)
            raise InputError(f"{lacking!r} of {path} has no {side} follow-ups, and other categories have some")
    return found


def _category(given: Any, where: str) -> FollowUps:
    if not isinstance(given, dict) or not given or not set(given) <= {"positive", "negative"}:
        raise InputError(f"{where} must be an object with positive and negative, each a list of texts")
    sides = {}
    for side in ("positive", "negative"):
        texts = given.get(side, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(f"{where}: {side} must be a list of texts that are not empty")
        if len(set(texts)) < len(texts):
            raise InputError(f"{where}: {side} has the same text twice: leave one out")
        sides[side] = tuple(texts)
    if not sides["positive"] and not sides["negative"]:
        raise InputError(f"{where} has no follow-ups: give positive or negative ones")
    return FollowUps(**sides)
