"""When do two answers mean the same? Equal texts, a judge of pairs, or embeddings: what semantic entropy is about.

An `Equivalence` numbers the meanings of distinct answers to one prompt. `exact_match` needs nothing, `by_hidden_states`
a model with hidden states, `by_embedding` any function from texts to vectors, `by_judge` any judge of pairs.
"""

from __future__ import annotations

import importlib
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loglik.errors import InputError, RowError
from loglik.models.batch import TokenBatch
from loglik.models.protocol import HiddenStates, require
from loglik.signals.drawing import prompt_tokens

__all__ = [
    "Equivalence",
    "by_embedding",
    "by_hidden_states",
    "by_judge",
    "exact_match",
    "mean_states",
    "meanings",
    "sentence_embedder",
]

# From a prompt and distinct answers to it to a class of meaning for each answer.
Equivalence = Callable[[str, Sequence[str]], Sequence[int]]

# Distances of states that are smaller than this share of their length are rounding.
_ROUNDING = 1e-4


def exact_match(prompt: str, texts: Sequence[str]) -> list[int]:
    """Texts mean the same if they are equal but for case, white space, articles and punctuation around words.

    Signs, decimal points and units stay, so that -5 is not 5 and 3.5 is not 35.
    """
    found: dict[str, int] = {}
    return [found.setdefault(_plain(text), len(found)) for text in texts]


def by_judge(judge: Callable[[str, str, str], bool], *, both_ways: bool = True) -> Equivalence:
    """Meanings from a judge of pairs, such as an entailment model.

    A text joins the first class with whose first text it agrees; where the judge is not transitive, the order counts.

    Args:
        judge: whether the second text follows from the first: ``judge(prompt, first, second)``.
        both_ways: join texts only if each follows from the other.

    Source: arXiv 2302.09664.
    """

    def classes(prompt: str, texts: Sequence[str]) -> list[int]:
        def agree(i: int, j: int) -> bool:
            return judge(prompt, texts[i], texts[j]) and (not both_ways or judge(prompt, texts[j], texts[i]))

        return _agglomerate(len(texts), agree)

    return classes


def by_embedding(embed: Callable[[Sequence[str]], Any], *, threshold: float = 0.9) -> Equivalence:
    """Meanings from embeddings: a text joins the first class whose first text has a cosine of at least `threshold`.

    Texts without a visible character have one meaning, their own, and are not embedded.

    Args:
        embed: from M texts to (M, D) numbers.
        threshold: in [-1, 1]; `loglik.signals.metacognition.fit_threshold` fits it on labelled pairs.

    Raises:
        InputError: for a threshold out of range; when used, for embeddings of another shape, 0 or not finite.
    """
    if not -1 <= threshold <= 1:
        raise InputError(f"threshold must lie in [-1, 1], got {threshold}")

    def classes(prompt: str, texts: Sequence[str]) -> list[int]:
        said = [row for row, text in enumerate(texts) if text.strip()]
        near = _near(embed, [texts[row] for row in said], threshold) if said else []
        place = {row: number for number, row in enumerate(said)}

        def agree(i: int, j: int) -> bool:
            return near[place[i]][place[j]] if i in place and j in place else (i in place) == (j in place)

        return _agglomerate(len(texts), agree)

    return classes


def by_hidden_states(model: Any, *, threshold: float = 0.9, centre: Sequence[str] = ()) -> Equivalence:
    r"""Meanings from the model's own hidden states: `by_embedding` of `mean_states`, without another package.

    .. math:: \cos(e_i - \bar e, e_j - \bar e) \ge \text{threshold}, \qquad
              e = \frac1T \sum_t h_t, \quad \bar e \text{ the mean of } e \text{ over } \texttt{centre}

    Hidden states of all texts point in much the same direction. Without its mean taken off, the cosine of two unrelated
    texts is far above 0 (arXiv 1702.01417): give texts of the same sort, such as the prompts, as `centre`. States tell
    what a text is about better than what it claims: a "yes" and a "no" are close. Where answers contradict one another
    in a word, take `exact_match` or an entailment model in `by_judge`, and fit the threshold on labelled pairs
    (`loglik.signals.metacognition.fit_threshold`).

    Args:
        model: has hidden states and a tokenizer; not necessarily the one that answers.
        threshold: least cosine of one meaning, in [-1, 1].
        centre: texts whose mean is subtracted; none subtracts nothing.

    Raises:
        InputError: for a model without hidden states or tokenizer, or a threshold out of range; when used, for a text
            whose state is the centre itself.
        RowError: for a text that does not fit into the context.
    """
    require(model, HiddenStates, "equivalence by hidden states")  # type: ignore[type-abstract]
    if isinstance(centre, str):
        raise InputError("centre must be several texts, not one string; give [text]")
    origin = mean_states(model, centre).double().mean(0) if len(centre) else None

    def embed(texts: Sequence[str]) -> Tensor:
        found = mean_states(model, texts).double()
        if origin is None:
            return found
        moved = found - origin
        # What is left of a text that is the centre itself is rounding, and has no direction.
        return moved.masked_fill((moved.norm(dim=1) < _ROUNDING * found.norm(dim=1))[:, None], 0.0)

    return by_embedding(embed, threshold=threshold)


@torch.no_grad()
def mean_states(model: Any, texts: Sequence[str], *, batch_size: int = 16) -> Tensor:
    r"""Mean hidden state of each text, over its own tokens: :math:`\frac1T \sum_t h_t`.

    A BOS before the text counts only where there is nothing else: its state is the same for all texts, and large.

    Args:
        model: has hidden states and a tokenizer.
        texts: N texts.
        batch_size: rows per forward pass; the states do not depend on it.

    Returns:
        (N, D) float32 or better.

    Raises:
        InputError: for a model without hidden states or tokenizer, no texts, or a batch size below 1.
        RowError: for a text that does not fit into the context, or is empty where the tokenizer has no BOS.
    """
    states = require(model, HiddenStates, "a mean hidden state")  # type: ignore[type-abstract]
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    batch = prompt_tokens(model, texts)
    rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.attention_mask, strict=True)]
    limit = getattr(model, "max_length", None)
    for number, row in enumerate(rows):
        if limit is not None and len(row) > limit:
            raise RowError(f"has {len(row)} tokens and the model's context is {limit}: cut it", row=f"text {number}")
    bos = getattr(model.tokenizer, "bos_token_id", None)
    out = []
    for begin in range(0, len(rows), batch_size):
        part = rows[begin : begin + batch_size]
        given = TokenBatch.from_lists(part, starts=[len(row) for row in part])
        found = states.hidden_states(given)
        wide = found if found.dtype == torch.float64 else found.float()
        kept = given.attention_mask & ~((given.ids == bos) & (torch.arange(given.ids.shape[1]) == 0))
        kept = torch.where(kept.any(1, keepdim=True), kept, given.attention_mask).to(wide.device)
        out.append((wide * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))
    return torch.cat(out)


def sentence_embedder(directory: str | Path) -> Callable[[Sequence[str]], Any]:
    """Embeddings by a model of the package sentence-transformers, for `by_embedding`.

    Args:
        directory: with the model (in safetensors); nothing is downloaded.

    Raises:
        InputError: where the package is not installed, or the directory holds no such model.
    """
    if not Path(directory).is_dir():
        raise InputError(f"{directory} is no directory: give one with a sentence-transformers model")
    try:
        package = importlib.import_module("sentence_transformers")
    except ImportError:
        raise InputError(
            "sentence embeddings need the package sentence-transformers: install it, or compare by hidden states"
        ) from None
    try:
        encoder = package.SentenceTransformer(
            str(directory), local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory} holds no sentence-transformers model that can be read: {error}") from None
    return lambda texts: encoder.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)


def meanings(equivalence: Equivalence, prompt: str, texts: Sequence[str]) -> list[int]:
    """Class of each text; `equivalence` sees each distinct text once.

    Raises:
        InputError: if it does not give a class for each.
    """
    distinct = list(dict.fromkeys(texts))
    classes = [int(number) for number in equivalence(prompt, distinct)]
    if len(classes) != len(distinct):
        raise InputError(f"equivalence must give a class for each of {len(distinct)} texts, got {len(classes)}")
    of = dict(zip(distinct, classes, strict=True))
    return [of[text] for text in texts]


def _agglomerate(count: int, agree: Callable[[int, int], bool]) -> list[int]:
    """Each item joins the first class with whose first item it agrees, or begins one."""
    heads: list[int] = []
    out = []
    for row in range(count):
        number = next((n for n, head in enumerate(heads) if agree(head, row)), len(heads))
        if number == len(heads):
            heads.append(row)
        out.append(number)
    return out


def _near(embed: Callable[[Sequence[str]], Any], texts: Sequence[str], threshold: float) -> list[list[bool]]:
    """Whether the cosine of each pair of texts is at least the threshold."""
    vectors = torch.as_tensor(embed(texts)).detach().double()
    if vectors.dim() != 2 or len(vectors) != len(texts):
        raise InputError(f"embed must give ({len(texts)}, D) numbers for as many texts, got {tuple(vectors.shape)}")
    norms = vectors.norm(dim=1, keepdim=True)
    bad = (~(torch.isfinite(norms) & (norms > 0))).flatten().nonzero()
    if len(bad):
        raise InputError(f"the embedding of {texts[int(bad[0])]!r} is 0 or not finite: give another embed")
    near: list[list[bool]] = ((vectors / norms) @ (vectors / norms).T >= threshold - 1e-9).tolist()
    return near


def _plain(text: str) -> str:
    """What `exact_match` compares."""
    folded = unicodedata.normalize("NFKC", text).casefold().split()
    words = [word.lstrip("\"'([{").rstrip("\"')]}.,;:!?") for word in folded]
    kept = [word for word in words if word and word not in ("a", "an", "the")]
    return " ".join(kept) if kept else " ".join(folded)  # "A" and "?" are answers too
