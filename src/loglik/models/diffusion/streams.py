"""Random numbers of a row: a function of the key and of the row alone.

Whatever else is in the batch, a row draws the same masks; another model that is given the same key draws them too
(common random numbers), so that differences between models carry little noise.
"""

from __future__ import annotations

import hashlib

import numpy as np

from loglik.kinds import DrawsKey
from loglik.models.batch import TokenBatch

__all__ = ["row_streams", "stream_key"]


def stream_key(draws: DrawsKey | None, seed: int, estimator: object) -> DrawsKey:
    """The key of one estimator's random numbers; without `draws`, the model's own `seed` names them."""
    names = sorted(draws.ids) if draws is not None else [f"seed {seed}"]
    return DrawsKey.of(f"{'+'.join(names)}/{estimator}")


def row_streams(key: DrawsKey, packed: TokenBatch) -> list[np.random.Generator]:
    """A generator for each left-aligned row, seeded by the key, the row's tokens and which of them are scored."""
    out = []
    name = "+".join(sorted(key.ids)).encode()
    lengths = packed.attention_mask.sum(1).tolist()
    ids, scored = packed.ids.cpu().numpy(), packed.scored_mask.cpu().numpy()
    for row, marks, length in zip(ids, scored, lengths, strict=True):
        found = hashlib.blake2b(name, digest_size=16)
        found.update(np.ascontiguousarray(row[:length]).tobytes())
        found.update(np.ascontiguousarray(marks[:length]).tobytes())
        out.append(np.random.Generator(np.random.Philox(key=np.frombuffer(found.digest(), dtype=np.uint64))))
    return out
