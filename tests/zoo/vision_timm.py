"""One small model of each family of timm, if it is installed; torchvision need not be."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from .case import Case, Subject, lively

GROUP = "timm"
_CLASSES = 5
_SIZES = (32, 64, 96, 128, 160, 224, 256)
# What makes models shallow, where they have it; the kinds of layers are the same in all of them.
_SHALLOW: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1},
    {},
)
_MOST_PARAMETERS = 60_000_000
# What small variants of a family are called, the smallest first.
_SMALL = (
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "xxt",
    "_xs",
    "035",
    "050",
    "lcnet",
    "tiny",
    "_t0",
    "_tn",
    "mini",
    "_s0",
    "_s1",
    "b0",
    "_m0",
    "_0",
    "_128s",
    "002",
    "s12",
    "18_small",
    "18",
    "_t",
    "_s",
    "small",
)


class _Kind(type):
    """A class any of whose attributes exist, as those of torchvision's enums do."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (), {})


class _TorchvisionStub(MetaPathFinder, Loader):
    """Answers for torchvision, which timm imports for what it does to images, not for its models."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


@cache
def timm() -> Any:
    """Import timm, with a stub for torchvision if that isn't there.

    Raises
    ------
    ImportError
        If timm isn't installed.
    """
    # transformers asks whether torchvision is there when it is imported; the stub shouldn't count.
    import transformers  # noqa: F401

    if find_spec("torchvision") is None:
        sys.meta_path.append(_TorchvisionStub())
    import timm

    return timm


def cases() -> list[Case]:
    """Return a case for each module of timm's models; none without timm."""
    try:
        names = smallest_of_each_family()
    except ImportError:
        return []
    return [Case(GROUP, name, partial(make, name), ((3,), (5,))) for name in names]


def smallest_of_each_family() -> list[str]:
    families: dict[str, list[str]] = defaultdict(list)
    for name in timm().list_models():
        families[timm().models._registry._model_to_module[name]].append(name)
    return [min(names, key=_rank) for _, names in sorted(families.items())]


def _rank(name: str) -> tuple[int, int, str]:
    found = next((i for i, part in enumerate(_SMALL) if part in name), len(_SMALL))
    return found, len(name), name


def make(name: str) -> Subject:
    """Return a model at the smallest image that it runs on."""
    reasons = []
    for shallow, size in product(_SHALLOW, _SIZES):
        for options in ({"img_size": size}, {}):
            try:
                model = _built(name, size, **shallow, **options)
            except TypeError:  # it has no such option, or another number of stages
                continue
            except Exception as error:
                reasons.append(error)
                continue
            return Subject(lively(model), partial(_images, size), functional.cross_entropy)
    raise reasons[-1] if reasons else ValueError("it has no options that the zoo knows")


def _built(name: str, size: int, **options: Any) -> Any:
    """Return a model that has classified images of a size.

    Raises
    ------
    TypeError, AssertionError, ...
        If it doesn't know an option, or can't take the size.
    """
    torch.manual_seed(0)
    model = timm().create_model(name, num_classes=_CLASSES, **options)
    if sum(p.numel() for p in model.parameters()) > _MOST_PARAMETERS:
        raise ValueError("it is larger than the zoo takes")
    with torch.no_grad():
        found = model.train()(torch.randn(2, 3, size, size))
    if found.shape != (2, _CLASSES):
        raise ValueError(f"it returns {list(found.shape)}")
    return model


def _images(size: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, size, size), torch.arange(rows) % _CLASSES
