"""From logits to the next token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from numbers import Real
from operator import index
from typing import Any

import torch

from dagflow.arguments import is_whole, shown
from dagflow.errors import SettingsInvalid

# Logits are float32: beyond these, products, quotients and sums of them may be infinite, or NaN. A
# bias of -1e6 leaves a token no share, as minus infinity would, and differences stay numbers.
LARGEST = 1e6
LEAST_REPETITION_PENALTY = 1 / LARGEST
# Quotients of float32 by less may be infinite.
_SMALL_TEMPERATURE = 1e-30
_WHOLE = ("top_k", "seed")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedily by default. Steps apply in the order of these attributes.

    Attributes
    ----------
    repetition_penalty : float
        Logits of tokens that occurred are divided by it if positive, multiplied if negative
        (CTRL, arXiv 1909.05858). 1e-6 to 1e6; 1 for none.
    frequency_penalty : float
        Taken from a token's logit for each time that it occurs in the answer so far.
    presence_penalty : float
        Taken from a token's logit once if it occurs in the answer so far. Both up to 1e6.
    logit_bias : mapping of int to float
        Added to the logits of these tokens; up to 1e6. Minus infinity counts as -1e6.
    temperature : float
        0 takes the most likely token; up to 1e6.
    top_k : int
        Keep the k most likely tokens; 0 for all.
    top_p : float
        Keep the most likely tokens that make up so much probability (arXiv 1904.09751).
    min_p : float
        Keep tokens with at least so much of the most likely one's probability (arXiv 2407.01082).
    seed : int
        The same seed chooses the same tokens, whatever happens to the machines. Above -2**64 and
        below 2**64.

    Raises
    ------
    SettingsInvalid
        If an option can't be; no logits make these options choose nothing.
    """

    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            as_python = _biases if name == "logit_bias" else _whole if name in _WHOLE else _number
            object.__setattr__(self, name, as_python(name, value))
        low, high = LEAST_REPETITION_PENALTY, LARGEST
        checks = {
            "repetition_penalty": (
                low <= self.repetition_penalty <= high,
                f"positive, from {low:g} to {high:g}",
            ),
            "frequency_penalty": (abs(self.frequency_penalty) <= high, f"finite, up to {high:g}"),
            "presence_penalty": (abs(self.presence_penalty) <= high, f"finite, up to {high:g}"),
            "temperature": (0 <= self.temperature <= high, f"0 or positive, up to {high:g}"),
            "top_k": (self.top_k >= 0, "0 or positive"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "seed": (abs(self.seed) < 2**64, "above -2**64 and below 2**64"),
        }
        for name, (fits, wanted) in checks.items():
            if not fits:
                raise SettingsInvalid(
                    f"{name} must be {wanted}; found {shown(getattr(self, name))}."
                )

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Sampling:
        """Return the sampling that options say.

        Raises
        ------
        SettingsInvalid
            If there is no such option.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise SettingsInvalid(
                f"There is no sampling option {unknown[0]!r}; there are {', '.join(known)}."
            )
        return cls(**options)  # type: ignore[arg-type]

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def adjusted(
        self, logits: torch.Tensor, tokens: Sequence[int], num_prompt: int = 0
    ) -> torch.Tensor:
        """Return logits (V,) after penalties and bias; the first tokens are the prompt's."""
        if self.repetition_penalty != 1.0 and tokens:
            seen = torch.tensor(sorted(set(tokens)))
            found = logits[seen]
            penalty = self.repetition_penalty
            logits = logits.clone()
            logits[seen] = torch.where(found < 0, found * penalty, found / penalty)
        if self.frequency_penalty or self.presence_penalty:
            logits = logits.clone()
            for token, count in Counter(tokens[num_prompt:]).items():
                logits[token] -= count * self.frequency_penalty + self.presence_penalty
        if self.logit_bias:
            logits = logits.clone()
            given = [max(bias, -LARGEST) for bias in self.logit_bias.values()]
            biases = torch.tensor(given, dtype=logits.dtype)
            logits[list(self.logit_bias)] += biases
        return logits

    def choose(self, logits: torch.Tensor, tokens: Sequence[int], num_prompt: int = 0) -> int:
        """Return the token that follows `tokens`, given the logits (V,) at its place."""
        logits = self.adjusted(logits, tokens, num_prompt)
        if self.is_greedy:
            return int(logits.argmax())
        kept = _kept(self._tempered(logits), self.top_k, self.top_p, self.min_p)
        generator = torch.Generator().manual_seed(self._seed_at(len(tokens)))
        return int(torch.multinomial(torch.softmax(kept, -1), 1, generator=generator))

    def _tempered(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature >= _SMALL_TEMPERATURE:
            return logits / self.temperature
        # Only differences count: the most likely one's is 0, whatever it is divided by.
        differences: torch.Tensor = logits.double() - logits.max()
        return differences / self.temperature

    def _seed_at(self, position: int) -> int:
        digest = blake2b(f"{self.seed}/{position}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _kept(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Return logits with those left out set to minus infinity."""
    if 0 < top_k < logits.numel():
        least = torch.topk(logits, top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = torch.sort(logits, descending=True)
        shares = torch.softmax(ordered, -1)
        beyond = shares.cumsum(-1) - shares >= top_p
        beyond[0] = False  # the most likely one stays, also where top_p is 0 as a float32
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -math.inf)
    if min_p > 0:
        shares = torch.softmax(logits, -1)
        logits = logits.masked_fill(shares < min_p * shares.max(), -math.inf)
    return logits


def _number(name: str, value: Any) -> int | float:
    """Return an option as Python's own number, which is kept and sent as JSON."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise SettingsInvalid(f"{name} is a number; found {shown(value)}.")
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf  # and refused
    return value if isinstance(value, int) and abs(value) <= LARGEST else as_float


def _whole(name: str, value: Any) -> int:
    if not is_whole(value):
        raise SettingsInvalid(f"{name} is a whole number; found {shown(value)}.")
    return index(value)


def _biases(name: str, value: Any) -> dict[int, int | float]:
    if not isinstance(value, Mapping):
        raise SettingsInvalid(f"{name} is a bias for each of some tokens; found {shown(value)}.")
    found = {_whole(f"A token of {name}", token): _number(name, value[token]) for token in value}
    for token, bias in found.items():
        if token < 0:
            raise SettingsInvalid(f"{name} names token {shown(token)}; tokens count from 0.")
        if not (abs(bias) <= LARGEST or bias == -math.inf):
            raise SettingsInvalid(f"{name} is finite, up to {LARGEST:g}; found {shown(bias)}.")
    return found
