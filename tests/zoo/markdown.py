"""The table of what is known to work, for the documentation."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from .case import IDIOMS

BEGIN, END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
_TITLES = {
    "causal": "Causal language models of transformers",
    "others": "Other models of transformers",
    "timm": "timm, a model a family",
    "idioms": "Idioms of modelling code",
}

Row = Mapping[str, Any]


def write_markdown(file: Path, records: Sequence[Row]) -> None:
    """Put the table between the file's markers.

    Raises
    ------
    ValueError
        If the file has no markers.
    """
    text = file.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{file} needs the lines {BEGIN} and {END}; the table goes between them.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    file.write_text(f"{before}{BEGIN}\n\n{markdown(records)}\n\n{END}{after}")


def markdown(records: Sequence[Row]) -> str:
    """Return the table: numbers by group, then names."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (list(_TITLES).index(r["group"]), r["name"])):
        groups[record["group"]].append(record)
    parts = [_training_table(groups)]
    served = [r for r in groups.get("causal", []) if r.get("generates")]
    if served:
        parts.append(_serving(served))
    parts += [_training_names(name, members) for name, members in groups.items()]
    return "\n\n".join(parts)


def _training_table(groups: Mapping[str, Sequence[Row]]) -> str:
    columns: dict[str, Callable[[Row], bool]] = {
        "run eagerly": lambda r: bool(r.get("eager")),
        "captured": lambda r: bool(r.get("captured")),
        "trained right": lambda r: r.get("training") == "right",
        "with eager's bits": lambda r: r.get("training") == "right" and r.get("uncut") == "bits",
        "cut = uncut to the bit": lambda r: r.get("cut") == "bits",
        "refused": lambda r: str(r.get("training")).startswith("refused"),
        "warned": lambda r: r.get("training") == "warned",
        "anything else": lambda r: _is_fault(r) and bool(r.get("eager")),
    }
    if any("microbatches" in r for members in groups.values() for r in members):
        columns["batch = micro-batches"] = lambda r: r.get("microbatches") == "right"
        columns["splitting refused"] = lambda r: r.get("microbatches") == "refused"
    lines = [f"| training | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, members in groups.items():
        counts = [str(sum(map(fits, members))) for fits in columns.values()]
        lines.append(f"| {_TITLES[name]} | {' | '.join(counts)} |")
    return "\n".join(lines)


def _is_fault(record: Row) -> bool:
    verdict = str(record.get("training"))
    return verdict not in ("right", "warned", "not run") and not verdict.startswith("refused")


def _serving(members: Sequence[Row]) -> str:
    found: dict[str, list[Row]] = defaultdict(list)
    for record in members:
        found[str(record.get("serving"))].append(record)
    right = ", ".join(f"`{r['name']}`" for r in found.pop("right", []))
    lines = [
        _wrapped(
            f"Of {len(members)} families of causal language models that generate, these are served "
            f"as transformers generates, token for token: {right}."
        )
    ]
    for verdict, records in found.items():
        lines.append(f"Serving, {verdict}:")
        lines.append("\n".join(_reason(r, "serving_cause") for r in records))
    return "\n\n".join(lines)


def _training_names(group: str, members: Sequence[Row]) -> str:
    right = ", ".join(f"`{r['name']}`" for r in members if r.get("training") == "right")
    parts = [f"### {_TITLES[group]}"]
    if group != IDIOMS:
        parts.append(_wrapped(f"Trained right: {right or 'none'}."))
    others = [r for r in members if r.get("training") not in ("right", "not run")]
    if others:
        parts.append("\n".join(_reason(r, "cause") for r in others))
    cut = [r for r in members if str(r.get("cut")).startswith("off")]
    if cut:
        parts.append("Bits that differ when the model is cut:")
        parts.append("\n".join(_reason(r, "cut_cause", verdict="cut") for r in cut))
    return "\n\n".join(parts)


def _reason(record: Row, cause: str, verdict: str = "") -> str:
    verdict = verdict or ("serving" if cause == "serving_cause" else "training")
    why = record.get(cause) or record.get("stopped") or record.get("zoo_failed") or ""
    why = str(why).partition(" Source:")[0].partition(" What to do:")[0]
    why = re.sub(r"/[\w./-]+/(\w+\.py)", r"\1", why)  # where the code lay when it was tried
    return _wrapped(f"- `{record['name']}`, {record.get(verdict)}: {why[:200]}", "  ")


def _wrapped(text: str, indent: str = "") -> str:
    return fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
