"""Answers that are kept in a store: what is written of them, and what is found again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from dagflow.errors import DamagedData, SettingsInvalid, StoreHoldsAnotherRun
from dagflow.models.model import Model
from dagflow.serving.answers import Chosen, Logprobs, Request, Telling, Token
from dagflow.serving.keeping import ANSWER, Keeper, Record
from dagflow_storage import StoredSequence, settings_diff
from dagflow_storage.place import fields
from dagflow_storage.place.documents import encode_document, read_document, sound

_CALL, _CALL_FORMAT = "generate.json", 1
_PARALLEL_READS = 16
_MOST_DIFFERENCES, _MOST_CHARACTERS = 10, 200


@dataclass(frozen=True)
class StoredAnswer:
    """An answer as the store has it, finished or not.

    Attributes
    ----------
    name : str
    request : Request
    begun : float
        When, in seconds since 1970, by the clock of the driver that began it.
    tokens : tuple of int
        Those that were written.
    text : str
        The text that is certain after them; empty without a tokenizer.
    finish_reason : str or None
        "stop" or "length"; None if there are tokens to come.
    """

    name: str
    request: Request
    begun: float
    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None


def take_up_answers(
    keeper: Keeper | None, model: Model, requests: Sequence[Request]
) -> list[Record | None]:
    """Return the records of those requests that have names, of new answers or kept ones.

    Raises
    ------
    StoreHoldsAnotherRun
        If another answer is kept under a name; says what differs.
    SessionInUse, LeaseLost, DamagedData, StoreUnreachable
    """
    if keeper is None:
        return [None] * len(requests)
    names = [request.name for request in requests if request.name is not None]
    if len(set(names)) < len(names):
        raise SettingsInvalid("Two answers at once have the same name.")
    records: list[Record | None] = []
    try:
        # One after the other where nothing is read.
        known = set(keeper.names())
        workers = min(_PARALLEL_READS, sum(name in known for name in names)) or 1
        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(lambda request: _take_up(keeper, model, request), requests)
            for record in found:
                records.append(record)
    except BaseException:
        close(records)
        raise
    return records


def close(records: Sequence[Record | None]) -> None:
    """Let others take answers up."""
    for record in records:
        if record is not None:
            record.close()


def chosen_so_far(record: Record | None) -> list[Chosen]:
    """Return the tokens that an answer's record was found with."""
    return [] if record is None or record.found is None else _chosen(record.found)


def note(record: Record, position: int, token: Token) -> None:
    """Keep a token, the answer's n-th."""
    assert token.token is not None
    details = None if token.logprobs is None else [token.logprobs.to_numbers()]
    record.add(position, [token.token], details, token.finish_reason)


def stored_answers(keeper: Keeper, model: Model) -> list[StoredAnswer]:
    """Return the model's answers that are kept and nobody is making, the oldest first."""
    found = keeper.stored().items()
    answers = []
    for name, one in found:
        if _is_of(model, one):
            try:
                answers.append(_stored_answer(model, name, one))
            except DamagedData as error:
                keeper.note(str(error))
    return sorted(answers, key=lambda answer: (answer.begun, answer.name))


def named(keeper: Keeper, model: Model, requests: Sequence[Request]) -> list[Request]:
    """Return the requests of one call with names to keep them by, unless the store has another call's.

    Raises
    ------
    StoreHoldsAnotherRun
        Says what differs.
    """
    wanted: dict[str, Any] = {"model": model.ref.name, "num_prompts": len(requests)}
    wanted["prompts"] = {str(n): _fingerprint(request) for n, request in enumerate(requests)}
    wanted["options"] = {k: v for k, v in requests[0].to_json().items() if k != "prompt"}
    # One call's options differ by prompt where the model leaves less room.
    wanted["options"]["max_new_tokens"] = [request.max_new_tokens for request in requests]
    document = encode_document(_CALL_FORMAT, {"settings": wanted})
    if not keeper.store.create_bytes(_CALL, document):
        theirs = read_document(keeper.store, _CALL, _CALL_FORMAT).get("settings", {})
        with sound(f"{_CALL} in {keeper.store!r} is that of no call"):
            fields.members(theirs, "settings")
        difference = settings_diff(theirs, json.loads(json.dumps(wanted)))
        if difference:
            raise StoreHoldsAnotherRun(
                f"{keeper.store} holds the answers of another call of generate:\n  "
                + "\n  ".join(shortened(difference))
                + "\nUse another store=, or the same model, prompts and options as before."
            )
    return [replace(request, name=f"prompt-{n:06d}") for n, request in enumerate(requests)]


def _fingerprint(request: Request) -> str:
    digest = blake2b(json.dumps(request.prompt).encode(), digest_size=6).hexdigest()
    return f"{len(request.prompt)} tokens, {digest}"


def _take_up(keeper: Keeper, model: Model, request: Request) -> Record | None:
    if request.name is None:
        return None
    wanted = request.to_json()
    head = {"kind": ANSWER, "model": model.ref.name, "begun": time.time(), "request": wanted}
    record = keeper.take_up(request.name, head)
    if record.found is not None:
        try:
            _check_same(keeper, request.name, record.found, head)
        except BaseException:
            record.close()
            raise
    return record


def _check_same(keeper: Keeper, name: str, found: StoredSequence, head: dict[str, Any]) -> None:
    parts = ("kind", "model", "request")
    theirs = {part: found.head.get(part) for part in parts}
    difference = settings_diff(theirs, {part: head[part] for part in parts})
    if difference:
        raise StoreHoldsAnotherRun(
            f"{keeper.store} keeps something else under the name {name!r}:\n  "
            + "\n  ".join(shortened(difference))
            + "\nUse another name, ask the same as before, or forget what is there."
        )


def shortened(differences: Sequence[str]) -> list[str]:
    """Return differences as people can read them."""
    shown = [line[:_MOST_CHARACTERS] for line in differences[:_MOST_DIFFERENCES]]
    more = len(differences) - len(shown)
    return [*shown, f"and {more} more"] if more else shown


def _is_of(model: Model, found: StoredSequence) -> bool:
    return (found.head.get("kind"), found.head.get("model")) == (ANSWER, model.ref.name)


def _stored_answer(model: Model, name: str, found: StoredSequence) -> StoredAnswer:
    with _whole(f"what is kept as {name!r}"):
        request = Request.from_json(found.head["request"], name)
        begun = fields.number(found.head["begun"], "begun")
    telling = Telling(model, request, 0)
    said = [telling.say(one) for one in _chosen(found)]
    return StoredAnswer(
        name,
        request,
        begun,
        found.tokens,
        "".join(token.text for token in said),
        said[-1].finish_reason if said else None,
    )


def _chosen(found: StoredSequence) -> list[Chosen]:
    with _whole("what is kept of an answer"):
        return [
            Chosen(token, None if detail is None else Logprobs.from_numbers(detail))
            for token, detail in zip(found.tokens, found.details, strict=True)
        ]


@contextmanager
def _whole(what: str) -> Iterator[None]:
    """Raise `DamagedData` for what the rows of an answer lack, though their checksums are right."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        SettingsInvalid,
    ) as error:
        raise DamagedData(
            f"{what} can't be read ({type(error).__name__}: {error}): forget it"
        ) from error
