"""Faults on purpose: real processes, a script of what happens to them, and what must still be true.

See `faults` for what may happen, `harness` for how it is made to happen, and `accounting` for what
is asked afterwards.
"""
