"""Keys and values of sessions' tokens, layer by layer, and where a pass finds them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dagflow_tasks.kernels.states import RecurrentState

# Caches grow by so many tokens: what is reserved for a session is what it takes, and all decode steps
# but one in so many copy nothing.
BLOCK_TOKENS = 32


# Layers with a window keep so many tokens more than it shows: a session can be rewound by these
# (wrong guesses) without anything being computed again.
KEPT_BEHIND_TOKENS = 2 * BLOCK_TOKENS


def whole_blocks(num_tokens: int) -> int:
    """Return how many tokens a cache for so many has room for.

    >>> whole_blocks(0), whole_blocks(1), whole_blocks(32), whole_blocks(33)
    (0, 32, 32, 64)
    """
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True)
class Reach:
    """Which tokens one sees in a layer that doesn't see all of them.

    Attributes
    ----------
    window : int
        How many tokens back, itself included; 0 for all.
    chunk : int
        Those of its own chunk of so many tokens; 0 for no chunks.
    """

    window: int
    chunk: int

    def first(self, position: int) -> int:
        """Return the first position that a token sees.

        >>> Reach(4, 0).first(10), Reach(4, 0).first(2), Reach(0, 4).first(10)
        (7, 0, 8)
        """
        low = max(0, position - self.window + 1) if self.window else 0
        return max(low, position // self.chunk * self.chunk) if self.chunk else low

    def first_kept(self, end: int) -> int:
        """Return the first position that a cache keeps which reaches up to another, exclusive."""
        return max(0, self.first(end) - KEPT_BEHIND_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def most_tokens(self) -> int:
        """How many tokens a layer's cache has room for at most."""
        shown = min(size for size in (self.window, self.chunk) if size)
        return whole_blocks(shown - 1 + KEPT_BEHIND_TOKENS + BLOCK_TOKENS - 1)


@dataclass
class LayerCache:
    """Keys and values of one session in one layer.

    Attributes
    ----------
    keys, values : Tensor (H, C, D)
        By key head; the first tokens of the capacity C are in use.
    first : int
        Position of the first one.
    reach : Reach or None
        Of a layer that keeps no more than its window or chunk needs; None if it keeps everything.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: int = 0
    reach: Reach | None = None

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass
class SessionCache:
    """What a stage remembers of one sequence.

    Attributes
    ----------
    length : int
        Tokens of the sequence so far.
    layers : dict
        By the layer's number in the model.
    states : dict
        Of recurrent operators, by their number in the model.
    num_bytes : int
        What keys and values take, used or not.
    """

    length: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    states: dict[int, RecurrentState] = field(default_factory=dict)
    num_bytes: int = 0

    @property
    def num_state_bytes(self) -> int:
        """What its states take."""
        return sum(state.num_bytes for state in list(self.states.values()))

    def reaches(self, position: int) -> bool:
        """Tell whether tokens from a position on can be computed."""
        if position == 0 or position > self.length:
            return position == 0
        windows = ((c.first, c.reach) for c in self.layers.values() if c.reach is not None)
        return all(state.reaches(position) for state in self.states.values()) and (
            position == self.length
            or all(first <= reach.first(position) for first, reach in windows)
        )

    def rewind(self, position: int) -> None:
        """Forget the tokens from a position on, which it must reach."""
        self.length = position
        self.states = {number: state.upto(position) for number, state in self.states.items()}

    def put(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put tokens at a position, and return all keys and values (H, L, D) up to them."""
        end = start + keys.shape[1]
        cache = self.layers.get(layer)
        if cache is None or cache.keys.shape[1] < end:
            self.num_bytes -= cache.num_bytes if cache is not None else 0
            cache = self._grown(cache, start, end, keys, values)
            self.num_bytes += cache.num_bytes
            self.layers[layer] = cache
        cache.keys[:, start:end] = keys
        cache.values[:, start:end] = values
        return cache.keys[:, :end], cache.values[:, :end]

    def put_within(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor, reach: Reach
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Put tokens at a position, and return the keys and values that these see.

        What no later token will see is dropped.

        Returns
        -------
        keys, values : Tensor (H, L, D)
        first : int
            Position of the first one.
        """
        end, low = start + keys.shape[1], reach.first(start)
        cache = self.layers.get(layer)
        if cache is None or low < cache.first:
            assert start == 0, "tokens that the window shows were dropped"
            cache = LayerCache(keys[:, :0], values[:, :0], 0, reach)
        begin, shown = start - cache.first, slice(low - cache.first, end - cache.first)
        if end - cache.first <= cache.keys.shape[1]:
            cache.keys[:, begin : shown.stop] = keys
            cache.values[:, begin : shown.stop] = values
            return cache.keys[:, shown], cache.values[:, shown], low
        kept = slice(max(cache.first, reach.first_kept(end)) - cache.first, begin)
        all_keys = torch.cat([cache.keys[:, :begin], keys], 1)
        all_values = torch.cat([cache.values[:, :begin], values], 1)
        self._replace(layer, all_keys, all_values, cache.first, kept.start, reach)
        return all_keys[:, shown], all_values[:, shown], low

    def _replace(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        first: int,
        skipped: int,
        reach: Reach,
    ) -> None:
        """Keep tokens from position `first` on, but for some at their beginning."""
        old, count = self.layers.get(layer), keys.shape[1] - skipped
        capacity = whole_blocks(count)
        new = LayerCache(
            keys.new_empty(keys.shape[0], capacity, keys.shape[2]),
            values.new_empty(values.shape[0], capacity, values.shape[2]),
            first + skipped,
            reach,
        )
        new.keys[:, :count] = keys[:, skipped:]
        new.values[:, :count] = values[:, skipped:]
        self.layers[layer] = new
        self.num_bytes += new.num_bytes - (old.num_bytes if old is not None else 0)

    def copy(self, other: SessionCache, begin: int, end: int) -> None:
        """Take over another's tokens up to `end`; those before `begin` are the same already."""
        for layer, cache in other.layers.items():
            if cache.reach is None:
                self.put(layer, begin, cache.keys[:, begin:end], cache.values[:, begin:end])
            else:
                self._copy_within(layer, cache, cache.reach, begin, end)
        self.states = {number: state.upto(end) for number, state in other.states.items()}
        self.length = end

    def _copy_within(
        self, layer: int, cache: LayerCache, reach: Reach, begin: int, end: int
    ) -> None:
        own, low = self.layers.get(layer), reach.first(begin)
        if own is not None and own.first <= low and cache.first <= begin:
            new = slice(begin - cache.first, end - cache.first)
            self.put_within(layer, begin, cache.keys[:, new], cache.values[:, new], reach)
            return
        count = end - cache.first
        skipped = max(0, reach.first_kept(end) - cache.first)
        keys, values = cache.keys[:, :count], cache.values[:, :count]
        self._replace(layer, keys, values, cache.first, skipped, reach)

    @staticmethod
    def _grown(
        cache: LayerCache | None, start: int, end: int, keys: torch.Tensor, values: torch.Tensor
    ) -> LayerCache:
        capacity = whole_blocks(end)
        new = LayerCache(
            keys.new_empty(keys.shape[0], capacity, keys.shape[2]),
            values.new_empty(values.shape[0], capacity, values.shape[2]),
        )
        if cache is not None and start:
            new.keys[:, :start] = cache.keys[:, :start]
            new.values[:, :start] = cache.values[:, :start]
        return new


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a pass that belong to one session.

    Attributes
    ----------
    cache : SessionCache or None
        None for a sequence that nobody goes on with: nothing is kept.
    start, count : int
        Position of the first token, and how many. The cache must reach as far as `start`; tokens
        that it has from there on are computed again.
    """

    cache: SessionCache | None
    start: int
    count: int
