"""Models that loop over a grid's numbers are captured for these numbers, and other ones are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from dagflow.check.micro_batch import check_capture
from dagflow.errors import BatchInvalid, CaptureFailed
from dagflow.graph.batch import flatten_batch
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.graph.signature import match_batch
from dagflow.microbatches.loss_weight import LossWeights
from dagflow.training.feed import split_batch
from dagflow.training.first_batch import FirstBatch
from dagflow.training.settings import Config

Body = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Tower(nn.Module):
    """A layer over patches (P, 4), and what a function makes of them and of the grid (N, 3)."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.body = body

    def forward(self, patches: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        return self.body(self.layer(patches), grid_thw).square().mean()


def images(*sides: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    grid = torch.tensor(sides)
    return {"patches": torch.randn(int(grid.prod(1).sum()), 4), "grid_thw": grid}


BATCH = images((1, 2, 4), (2, 2, 2))


def attends_image_by_image(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    frames = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
    ends = functional.pad(frames.cumsum(0, dtype=torch.int32), (1, 0))
    parts = torch.split(h, (ends[1:] - ends[:-1]).tolist())
    return torch.cat([(part @ part.T).softmax(-1) @ part for part in parts])


def resizes_a_table(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    table, found = h[:9].T.reshape(1, 4, 3, 3), []
    for row in grid:
        t, height, width = row
        resized = functional.interpolate(table, (int(height), int(width)), mode="bilinear")
        found.append(resized.flatten(2)[0].T.repeat(t, 1))
    return h + torch.cat(found)


def reorders_windows(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    order, begin = [], 0
    for t, height, width in grid.tolist():
        index = torch.arange(t * height * width).reshape(t, height, width)
        index = functional.pad(index, (0, 1, 0, 1), value=-100).transpose(1, 2).flatten()
        order.append(index[index != -100] + begin)
        begin += t * height * width
    places = torch.cat(order)
    return torch.cat([h[places][: len(h) // 2], h[torch.unique_consecutive(places)]])


def selects_by_known_masks(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    sizes = grid.prod(dim=1)
    image = torch.repeat_interleave(torch.arange(len(grid)), sizes)
    means = torch.stack([h[image == number].mean(0) for number in range(len(grid))])
    means[sizes > 8] = 0
    return h + means.repeat_interleave(sizes, 0) + h[: grid[0, 1] + grid[1, 2]].sum()


def fills_a_known_table(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    ends = torch.zeros(len(grid) + 1, dtype=torch.int64)
    ends[1:] = grid.prod(1).cumsum(0)
    return torch.cat([h[a:b].cumsum(0) for a, b in itertools.pairwise(ends)])


BODIES: dict[str, Body] = {
    f.__name__: f
    for f in (
        attends_image_by_image,
        resizes_a_table,
        reorders_windows,
        selects_by_known_masks,
        fills_a_known_table,
    )
}


def captured(model: nn.Module, batch: Any = BATCH) -> OperatorDag:
    with pytest.warns(UserWarning, match="decides by the numbers in 'grid_thw'.*one size"):
        dag = capture(model, batch)
    return OperatorDag.from_json(dag.to_json())


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_code_that_decides_by_a_grid_is_captured_to_the_bit(body: Body) -> None:
    model = Tower(body)
    dag = captured(model)
    _, report = check_capture(dag, model, BATCH)
    assert report.exact
    assert report.num_gradients == 2


def test_a_batch_with_another_grid_is_refused() -> None:
    dag = captured(Tower(attends_image_by_image))
    assert dag.fixed_values == {"grid_thw": [[1, 2, 4], [2, 2, 2]]}
    match_batch(dag, *flatten_batch(BATCH), where="step 1")
    others = images((2, 2, 2), (1, 2, 4)), images((1, 4, 2), (2, 2, 2)), images((1, 2, 4))
    for other in others:
        with pytest.raises(BatchInvalid, match=r"grid_thw' of step 2 holds \[\[.*one size"):
            match_batch(dag, *flatten_batch(other), where="step 2")


def test_only_a_grid_whose_numbers_are_read_is_fixed() -> None:
    class Boxes(Tower):
        def forward(  # type: ignore[override]
            self, patches: torch.Tensor, grid_thw: torch.Tensor, boxes: torch.Tensor
        ) -> torch.Tensor:
            loss = super().forward(patches, grid_thw)
            return loss + self.layer.bias[(boxes + boxes.flip(0)).clamp(0, 3)].sum()

    batch = {**BATCH, "boxes": torch.tensor([[0, 1], [2, 3], [1, 1]])}
    dag = captured(Boxes(attends_image_by_image), batch)
    assert list(dag.fixed_values) == ["grid_thw"]
    other = {**batch, "boxes": torch.zeros(5, 2, dtype=torch.int64)}
    match_batch(dag, *flatten_batch(other), where="step 1")


def reads_what_patches_were_written_into(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    table = torch.zeros(len(grid))
    table[:1].copy_(h[:1, 0])
    return h[: int(table[0]) + int(grid[0, 0])]


def reads_what_is_drawn(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return h[: int(torch.randint_like(grid, 2)[0, 0]) + int(grid[0, 0])]


@pytest.mark.parametrize("body", [reads_what_patches_were_written_into, reads_what_is_drawn])
def test_numbers_that_follow_from_more_than_a_grid_are_refused(body: Body) -> None:
    with pytest.raises(CaptureFailed, match="decides by a tensor's value"):
        capture(Tower(body), BATCH)


def reads_the_grid_and_then_patches(h: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    h = torch.cat(h.split(grid.prod(1).tolist()))
    return h * 2 if h[0, 0] > 0 else h


def test_what_stands_in_the_way_beside_a_grid_is_named() -> None:
    with pytest.raises(CaptureFailed, match=r"Source: \S+: return h \* 2 if"):
        capture(Tower(reads_the_grid_and_then_patches), BATCH)


def first(model: nn.Module, batch: Any, num_microbatches: int) -> FirstBatch:
    return FirstBatch(model, None, batch, num_microbatches, lambda name: None, Config())


def test_rows_of_patches_beside_rows_of_images_are_trained_whole() -> None:
    model = Tower(attends_image_by_image)
    with pytest.warns(UserWarning, match="decides by the numbers"):
        prepared = first(model, BATCH, 1).prepare(check=True)
    assert prepared.report.exact
    with pytest.raises(BatchInvalid, match="num_microbatches=1 takes batches whole"):
        first(model, BATCH, 2).prepare(check=True)


class Images(nn.Module):
    """Images as rows of patches (B, P, 4), of which each has as many as its sides (B, 2) say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, patches: torch.Tensor, spatial_shapes: torch.Tensor) -> torch.Tensor:
        h = self.layer(patches)
        sizes = [height * width for height, width in spatial_shapes.tolist()]
        means = [row[:size].mean() for row, size in zip(h, sizes, strict=True)]
        return torch.stack(means).square().mean()


def test_micro_batches_whose_grids_differ_are_refused_and_equal_ones_are_right() -> None:
    patches, model = torch.randn(4, 6, 4), Images()
    sides = torch.tensor([[2, 3], [1, 4], [2, 3], [1, 4]])
    alike = {"patches": patches, "spatial_shapes": sides}
    otherwise = {"patches": patches, "spatial_shapes": sides.sort(0).values}
    with pytest.warns(UserWarning, match="'spatial_shapes'"):
        prepared = first(model, alike, 2).prepare(check=True)
    assert prepared.report.exact
    assert not prepared.report.microbatches
    weights = LossWeights(prepared.dag, lambda name: None)
    with pytest.raises(BatchInvalid, match="num_microbatches=1 keeps them together"):
        split_batch(prepared.dag, otherwise, 3, 2, weights)
    with (
        pytest.warns(UserWarning, match="'spatial_shapes'"),
        pytest.raises(BatchInvalid, match="num_microbatches=1 keeps them together"),
    ):
        first(model, otherwise, 2).prepare(check=True)


def writes_into_an_element(numbers: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    numbers[0] = n
    return numbers[0]


def copies_into_a_slice(numbers: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    numbers[:1].copy_(n[None])
    return numbers.max()


def adds_to_a_view(numbers: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    view = numbers.view(2, 1)
    view[0].add_(n)
    return view.sum()


@pytest.mark.parametrize("body", [writes_into_an_element, copies_into_a_slice, adds_to_a_view])
def test_a_small_tensor_that_something_is_written_into_through_a_view_is_not_known(
    body: Body,
) -> None:
    class Counts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count = body(torch.tensor([0, 0]), (x > 0).sum())
            h = super().forward(x)
            return (2 * h if count > 0 else h).square().mean()

    with pytest.raises(CaptureFailed, match="decides by a tensor's value"):
        capture(Counts(4, 4), torch.randn(3, 4))


def test_a_small_tensor_that_numbers_are_written_into_is_known() -> None:
    class Sides(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sides = torch.tensor([0, 0])
            sides[0] = 3
            sides.view(2, 1)[1].add_(sides[0])
            return super().forward(x)[:, : sides[1] - 1].square().mean()

    model, x = Sides(4, 4), torch.randn(3, 4)
    _, report = check_capture(capture(model, x), model, x)
    assert report.exact
