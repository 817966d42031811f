"""``python -m tests.zoo``: tries every model of the zoo, and says what trains and is served right."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests' own modules are imported by name, as pytest has them.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from .case import Case
from .groups import GROUPS, cases_of
from .judge import judge, warm_up
from .markdown import write_markdown
from .operators import record_operators, update
from .pool import try_all
from .table import causes, rows, totals


def main() -> None:
    options = _options()
    known = _known(options.json) if options.resume else {}
    cases = _chosen(options)
    left = [case for case in cases if (case.group, case.name) not in known]
    # An exit ends the processes that were forked, which a signal wouldn't.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warm_up()
    work = record_operators if options.operators else judge
    for number, record in enumerate(try_all(left, work, options.jobs, options.seconds), 1):
        known[record["group"], record["name"]] = record
        row = record["name"] if options.operators else rows([record])
        print(f"{number}/{len(left)} {row}", flush=True)
        if options.json:
            _save(options.json, list(known.values()))
    records = list(known.values())
    if options.operators:
        print("\n".join(update(Path(options.operators), records)))
        return
    print(f"\n{totals(records)}\n\n{causes(records)}")
    if options.markdown:
        write_markdown(Path(options.markdown), records)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="all, if not given")
    parser.add_argument("--only", default="", metavar="PATTERN", help="names that it matches")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=240, help="processor time for each model")
    parser.add_argument("--json", metavar="FILE", help="keep the results here, as they come")
    parser.add_argument("--resume", action="store_true", help="take what the file has as done")
    parser.add_argument("--markdown", metavar="FILE", help="put the table between its markers")
    parser.add_argument(
        "--operators", metavar="FILE", help="only capture, and add to this list what captures use"
    )
    options = parser.parse_args()
    if options.resume and not options.json:
        parser.error("--resume needs --json FILE")
    return options


def _chosen(options: argparse.Namespace) -> list[Case]:
    wanted = re.compile(options.only)
    groups = options.group or list(GROUPS)
    return [case for group in groups for case in cases_of(group) if wanted.search(case.name)]


def _known(file: str) -> dict[tuple[str, str], dict[str, Any]]:
    if not Path(file).is_file():
        return {}
    return {(r["group"], r["name"]): r for r in json.loads(Path(file).read_text())}


def _save(file: str, records: list[dict[str, Any]]) -> None:
    partial = Path(f"{file}.partial")
    partial.write_text(json.dumps(records, indent=1))
    partial.replace(file)


if __name__ == "__main__":
    main()
