"""Do a model's micro-batches add up to its batch, or is it refused to split it?"""

from __future__ import annotations

import copy
from typing import Any

from dagflow.check.whole_batch import check_microbatches
from dagflow.errors import DagflowError
from dagflow.graph.batch import flatten_batch
from dagflow.graph.dag import OperatorDag
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.training.data import num_rows, split_rows
from dagflow.training.feed import least_rows, split_batch

from .case import Subject
from .record import Record, short

_NUM_MICROBATCHES = 2


def judge_microbatches(subject: Subject, dag: OperatorDag, batch: Any, record: Record) -> None:
    """Note whether a batch's loss is that of its halves, as `train` weighs and checks it.

    The column is "right", "refused", "crash", or "not split" where a batch has too few rows.
    """
    model, batch = subject.model, copy.deepcopy(batch)
    tensors, _ = flatten_batch(batch)
    try:
        rows = num_rows(tensors, "the batch")
        if len(split_rows(rows, _NUM_MICROBATCHES, least_rows(dag))) == 1:
            record.note(microbatches="not split")
            return
        weights = LossWeights(dag, dict(model.named_buffers()).get)
        parts, microbatches = split_batch(dag, batch, 0, _NUM_MICROBATCHES, weights)
        split = weights.applied_to(dag)
        check_microbatches(dag, split, model, batch, parts, microbatches, subject.loss)
    except DagflowError as error:
        record.note(microbatches="refused", microbatches_cause=short(error))
    except Exception as error:
        record.note(microbatches="crash", microbatches_cause=short(error))
    else:
        record.note(microbatches="right")
