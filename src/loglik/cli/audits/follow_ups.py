"""``loglik audit follow-ups``: would a user be content with a response, by what they are likely to write next?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit, check_writable, write_text
from loglik.cli.audits.named import named_rows
from loglik.errors import InputError

if TYPE_CHECKING:
    from loglik.signals.feedback import FollowUpScores
    from loglik.signals.pages import AuditPage

__all__ = ["AuditFollowUps"]

_SIDES = ("positive", "negative")
_MOST_ROWS = 30  # of the heat map


@dataclass(frozen=True, kw_only=True)
class AuditFollowUps(ModelAudit):
    """Reward responses by how much likelier a content user's next message is than a discontented one's."""

    prompt_field: str = "prompt"
    """Column of the user's message."""
    response_field: str = "response"
    """Column of the response, where rows hold one each; rows with the same prompt are compared."""
    chosen_field: str = "chosen"
    """Column of the preferred response, where rows are pairs."""
    rejected_field: str = "rejected"
    """Column of the other one."""
    follow_ups: str | None = None
    """A .json file with lists "positive" and "negative" of what users might write; those of loglik by default."""
    category: tuple[str, ...] = ()
    """Only these categories of the default follow-ups."""
    aggregate: Literal["mean", "sum"] = "mean"
    """Log-likelihood per token of a follow-up, or of the whole."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """The tokenizer's chat template, plain turns, or the former where there is one."""
    overflow: Literal["error", "window"] = "error"
    """A context longer than the model's is refused, or read from a later token on."""
    pairs: str | None = None
    """Write the best against the worst response of each prompt here, as pairs to train on (.jsonl)."""
    gap: float = 0.0
    """Least difference of reward of such a pair."""
    bootstrap: int = 2000
    """Resamples of the rows behind the interval of the accuracy."""
    seed: int = 0
    """Of the resampling."""

    def run(self) -> None:
        """Read, score the follow-ups, compare, write."""
        from loglik.signals.pages import AuditPage

        audited = self.read()
        prompts = audited.texts(self.prompt_field)
        paired = not audited.has(self.response_field)
        if paired and self.pairs is not None:
            raise InputError("--pairs needs rows with one response each; these are pairs already: leave it out")
        if self.pairs is not None:
            check_writable(self.pairs)
        sides = self._sides()
        page = AuditPage("Follow-ups", f"{self.data} under {self.model}")
        summary: dict[str, Any] = {"model": self.model, "follow_ups": {side: len(sides[side]) for side in _SIDES}}
        if paired:
            rows = self._judge_pairs(audited, prompts, sides, summary, page)
        else:
            rows = self._reward(audited, prompts, sides, summary, page)
        self.finish(audited, rows, {"rows": len(rows)} | summary, page)

    def _judge_pairs(
        self,
        audited: Audited,
        prompts: Sequence[str],
        sides: Mapping[str, list[str]],
        summary: dict[str, Any],
        page: AuditPage,
    ) -> list[dict[str, Any]]:
        from loglik.signals.intervals import mean_intervals

        chosen, rejected = audited.texts(self.chosen_field), audited.texts(self.rejected_field)
        names = [f"{name} ({which})" for which in (self.chosen_field, self.rejected_field) for name in audited.names]
        found = self._scores([*prompts, *prompts], [*chosen, *rejected], names, sides)
        first, second = found.reward.value.chunk(2)
        margin = first - second
        right = (margin > 0).double() + 0.5 * (margin == 0).double()
        summary["accuracy"] = float(right.mean())
        if len(prompts) > 1:
            told = mean_intervals(right, resamples=self.bootstrap, seed=self.seed)
            summary["accuracy_interval"] = [float(end) for end in told.interval[0]]
        summary |= {
            "mean_margin": float(margin.mean()),
            "ties": int((margin == 0).sum()),
            "kind": str(found.reward.kind),
        }
        if self.report is not None:
            from loglik.signals.plots import plot_by_class

            labels = [True] * len(prompts) + [False] * len(prompts)
            drawn = plot_by_class(
                found.reward.value, labels, names=(self.chosen_field, self.rejected_field), label="reward, nats"
            )
            page.figure("Reward by preference", drawn, "Compare rewards of one prompt only: their level depends on it.")
            self._map(found, names[: len(prompts)], sides, page)
        return [
            {"reward_chosen": a, "reward_rejected": b, "margin": a - b, "correct": a > b}
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ]

    def _reward(
        self,
        audited: Audited,
        prompts: Sequence[str],
        sides: Mapping[str, list[str]],
        summary: dict[str, Any],
        page: AuditPage,
    ) -> list[dict[str, Any]]:
        responses = audited.texts(self.response_field)
        found = self._scores(prompts, responses, audited.names, sides)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(prompts))}
        rewards = found.reward.value.tolist()
        summary |= {"prompts": len(numbers), "mean_reward": sum(rewards) / len(rewards), "kind": str(found.reward.kind)}
        best, worst = self._mined(found, [numbers[prompt] for prompt in prompts])
        summary["pairs"] = len(best)
        if self.pairs is not None:
            kept = [
                {
                    "prompt": prompts[i],
                    "chosen": responses[i],
                    "rejected": responses[j],
                    "reward_chosen": rewards[i],
                    "reward_rejected": rewards[j],
                }
                for i, j in zip(best, worst, strict=True)
            ]
            write_text(self.pairs, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in kept))
        if self.report is not None:
            self._map(found, audited.names, sides, page)
        return [{"reward": reward, "prompt_number": numbers[p]} for reward, p in zip(rewards, prompts, strict=True)]

    def _mined(self, found: FollowUpScores, groups: Sequence[int]) -> tuple[list[int], list[int]]:
        import torch

        from loglik.signals.feedback import mine_pairs

        best, worst = mine_pairs(found.reward.value, torch.tensor(groups), gap=self.gap)
        return best.tolist(), worst.tolist()

    def _scores(
        self, prompts: Sequence[str], responses: Sequence[str], names: Sequence[str], sides: Mapping[str, list[str]]
    ) -> FollowUpScores:
        from loglik.signals.feedback import follow_up_likelihood

        with named_rows(names):
            return follow_up_likelihood(
                self.load(),
                prompts,
                responses,
                positive=sides["positive"],
                negative=sides["negative"],
                aggregate=self.aggregate,
                template=self.template,
                overflow=self.overflow,
            )

    def _map(
        self, found: FollowUpScores, names: Sequence[str], sides: Mapping[str, list[str]], page: AuditPage
    ) -> None:
        """Which follow-ups tell responses apart: log-likelihoods less each follow-up's mean."""
        import torch

        from loglik.signals.plots import plot_heat_map

        table = torch.cat([found.positive, found.negative], 1)
        table = (table - table.mean(0))[: min(_MOST_ROWS, len(names))]
        drawn = plot_heat_map(
            table,
            rows=list(names[: len(table)]),
            columns=[f"{'+' if side == 'positive' else '-'} {text}" for side in _SIDES for text in sides[side]],
            label="nats above the follow-up's mean",
            diverging=True,
        )
        page.figure("Responses and follow-ups", drawn, "A follow-up with a pale column does not tell responses apart.")

    def _sides(self) -> dict[str, list[str]]:
        """What is scored, by side."""
        if self.follow_ups is not None:
            if self.category:
                raise InputError("--category chooses among the default follow-ups: leave it out with --follow-ups")
            return _given(self.follow_ups)
        from loglik.signals.follow_ups import DEFAULT_FOLLOW_UPS

        unknown = next((name for name in self.category if name not in DEFAULT_FOLLOW_UPS), None)
        if unknown is not None:
            raise InputError(f"--category must be of {', '.join(DEFAULT_FOLLOW_UPS)}, got {unknown!r}")
        chosen = [DEFAULT_FOLLOW_UPS[name] for name in self.category or DEFAULT_FOLLOW_UPS]
        return {side: [text for both in chosen for text in getattr(both, side)] for side in _SIDES}


def _given(path: str) -> dict[str, list[str]]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a .json file as --follow-ups") from None
    except ValueError:
        raise InputError(f"{path} is not JSON: give lists of texts, positive and negative") from None
    sides: dict[str, Any] = {side: found.get(side, []) for side in _SIDES} if isinstance(found, dict) else {"": None}
    if not all(isinstance(part, list) and all(isinstance(text, str) for text in part) for part in sides.values()):
        raise InputError(f'{path} must be an object with lists of texts "positive" and "negative"')
    return sides
