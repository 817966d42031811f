"""Which of the messages that wait for a stage are computed together, and which nobody needs any more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dagflow.swarm.links import Message
from dagflow_tasks.decode.decoder_stage import Part

# A pass that is too long holds up everybody's next token.
MOST_TOKENS = 512


def together(waiting: Sequence[Message]) -> list[Message]:
    """Return the first messages that make one pass; none if the first isn't a pass.

    >>> parts = [[Part(session, 0, 0, 1, 0, "last")] for session in "abc"]
    >>> message = {"kind": "pass", "rebuilt": []}
    >>> [len(together([{**message, "parts": p, "most_sessions": m} for p in parts])) for m in (1, 2)]
    [1, 2]
    """
    found: list[Message] = []
    tokens = 0
    sessions: set[str] = set()
    for message in waiting:
        if message["kind"] != "pass" or (found and message["rebuilt"] != found[0]["rebuilt"]):
            break
        parts = message["parts"]
        own = {name for part in parts for name in (part.session, part.origin) if name}
        tokens += sum(part.count for part in parts)
        # Tokens of one session come one part after the other, and before those of its copies.
        if found and (tokens > MOST_TOKENS or own & sessions):
            break
        if found and len(own | sessions) > message.get("most_sessions", math.inf):
            break
        sessions |= own
        found.append(message)
    return found


def rewound(waiting: Sequence[Message]) -> dict[str, tuple[int, int]]:
    """Return from where on the sessions that wait begin anew: the newest epoch, and its first token."""
    found: dict[str, tuple[int, int]] = {}
    for message in waiting:
        for part in message["parts"] if message["kind"] == "pass" else ():
            if part.epoch > found.get(part.session, (0, 0))[0]:
                found[part.session] = (part.epoch, part.start)
    return found


def is_rewound(part: Part, newest: Mapping[str, tuple[int, int]]) -> bool:
    """Tell whether all of a part's tokens will be cut off, by what `rewound` has returned."""
    epoch, start = newest.get(part.session, (0, 0))
    return part.epoch < epoch and start <= part.start
