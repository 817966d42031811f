"""Operator DAGs for people: a table by module, a picture for Graphviz."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dagflow_tasks.program.sizes import size_text

if TYPE_CHECKING:
    from dagflow.graph.dag import OperatorDag
    from dagflow_tasks.program.nodes import Node

_COLOURS = ("#cfe2f3", "#fce5cd", "#d9ead3", "#ead1dc", "#fff2cc", "#d0e0e3", "#f4cccc", "#d9d2e9")


def amount(value: float, unit: str) -> str:
    """Write a quantity with three digits and a prefix.

    >>> amount(12_300_000, "FLOP")
    '12.3 MFLOP'
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"


def table(dag: OperatorDag) -> str:
    """Return one line a module, with its operators, FLOPs, bytes and output."""
    rows: list[tuple[str, str, int, int, str]] = []
    for path, names in _by_module(dag):
        operators = [node.op.removeprefix("aten.").rsplit(".", 1)[0] for node in names]
        flops = sum(dag.info[node.name].flops for node in names)
        moved = sum(dag.info[node.name].bytes for node in names)
        rows.append(
            (path or "(model)", _summary(operators), flops, moved, _shape(dag, names[-1].name))
        )
    width = min(44, max((len(row[0]) for row in rows), default=6))
    lines = [
        f"OperatorDag: {len(dag.nodes)} operators, {len(dag.parameters)} parameters "
        f"({amount(dag.parameter_bytes, 'B')}), {amount(dag.total_flops, 'FLOP')} forward",
        "sizes: "
        + (
            ", ".join(
                f"{s.name} = {s.input[3:]}.shape[{s.dim}] ({s.hint} in the example)"
                for s in dag.symbols
            )
            or "all fixed"
        ),
        f"{'module':<{width}}  {'FLOPs':>10}  {'bytes':>9}  {'output':<24} operators",
    ]
    for path, operators_text, flops, moved, shape in rows:
        short = path if len(path) <= width else "…" + path[-(width - 1) :]
        lines.append(
            f"{short:<{width}}  {amount(flops, ''):>10}  {amount(moved, 'B'):>9}  {shape:<24} "
            f"{operators_text}"
        )
    lines.append(f"loss: {dag.loss}")
    return "\n".join(lines)


def _by_module(dag: OperatorDag) -> list[tuple[str, list[Node]]]:
    groups: list[tuple[str, list[Node]]] = []
    for node in dag.nodes:
        if not groups or groups[-1][0] != node.module:
            groups.append((node.module, []))
        groups[-1][1].append(node)
    return groups


def _summary(operators: list[str]) -> str:
    text = " ".join(dict.fromkeys(operators))
    return text if len(text) <= 60 else text[:57] + "..."


def _shape(dag: OperatorDag, name: str) -> str:
    outputs = dag.info[name].outputs
    if not outputs:
        return ""
    dtype, shape = outputs[0]
    return f"{dtype}[{', '.join(size_text(size) for size in shape)}]"


def dot(dag: OperatorDag, stages: Mapping[str, int]) -> str:
    """Return Graphviz source: operators as nodes, modules as boxes, stages as colours."""
    lines = [
        "digraph operators {",
        "  rankdir=TB; compound=true;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=Helvetica, '
        "fontsize=10];",
    ]
    for spec in dag.inputs:
        lines.append(
            f'  "{spec.name}" [label="{spec.name[3:]}", shape=ellipse, fillcolor="#eeeeee"];'
        )
    for index, (path, nodes) in enumerate(_by_module(dag)):
        lines.append(
            f'  subgraph cluster_{index} {{ label="{path or "model"}"; color="#bbbbbb"; fontsize=9;'
        )
        for node in nodes:
            label = node.op.removeprefix("aten.").rsplit(".", 1)[0]
            stage = stages.get(node.name)
            colour = "white" if stage is None else _COLOURS[stage % len(_COLOURS)]
            label += f"\\n{_shape(dag, node.name)}"
            lines.append(f'    "{node.name}" [label="{label}", fillcolor="{colour}"];')
        lines.append("  }")
    known = {node.name for node in dag.nodes} | {spec.name for spec in dag.inputs}
    for node in dag.nodes:
        for source in dict.fromkeys(node.references()):
            if source in known:
                lines.append(f'  "{source}" -> "{node.name}";')
    lines.append("}")
    return "\n".join(lines)
