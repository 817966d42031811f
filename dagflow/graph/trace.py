"""Follows a model's trace: where it is, what it does that a graph can't hold, what to say if it fails."""

from __future__ import annotations

import os
import random
import secrets
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from dagflow.errors import CaptureFailed
from dagflow.graph.autocasts import watch_autocasts
from dagflow.graph.batched import unmapped
from dagflow.graph.casts import needless_casts
from dagflow.graph.checks import is_asked_for, passed
from dagflow.graph.demands import Demands
from dagflow.graph.effects import Snapshot
from dagflow.graph.expert_loops import ExpertLoops
from dagflow.graph.flags import flags_of_sizes
from dagflow.graph.known_numbers import is_known_number, make_known
from dagflow.graph.known_values import KnownValues
from dagflow.graph.leftovers import Left
from dagflow.graph.sizes import Decision, symbolic_mathematics, watch_decisions
from dagflow.graph.tensor_sizes import note_size
from dagflow.graph.whole import stand_in
from dagflow.graph.writes import written_in_place

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_LIBRARIES = (sysconfig.get_path("stdlib"), _TORCH_FOLDER)
OWN_FILES = frozenset(
    str(Path(__file__).with_name(f"{name}.py"))
    for name in (
        "attention_capture",
        "autocasts",
        "batch",
        "batched",
        "capture",
        "casts",
        "checks",
        "contents",
        "decoder",
        "demands",
        "effects",
        "examine",
        "expert_loops",
        "experts",
        "flags",
        "known_numbers",
        "known_values",
        "leftovers",
        "loop_bodies",
        "loss",
        "masks",
        "outside",
        "selections",
        "sizes",
        "tensor_sizes",
        "trace",
        "whole",
        "writes",
    )
)


@dataclass
class Trace:
    """What was seen while a model was traced.

    Attributes
    ----------
    functions
        The model's own `torch.autograd.Function` classes, with the module that calls each.
    decisions
        What the model's code decided by sizes.
    shapes
        Shapes of the batch's tensors as the model got them, open sizes as torch's symbols.
    mathematics
        Lines that call functions of `math` on open sizes, by the function's name.
    hooks
        Hooks on tensors' gradients that forward sets, by module and line of code.
    clock
        Lines that read the time.
    autocasts
        Lines that ask for autocast where the model isn't, with that kind of device.
    drawn
        Lines that draw from Python's or NumPy's random numbers, though the graph doesn't show it.
    left
        What forward leaves in attributes, but for assigned buffers.
    unused
        What it leaves, in every call, where no later call makes use of it.
    read_buffers
        Buffers of one whole number each, and what they hold, that code may read as numbers.
    written_numbers
        Those of them that forward writes.
    known
        Inputs whose numbers the code may read, and what follows from them.
    apart
        Modules that loop over experts that were hit, each with parameters of its own, by that line.
    modules, operator
        The modules that the trace is in, outermost first, and the latest torch function.
    """

    functions: dict[type[torch.autograd.Function], str] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    shapes: list[list[Any]] = field(default_factory=list)
    mathematics: dict[str, str] = field(default_factory=dict)
    hooks: list[tuple[str, str]] = field(default_factory=list)
    clock: list[str] = field(default_factory=list)
    autocasts: Mapping[str, str] = field(default_factory=dict)
    drawn: str = ""
    left: list[Left] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    read_buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    written_numbers: list[str] = field(default_factory=list)
    known: KnownValues | None = None
    apart: Mapping[str, str] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    operator: str = ""

    @property
    def module(self) -> str:
        """Path of the innermost module, in words where there is none."""
        if not self.modules:
            return "none, outside the model's forward"
        return self.modules[-1] or "the model itself"


class _Follower(TorchFunctionMode):
    """Sees every torch function that the model calls, before torch.export does."""

    def __init__(self, trace: Trace, demands: Demands, loops: ExpertLoops) -> None:
        super().__init__()
        self.trace, self._demands, self._loops = trace, demands, loops
        self._recorded_grad = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.trace.operator = getattr(func, "__name__", str(func))
        applied = _enclosing_function()
        if applied is not None and not applied.__module__.startswith("torch."):
            # torch's own keep to the derivative (activation checkpointing, custom operators).
            self.trace.functions.setdefault(applied, (self.trace.modules or [""])[-1])
        if func is torch._C._set_grad_enabled:
            if applied is not None:
                # Inside of a function's forward gradients are off anyway; recorded, the switch would
                # stay off for all that follows, for nobody records how `apply` switches it back.
                with torch._C.DisableTorchFunction():
                    return func(*args)
            self._recorded_grad = bool(args[0])
        elif applied is None and self._recorded_grad != torch.is_grad_enabled():
            # Switched by what nobody records: a function's `apply`, inference mode.
            self._recorded_grad = torch.is_grad_enabled()
            torch._C._set_grad_enabled(self._recorded_grad)
        known, kwargs = self.trace.known, kwargs or {}
        call = None if known is None else known.call(func, self.trace.operator, args, kwargs)
        if call is not None:
            if call.answer:
                return call.answer[0]
            args, kwargs = call.args, call.kwargs
        experts = self._loops.iterated(self.trace.operator, args)
        if experts is not None:
            return experts
        args, kwargs = self._loops.arguments(self.trace.operator, args, kwargs)
        if self.trace.operator == "__format__" and is_known_number(args[0]):
            return format(args[0].constant.item(), *args[1:])  # a module's name, above all
        if self.trace.operator == "item" and is_asked_for(args[0], sys._getframe(1)):
            return args[0]
        if self.trace.operator == "__bool__":
            answer = self._loops.asked(args[0], sys._getframe(1))
            answer = passed(args[0], sys._getframe(1)) if answer is None else answer
            if answer is not None:
                return answer
        if func is torch._assert and self._demands.keep(args[0]):
            return None
        self._loops.check(self.trace.operator, args, kwargs)
        result = self._called(func, args, kwargs)
        if known is not None and call is not None:
            known.note(func, call, result)
        self._demands.note(self.trace.operator, args, result)
        self._loops.note(self.trace.operator, args, result)
        note_size(self.trace.operator, args, kwargs, result)
        if applied is not None and self.trace.operator in _NEEDED_AS_THEY_ARE:
            # A function's forward may write into it in place, for its backward is its own.
            return result.clone()
        return result

    def _refused(self, what: str, why: str, advice: str) -> CaptureFailed:
        return CaptureFailed(
            f"Module {self.trace.module!r} {what} ({line_of_model()}); {why}. What to do: {advice}."
        )

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = self.trace.operator
        if name in _REFUSED and getattr(func, "__module__", None) in (None, *_REFUSED[name][0]):
            raise self._refused(*_REFUSED[name][1:])
        if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            raise self._refused(
                f"draws with a generator of its own in {name}",
                "workers draw by the run's seed, step and operator, so that a task can run again",
                "leave generator= out",
            )
        if name in ("register_hook", "register_post_accumulate_grad_hook"):
            self.trace.hooks.append((self.trace.module, line_of_model()))
        if getattr(func, "__self__", None) is torch.Tensor.data:
            if name == "__set__":
                raise self._refused(
                    "replaces a tensor's .data",
                    "a graph can't hold that",
                    "write into it under torch.no_grad(), with copy_()",
                )
            return args[0].detach()
        return (stand_in(func, name) or func)(*args, **kwargs)


# Operators whose derivative is made of their result, and that such functions are written about.
_NEEDED_AS_THEY_ARE = (
    *("softmax", "log_softmax", "exp", "sigmoid", "tanh", "relu"),
    *("sqrt", "rsqrt", "reciprocal"),
)
_INSIDE = "a graph is the forward alone, and its gradient is what workers make of it"
# By name: modules of the functions, what they do, why a graph can't hold it, what to do.
_REFUSED: Mapping[str, tuple[tuple[str, ...], str, str, str]] = {
    "grad": (
        ("torch.autograd",),
        "computes a gradient inside of forward (torch.autograd.grad, torch.func.grad, vjp)",
        _INSIDE,
        "write the derivative as a formula",
    ),
    "backward": (
        ("torch._tensor", "torch.autograd"),
        "calls backward() inside of forward",
        _INSIDE,
        "return the loss instead",
    ),
    "_pack_padded_sequence": (
        ("torch",),
        "packs sequences by their lengths (pack_padded_sequence)",
        "these depend on the data, and a graph's operators have fixed arguments",
        "give the padded sequence to the recurrent layer, and mask the result",
    ),
}

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _enclosing_function() -> type[torch.autograd.Function] | None:
    """Return the `torch.autograd.Function` whose forward is being traced, if any.

    Found on the stack rather than by replacing `apply`: models often keep `apply` itself under
    another name, and other threads may call it meanwhile.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_code is _APPLY:
            found: type[torch.autograd.Function] = frame.f_locals["cls"]
            return found
        frame = frame.f_back
    return None


def line_of_model() -> str:
    """Return file and line of the innermost code that is neither torch's nor dagflow's capture."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH_FOLDER, "<")) and file not in OWN_FILES:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"


class _Checkpointed:
    """Stands for `torch.utils.checkpoint.CheckpointFunction` while a model is traced.

    What it computes is what the function computes; recomputing is no part of a graph. As there, an
    input must ask for gradients, or nothing inside gets any.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return function(*args)
        with torch.no_grad():
            return function(*args)


@contextmanager
def _refuse_seeds(trace: Trace) -> Iterator[None]:
    """Refuse that this thread's model seeds torch's generator; others' stages do so all the time."""
    thread = threading.get_ident()

    def refusing(seed: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            file = sys._getframe(1).f_code.co_filename
            if threading.get_ident() == thread and not file.startswith((*_LIBRARIES, "<")):
                raise CaptureFailed(
                    f"Module {trace.module!r} seeds torch's random numbers ({line_of_model()}); a "
                    "graph draws by the run's own seed, other numbers in every step. What to do: "
                    "seed outside of forward, or keep what must be the same in a buffer."
                )
            return seed(*args, **kwargs)

        return function

    with ExitStack() as stack:
        for owner in (torch, torch.random):
            for name in ("manual_seed", "seed", "set_rng_state"):
                stack.enter_context(patch.object(owner, name, refusing(getattr(owner, name))))
        yield


@contextmanager
def _refuse_entropy(trace: Trace) -> Iterator[None]:
    """Refuse that this thread's model asks the operating system for random numbers."""
    thread, urandom = threading.get_ident(), os.urandom

    def drawn(size: int) -> bytes:
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename in _SOURCES_OF_ENTROPY:
            frame = frame.f_back
        file = frame.f_code.co_filename if frame is not None else "<"
        if threading.get_ident() == thread and not file.startswith((*_LIBRARIES, "<")):
            raise CaptureFailed(
                f"Module {trace.module!r} draws random numbers of the operating system "
                f"({file}:{frame.f_lineno}: os.urandom, secrets, uuid). A graph would hold the "
                "first draw for ever. What to do: draw with torch (torch.rand), or draw in the "
                "data loader."
            )
        return urandom(size)

    with patch.object(os, "urandom", drawn), patch.object(random, "_urandom", drawn):
        yield


_SOURCES_OF_ENTROPY = (random.__file__, secrets.__file__, uuid.__file__)


@contextmanager
def _watch_clock(lines: list[str]) -> Iterator[None]:
    """Note the lines of the model's own code, or of who calls it, that ask for the time."""
    thread = threading.get_ident()

    def noting(clock: Callable[[], float]) -> Callable[[], float]:
        def read() -> float:
            caller = sys._getframe(1)
            file = caller.f_code.co_filename
            if threading.get_ident() == thread and not file.startswith((*_LIBRARIES, "<")):
                lines.append(f"{file}:{caller.f_lineno}")
            return clock()

        return read

    names = ("time", "time_ns", "monotonic", "perf_counter")
    clocks: dict[str, Any] = {name: noting(getattr(time, name)) for name in names}
    with patch.multiple(time, **clocks):
        yield


def _refuse_scripts(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureFailed(
                f"Module {path or 'the model itself'!r} is a {type(module).__name__} (of "
                "torch.jit.script, trace or load), and torch.export can't look into one. What to do: "
                "use the plain torch.nn.Module that it was made from; load_state_dict() takes the "
                "script's state_dict()."
            )


def _refuse_cumulative_average(module: torch.nn.Module, path: str) -> None:
    is_normalisation = isinstance(module, torch.nn.modules.batchnorm._NormBase)
    has_statistics = is_normalisation and module.training and module.track_running_stats
    if has_statistics and module.momentum is None:
        raise CaptureFailed(
            f"Module {path or 'the model itself'!r} ({type(module).__name__}) has momentum=None: "
            "its running statistics are the mean over all batches so far, weighted by a number that "
            "it reads out of a tensor (num_batches_tracked), and a graph's operators have fixed "
            "arguments. What to do: give it a momentum, 0.1 say, or put it into eval()."
        )


@contextmanager
def follow(
    wrapper: Any,
    read_buffers: Mapping[str, torch.Tensor] | None = None,
    names: Sequence[str] = (),
    read_inputs: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Trace]:
    """Follow the trace of a wrapper around a model through the modules and torch's functions.

    Parameters
    ----------
    read_buffers
        What buffers hold that the code may read as numbers.
    names
        The inputs' names, in order.
    read_inputs
        What some of them hold that the code may read as numbers.
    """
    _refuse_scripts(wrapper.model)
    trace = Trace(read_buffers=read_buffers or {})
    demands, loops = Demands(lambda: trace.module), ExpertLoops(lambda: trace.module)
    trace.known = KnownValues(read_inputs) if read_inputs else None
    handles = []

    def leave(*_: Any) -> None:
        trace.modules.pop()

    for path, module in wrapper.model.named_modules():

        def enter(module: torch.nn.Module, *_: Any, path: str = path) -> None:
            trace.modules.append(path)
            _refuse_cumulative_average(module, path)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    forward = wrapper.forward

    def followed(*tensors: torch.Tensor) -> Any:
        before = Snapshot(wrapper, values=False)
        trace.shapes = [
            [s.node.expr if isinstance(s, torch.SymInt) else s for s in tensor.shape]
            for tensor in tensors
        ]
        written = make_known(wrapper.model, trace.read_buffers)
        if trace.known is not None:
            trace.known.begin(dict(zip(names, tensors, strict=True)))
        with _Follower(trace, demands, loops), written_in_place(wrapper.model):
            result = forward(*tensors)
        trace.apart = loops.apart()
        trace.left = before.left()  # now: torch.export puts numbers back as they were
        trace.written_numbers = written()
        return result

    wrapper.forward = followed
    checkpoint = patch.object(torch.utils.checkpoint, "CheckpointFunction", _Checkpointed)
    try:
        with (
            checkpoint,
            _refuse_seeds(trace),
            _refuse_entropy(trace),
            _watch_clock(trace.clock),
            watch_autocasts(wrapper.model, line_of_model) as trace.autocasts,
            needless_casts(),
            demands.kept(),
            symbolic_mathematics() as trace.mathematics,
            unmapped(lambda: trace.module),
            watch_decisions(OWN_FILES) as trace.decisions,
            loops.followed(),
            flags_of_sizes(trace.decisions, line_of_model),
        ):
            yield trace
    finally:
        for handle in handles:
            handle.remove()
        wrapper.forward = forward
