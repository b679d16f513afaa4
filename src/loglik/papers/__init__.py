"""The catalogue of papers: what each computes, what implements it here, what was reproduced."""

from loglik.papers.catalogue import Paper, Status, papers, search

__all__ = ["Paper", "Status", "papers", "search"]
