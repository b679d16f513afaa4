"""``loglik audit follow-ups``: which response makes a happy user likelier?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from loglik.cli.audits.common import Audited, ModelAudit, check_writable, rows_named, write_table
from loglik.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["AuditFollowUps"]

_MOST_ROWS = 40  # of the heat map


@dataclass(frozen=True, kw_only=True)
class AuditFollowUps(ModelAudit):
    """Reward responses by how much likelier happy user follow-ups are than unhappy ones; check it on known pairs."""

    prompt_field: str = "prompt"
    """Column of the prompt: a text, or a list of messages with role and content."""
    response_field: str = "response"
    """Column of the response, where rows are single responses."""
    chosen_field: str = "chosen"
    """Column of the preferred response, where rows are pairs."""
    rejected_field: str = "rejected"
    """Column of the other one."""
    rating_field: str = "rating"
    """Column of a human rating of the response, if that is known; higher is better."""
    follow_ups: str | None = None
    """A .json file with positive and negative follow-ups, or such lists by category; the own list by default."""
    aggregate: Literal["mean", "sum"] = "mean"
    """Of the tokens of a follow-up."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How a conversation is written: the chat template if there is one, or User: and Assistant: lines."""
    overflow: Literal["error", "window"] = "error"
    """A conversation longer than the context is refused, or read from a later token on."""
    pairs: str | None = None
    """Write the best against the worst response of each prompt here, as pairs to train on (.jsonl or .parquet)."""
    gap: float = 0.0
    """Such a pair is kept if its rewards differ by more than this."""
    level: float = 0.95
    """Confidence of the interval."""

    def run(self) -> None:
        """Read, score, compare, write."""
        from loglik.signals.follow_ups import DEFAULT_FOLLOW_UPS, read_follow_ups
        from loglik.signals.pages import AuditPage

        if not 0 < self.level < 1:
            raise InputError(f"--level must lie between 0 and 1, got {self.level}")
        follow_ups = DEFAULT_FOLLOW_UPS if self.follow_ups is None else read_follow_ups(self.follow_ups)
        audited = self.read()
        prompts = self._prompts(audited)
        columns = self._columns(audited)
        if self.pairs is not None:
            if len(columns) == 2:
                raise InputError("--pairs needs rows with one response each, and these are pairs already: leave it out")
            check_writable(self.pairs)
        ratings = audited.numbers(self.rating_field) if len(columns) == 1 and audited.has(self.rating_field) else None
        responses = {name: audited.texts(name) for name in columns}
        model = self.load()
        rewards, categories, own = self._rewards(model, audited, prompts, responses, follow_ups)
        rows: list[dict[str, Any]] = []
        for i in range(len(audited)):
            row: dict[str, Any] = {}
            for name in columns:
                row[f"reward_{name}"] = float(rewards[name][i])
                row[f"categories_{name}"] = {each: float(v[i]) for each, v in categories[name].items()}
                row[f"log_prob_per_token_{name}"] = float(own[name][i])
            rows.append(row)
        summary: dict[str, Any] = {
            "rows": len(rows),
            "model": self.model,
            "follow_ups": sum(len(each.positive) + len(each.negative) for each in follow_ups.values()),
        }
        for name in columns:
            summary[f"mean_reward_{name}"] = float(rewards[name].mean())
        page = AuditPage("Follow-ups", f"{self.data} under {self.model}")
        if len(columns) == 2:
            self._judge(columns, rewards, categories, own, rows, summary, page)
        elif ratings is not None:
            self._rate(rewards[columns[0]], own[columns[0]], ratings, summary)
        if len(columns) == 1:
            self._mine(prompts, responses[columns[0]], rewards[columns[0]], summary)
        if self.report is not None:
            self._map(audited, columns, categories, page)
        self.finish(audited, rows, summary, page)

    def _rewards(
        self,
        model: Any,
        audited: Audited,
        prompts: Sequence[Any],
        responses: Mapping[str, Sequence[str]],
        follow_ups: Mapping[str, Any],
    ) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """By column: rewards, rewards by category, and log-likelihood of the response per token."""
        import torch

        from loglik.progress import bar
        from loglik.signals.feedback import follow_up_likelihood
        from loglik.signals.follow_up_preferences import category_rewards, response_likelihood

        positive = [text for each in follow_ups.values() for text in each.positive]
        negative = [text for each in follow_ups.values() for text in each.negative]
        rewards: dict[str, list[torch.Tensor]] = {name: [] for name in responses}
        categories: dict[str, dict[str, list[torch.Tensor]]] = {
            name: {each: [] for each in follow_ups} for name in responses
        }
        own: dict[str, list[torch.Tensor]] = {name: [] for name in responses}
        with bar("responses", total=len(prompts) * len(responses), unit="rows") as advance:
            for first in range(0, len(prompts), self.batch_size):
                part = slice(first, first + self.batch_size)
                # Both responses of a pair in one call: equal ones then have equal rewards, to the last digit.
                asked = list(prompts[part]) * len(responses)
                texts = [text for each in responses.values() for text in each[part]]
                with rows_named(audited.names[part] * len(responses)):
                    scores = follow_up_likelihood(
                        model,
                        asked,
                        texts,
                        positive=positive,
                        negative=negative,
                        aggregate=self.aggregate,
                        template=self.template,
                        overflow=self.overflow,
                    )
                    likelihood = response_likelihood(model, asked, texts, overflow=self.overflow)
                count, by_category = len(prompts[part]), category_rewards(scores, follow_ups)
                for place, name in enumerate(responses):
                    own_rows = slice(place * count, (place + 1) * count)
                    rewards[name].append(scores.reward.value[own_rows])
                    own[name].append(likelihood.mean_per_unit().value[own_rows])
                    for category, values in by_category.items():
                        categories[name][category].append(values[own_rows])
                advance(len(texts))
        return (
            {name: torch.cat(parts) for name, parts in rewards.items()},
            {name: {each: torch.cat(v) for each, v in found.items()} for name, found in categories.items()},
            {name: torch.cat(parts) for name, parts in own.items()},
        )

    def _judge(
        self,
        columns: Sequence[str],
        rewards: Mapping[str, torch.Tensor],
        categories: Mapping[str, Mapping[str, torch.Tensor]],
        own: Mapping[str, torch.Tensor],
        rows: list[dict[str, Any]],
        summary: dict[str, Any],
        page: Any,
    ) -> None:
        """Pairwise accuracies, into the rows, the summary and the page."""
        from loglik.signals.follow_up_preferences import pairwise_accuracy
        from loglik.signals.plots import plot_bars

        better, worse = columns
        scores = {"follow_ups": (rewards[better], rewards[worse]), "response_likelihood": (own[better], own[worse])}
        for each, values in categories[better].items():
            scores[f"category {each}"] = values, categories[worse][each]
        found = {name: pairwise_accuracy(one, other, level=self.level) for name, (one, other) in scores.items()}
        for row, outcome in zip(rows, found["follow_ups"].outcomes.tolist(), strict=True):
            row["margin"] = row[f"reward_{better}"] - row[f"reward_{worse}"]
            row["prefers_chosen"] = outcome == 1
        for name, accuracy in found.items():
            summary[f"accuracy_{name.replace(' ', '_')}"] = accuracy.record()
        if self.report is not None:
            bars = {name: accuracy.accuracy for name, accuracy in found.items()}
            spans = {name: (accuracy.low, accuracy.high) for name, accuracy in found.items()}
            page.figure(
                "Pairwise accuracy",
                plot_bars(bars, label="share of pairs that prefer the chosen response", intervals=spans),
                f"With {self.level:.0%} intervals; one half is chance.",
            )

    def _mine(
        self, prompts: Sequence[Any], responses: Sequence[str], reward: torch.Tensor, summary: dict[str, Any]
    ) -> None:
        """Pairs of responses to one prompt, counted in the summary and written where they are wanted."""
        import torch

        from loglik.signals.feedback import mine_pairs

        numbers: dict[str, int] = {}
        groups = [numbers.setdefault(repr(prompt), len(numbers)) for prompt in prompts]
        best, worst = mine_pairs(reward, torch.tensor(groups), gap=self.gap)
        summary |= {"prompts": len(numbers), "pairs": len(best)}
        if self.pairs is not None:
            kept = [
                {
                    "prompt": prompts[i],
                    "chosen": responses[i],
                    "rejected": responses[j],
                    "reward_chosen": float(reward[i]),
                    "reward_rejected": float(reward[j]),
                }
                for i, j in zip(best.tolist(), worst.tolist(), strict=True)
            ]
            write_table(self.pairs, kept)

    def _rate(self, reward: torch.Tensor, own: torch.Tensor, ratings: list[float], summary: dict[str, Any]) -> None:
        """Rank correlations with ratings, into the summary."""
        from loglik.signals.follow_up_preferences import rating_correlation

        summary["rank_correlation_follow_ups"] = rating_correlation(reward, ratings)
        summary["rank_correlation_response_likelihood"] = rating_correlation(own, ratings)

    def _map(
        self,
        audited: Audited,
        columns: Sequence[str],
        categories: Mapping[str, Mapping[str, torch.Tensor]],
        page: Any,
    ) -> None:
        """Rows against categories: rewards, or what the chosen response gains over the rejected one."""
        import torch

        from loglik.signals.plots import plot_heat_map

        found = categories[columns[0]]
        table = torch.stack(list(found.values()), 1)
        if len(columns) == 2:
            table = table - torch.stack(list(categories[columns[1]].values()), 1)
        label = "reward of chosen minus rejected" if len(columns) == 2 else "reward"
        drawn = plot_heat_map(
            table[:_MOST_ROWS],
            rows=audited.names[:_MOST_ROWS],
            columns=list(found),
            label=label,
            diverging=True,
        )
        page.figure("Rows and categories", drawn, "The first rows.")

    def _columns(self, audited: Audited) -> tuple[str, ...]:
        """The response's column, or those of the pair."""
        if audited.has(self.chosen_field):
            return self.chosen_field, self.rejected_field
        if audited.has(self.response_field):
            return (self.response_field,)
        raise InputError(
            f"{audited.names[0]} has neither {self.chosen_field} and {self.rejected_field} nor {self.response_field}"
        )

    def _prompts(self, audited: Audited) -> list[Any]:
        found = []
        for name, record in audited.pairs():
            value = record.get(self.prompt_field)
            turns = (
                isinstance(value, list)
                and value
                and all(
                    isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                    for m in value
                )
            )
            if not turns and not (isinstance(value, str) and value.strip()):
                shown = "nothing" if value is None else repr(value)[:60]
                raise InputError(
                    f"{name}: {self.prompt_field} must be a text that is not empty, or a list of messages with role "
                    f"and content, got {shown}"
                )
            found.append(value)
        return found
