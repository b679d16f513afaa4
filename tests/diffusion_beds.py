"""Test beds of masked diffusion: random networks, and networks whose conditionals are those of a known joint."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from loglik import TokenBatch
from loglik.models.diffusion import BidirectionalLlama, BidirectionalLlamaConfig, Estimator, MaskedDiffusionLM


def random_network(vocabulary: int = 4, *, seed: int = 0, scale: float = 3.0, width: int = 16) -> BidirectionalLlama:
    """A small network in float64 whose conditionals differ from each other; its mask token is the last."""
    torch.manual_seed(seed)
    config = BidirectionalLlamaConfig(
        vocab_size=vocabulary + 1,
        mask_token_id=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    network = BidirectionalLlama(config).double()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10 * scale)
    return network.eval()


def random_lm(vocabulary: int = 4, *, seed: int = 0, scale: float = 3.0, **options: object) -> MaskedDiffusionLM:
    """A model on `random_network`."""
    return MaskedDiffusionLM(random_network(vocabulary, seed=seed, scale=scale), **options)  # type: ignore[arg-type]


class JointNetwork(nn.Module):
    """Conditionals of a known joint distribution over V^n texts that stand alone in their rows."""

    def __init__(self, joint: np.ndarray) -> None:
        super().__init__()
        self.joint = torch.from_numpy(joint)  # (V, ..., V)
        self.size, self.length = joint.shape[0], joint.ndim
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.config = SimpleNamespace(mask_token_id=self.size, max_position_embeddings=self.length)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Log of the marginals of every token given the visible ones."""
        texts = torch.tensor(list(product(range(self.size), repeat=self.length)))
        weight = self.joint.reshape(-1)
        fits = ((input_ids[:, None] == texts) | (input_ids[:, None] == self.size)).all(-1).double() * weight
        one_hot = torch.nn.functional.one_hot(texts, self.size).double()
        marginals = torch.einsum("bs,siv->biv", fits, one_hot) / fits.sum(1)[:, None, None]
        # What the mask token is given must not matter.
        return SimpleNamespace(logits=torch.cat([marginals.log(), torch.full_like(marginals[..., :1], 7.0)], -1))


def joint_lm(joint: np.ndarray, estimator: Estimator | str = "count", **options: object) -> MaskedDiffusionLM:
    """A model with the exact conditionals of a joint."""
    return MaskedDiffusionLM(JointNetwork(joint), estimator=estimator, **options)  # type: ignore[arg-type]


def random_joint(vocabulary: int, length: int, seed: int = 0) -> np.ndarray:
    """A joint without structure."""
    values = np.exp(1.5 * np.random.default_rng(seed).standard_normal((vocabulary,) * length))
    return values / values.sum()


def whole(rows: list[list[int]], prompt: int = 0) -> TokenBatch:
    """Rows whose tokens from `prompt` on are generated."""
    return TokenBatch.from_lists(rows, starts=[prompt] * len(rows), scored_from=[prompt] * len(rows))


def all_texts(vocabulary: int, length: int) -> list[list[int]]:
    """Every text."""
    return [list(text) for text in product(range(vocabulary), repeat=length)]


def empty_prompt(n: int = 1) -> TokenBatch:
    """Rows without a prompt."""
    return TokenBatch.from_lists([[] for _ in range(n)], starts=[0] * n)
