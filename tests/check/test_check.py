"""A run begins only if its graph computes what the model does by itself."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout, normalize
from torch.utils.checkpoint import checkpoint
from zoo import build, captured

from dagflow.check.micro_batch import CheckReport, check_capture
from dagflow.errors import ResultsDiffer
from dagflow.graph.capture import capture
from dagflow.graph.dag import OperatorDag
from dagflow.training.first_batch import FirstBatch
from dagflow.training.settings import Config
from dagflow_tasks.program.nodes import Node


class Three(nn.Module):
    """Three layers over sequences (B, T, 8), and a mean over T."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.c(self.inside(torch.tanh(self.a(x)))).mean(1)
        return output

    def inside(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.b(hidden)
        return output


def batch(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 10, 8), torch.randint(0, 4, (rows,))


def check(model: nn.Module, dag: OperatorDag | None = None) -> tuple[OperatorDag, CheckReport]:
    given = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dag = dag or capture(model, given, loss=cross_entropy)
    return check_capture(dag, model, given, cross_entropy)


class Dropping(Three):
    def inside(self, hidden: torch.Tensor) -> torch.Tensor:
        torch.rand(3)  # drawn, and not used
        return dropout(self.b(hidden), 0.3) * torch.rand(hidden.shape[0], 1, 1)


class Checkpointed(Three):
    def inside(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = checkpoint(
            lambda x: dropout(self.b(x), 0.3), hidden, use_reentrant=False
        )
        return output


class Chaotic(Three):
    """One unit in the last place of a parameter changes the loss altogether."""

    def inside(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.b(hidden)
        for _ in range(30):
            hidden = (
                3.9 * torch.sigmoid(hidden) * (1 - torch.sigmoid(hidden)) * 4 - 0.5 + 0.3 * hidden
            )
        return hidden


class Unseen(nn.Module):
    """The keys' bias has no influence, nor a bias before batch normalisation: gradients near zero."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.c = nn.Linear(8, 24), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        hidden = nn.functional.scaled_dot_product_attention(q, k, v).mean(1)
        output: torch.Tensor = self.c(self.norm(hidden))
        return output


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind",
    [
        Dropping,
        Unseen,
        *(pytest.param(kind, marks=SLOW) for kind in (Three, Checkpointed, Chaotic)),
    ],
)
def test_a_model_and_its_graph_are_the_same_to_the_bit(kind: type[nn.Module]) -> None:
    _, report = check(kind())
    assert (report.skipped, report.exact, report.fixed) == ("", True, ())
    # One row is no batch that batch normalisation can train on.
    assert report.one_row is (kind is not Unseen)


@SLOW
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_language_models_are_checked_with_their_dropout(name: str) -> None:
    example, dag = build(name), captured(name)
    before, given = copy.deepcopy(example.model.state_dict()), example.batch(4)
    state, python = torch.get_rng_state(), random.getstate()
    report = check_capture(dag, example.model, given)[1]
    assert report.exact
    assert report.one_row
    assert report.num_gradients == sum(1 for _ in example.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert all(p.grad is None for p in example.model.parameters())
    assert all(torch.equal(before[n], t) for n, t in example.model.state_dict().items())


# Graphs that compute something else than their model.


def test_a_hook_that_changes_a_parameters_gradient_is_found() -> None:
    model = Three()
    model.b.weight.register_hook(lambda gradient: 0.5 * gradient)  # type: ignore[no-untyped-call]
    with pytest.raises(ResultsDiffer, match=r"gradient of 'b.weight' is 100 % off"):
        check(model)


def with_node(dag: OperatorDag, op: str, change: Callable[[Node], Node]) -> OperatorDag:
    """Change the first node of an operator."""
    place = next(i for i, node in enumerate(dag.nodes) if node.op.startswith(op))
    nodes = list(dag.nodes)
    nodes[place] = change(nodes[place])
    return replace(dag, nodes=tuple(nodes))


def test_another_constant_is_found_and_its_module_named() -> None:
    class Scaled(Three):
        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.b(hidden * 0.5)
            return output

    dag = capture(Scaled(), batch(), loss=cross_entropy)
    wrong = with_node(dag, "aten.mul", lambda n: replace(n, args=(n.args[0], 0.6)))
    with pytest.raises(ResultsDiffer, match=r"from module 'b' on: the loss is .* instead of"):
        check(Scaled(), wrong)


def test_a_gradient_that_is_cut_off_is_found_though_the_last_layer_is_zero() -> None:
    model = Three()
    nn.init.zeros_(model.c.weight)
    dag = capture(model, batch(), loss=cross_entropy)
    wrong = with_node(dag, "aten.tanh", lambda node: replace(node, grad=False))
    with pytest.raises(ResultsDiffer, match=r"gradient of 'a.weight' is missing.*no_grad"):
        check(model, wrong)


def test_a_gradient_that_should_not_be_is_found() -> None:
    class Stopped(Three):
        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().inside(hidden)

    dag = capture(Stopped(), batch(), loss=cross_entropy)
    nodes = tuple(replace(node, grad=True) for node in dag.nodes)
    with pytest.raises(ResultsDiffer, match=r"gradient of 'b.bias' should be none at all"):
        check(Stopped(), replace(dag, nodes=nodes))


@SLOW
def test_other_dropout_is_found() -> None:
    dag = capture(Dropping(), batch(), loss=cross_entropy)
    wrong = with_node(dag, "aten.dropout", lambda n: replace(n, args=(n.args[0], 0.31, True)))
    with pytest.raises(ResultsDiffer):
        check(Dropping(), wrong)


def test_a_buffer_that_the_graph_does_not_move_is_found() -> None:
    class Averaging(Three):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            self.mean.mul_(0.9).add_(0.1 * hidden.detach().mean((0, 1)))
            return super().inside(hidden)

    dag = capture(Averaging(), batch(), loss=cross_entropy)
    nodes = tuple(n for n in dag.nodes if not n.op.startswith(("aten.mul_", "aten.add_")))
    with pytest.raises(ResultsDiffer, match=r"the buffer 'mean' is 100 % off.*in place"):
        check(Averaging(), replace(dag, nodes=nodes))


def test_what_only_python_remembers_is_found_in_the_second_forward() -> None:
    class Counting(Three):
        count = 0

        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return super().inside(hidden) * self.count

    model, dag = Counting(), capture(Three(), batch(), loss=cross_entropy)
    with pytest.raises(ResultsDiffer, match=r"second micro-batch.*only Python knows \('count'\)"):
        check(model, dag)
    assert model.count == 0


def test_pythons_random_numbers_are_found() -> None:
    class Skipping(Three):
        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().inside(hidden) if random.random() < 0.5 else hidden

    with pytest.raises(ResultsDiffer, match="Python's random or NumPy"):
        check(Skipping(), capture(Three(), batch(), loss=cross_entropy))


def test_a_graph_that_is_right_for_one_length_only_refuses_others() -> None:
    class Cropping(Three):
        length = 6

        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().inside(hidden[:, :6])

    class CroppingMore(Cropping):
        """What `Cropping`'s graph isn't for any length but ten."""

        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            return Three.inside(self, hidden[:, : hidden.shape[1] * 6 // 10])

    dag = capture(Cropping(), batch(), loss=cross_entropy)
    limited, report = check(CroppingMore(), dag)
    assert report.fixed == ("'0' dimension 1 = 10",)
    (length,) = [symbol for symbol in limited.symbols if symbol.dim == 1]
    assert (length.minimum, length.maximum) == (10, 10)


def test_models_without_weights_are_not_checked() -> None:
    with torch.device("meta"):
        model = Three()
    report = check(model)[1]
    assert report.skipped == "the model has no weights here (meta device)"
    dag = capture(Three(), batch(), loss=cross_entropy)
    report = check_capture(dag, Three(), batch(), cross_entropy, memory_bytes=1000)[1]
    assert "GB of memory" in report.skipped


# Losses that micro-batches change.


def first_batch(
    loss: Callable[..., torch.Tensor], given: Any, num_microbatches: int = 2
) -> CheckReport:
    model = Three()
    buffers = dict(model.named_buffers())
    of = FirstBatch(model, loss, given, num_microbatches, buffers.get, Config())
    return of.prepare(check=True).report


def contrastive(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    output = normalize(output, dim=-1)
    return cross_entropy(output @ output.T / 0.1, torch.arange(len(output)))


def correlations(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    normal = (output - output.mean(0)) / output.std(0)
    return ((normal.T @ normal / len(output) - torch.eye(4)) ** 2).sum()


def triplets(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 + torch.cdist(output, output)).amax(1).mean()


# Of `len`, which is what such losses are written with.
@pytest.mark.filterwarnings("ignore:The size of .* is fixed:UserWarning")
@pytest.mark.parametrize(
    "loss",
    [contrastive, pytest.param(correlations, marks=SLOW), pytest.param(triplets, marks=SLOW)],
)
def test_losses_over_the_whole_batch_are_refused_with_both_numbers(
    loss: Callable[..., torch.Tensor],
) -> None:
    with pytest.raises(ResultsDiffer, match=r"is [\d.]+, but .* add up to .*num_microbatches=1"):
        first_batch(loss, batch(8))
    assert first_batch(loss, batch(8), 1).microbatches == "there is one micro-batch only"


def test_a_loss_over_rows_is_compared_on_the_whole_batch() -> None:
    assert first_batch(cross_entropy, batch(9)).microbatches == ""


def test_dropout_and_new_layers_do_not_hide_in_the_batchs_loss() -> None:
    class Normed(Dropping):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)  # begins with ones and zeros

        def inside(self, hidden: torch.Tensor) -> torch.Tensor:
            heads = self.norm(hidden)[:, None]
            attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return super().inside(attended[:, 0])

    of = FirstBatch(Normed(), cross_entropy, batch(9), 3, {}.get, Config())
    assert of.prepare(check=True).report.microbatches == ""


class HoldsALock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().mean()


def test_a_model_that_cannot_be_copied_is_checked_like_any_other() -> None:
    model, batch = HoldsALock(), torch.randn(4, 4)
    _, report = check_capture(capture(model, batch), model, batch)
    assert (report.skipped, report.exact) == ("", True)


class Reaching(nn.Module):
    """Uses a layer through what a copy of the model would not take along."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.through = lambda x: self.second(x)
        if how == "hook":
            self.through = nn.Identity()
            self.first.register_forward_hook(lambda module, given, found: self.second(found))
        elif how == "list":
            self.through = nn.Identity()
            self.first.register_forward_hook(partial(_apply, [self.second]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.through(self.first(x))).square().mean()


def _apply(layers: list[nn.Module], module: nn.Module, given: object, found: Any) -> Any:
    return layers[0](found)


@pytest.mark.parametrize("how", ["lambda", "hook", "list"])
def test_layers_that_closures_and_hooks_use_are_the_models_own(how: str) -> None:
    torch.manual_seed(0)
    model, batch = Reaching(how), torch.randn(6, 4)
    _, report = check_capture(capture(model, batch), model, batch)
    assert (report.exact, report.num_gradients) == (True, 6)


def test_a_loss_may_close_over_the_model() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(4, 4),) * 2

    def penalised(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return (output - target).square().mean() + 0.1 * penalty

    _, report = check_capture(capture(model, batch, loss=penalised), model, batch, penalised)
    assert report.exact


def unbiased(node: Node) -> Node:
    return replace(node, args=node.args[:2])


def test_the_check_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model, batch = Reaching("lambda"), torch.randn(6, 4)
    seen: list[torch.Tensor] = []
    model.first.register_forward_hook(lambda module, given, found: seen.append(found.detach()))
    nn.init.zeros_(model.second.bias)  # tried with other values
    model(batch).backward()
    model.second.weight.register_post_accumulate_grad_hook(lambda p: p.data.zero_())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="Forward sets|Hooks on gradients"):
        dag = capture(model, batch)
    with pytest.raises(ResultsDiffer):  # after all nudges
        check_capture(with_node(dag, "aten.linear", unbiased), model, batch)
    check_capture(dag, model, batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert len(seen) == 1
    assert model.second.weight._post_accumulate_grad_hooks


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).square().mean()


class EndsAfter(Squares):
    """A model that can't be run as often as the check would, and computes something else."""

    def __init__(self, num_calls: int) -> None:
        super().__init__()
        self.calls = iter(range(num_calls))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if next(self.calls, None) is None:
            raise KeyError("no more calls")
        return 2 * super().forward(x)


def test_whatever_fails_in_the_check_is_told_in_its_words() -> None:
    x = torch.randn(4, 8)
    dag = capture(Squares(), x)
    with pytest.raises(
        ResultsDiffer, match=r"comes to no end.*KeyError: 'no more calls'.*What to do"
    ):
        check_capture(dag, EndsAfter(2), x)
