"""The zoo's table: a row a model, totals by group, and what the causes are."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_COLUMNS = (
    "built",
    "eager",
    "captured",
    "check",
    "uncut",
    "cut",
    "second_shape",
    "microbatches",
    "served",
)

Row = Mapping[str, Any]


def rows(records: Iterable[Row]) -> str:
    """Return a line for each record."""
    return "\n".join(_line(record) for record in records)


def _line(record: Row) -> str:
    cells = " ".join(f"{name}={_cell(record[name])}" for name in _COLUMNS if name in record)
    verdicts = f"training: {record.get('training', '-')}"
    if "serving" in record:
        verdicts += f", serving: {record['serving']}"
    seconds = record.get("capture_seconds", "-")
    return f"{record['name']:<24} {verdicts:<42} {cells} capture={seconds}s {_reason(record)}"


def _cell(value: Any) -> str:
    return {True: "yes", False: "no", None: "-"}.get(value, str(value))


def _reason(record: Row) -> str:
    names = ("cause", "cut_cause", "serving_cause", "stopped", "zoo_failed")
    return " | ".join(str(record[n])[:160] for n in names if record.get(n))


def totals(records: Sequence[Row]) -> str:
    """Return how many there are of each verdict, by group."""
    lines = []
    for group in dict.fromkeys(r["group"] for r in records):
        members = [r for r in records if r["group"] == group]
        for what in ("training", "serving"):
            counts = Counter(r[what] for r in members if what in r)
            if counts:
                text = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
                lines.append(f"{group}, {what} ({len(members)}): {text}")
        bits = Counter(_kind(r.get("uncut")) for r in members if r.get("uncut"))
        cut = Counter(_kind(r.get("cut")) for r in members if r.get("cut"))
        lines.append(f"{group}, uncut = eager: {_counts(bits)}; cut = uncut: {_counts(cut)}")
        split = Counter(r["microbatches"] for r in members if "microbatches" in r)
        if split:
            lines.append(f"{group}, micro-batches = batch: {_counts(split)}")
    return "\n".join(lines)


def _kind(text: Any) -> str:
    return "off" if str(text).startswith("off") else str(text)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


def causes(records: Iterable[Row]) -> str:
    """Return what isn't right, by cause."""
    found: dict[str, list[str]] = defaultdict(list)
    for record in records:
        name = f"{record['group']}/{record['name']}"
        for what, cause in (("training", "cause"), ("serving", "serving_cause")):
            verdict = record.get(what, "right")
            if verdict not in ("right", "wrong cut"):
                text = str(record.get(cause) or record.get("stopped") or record.get("zoo_failed"))
                found[f"{what}, {verdict}: {_alike(text)}"].append(name)
        if str(record.get("cut")).startswith(("off", "crash")):
            found[f"cut, {record['cut']}: {record.get('cut_cause') or record.get('cause')}"].append(
                name
            )
        if record.get("microbatches") in ("refused", "crash"):
            what = _alike(record["microbatches_cause"])
            found[f"micro-batches, {record['microbatches']}: {what}"].append(name)
        if record.get("second_shape") in ("no", "rows only", "length only"):
            what = _alike(str(record.get("second_cause", "")))
            found[f"second shape, {record['second_shape']}: {what}"].append(name)
    ordered = sorted(found.items(), key=lambda item: (item[0].split(":")[0], -len(item[1])))
    return "\n".join(f"- {cause}\n  {len(names)}: {', '.join(names)}" for cause, names in ordered)


def _alike(text: str) -> str:
    """Return a message without what differs from model to model."""
    text = re.sub(r"^(\w+): \w+ has (\d+) layers", r"\1: ... has N layers", text)
    text = re.sub(r"was found in \d+", "was found in M", text)
    text = re.sub(r"is [-\d.e]+, but (.*?) to [-\d.e]+, .*? off:", r"is x, but \1 to y:", text)
    text = re.sub(r"^step \d: gradient of .* is off.*", "a gradient is off", text)
    return re.sub(r"\d\.\de[+-]\d+", "x", text)[:220]
