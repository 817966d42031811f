"""What `train` makes sure of on its first batch, before anything runs or is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dagflow.check.eager import Eager
from dagflow.check.micro_batch import CheckReport, check_capture
from dagflow.check.whole_batch import check_microbatches
from dagflow.errors import BatchInvalid, CaptureFailed, SettingsInvalid
from dagflow.graph.analysis import DagAnalysis
from dagflow.graph.batch import flatten_batch, rebuilder, take_rows
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.graph.loss import LossFunction
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.microbatches.parameterless import Sizes, Tensors
from dagflow.training.data import num_rows, split_rows
from dagflow.training.feed import least_rows, split_batch, whole_batch
from dagflow.training.settings import Config
from dagflow_tasks.train.references import Microbatch

# The graph is compared with the model on at most this part of the batch's rows.
_LARGEST_SHARE = 8
_MEMORY_FACTS = Path("/proc/meminfo")


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained.

    Attributes
    ----------
    dag : OperatorDag
        Refuses batches of sizes for which it would be wrong.
    loss_weights : LossWeights
        Weighs the micro-batches of every batch.
    report : CheckReport
    """

    dag: OperatorDag
    loss_weights: LossWeights
    report: CheckReport


@dataclass(frozen=True)
class FirstBatch:
    """A run's first batch, and what is to be trained on it.

    Attributes
    ----------
    model, loss
    batch
        As the user's data yields it.
    num_microbatches : int
    read_buffer : callable
        Returns the value of one of the model's buffers by name, or None.
    config : Config
    """

    model: torch.nn.Module
    loss: LossFunction | None
    batch: Any
    num_microbatches: int
    read_buffer: Callable[[str], torch.Tensor | None]
    config: Config

    def prepare(self, *, check: bool) -> Prepared:
        """Capture the model, and check that what will be trained is what it computes.

        Raises
        ------
        CaptureFailed, BatchInvalid
        SettingsInvalid
            If there is nothing to train.
        ResultsDiffer
            If training would compute something else than the model does by itself.
        """
        tensors, _ = flatten_batch(self.batch)
        if check and self._num_rows(tensors) == 1:
            # torch takes one row for a case of its own. Captured from two, the graph takes any
            # number of rows, and one as well if it turns out to be right for it.
            twice = {n: torch.cat([t, t]) if t.dim() else t for n, t in tensors.items()}
            two_rows = replace(self, batch=_like(self.batch, twice), num_microbatches=1)
            prepared = two_rows._prepare(check=True)
            if prepared.report.one_row:
                return prepared
        return self._prepare(check=check)

    def _num_rows(self, tensors: Tensors) -> int:
        return num_rows(tensors, "step 0", is_split=self.num_microbatches > 1)

    def _prepare(self, *, check: bool) -> Prepared:
        tensors, _ = flatten_batch(self.batch)
        begin, end = split_rows(self._num_rows(tensors), self.num_microbatches, 2)[0]
        example = _like(self.batch, take_rows(tensors, begin, end))
        dag = self._captured(example)
        _refuse_nothing_to_train(dag)
        loss_weights = LossWeights(dag, self.read_buffer)
        if not check:
            skipped = CheckReport(skipped="the check is turned off")
            return Prepared(loss_weights.applied_to(dag), loss_weights, skipped)
        microbatches = split_batch(dag, self.batch, 0, self.num_microbatches, loss_weights)
        batch, following = self._chosen(dag, loss_weights, microbatches[1])
        checked, report = check_capture(
            dag,
            self.model,
            batch,
            self.loss,
            following=following,
            memory_bytes=_available_bytes(),
        )
        start = time.perf_counter()
        reason = report.skipped or self._check_microbatches(checked, loss_weights, *microbatches)
        report = replace(
            report, microbatches=reason, seconds=report.seconds + time.perf_counter() - start
        )
        return Prepared(loss_weights.applied_to(checked), loss_weights, report)

    def _captured(self, example: Any) -> OperatorDag:
        """Capture the model, and if that fails say so if the model itself fails just like that.

        Raises
        ------
        CaptureFailed, BatchInvalid
        """
        try:
            return capture(self.model, example, loss=self.loss, dynamic=self.config.dynamic)
        except CaptureFailed as error:
            if error.__cause__ is None:  # refused by name
                raise
            tensors, _ = flatten_batch(self.batch)
            why = _why_it_fails(self.model, self.loss, example)
            hint = _of_single_samples(tensors)
            if why:
                raise BatchInvalid(
                    f"The model fails on the first batch without dagflow, too: {why} The batch holds "
                    f"{_listed(tensors)}.{hint} What to do: see that one step of a plain loop over "
                    "this data works."
                ) from error.__cause__
            if hint:
                raise CaptureFailed(f"{error}{hint}") from error.__cause__
            raise

    def _chosen(
        self, dag: OperatorDag, loss_weights: LossWeights, microbatches: tuple[Microbatch, ...]
    ) -> tuple[Any, Any]:
        """Return the micro-batch that counts most, or some rows of it, and another one."""
        tensors, _ = flatten_batch(self.batch)
        rows = self._num_rows(tensors)
        bounds = split_rows(rows, self.num_microbatches, least_rows(dag))
        chosen = max(microbatches, key=lambda m: m.least_weight).index
        begin, end = bounds[chosen]
        few = min(end, begin + max(least_rows(dag), rows // _LARGEST_SHARE))
        if any(tensor.shape[0] != rows for tensor in tensors.values() if tensor.dim()):
            few = end  # rows of one tensor belong to other rows of another
        part = take_rows(tensors, begin, few)
        found = whole_batch(dag, part, dag.batch_constants)
        if found is None or not _all_counts(loss_weights, *found):
            part = take_rows(tensors, begin, end)
        other = take_rows(tensors, *bounds[(chosen + 1) % len(bounds)])
        if len(bounds) == 1:
            other = part
        return _like(self.batch, part), _like(self.batch, other)

    def _check_microbatches(
        self,
        dag: OperatorDag,
        loss_weights: LossWeights,
        parts: list[dict[str, torch.Tensor]],
        microbatches: tuple[Microbatch, ...],
    ) -> str:
        """Compare the batch's loss with its micro-batches'; return why not, or ""."""
        if len(microbatches) == 1:
            return "there is one micro-batch only"
        split = loss_weights.applied_to(dag)
        check_microbatches(dag, split, self.model, self.batch, parts, microbatches, self.loss)
        return ""


def _why_it_fails(model: torch.nn.Module, loss: LossFunction | None, batch: Any) -> str:
    """Return what the model raises on a batch, run eagerly; "" if nothing, or if it can't be tried."""
    tensors, _ = flatten_batch(batch)
    held = [*model.parameters(), *model.buffers()]
    available = _available_bytes()
    if any(tensor.device.type != "cpu" for tensor in held) or (
        available is not None and sum(tensor.nbytes for tensor in held) > available // 4
    ):
        return ""
    try:
        Eager(model, loss, batch, {}, False).outcomes([(list(tensors.values()), None)], grad=False)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}."
    return ""


def _listed(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return names, dtypes and shapes.

    >>> _listed({"0": torch.ones(2, 3)})
    "'0' float32[2, 3]"
    """
    kinds = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()}
    return ", ".join(f"{name!r} {kinds[name]}{list(t.shape)}" for name, t in tensors.items())


def _of_single_samples(tensors: Mapping[str, torch.Tensor]) -> str:
    flat = [name for name, tensor in tensors.items() if not tensor.dim()]
    if not flat or len(flat) == len(tensors):
        return ""
    return (
        f" {flat[0]!r} has no dimension: does the data yield single samples? "
        "DataLoader(data, batch_size=8) makes batches of them."
    )


def described(report: CheckReport) -> str:
    """Say in a line what the check has found."""
    if report.skipped:
        return f"Not checked against the model itself: {report.skipped}."
    same = "the same to the bit" if report.exact else "the same but for rounding"
    text = (
        f"Checked against the model itself in {report.seconds:.1f} s: loss and "
        f"{report.num_gradients} gradients are {same}."
    )
    if report.fixed:
        text += (
            f" Right only for {', '.join(report.fixed)}: batches of other sizes will be refused."
        )
    return text


def _all_counts(loss_weights: LossWeights, tensors: Tensors, sizes: Sizes) -> bool:
    (share,) = loss_weights([tensors], [sizes], None)
    return bool(Microbatch(0, 0, share.weight, (), share.numbers).least_weight)


def _like(batch: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a batch of the same structure with other tensors."""
    if isinstance(batch, torch.Tensor):
        return tensors["input"]
    return rebuilder(batch)(list(tensors.values()))


def _refuse_nothing_to_train(dag: OperatorDag) -> None:
    if dag.loss in DagAnalysis(dag).differentiable:
        return
    trainable = [p.name for p in dag.parameters if p.trainable]
    if not trainable:
        if not dag.parameters:
            raise SettingsInvalid(
                "The model has no parameters: there is nothing to train. Are its layers in a plain "
                "list or dict? torch finds them only as attributes, in nn.ModuleList or "
                "nn.ModuleDict; tensors to train are nn.Parameter."
            )
        raise SettingsInvalid(
            f"All {len(dag.parameters)} parameters of the model are frozen: there is nothing to train. "
            "Call requires_grad_(True) on those that should learn."
        )
    raise SettingsInvalid(
        f"The loss depends on none of the {len(trainable)} parameters that aren't frozen "
        f"({trainable[0]!r} the first): there is nothing to train. Is a part of the model under "
        "no_grad, detached, or not used by the loss?"
    )


def _available_bytes() -> int | None:
    """Return the memory that this machine has left; None if it doesn't say."""
    try:
        lines = _MEMORY_FACTS.read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable")), None)
