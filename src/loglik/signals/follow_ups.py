"""What users write after a response they like or dislike: phrases of our own, by category."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["DEFAULT_FOLLOW_UPS", "FollowUps"]


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
