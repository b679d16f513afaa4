"""Decoders: functions of log-likelihoods that choose or draw sequences."""
