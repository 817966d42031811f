"""Operators of dagflow's own: attention with caches, recurrences, layers on oneDNN, quantised layers."""
