"""A run's directory: what was asked for, the programs, and the metrics so far.

::

    run.json                       settings and the run's id, written once
    programs/NAME/stage-000.json   one a stage; programs/NAME/programs.json last
    metrics/, ledger/              rows by step, see dagflow_storage.records.rows
    events/                        what has happened, rows by number
    journal/                       see dagflow_storage.records.journal
    snapshots/                     see dagflow_storage.records.snapshots
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dagflow_storage.errors import StoreHoldsAnotherRun
from dagflow_storage.place import fields
from dagflow_storage.place.documents import JSON, encode_document, read_document, sound
from dagflow_storage.place.location import Store
from dagflow_storage.records.rows import RowLog

RUN_FORMAT = 1
_RUN_FILE = "run.json"
_MOST_STAGES = 1_000_000  # fewer than operators in any model
_ABSENT = object()


class RunDirectory:
    """The files of one run.

    Attributes
    ----------
    store : Store
    ledger : RowLog
        What each step was computed from.
    events : RowLog
        What has happened, by number.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ledger = RowLog(store, "ledger")
        self.events = RowLog(store, "events", by="number")
        self._metrics = RowLog(store, "metrics")

    def exists(self) -> bool:
        """Whether a run was created here."""
        return self.store.exists(_RUN_FILE)

    def create(self, settings: Mapping[str, JSON], facts: Mapping[str, JSON] | None = None) -> None:
        """Create the run; of several creators one wins.

        Parameters
        ----------
        settings
            What decides the result; who resumes compares it.
        facts
            What else later readers must know; nobody compares it.

        Raises
        ------
        StoreHoldsAnotherRun
            If there is one already, naming the settings that differ.
        """
        run_id = uuid.uuid4().hex
        content = {"run_id": run_id, "settings": dict(settings), "facts": dict(facts or {})}
        if self.store.create_bytes(_RUN_FILE, encode_document(RUN_FORMAT, content)):
            return
        # The answer to a put that succeeded can get lost, and its repetition then fails: what
        # counts is whose id is there.
        if self.run_id == run_id:
            return
        differences = settings_diff(self.settings(), settings) or ["no setting differs"]
        raise StoreHoldsAnotherRun(
            f"{self.store!r} holds run {self.run_id} already; theirs -> yours: "
            + "; ".join(differences)
        )

    def settings(self) -> dict[str, Any]:
        """The settings the run was created with."""
        return dict(self._run_file()["settings"])

    def facts(self) -> dict[str, Any]:
        """What else was told about the run; empty if an older dagflow created it."""
        return dict(self._run_file().get("facts") or {})

    @property
    def run_id(self) -> str:
        """The run's random id. Read from the store at each access."""
        return str(self._run_file()["run_id"])

    def write_programs(self, name: str, programs: Sequence[str]) -> None:
        """Store the stage programs (JSON texts) of one plan, replacing those of that name."""
        folder = f"programs/{name}"
        self.store.delete(f"{folder}/programs.json")
        for stage, program in enumerate(programs):
            self.store.write_bytes(_program_path(folder, stage), program.encode())
        # Last, and with the number: a half-written set is none.
        listing = encode_document(RUN_FORMAT, {"num_stages": len(programs)})
        self.store.write_bytes(f"{folder}/programs.json", listing)

    def read_programs(self, name: str) -> list[str]:
        """The stage programs of one plan, by stage.

        Raises
        ------
        NotFound
            If they were never, or not completely, written.
        """
        folder = f"programs/{name}"
        listing = read_document(self.store, f"{folder}/programs.json", RUN_FORMAT)
        with sound(f"{folder} in {self.store!r} holds no programs"):
            fields.members(listing, "it", "num_stages")
            num_stages = fields.integer(listing["num_stages"], "num_stages", most=_MOST_STAGES)
            paths = [_program_path(folder, stage) for stage in range(num_stages)]
            return [self.store.read_bytes(path).decode() for path in paths]

    def append_metrics(self, rows: Sequence[Mapping[str, JSON]]) -> None:
        """Add rows, each with an integer ``"step"``; see `RowLog.append`."""
        self._metrics.append(rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics that hold, by step."""
        return self._metrics.read()

    def read_last_metrics(self) -> dict[str, Any] | None:
        """The row of the latest step, without reading those before; None if there is none."""
        return self._metrics.last()

    def _run_file(self) -> dict[str, Any]:
        document = read_document(self.store, _RUN_FILE, RUN_FORMAT)
        with sound(f"{_RUN_FILE} in {self.store!r} is that of no run"):
            fields.members(document, "it", "run_id", "settings")
            fields.text(document["run_id"], "run_id")
            fields.members(document["settings"], "settings")
            fields.members(document.get("facts") or {}, "facts")
        return document


def settings_diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed, a line each: ``optimizer.options.lr: 0.0003 -> 0.001``."""
    before, after = dict(_flattened(old)), dict(_flattened(new))
    return [
        f"{name}: {_shown(before, name)} -> {_shown(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{name}.")
        else:
            # JSON has no tuples: a list that went through it is still the same setting.
            yield name, list(value) if isinstance(value, tuple) else value


def _shown(flattened: Mapping[str, Any], name: str) -> str:
    return repr(flattened[name]) if name in flattened else "(absent)"


def _program_path(folder: str, stage: int) -> str:
    return f"{folder}/stage-{stage:03d}.json"
