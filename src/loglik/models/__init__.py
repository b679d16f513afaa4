"""Everything with a likelihood, behind one protocol."""

from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.encode import EncodedText, TextEncoder
from loglik.models.load import load
from loglik.models.masked import MaskedLM
from loglik.models.ngram import NGramLM
from loglik.models.protocol import ChainRule, EvidenceTerms, HiddenStates, Model, Sampler, TextModel, require
from loglik.models.seq2seq import Seq2SeqLM

__all__ = [
    "CausalLM",
    "ChainRule",
    "EncodedText",
    "EvidenceTerms",
    "HiddenStates",
    "MaskedLM",
    "Model",
    "NGramLM",
    "Sampler",
    "Seq2SeqLM",
    "TextEncoder",
    "TextModel",
    "TokenBatch",
    "load",
    "require",
]
