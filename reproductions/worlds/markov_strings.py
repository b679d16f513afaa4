r"""Strings of a second-order Markov chain, and masked-diffusion models small enough to learn them in a minute.

A symbol depends on the last two, :math:`p(c \mid a, b) = \text{softmax}(2.5\, N(0, 1))_c`; the first two come from the
chain's stationary law, so that every place of a string is like every other. The likelihood of a string, the entropy of
strings and the entropy rate are exact: what a model's bound is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loglik.kinds import DrawsKey
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.diffusion import BidirectionalLlama, BidirectionalLlamaConfig, MaskedDiffusionLM
from loglik.objectives.supervised import MaximumLikelihood

__all__ = ["MarkovStrings", "masked_network", "train"]


@dataclass(frozen=True, eq=False)
class MarkovStrings:
    """Strings of `length` symbols.

    Args:
        table: (V, V, V) float64, entry (a, b, c) is the log-probability of c after a and b.
        length: L, symbols per string.
    """

    table: Tensor
    length: int = 16

    @classmethod
    def random(
        cls, *, vocabulary: int = 5, length: int = 16, scale: float = 2.5, generator: torch.Generator
    ) -> MarkovStrings:
        """A chain whose rows are ``softmax(scale * N(0, 1))``."""
        logits = scale * torch.randn((vocabulary,) * 3, generator=generator, dtype=torch.float64)
        return cls(logits.log_softmax(-1), length)

    @property
    def vocabulary(self) -> int:
        """V, symbols."""
        return len(self.table)

    @cached_property
    def stationary(self) -> Tensor:
        r"""(V, V) probabilities of two neighbours, :math:`\pi_{bc} = \sum_a \pi_{ab}\, p(c \mid a, b)`."""
        size = self.vocabulary
        step = self.table.new_zeros((size,) * 4)  # (a, b) to (b, c)
        for b in range(size):
            step[:, b, b] = self.table[:, b].exp()
        step = step.reshape(size**2, size**2)
        # The balance and a sum of 1: one equation more than unknowns, all of them satisfied.
        left = torch.cat([step.T - torch.eye(size**2, dtype=step.dtype), step.new_ones(1, size**2)])
        right = torch.cat([step.new_zeros(size**2), step.new_ones(1)])
        return torch.linalg.lstsq(left, right[:, None]).solution[:, 0].clamp_min(0).reshape(size, size)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, L) strings."""
        chances = self.table.exp().reshape(-1, self.vocabulary)
        pair = torch.multinomial(self.stationary.reshape(-1), n, replacement=True, generator=generator)
        symbols = [pair // self.vocabulary, pair % self.vocabulary]
        while len(symbols) < self.length:
            last_two = symbols[-2] * self.vocabulary + symbols[-1]
            symbols.append(torch.multinomial(chances[last_two], 1, generator=generator)[:, 0])
        return torch.stack(symbols[: self.length], dim=1)

    def log_prob(self, strings: Tensor) -> LogLikelihood:
        """EXACT log-likelihoods of (B, L) strings with the terms of the chain rule, nats."""
        first = self.stationary.sum(1).log()
        second = self.stationary.log() - first[:, None]
        terms = torch.cat(
            [
                first[strings[:, :1]],
                second[strings[:, :-1], strings[:, 1:]][:, :1],
                self.table[strings[:, :-2], strings[:, 1:-1], strings[:, 2:]],
            ],
            dim=1,
        )
        return LogLikelihood.from_per_unit(terms, torch.ones_like(strings, dtype=torch.bool))

    def entropy(self) -> float:
        """Of a string of two symbols or more, nats: no model's mean negative log-likelihood is below it."""
        pair = -torch.special.xlogy(self.stationary, self.stationary).sum()
        return float(pair) + (self.length - 2) * self.entropy_rate()

    def entropy_rate(self) -> float:
        r"""Nats per symbol in the long run, :math:`\sum_{ab} \pi_{ab} H(c \mid a, b)`."""
        of_next = -(self.table.exp() * self.table).sum(-1)
        return float((self.stationary * of_next).sum())

    def rows(self, strings: Tensor) -> TokenBatch:
        """Strings (B, L) as rows without a prompt: every symbol is scored."""
        everything = torch.ones_like(strings, dtype=torch.bool)
        return TokenBatch(strings, everything, everything, torch.zeros(len(strings), dtype=torch.long))


def masked_network(
    vocabulary: int, length: int, *, seed: int, width: int = 32, layers: int = 2, heads: int = 4, scale: float = 0.1
) -> BidirectionalLlama:
    """A bidirectional transformer with random weights; the mask token is the one after the vocabulary's last.

    Args:
        vocabulary: V, symbols that are predicted.
        length: L, longest row.
        seed: of the weights; the global generator is left as it was.
        width: of the states.
        layers: blocks.
        heads: of the attention.
        scale: standard deviation of the weights; from about 0.5 on, conditionals are far from uniform.
    """
    config = BidirectionalLlamaConfig(
        vocab_size=vocabulary + 1,
        mask_token_id=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=length,
        initializer_range=scale,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BidirectionalLlama(config)


def train(
    model: MaskedDiffusionLM,
    world: MarkovStrings,
    *,
    steps: int,
    generator: torch.Generator,
    batch: int = 128,
    learning_rate: float = 2e-3,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    """Maximise the bound of fresh strings, as the model's own estimator draws it: AdamW, gradients clipped to norm 1.

    Args:
        model: trained in place; `num_samples` of it is the number of draws per string.
        world: of the strings.
        steps: optimizer steps.
        generator: of the strings. Masks are functions of the string and of the step.
        batch: strings per step.
        learning_rate: constant.
        watch: called with the number of steps taken after each of them.
    """
    objective = MaximumLikelihood()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        rows = world.rows(world.sample(batch, generator))
        loss = objective(model.log_prob(rows, draws=DrawsKey.of(f"step {step}"))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimizer.step()
        watch(step + 1)
