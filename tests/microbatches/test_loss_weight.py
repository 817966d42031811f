"""The micro-batches' losses, as they are weighed, add up to the batch's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    log_softmax,
    mse_loss,
    nll_loss,
    one_hot,
)

from dagflow.check.uncut import Uncut
from dagflow.errors import ResultsDiffer
from dagflow.graph.capture import capture
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.training.data import TokenDataset
from dagflow.training.feed import TokenFeed, split_batch
from dagflow.training.step_graph import StepGraph
from dagflow_tasks.train.references import Microbatch

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Tagger(nn.Module):
    """Logits (B, T, 5) of tokens (B, T), and the weights of its classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("class_weight", torch.tensor([1.0, 3.0, 0.2, 0.5, 2.0]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(ids))
        return logits


class WithLoss(Tagger):
    """A tagger that returns its loss, whose class weights are a buffer."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), self.class_weight)


CLASS_WEIGHT = torch.tensor([1.0, 3.0, 0.2, 0.5, 2.0])


def entropy(**options: Any) -> Loss:
    return lambda output, target: cross_entropy(output.flatten(0, 1), target.flatten(), **options)


def masked(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each target's loss, 0 where it is ignored, and which count; both (B, T)."""
    mask = (target != -100).float()
    return cross_entropy(output.transpose(1, 2), target, reduction="none") * mask, mask


def over_rows(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses, mask = masked(output, target)
    return (losses.sum(1) / mask.sum(1)).mean()


def of_masks(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses, mask = masked(output, target)
    return losses.mean() / mask.mean()


def over_mask(least: float) -> Loss:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses, mask = masked(output, target)
        return losses.sum() / mask.sum().clamp(min=least)

    return loss


def binary(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wanted = (target > 2).float()[..., None].expand_as(output)
    return binary_cross_entropy_with_logits(output, wanted, CLASS_WEIGHT)


def of_share(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The masked loss, by the part that each target has of all."""
    losses, mask = masked(output, target)
    return (losses * (mask / mask.sum())).sum()


def contracted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses, mask = masked(output, target)
    return torch.einsum("bt,bt->", losses, mask) / mask.sum()


def in_place(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses, mask = masked(output, target)
    loss = torch.zeros(())
    loss += losses.sum()
    loss += 0.1 * (losses**2).sum()
    loss /= mask.sum()
    return loss


LOSSES: dict[str, Loss] = {
    "mean": entropy(),
    "sum": entropy(reduction="sum"),
    "label smoothing": entropy(label_smoothing=0.1),
    "class weights": entropy(weight=CLASS_WEIGHT),
    "class weights and label smoothing": entropy(weight=CLASS_WEIGHT, label_smoothing=0.1),
    "negative log likelihood": lambda o, t: nll_loss(
        log_softmax(o, -1).transpose(1, 2), t, CLASS_WEIGHT
    ),
    "another index ignored": entropy(ignore_index=1),
    "masked": over_mask(0.0),
    "masked, clamped": over_mask(1.0),
    "quotient of means": of_masks,
    "mean of rows' means": over_rows,
    "sum by a count": lambda o, t: entropy(reduction="sum")(o, t) / (t != -100).sum(),
    "sum times an inverse": lambda o, t: entropy(reduction="sum")(o, t) * (1 / (t != -100).sum()),
    "sum by rows": lambda o, t: (o**2).sum() / o.shape[0],
    "sum of a mean over rows": lambda o, t: (o**2).mean((0, 1)).sum(),
    "mean of a sum over rows": lambda o, t: (o**2).sum((0, 1)).mean(),
    "scaled, in another dtype": lambda o, t: (0.5 * entropy()(o, t)).double() / 3,
    "by shares": of_share,
    "contracted": contracted,
    "added up in place": in_place,
    "index ignored that is a size": lambda o, t: entropy(ignore_index=o.shape[1])(
        o[:, :3], t[:, :3].clamp(min=0)
    ),
    "two terms": lambda o, t: entropy()(o, t) + 0.1 * entropy(label_smoothing=0.3)(o, t),
    "stacked terms": lambda o, t: torch.stack([entropy()(o, t), 2 * entropy()(o, t)]).mean(),
    "two sums": lambda o, t: (o**2).sum() - 0.1 * o.abs().sum(),
    "squares": lambda o, t: mse_loss(o, torch.zeros_like(o)),
    "binary": binary,
    "divergence": lambda o, t: kl_div(
        log_softmax(o, -1), torch.full_like(o, 0.2), reduction="batchmean"
    ),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ten rows of tokens; the targets of the first six are ignored from the third on."""
    ids, target = torch.randint(0, 11, (10, 6)), torch.randint(0, 5, (10, 6))
    target[:6, 2:] = -100
    return ids, target


def split(model: nn.Module, loss: Loss | None, given: Any) -> Iterator[tuple[Microbatch, float]]:
    """Split a batch into four, and yield each micro-batch with its loss by the DAG."""
    dag = capture(model, tuple(tensor[:3] for tensor in given), loss=loss)
    weights = LossWeights(dag, dict(model.named_buffers()).get)
    uncut = Uncut(weights.dag, dict(model.named_parameters()), dict(model.named_buffers()))
    parts, microbatches = split_batch(dag, given, 0, 4, weights)
    for part, microbatch in zip(parts, microbatches, strict=True):
        uncut.numbers = dict(microbatch.numbers)
        yield microbatch, uncut.loss(part, dict(microbatch.sizes))


def weighed(model: nn.Module, loss: Loss | None, given: Any) -> list[float]:
    return [microbatch.weight for microbatch, _ in split(model, loss, given)]


def added(model: nn.Module, loss: Loss | None, given: Any) -> float:
    """Return what a batch's micro-batches add up to."""
    return sum(m.weight * found for m, found in split(model, loss, given) if m.weight)


OFTEN = ("sum", "class weights", "masked, clamped", "sum by a count", "two terms")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow])
        for name in LOSSES
        if name != "another index ignored"  # -100 is a class that this one doesn't know
    ],
)
def test_weighted_losses_of_microbatches_add_up_to_the_batchs(name: str) -> None:
    model, loss, (ids, target) = Tagger(), LOSSES[name], batch()
    wanted = loss(model(ids), target).item()
    assert added(model, loss, (ids, target)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_any_index_may_be_the_ignored_one() -> None:
    model, loss = Tagger(), LOSSES["another index ignored"]
    ids, target = batch()
    target = target.clamp(min=1)
    wanted = loss(model(ids), target).item()
    assert added(model, loss, (ids, target)) == pytest.approx(wanted, rel=1e-6)


def test_class_weights_may_be_a_buffer_of_the_model() -> None:
    model, given = WithLoss(), batch()
    assert added(model, None, given) == pytest.approx(model(*given).item(), rel=1e-6)
    assert len(set(weighed(model, None, given))) == 4


def test_a_microbatch_without_targets_counts_nothing() -> None:
    ids, target = batch()
    target[3:6] = -100
    for loss in (entropy(), entropy(weight=CLASS_WEIGHT)):
        weights = weighed(Tagger(), loss, (ids, target))
        assert weights[1] == 0.0
        assert sum(weights) == pytest.approx(1.0)
    model, masked_mean = Tagger(), over_mask(0.0)
    wanted = masked_mean(model(ids), target).item()
    assert added(model, masked_mean, (ids, target)) == pytest.approx(wanted, rel=1e-6)
    target[:] = -100
    assert weighed(model, entropy(), (ids, target)) == [0.0] * 4
    assert weighed(model, masked_mean, (ids, target)) == [0.0] * 4


def spread(output: torch.Tensor) -> torch.Tensor:
    """Z-loss: a mean over all tokens, ignored or not."""
    return output.logsumexp(-1).square().mean()


def ignoring_and_spread(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return entropy()(output, target) + 0.1 * spread(output)


def many_counts(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses, mask = masked(output, target)
    by_mask = 0.5 * losses.sum() / mask.sum().clamp(min=1)
    return (by_mask + entropy(weight=CLASS_WEIGHT)(output, target)) / 3 - 0.1 * (output**2).sum()


def in_place_of_two(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss = spread(output)
    loss += entropy()(output, target)
    loss /= 2
    return loss


def two_heads(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As masked language models with next sentences: targets of both, padded each in its way."""
    sentence = torch.where(target[:, 5] == 1, -100, target[:, 0])
    return entropy()(output, target) + cross_entropy(output.mean(1), sentence)


SEPARATE: dict[str, Loss] = {
    "targets and all tokens": ignoring_and_spread,
    "three counts and a sum": many_counts,
    "added up in place": in_place_of_two,
    "two kinds of targets": two_heads,
    "stacked": lambda o, t: (
        torch.stack([entropy()(o, t), spread(o), (o**2).sum()]) @ torch.tensor([1.0, 0.1, 0.01])
    ),
    "a sum and a mean": lambda o, t: (o**2).sum() + spread(o) * 3,
    "masked and plain": lambda o, t: over_mask(1.0)(o, t) + 0.1 * o.abs().mean(),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if k < 2 else [pytest.mark.slow]) for k, n in enumerate(SEPARATE)],
)
def test_parts_that_are_divided_by_different_things_are_weighed_one_by_one(name: str) -> None:
    model, loss, (ids, target) = Tagger(), SEPARATE[name], batch()
    for _ in range(2):
        wanted = loss(model(ids), target).item()
        assert added(model, loss, (ids, target)) == pytest.approx(wanted, rel=2e-6)
        target[3:6] = -100  # of the second micro-batch


class WithPenalty(Tagger):
    """A sum over rows and a penalty on weights, which no batch is in."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = super().forward(ids)
        penalty = sum(p.square().sum() for p in self.parameters())
        return entropy(reduction="sum")(logits, labels) + penalty / 7


def test_a_penalty_on_weights_counts_once() -> None:
    model, given = WithPenalty(), batch()
    assert added(model, None, given) == pytest.approx(model(*given).item(), rel=1e-6)


def test_a_part_of_which_nothing_counts_has_no_gradient() -> None:
    ids, target = batch()
    target[:] = -100
    model = Tagger()
    dag = capture(model, (ids[:3], target[:3]), loss=ignoring_and_spread)
    weights = LossWeights(dag)
    (part,), (microbatch,) = split_batch(dag, (ids, target), 0, 1, weights)
    uncut = Uncut(weights.dag, dict(model.named_parameters()), {})
    uncut.numbers = dict(microbatch.numbers)
    found = uncut.run(part, dict(microbatch.sizes), ["head.weight"])
    wanted = 0.1 * spread(model(ids))
    wanted.backward()
    assert microbatch.weight == 1.0
    torch.testing.assert_close(found["loss", ""], wanted.detach())
    torch.testing.assert_close(found["gradient", "head.weight"], model.head.weight.grad)


def test_terms_that_cannot_be_told_apart_are_refused_before_the_first_step() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        first = ignoring_and_spread(output, target)
        return first + first / (target != -100).sum()

    whole = torch.randint(0, 11, (10, 6)), torch.randint(0, 5, (10, 6))
    words = r"add .*weighed differently.*targets.*a mean over rows.*num_microbatches=1"
    with pytest.raises(ResultsDiffer, match=words):
        weighed(Tagger(), loss, whole)


class DrawsTargets(Tagger):
    """Masked language modelling whose masks are drawn in forward."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(ids.shape) < 0.15
        logits = super().forward(ids.masked_fill(drawn, 0))
        return self.of_drawn(logits, ids % 5, drawn)

    def of_drawn(
        self, logits: torch.Tensor, wanted: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        return entropy()(logits, torch.where(drawn, wanted, -100))


class DrawsMask(DrawsTargets):
    def of_drawn(
        self, logits: torch.Tensor, wanted: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        losses = cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        return (losses * drawn).sum() / drawn.sum().clamp(min=1)


class DrawsWeights(DrawsTargets):
    def of_drawn(
        self, logits: torch.Tensor, wanted: torch.Tensor, drawn: torch.Tensor
    ) -> torch.Tensor:
        weights = torch.empty(logits.shape[0]).uniform_()
        return ((logits**2).mean((1, 2)) * weights).sum() / weights.sum()


@pytest.mark.parametrize("kind", [DrawsTargets, DrawsMask, DrawsWeights])
def test_what_is_drawn_in_forward_does_not_weigh_microbatches(kind: type[Tagger]) -> None:
    ids = torch.randint(0, 11, (10, 6))
    dag = capture(kind(), (ids[:3],))
    weights = LossWeights(dag)
    with pytest.raises(ResultsDiffer, match=r"test_loss_weight.*draws at random.*microbatches=1"):
        split_batch(dag, (ids,), 0, 4, weights)
    assert [m.weight for m in split_batch(dag, (ids,), 0, 1, weights)[1]] == [1.0]


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output**2).mean(-1)


def hard(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of the examples that are hard: all, on the first batch."""
    losses = squares(output, target)
    kept = (losses.detach() < 1e9).float()
    return (losses * kept).sum() / kept.sum().clamp(min=1)


def own_labels(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    sure = output.detach().amax(-1) > -1e9
    return entropy()(output, torch.where(sure, output.detach().argmax(-1), -100))


def by_class(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Each class weighs what the batch has of all others."""
    share = one_hot(target.clamp(min=0), 5).float().mean((0, 1))
    return entropy(weight=1 / share.clamp(min=0.01))(output, target)


def positives(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wanted = (target > 2).float()
    weight = (1 - wanted.mean()) / wanted.mean().clamp(min=0.1)
    return binary_cross_entropy_with_logits(output[..., 0], wanted, pos_weight=weight)


def by_balance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wanted = (target > 2).float()
    share = wanted.mean()
    weight = torch.where(wanted > 0, 1 / share, 1 / (1 - share))
    losses = binary_cross_entropy_with_logits(output[..., 0], wanted, reduction="none")
    return (losses * weight).mean()


def by_frequency(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    target = target.clamp(min=0)
    often = one_hot(target, 5).sum((0, 1))
    losses = cross_entropy(output.transpose(1, 2), target, reduction="none")
    return (losses / often[target]).sum()


def centred(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    wanted = target.float().clamp(min=0)
    wanted -= wanted.mean()
    return mse_loss(output[..., 0], wanted / wanted.std())


def guarded(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    losses, mask = masked(output, target)
    count = mask.sum()
    count.clamp_(min=1)
    return torch.where(mask.sum() > 0, losses.sum() / count, 0.0) + spread(output)


def by_what_is_left(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Numbers that are 0 in a micro-batch, and not in the batch."""
    mask = (target != -100).float()
    return entropy()(output, target) * mask.mean() + spread(output) / mask.sum()


BALANCED: dict[str, Loss] = {
    "rows by their class's share": by_balance,
    "numbers that may be 0": by_what_is_left,
    "classes": by_class,
    "guarded": guarded,
    "positives": positives,
    "rows by their class's number": by_frequency,
    "standardised targets": centred,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if k < 2 else [pytest.mark.slow]) for k, n in enumerate(BALANCED)],
)
def test_what_the_batch_is_summed_up_to_is_the_whole_batchs(name: str) -> None:
    model, loss, (ids, target) = Tagger(), BALANCED[name], batch()
    target[3:6] = -100  # of the second micro-batch
    wanted = loss(model(ids), target).item()
    assert added(model, loss, (ids, target)) == pytest.approx(wanted, rel=2e-6)


class Counting(Tagger):
    """Counts targets in a buffer, and divides by the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        count = (labels != -100).sum()
        self.seen += count
        return entropy(reduction="sum")(super().forward(ids), labels) / count


def test_a_buffer_counts_each_microbatch_though_the_loss_is_given_the_batchs_count() -> None:
    model, (ids, labels) = Counting(), batch()
    dag = capture(model, (ids[:3], labels[:3]))
    weights = LossWeights(dag)
    parts, microbatches = split_batch(dag, (ids, labels), 0, 4, weights)
    uncut = Uncut(weights.dag, dict(model.named_parameters()), dict(model.named_buffers()))
    losses = []
    for part, microbatch in zip(parts, microbatches, strict=True):
        uncut.numbers = dict(microbatch.numbers)
        outcome = uncut.run(part, dict(microbatch.sizes), None)
        losses.append(outcome["loss", ""].item())
    count = (labels != -100).sum().item()
    assert outcome["buffer", "seen"].item() == count
    wanted = entropy(reduction="sum")(Tagger.forward(model, ids), labels).item() / count
    assert sum(losses) == pytest.approx(wanted, rel=1e-6)


class GivenCount(Tagger):
    """Divides by a number that comes with the batch, as transformers does by `num_items_in_batch`."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return entropy(reduction="sum")(super().forward(ids), labels) / count.float()


def test_a_number_that_comes_with_the_batch_is_the_whole_batchs() -> None:
    model, (ids, labels) = GivenCount(), batch()
    count = (labels != -100).sum()
    dag = capture(model, (ids[:3], labels[:3], count))
    weights = LossWeights(dag)
    _, microbatches = split_batch(dag, (ids, labels, count), 0, 4, weights)
    assert [m.weight for m in microbatches] == [1.0] * 4
    assert weights.need_values is False


class ByPosition(Tagger):
    """Takes from each token's target the mean of its position's: as many numbers as there are tokens."""

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = labels.float() - labels.float().mean(0)
        return mse_loss(super().forward(ids)[..., 0], wanted)


def test_many_numbers_of_the_batch_are_refused() -> None:
    with pytest.raises(ResultsDiffer, match=r"sub .*test_loss_weight.*whole data set"):
        weighed(ByPosition(), None, batch())


NO_SUMS: dict[str, tuple[str, Loss]] = {
    "hard examples": ("div", hard),
    "own labels": ("cross_entropy_loss", own_labels),
    "mean of what is no nan": ("nanmean", lambda o, t: squares(o, t).nanmean()),
    "flooded": ("abs", lambda o, t: (squares(o, t).mean() + 1.0).abs() - 1.0),
    "hinge of a mean": ("relu", lambda o, t: (squares(o, t).mean() + 1.0).relu()),
    "larger of two": ("maximum", lambda o, t: torch.maximum(squares(o, t).mean(), o.new_zeros(()))),
    "largest of means": ("max", lambda o, t: o.mean((0, 1)).max()),
}
FEW = ("hard examples", "own labels", "flooded")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow]) for n in NO_SUMS]
)
def test_a_loss_that_is_no_sum_over_rows_is_refused_by_its_operator(name: str) -> None:
    operator, loss = NO_SUMS[name]
    dag = capture(Tagger(), tuple(tensor[:3] for tensor in batch()), loss=loss)
    weights = LossWeights(dag)
    with pytest.raises(ResultsDiffer, match=rf": {operator} \(in the loss.*num_microbatches=1"):
        split_batch(dag, batch(), 0, 4, weights)
    assert [m.weight for m in split_batch(dag, batch(), 0, 1, weights)[1]] == [1.0]


@pytest.mark.slow
def test_targets_that_argmax_makes_all_count() -> None:
    def distilled(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return entropy()(output, (output.detach() * 2).argmax(-1))

    assert weighed(Tagger(), distilled, batch()) == [0.3, 0.3, 0.2, 0.2]


def test_only_what_is_in_a_batch_makes_its_weights_be_computed_each_step() -> None:
    example = tuple(tensor[:3] for tensor in batch())
    needed = {
        name: LossWeights(capture(Tagger(), example, loss=loss)).need_values
        for name, loss in LOSSES.items()
        if name in ("mean", "sum", "squares", "class weights", "masked")
    }
    assert needed == {
        "mean": False, "sum": False, "squares": False, "class weights": True, "masked": True,
    }  # fmt: skip


def test_a_token_datasets_steps_are_weighed_by_their_own_tokens(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 5, 200).astype("uint16")
    TokenDataset.write(str(tmp_path), tokens)
    dataset = TokenDataset(str(tmp_path), batch_size=8, sequence_length=6)

    class Renamed(WithLoss):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids, labels)

    model = Renamed()
    dag = capture(model, dataset.rows(0, 0, 2))
    feed = TokenFeed(dataset, dag, 4, LossWeights(dag, dict(model.named_buffers()).get))
    graph = StepGraph("prefix", (), (), (), ())
    for step in (0, 3):
        found = feed.prepare(step, graph)
        assert found is not None
        assert {microbatch.step for microbatch in found.microbatches} == {step}
        losses = [model(**dataset.rows(step, 2 * m, 2 * m + 2)).item() for m in range(4)]
        added = sum(m.weight * x for m, x in zip(found.microbatches, losses, strict=True))
        assert added == pytest.approx(model(**dataset.rows(step, 0, 8)).item(), rel=1e-6)
