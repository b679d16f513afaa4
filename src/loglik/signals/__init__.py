"""Signals: decisions from log-likelihoods."""
