"""From logits to the next token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from numbers import Real

import torch

from dagflow.errors import SettingsInvalid


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedily by default. Steps apply in the order of these attributes.

    Attributes
    ----------
    repetition_penalty : float
        Logits of tokens that occurred are divided by it if positive, multiplied if negative
        (CTRL, arXiv 1909.05858). 1 for none.
    frequency_penalty : float
        Taken from a token's logit for each time that it occurs in the answer so far.
    presence_penalty : float
        Taken from a token's logit once if it occurs in the answer so far.
    logit_bias : mapping of int to float
        Added to the logits of these tokens.
    temperature : float
        0 takes the most likely token.
    top_k : int
        Keep the k most likely tokens; 0 for all.
    top_p : float
        Keep the most likely tokens that make up so much probability (arXiv 1904.09751).
    min_p : float
        Keep tokens with at least so much of the most likely one's probability (arXiv 2407.01082).
    seed : int
        The same seed chooses the same tokens, whatever happens to the machines.
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
            value = getattr(self, option.name)
            if option.name != "logit_bias" and not isinstance(value, Real):
                raise SettingsInvalid(f"{option.name} is a number; found {value!r}.")
        checks = {
            "repetition_penalty": (self.repetition_penalty > 0, "positive"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "finite"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "finite"),
            "temperature": (self.temperature >= 0, "0 or positive"),
            "top_k": (self.top_k >= 0, "0 or positive"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
        }
        for name, (fits, wanted) in checks.items():
            if not fits:
                raise SettingsInvalid(f"{name} must be {wanted}; found {getattr(self, name)}.")

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
            biases = torch.tensor(list(self.logit_bias.values()), dtype=logits.dtype)
            logits[list(self.logit_bias)] += biases
        return logits

    def choose(self, logits: torch.Tensor, tokens: Sequence[int], num_prompt: int = 0) -> int:
        """Return the token that follows `tokens`, given the logits (V,) at its place."""
        logits = self.adjusted(logits, tokens, num_prompt)
        if self.is_greedy:
            return int(logits.argmax())
        kept = _kept(logits / self.temperature, self.top_k, self.top_p, self.min_p)
        generator = torch.Generator().manual_seed(self._seed_at(len(tokens)))
        return int(torch.multinomial(torch.softmax(kept, -1), 1, generator=generator))

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
        beyond = shares.cumsum(-1) - shares >= top_p  # the most likely one always stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -math.inf)
    if min_p > 0:
        shares = torch.softmax(logits, -1)
        logits = logits.masked_fill(shares < min_p * shares.max(), -math.inf)
    return logits
