"""Scoring text: encode, cut into windows, batch, score, and write rows that survive interruptions."""

from loglik.scoring.engine import ScoreOptions, Scorer
from loglik.scoring.rows import InputRow, ScoredRow
from loglik.scoring.score import score

__all__ = ["InputRow", "ScoreOptions", "ScoredRow", "Scorer", "score"]
