r"""An n-gram language model with interpolated modified Kneser-Ney smoothing: exact, trained and scored in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loglik.errors import InputError, RowError
from loglik.kinds import DrawsKey, Kind, Unit
from loglik.likelihood import LogLikelihood
from loglik.models.batch import TokenBatch
from loglik.models.encode import Layout, check_text
from loglik.models.kneser_ney import KneserNey, NGramCounts, count_ngrams
from loglik.models.sampling import ancestral_samples
from loglik.models.tokens import labelled

__all__ = ["NGramLM", "byte_tokenizer"]

FORMAT_VERSION = 1
_CONFIG, _ARRAYS = "loglik_ngram.json", "loglik_ngram.safetensors"
_END = "<|endoftext|>"
_CHUNK = 1 << 20  # characters that are tokenised at once


class NGramLM:
    r"""An n-gram model behind the `Model` protocol; `loglik.models.kneser_ney` has the formulas.

    .. math:: \log p(x_{s:} \mid x_{<s}) = \sum_{t \ge s} \log p(x_t \mid x_{t-N+1}, \dots, x_{t-1})

    A row is read as a causal model reads it: the context of a token is the up to N - 1 real tokens before it in its
    row, and BOS is a token like any other that stands once where a document starts. Every conditional distribution
    is positive on all V tokens of the vocabulary and sums to 1. BOS is among them: where it is also EOS (the byte
    tokenizer) it is predicted as the end, and else it only has its share of the uniform distribution that unigrams
    are interpolated with. Values and terms are float64 and carry no gradient.

    Args:
        smoothing: the estimated distributions.
        tokenizer: the transformers tokenizer of their vocabulary.
    """

    kind = Kind.EXACT
    unit = Unit.TOKEN
    layout: Layout = "causal"
    max_length: int | None = None

    def __init__(self, smoothing: KneserNey, tokenizer: Any) -> None:
        self.smoothing = smoothing
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], *, order: int = 5, tokenizer: Any = None) -> NGramLM:
        """Estimate a model from documents, each read as BOS + tokens + EOS.

        Args:
            texts: the documents; an empty one is a document that ends at once.
            order: N, the length of the longest n-grams: N - 1 tokens of context.
            tokenizer: a fast transformers tokenizer with an EOS token (which also stands for a missing BOS); by
                default `byte_tokenizer()`.

        Raises:
            InputError: for an order below 1, a tokenizer without EOS, or texts without any token.
            RowError: for a text that is no string or not Unicode, counted from 0.
        """
        if order < 1:
            raise InputError(f"order must be at least 1, got {order}")
        if isinstance(texts, str):
            raise InputError("texts must be several documents, not one string; give [text]")
        encoded = _byte_documents(texts) if tokenizer is None else _encoded_documents(texts, tokenizer)
        tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
        bos, eos = _bos(tokenizer), tokenizer.eos_token_id
        if eos is None:
            raise InputError("the tokenizer has no EOS token, which ends every training document; add one to it")
        documents = [np.concatenate(([bos], ids, [eos]), dtype=np.int32) for ids in encoded]
        if all(len(document) == 2 for document in documents):
            raise InputError("there is nothing to train on: no text has a token")
        return cls(KneserNey(count_ngrams(documents, vocab_size=_vocab_size(tokenizer), order=order)), tokenizer)

    @property
    def order(self) -> int:
        """N: a token is predicted from the N - 1 before it."""
        return self.smoothing.order

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.smoothing.vocab_size

    def log_prob(self, x: TokenBatch, *, draws: DrawsKey | None = None) -> LogLikelihood:
        """Exact log-likelihood (B,) of the scored tokens, with per-token terms (B, T), float64.

        Raises:
            ValueError: if the first token of a row is to be scored (nothing stands before it), or for a token id
                outside the vocabulary.
        """
        return self.score_tokens(x)[0]

    def score_tokens(self, x: TokenBatch) -> tuple[LogLikelihood, Tensor]:
        """`log_prob`, and (B, T) bool whether each scored token is the model's first choice (ties count)."""
        packed, origin = x.packed_left()
        packed.require_context()
        probs, best = self.smoothing.score(self._ids(packed))
        terms = torch.from_numpy(np.log(probs)).to(x.ids.device).masked_fill(~packed.scored_mask, 0.0)
        greedy = torch.from_numpy(probs >= best).to(x.ids.device) & packed.scored_mask
        return labelled(x, packed, origin, terms, greedy, kind=self.kind)

    def next_log_probs(self, prefix: TokenBatch) -> Tensor:
        """(B, V) log-probabilities of the token after each row, float64, nats; rows must not be empty."""
        packed, _ = prefix.packed_left()
        lengths = packed.prefix_lengths()
        ids = self._ids(packed)
        columns = lengths.cpu().numpy()[:, None] - np.arange(max(1, self.order - 1), 0, -1)
        context = np.where(columns >= 0, np.take_along_axis(ids, np.maximum(columns, 0), 1), -1)
        return torch.from_numpy(np.log(self.smoothing.next_probs(context))).to(prefix.ids.device)

    def sample(
        self,
        n: int,
        *,
        prompt: TokenBatch | None = None,
        generator: torch.Generator | None = None,
        max_tokens: int = 64,
    ) -> TokenBatch:
        """Ancestral samples of the model's own distribution: `n` per prompt row, each ended by EOS or `max_tokens`.

        The completion (EOS included) is scored in the returned batch; without a prompt it starts after BOS.
        """
        if prompt is None:
            prompt = TokenBatch.from_lists([[_bos(self.tokenizer)]])
        return ancestral_samples(
            self, n, prompt=prompt, generator=generator, max_tokens=max_tokens, context=max(1, self.order - 1)
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write counts (safetensors), settings (JSON) and tokenizer files into `directory`, made if it is not there.

        Raises:
            InputError: if `directory` is a file.
        """
        target = Path(directory)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{str(directory)!r} is or lies below a file; give a directory to save to") from None
        self.tokenizer.save_pretrained(str(target))
        counts = self.smoothing.counts
        arrays = {"counts.1": counts.unigrams}
        for n, (keys, values) in enumerate(zip(counts.keys, counts.counts, strict=True), start=2):
            arrays[f"keys.{n}"], arrays[f"counts.{n}"] = keys, values
        save_file(arrays, str(target / _ARRAYS))
        settings = {
            "format_version": FORMAT_VERSION,
            "order": self.order,
            "vocab_size": self.vocab_size,
            "discounts": self.smoothing.discounts,
        }
        # Last, because it is what makes the directory a model.
        (target / _CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> NGramLM:
        """Read what `save_pretrained` wrote; the values are the same to the last bit.

        Raises:
            InputError: for missing, damaged or truncated files, or another version of the format.
        """
        source = Path(directory)
        settings = _read_settings(source)
        order, vocab_size, discounts = settings["order"], settings["vocab_size"], settings["discounts"]
        try:
            arrays = load_file(str(source / _ARRAYS))
        except FileNotFoundError:
            raise InputError(f"{str(source)!r} has no {_ARRAYS}; copy the whole directory of the model") from None
        except (SafetensorError, OSError):
            raise InputError(f"{_ARRAYS} in {str(source)!r} is damaged or truncated; copy it again") from None
        wanted = {"counts.1", *(f"{kind}.{n}" for n in range(2, order + 1) for kind in ("keys", "counts"))}
        bad = set(arrays) ^ wanted or {name for name, a in arrays.items() if a.dtype != np.int64 or a.ndim != 1}
        try:
            if bad or len(arrays["counts.1"]) != vocab_size:
                raise ValueError(f"{min(bad, default='counts.1')} does not fit the settings")
            smoothing = KneserNey(
                NGramCounts(
                    arrays["counts.1"],
                    tuple(arrays[f"keys.{n}"] for n in range(2, order + 1)),
                    tuple(arrays[f"counts.{n}"] for n in range(2, order + 1)),
                ),
                discounts,
            )
        except (ValueError, TypeError) as error:
            raise InputError(f"the n-gram model in {str(source)!r} is damaged ({error}); copy it again") from None
        tokenizer = _read_tokenizer(source)
        if _vocab_size(tokenizer) != vocab_size:
            raise InputError(
                f"the tokenizer in {str(source)!r} has {_vocab_size(tokenizer)} tokens and the n-gram model has "
                f"{vocab_size}; put back the tokenizer that the model was trained with"
            )
        return cls(smoothing, tokenizer)

    def _ids(self, packed: TokenBatch) -> NDArray[np.int64]:
        """(B, T) ids as an array, after a check that all are in the vocabulary."""
        outside = (packed.ids < 0) | (packed.ids >= self.vocab_size)
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            token = int(packed.ids[row, column])
            raise ValueError(f"row {row}: token id {token} is outside the vocabulary of {self.vocab_size} tokens")
        ids: NDArray[np.int64] = packed.ids.cpu().numpy().astype(np.int64)
        return ids

    def __repr__(self) -> str:
        counts = self.smoothing.counts
        count = int((counts.unigrams > 0).sum()) + sum(len(keys) for keys in counts.keys)
        return f"{type(self).__name__}(order {self.order}, {count:,} n-grams, vocabulary {self.vocab_size:,})"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of UTF-8 bytes: token b is byte b, and 256 is ``<|endoftext|>``, both BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Printable Latin-1 characters stand for their own byte, and the characters from 256 on for the other bytes.
    own = {ord(c): c for c in alphabet if ord(c) < 256}
    others = iter(c for c in alphabet if ord(c) >= 256)
    vocab = {own[b] if b in own else next(others): b for b in range(256)} | {_END: 256}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token=_END, eos_token=_END, clean_up_tokenization_spaces=False
    )


def _bos(tokenizer: Any) -> Any:
    """The token that starts a document: BOS, or EOS where the tokenizer has no BOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _vocab_size(tokenizer: Any) -> int:
    vocab: dict[str, int] = tokenizer.get_vocab()
    return 1 + max(vocab.values())  # ids may have gaps: the number of tokens could be too small


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowError(f"a document must be a string, got {type(text).__name__}", row=f"text {number}")
        try:
            check_text(text, "text")
        except RowError as error:
            raise error.at(f"text {number}") from None
        yield text


def _byte_documents(texts: Iterable[str]) -> Iterator[NDArray[np.integer]]:
    """Token ids of `byte_tokenizer`, read off the bytes; BOS and EOS written out in a text are tokens there too."""
    for text in _checked(texts):
        parts = [np.frombuffer(part.encode("utf-8"), dtype=np.uint8) for part in text.split(_END)]
        ids = [piece for part in parts for piece in (np.array([256]), part)][1:]
        yield np.concatenate(ids, dtype=np.int32)


def _encoded_documents(texts: Iterable[str], tokenizer: Any) -> Iterator[NDArray[np.integer]]:
    """Token ids of every text without special tokens around it."""

    def encode(chunk: list[str]) -> Iterator[NDArray[np.integer]]:
        rows = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return (np.array(row, dtype=np.int32) for row in rows)

    chunk: list[str] = []
    size = 0
    for text in _checked(texts):
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield from encode(chunk)
            chunk, size = [], 0
    if chunk:
        yield from encode(chunk)


def _read_settings(source: Path) -> dict[str, Any]:
    """The settings of a saved model, of this version and with every field."""
    try:
        settings = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{str(source)!r} has no {_CONFIG}, so it holds no n-gram model; train and save one") from None
    except ValueError:
        raise InputError(f"{_CONFIG} in {str(source)!r} is damaged or truncated; copy it again") from None
    version = settings.get("format_version") if isinstance(settings, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{_CONFIG} in {str(source)!r} has format version {version}, and this version of loglik reads "
            f"{FORMAT_VERSION}; train the model again"
        )
    for name, kind in (("order", int), ("vocab_size", int), ("discounts", list)):
        if not isinstance(settings.get(name), kind):
            raise InputError(f"{_CONFIG} in {str(source)!r} gives no usable {name!r}; copy it again")
    return dict(settings)


def _read_tokenizer(source: Path) -> Any:
    if not (source / "tokenizer.json").is_file():
        raise InputError(f"{str(source)!r} has no tokenizer.json; copy the whole directory of the model")
    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception:  # the tokenizers library raises bare Exception for a damaged file
        raise InputError(f"the tokenizer in {str(source)!r} is damaged or truncated; copy it again") from None
