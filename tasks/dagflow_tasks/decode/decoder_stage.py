"""One stage of a decoder: its weights, its sessions' caches, and what it has sent on for them.

A pass is a row of tokens that belong to any number of sessions. A stage keeps what it sends to the
next stage, by session: should that be lost, whoever replaces it gets it again, in one go, and no
other stage computes anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from dagflow_tasks.errors import ProgramInvalid, TaskFailed
from dagflow_tasks.kernels.attention import attending
from dagflow_tasks.kernels.session_cache import SessionCache, Span, whole_blocks
from dagflow_tasks.program.interpreter import Executable, RandomAddress
from dagflow_tasks.program.stage_program import StageProgram
from dagflow_tasks.tensors import TensorDict

TOKENS, POSITIONS, ROWS = "in.tokens", "in.positions", "in.rows"
NOTHING, LAST, ALL = "nothing", "last", "all"

_REMEMBERED = 1024
_NO_RANDOM = RandomAddress(0, 0, 0)


@dataclass(frozen=True)
class Part:
    """Neighbouring tokens of one session in a pass.

    Attributes
    ----------
    session : str
    epoch : int
        Counts the session's rewinds. The first tokens of a new epoch cut off what is behind them.
    start, count : int
        Position of the first token, and how many.
    deliver : int
        Position of the first token that whoever has the tokens before already is given.
    want : {"nothing", "last", "all"}
        Of which tokens to be delivered the driver wants the logits.
    origin : str
        A session whose first `start` tokens this one takes over before its own come, if it is new
        or has been rewound; empty for none.
    origin_epoch : int
    shared : int
        How many of these it has already, from the epoch before.
    """

    session: str
    epoch: int
    start: int
    count: int
    deliver: int
    want: str
    origin: str = ""
    origin_epoch: int = 0
    shared: int = 0

    @property
    def end(self) -> int:
        return self.start + self.count

    def from_position(self, position: int) -> Part:
        """Return the part without the tokens before a position."""
        if position <= self.start:
            return self
        start = min(position, self.end)
        return replace(self, start=start, count=self.end - start, origin="")


@dataclass
class _Sent:
    """What was sent on for one session: tensors by name, tokens first, in buffers of whole blocks."""

    length: int = 0
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def put(self, start: int, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            end = start + value.shape[0]
            known = self.buffers.get(name)
            if known is None or known.shape[0] < end:
                grown = value.new_empty(whole_blocks(end), *value.shape[1:], device="cpu")
                if known is not None:
                    grown[:start] = known[:start]
                self.buffers[name] = known = grown
            known[start:end] = value
            self.length = max(self.length, end)

    def take(self, begin: int, end: int) -> dict[str, torch.Tensor]:
        return {name: buffer[begin:end] for name, buffer in self.buffers.items()}

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in list(self.buffers.values()))


class DecoderStage:
    """A stage of a decoder on this machine. Not safe for several threads at once.

    Parameters
    ----------
    program : StageProgram
    device : torch.device
    weights : mapping
        Parameters and buffers by name, those included that other stages own.

    Attributes
    ----------
    num_tokens : int
        How many it has computed since it was opened, over all sessions.
    peak_cache_bytes : int
        The most that all sessions' caches have taken together.
    """

    def __init__(
        self, program: StageProgram, device: torch.device, weights: Mapping[str, torch.Tensor]
    ) -> None:
        self.program = program
        self.device = device
        self.num_tokens = 0
        self.peak_cache_bytes = 0
        self._executable = Executable(program, device)
        self._weights = {use.value: weights[use.parameter] for use in program.parameters}
        self._weights |= {use.value: weights[use.buffer] for use in program.buffers}
        self._dims = {o.value.name: _token_dim(o.value.shape, program) for o in program.outputs}
        self._dims |= {
            i.value.name: _token_dim(i.value.shape, program)
            for i in program.inputs
            if i.source is not None
        }
        self._rows = {s.name for s in _symbols(program) if s.input == ROWS}
        self.sessions: dict[str, SessionCache] = {}
        self._epochs: dict[str, int] = {}
        self._sent: dict[str, _Sent] = {}
        # Tokens may still be on their way to a session that was closed.
        self._closed: deque[str] = deque(maxlen=_REMEMBERED)

    @property
    def is_last(self) -> bool:
        return self.program.loss is not None

    @property
    def num_weight_bytes(self) -> int:
        """What its weights take."""
        return sum(tensor.nbytes for tensor in {id(t): t for t in self._weights.values()}.values())

    @property
    def num_cache_bytes(self) -> int:
        """What all sessions' caches take: keys, values, states, and what was sent on."""
        # Copied first: it may be asked for while a pass is being computed.
        caches = list(self.sessions.values())
        held = sum(cache.num_bytes + cache.num_state_bytes for cache in caches)
        return held + sum(sent.num_bytes for sent in list(self._sent.values()))

    def is_over(self, part: Part) -> bool:
        """Tell whether nobody needs a part any more: it was rewound, or its session closed."""
        rewound = part.epoch < self._epochs.get(part.session, 0)
        return rewound or part.session in self._closed

    def accepts(self, part: Part) -> bool:
        """Tell whether a part's tokens follow on those that are here.

        Of a session that is to be rewound further than states and windows reach, nothing is kept:
        tokens of its new epoch that come before those refused are sent again would be taken for
        their like.
        """
        epoch, length = self._epochs.get(part.session, 0), self._length(part.session)
        if not part.origin or part.epoch <= epoch:
            reached = part.epoch >= epoch and self._reaches(part.session, part.start)
            if not reached and part.epoch > epoch and part.session in self.sessions:
                self._forget_tokens(part)
            return reached
        has_shared = epoch == part.epoch - 1 and length >= part.shared
        has_rest = self._epochs.get(part.origin) == part.origin_epoch
        return (
            has_rest and self._reaches(part.origin, part.start) and (has_shared or not part.shared)
        )

    def run(
        self, parts: Sequence[Part], values: Mapping[str, torch.Tensor]
    ) -> tuple[list[Part], TensorDict]:
        """Compute a pass, and return what to send on: parts with their tensors, tokens first.

        The last stage returns logits (R, V) under the name ``logits``, of the tokens wanted.

        Parameters
        ----------
        parts
            Each must be accepted.
        values
            By name, tokens first: tokens, or what the stage before has sent.
        """
        spans = [Span(self._cache(part), part.start, part.count) for part in parts]
        positions = [torch.arange(p.start, p.end) for p in parts]
        rows = torch.tensor(_wanted_rows(parts), dtype=torch.int64)
        given: dict[str, torch.Tensor] = dict(self._weights)
        for item in self.program.inputs:
            name = item.value.name
            if name == POSITIONS:
                given[name] = torch.cat(positions)[None].to(self.device)
            elif name == ROWS:
                given[name] = rows.to(self.device)
            elif name == TOKENS:
                given[name] = values[name][None].to(self.device)
            else:
                given[name] = _to_dim(values[name], self._dims[name]).to(self.device)
        count = sum(part.count for part in parts)
        self.num_tokens += count
        sizes = {s: len(rows) if s in self._rows else count for s in self.program.symbols}
        if self.is_last and not len(rows):
            sizes |= dict.fromkeys(self._rows, 1)
            given[ROWS] = torch.zeros(1, dtype=torch.int64, device=self.device)
        with torch.inference_mode(), attending(spans):
            outputs = self._executable.run(given, sizes, _NO_RANDOM)
        if self.program.loss is not None:
            logits = outputs[self.program.loss][0]
            found = TensorDict({"logits": logits[: len(rows)].float().cpu()})
        else:
            sent = {n: dim for n, dim in self._dims.items() if n in outputs}
            found = TensorDict({n: _from_dim(outputs[n], dim).cpu() for n, dim in sent.items()})
            self._keep_sent(parts, found)
        if any(whole_blocks(part.start) < whole_blocks(part.end) for part in parts):
            self._note_peak()  # buffers have grown
        return list(parts), found

    def resend(self, session: str, deliver: int, want: str) -> tuple[Part, TensorDict] | None:
        """Return everything that was sent on for a session, to be sent to a new next stage."""
        sent = self._sent.get(session)
        if sent is None or not sent.length:
            return None
        part = Part(session, self._epochs.get(session, 0), 0, sent.length, deliver, want)
        return part, TensorDict(sent.take(0, sent.length))

    def close(self, session: str) -> None:
        """Forget a session, and leave out what still comes for it."""
        self._closed.append(session)
        self.sessions.pop(session, None)
        self._epochs.pop(session, None)
        self._sent.pop(session, None)

    def fork(self, session: str, new: str, length: int) -> bool:
        """Begin a session with the first tokens of another; False if those aren't here."""
        if new in self.sessions or new in self._closed:
            return True  # what it was to begin with has been sent again meanwhile, or it has ended
        if session not in self.sessions or not self._reaches(session, length):
            return False
        self._copy(session, new, 0, length)
        self._epochs[new] = 0
        return True

    def _copy(self, session: str, to: str, begin: int, end: int) -> None:
        """Have a session take over another's tokens; those before `begin` are the same already."""
        with torch.inference_mode():  # as all that is in caches was made
            self.sessions.setdefault(to, SessionCache()).copy(self.sessions[session], begin, end)
        if session in self._sent:
            sent = self._sent.setdefault(to, _Sent())
            sent.put(begin, self._sent[session].take(begin, end))
        self._note_peak()

    def _length(self, session: str) -> int:
        return self.sessions[session].length if session in self.sessions else 0

    def _reaches(self, session: str, position: int) -> bool:
        """Tell whether a session's tokens from a position on can be computed."""
        return (
            self.sessions[session].reaches(position) if session in self.sessions else not position
        )

    def _forget_tokens(self, part: Part) -> None:
        """Begin a part's epoch with no tokens of its session."""
        self.sessions[part.session] = SessionCache()
        self._epochs[part.session] = part.epoch
        self._sent.pop(part.session, None)

    def _note_peak(self) -> None:
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.num_cache_bytes)

    def _cache(self, part: Part) -> SessionCache:
        if not self.accepts(part):
            raise TaskFailed(
                f"The tokens of session {part.session} from {part.start} on don't fit."
            )
        cache = self.sessions.setdefault(part.session, SessionCache())
        if part.epoch > self._epochs.get(part.session, 0):
            if part.origin:
                self._copy(part.origin, part.session, part.shared, part.start)
            cache.rewind(part.start)
            self._epochs[part.session] = part.epoch
            if part.session in self._sent:
                sent = self._sent[part.session]
                sent.length = min(sent.length, part.start)
        self._epochs.setdefault(part.session, part.epoch)
        return cache

    def _keep_sent(self, parts: Sequence[Part], found: Mapping[str, torch.Tensor]) -> None:
        begin = 0
        for part in parts:
            end = begin + part.count
            sent = self._sent.setdefault(part.session, _Sent())
            sent.put(part.start, {name: value[begin:end] for name, value in found.items()})
            begin = end


def select(
    parts: Sequence[Part], values: Mapping[str, torch.Tensor], everything: bool
) -> tuple[list[Part], TensorDict]:
    """Return what the next stage is to get: what is to be delivered, or, rebuilt, everything."""
    if everything:
        return list(parts), TensorDict(values)
    return keep_from(parts, values, [part.deliver for part in parts])


def keep_from(
    parts: Sequence[Part], values: Mapping[str, torch.Tensor], positions: Sequence[int]
) -> tuple[list[Part], TensorDict]:
    """Return parts and their tensors without the tokens before a position of each.

    >>> parts = [Part("a", 0, 3, 2, 0, "last"), Part("b", 0, 0, 1, 0, "last")]
    >>> kept, values = keep_from(parts, {"x": torch.arange(3)}, [4, 1])
    >>> [(part.session, part.start) for part in kept], values["x"]
    ([('a', 4)], tensor([1]))
    """
    short = [part.from_position(at) for part, at in zip(parts, positions, strict=True)]
    if short == list(parts):
        return short, TensorDict(values)
    ends = accumulate(part.count for part in parts)
    tails = zip(short, ends, strict=True)
    rows = torch.tensor([r for part, end in tails for r in range(end - part.count, end)]).long()
    kept = [part for part in short if part.count]
    return kept, TensorDict({name: value[rows] for name, value in values.items()})


def join(
    passes: Sequence[tuple[Sequence[Part], Mapping[str, torch.Tensor]]],
) -> tuple[list[Part], TensorDict]:
    """Make one pass of several."""
    parts = [part for some, _ in passes for part in some]
    if len(passes) == 1:
        return parts, TensorDict(passes[0][1])
    names = passes[0][1].keys()
    return parts, TensorDict({n: torch.cat([values[n] for _, values in passes]) for n in names})


def split_logits(parts: Sequence[Part], logits: torch.Tensor) -> list[tuple[Part, torch.Tensor]]:
    """Return each part's own rows of the logits."""
    found = []
    begin = 0
    for part in parts:
        count = len(_rows_of(part))
        found.append((part, logits[begin : begin + count]))
        begin += count
    return found


def _rows_of(part: Part) -> range:
    """Which of a part's tokens' logits are wanted, counted from its first."""
    first = min(max(part.deliver - part.start, 0), part.count)
    if part.want == NOTHING or first == part.count:
        return range(0)
    return range(part.count - 1, part.count) if part.want == LAST else range(first, part.count)


def _wanted_rows(parts: Sequence[Part]) -> list[int]:
    rows: list[int] = []
    begin = 0
    for part in parts:
        rows += [begin + row for row in _rows_of(part)]
        begin += part.count
    return rows


@dataclass(frozen=True)
class _Symbol:
    name: str
    input: str


def _symbols(program: StageProgram) -> list[_Symbol]:
    """Which size each symbol stands for: the inputs say it where this stage has them."""
    found: dict[str, str] = {}
    for item in program.inputs:
        for size in item.value.shape:
            if isinstance(size, str):
                found.setdefault(size, item.value.name)
    return [_Symbol(name, found.get(name, TOKENS)) for name in program.symbols]


def _token_dim(shape: Sequence[object], program: StageProgram) -> int:
    dims = [dim for dim, size in enumerate(shape) if isinstance(size, str)]
    if len(dims) != 1:
        raise ProgramInvalid(
            f"Stage {program.stage} sends or gets a tensor of shape {list(shape)}, which isn't one row "
            "a token: cut the model between its layers."
        )
    if dims[0] == 1 and shape[0] != 1:
        raise ProgramInvalid(
            f"Stage {program.stage} sends or gets a tensor of shape {list(shape)}: its tokens come "
            f"after a dimension of {shape[0]}. Cut the model between its layers."
        )
    return dims[0]


def _to_dim(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Put a tensor that has its tokens first, and no batch, into the program's form."""
    if dim == 1:
        return value[None]
    return value.movedim(0, dim) if dim else value


def _from_dim(value: torch.Tensor, dim: int) -> torch.Tensor:
    if dim == 1:
        return value[0]
    return value.movedim(dim, 0).contiguous() if dim else value
