"""How much memory an operator's result can take at most, known before it is computed.

What most operators return is as large as their inputs broadcast against each other. For those of which models
have many, and whose results are larger, there are rules; for the rest, torch computes the form on tensors
without data, what is made on the way included.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dagflow_tasks.program.allow_list import IN_PLACE, RANDOM, SELECTING, VIEWS, allowed

Rule = Callable[[Sequence[Any], Mapping[str, Any]], int]
_META = torch.device("meta")


def most_bytes(op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Return an upper bound of what a call makes.

    Parameters
    ----------
    op : str
        As programs name it.
    """
    rule = _rule(op)
    if rule is None:
        return _computed(op, arguments, keywords)
    return rule(_in_order(op, arguments, keywords) if keywords else arguments, keywords)


def is_sized_by_data(op: str, arguments: Sequence[Any]) -> bool:
    """Tell whether a call's result is as large as the data says: selected rows, repeats, classes."""
    if op == "aten.index.Tensor":
        indices = [index for index in arguments[1] if isinstance(index, torch.Tensor)]
        return any(index.dtype in (torch.bool, torch.uint8) for index in indices)
    if op == "aten.one_hot.default":
        return len(arguments) < 2 or arguments[1] < 0
    return op in _REPEATS or allowed().get(op) == SELECTING


_REPEATS = ("aten.repeat_interleave.Tensor", "aten.repeat_interleave.self_Tensor")


def _in_order(op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> list[Any]:
    """Return the positional arguments, and those behind them that are given by name."""
    found = list(arguments)
    for name in _names(op)[len(found) :]:
        if name not in keywords:
            break
        found.append(keywords[name])
    return found


@cache
def _names(op: str) -> tuple[str, ...]:
    if not op.startswith("aten."):
        return ()
    _, packet, overload = op.split(".")
    schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
    return tuple(argument.name for argument in schema.arguments if not argument.kwarg_only)


@cache
def _rule(op: str) -> Rule | None:
    packet = op.split(".")[1] if op.startswith("aten.") else op
    found = _RULES.get(op, _RULES.get(packet))
    if found is not None:
        return found
    section = allowed().get(op)
    if section == IN_PLACE or packet.endswith("_"):
        return _one_of_its_inputs
    if section == RANDOM and packet not in _LIKE_INPUTS:
        return _drawn
    if packet in _COMPUTED:
        return None
    if section == VIEWS or packet in _LIKE_INPUTS or _is_pointwise(op):
        return _broadcast
    return None


# Views that can be larger than what they show.
_COMPUTED = frozenset(("as_strided", "unfold", "expand_as", "view_as", "reshape_as"))


def _is_pointwise(op: str) -> bool:
    if not op.startswith("aten."):
        return False
    _, packet, overload = op.split(".")
    return torch.Tag.pointwise in getattr(getattr(torch.ops.aten, packet), overload).tags


# fmt: off
_LIKE_INPUTS = frozenset((
    # normalisation, softmax, reductions, orders, sums along a dimension
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "native_group_norm", "batch_norm",
    "instance_norm", "softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "logsumexp",
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "std", "var",
    "var_mean", "std_mean", "norm", "linalg_vector_norm", "cumsum", "cumprod", "cummax", "cummin",
    "logcumsumexp", "sort", "argsort", "topk", "flip", "roll", "clone", "dropout", "native_dropout",
    "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "cross_entropy_loss", "nll_loss",
    "nll_loss_nd", "mse_loss", "l1_loss", "smooth_l1_loss", "binary_cross_entropy",
    "binary_cross_entropy_with_logits", "cosine_similarity", "tril", "triu", "masked_scatter", "gelu",
    "scatter", "scatter_add", "scatter_reduce", "index_add", "index_put", "index_copy", "index_fill",
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like",
    "broadcast_tensors", "lift_fresh_copy", "searchsorted", "bucketize", "glu", "quantile",
    "nanquantile", "median", "nanmedian", "kthvalue", "mode", "relu", "gather", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "unsafe_split", "unsafe_chunk", "_unsafe_view", "multinomial",
    "max_unpool2d", "_weight_norm", "select_scatter", "slice_scatter", "diagonal_scatter", "ctc_loss",
    "poisson", "bernoulli", "multilabel_margin_loss", "linalg_cholesky", "linalg_inv", "getitem",
    "_to_copy", "type_as", "complex", "polar", "linalg_det", "linalg_slogdet",
    "dagflow.weighted", "dagflow.running_max.default",
))
# fmt: on


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))


def _item_bytes(tensors: Sequence[torch.Tensor], tree: Any) -> int:
    """Return the most that an element of the result takes: inputs' own, a dtype that is asked for."""
    own = max((tensor.element_size() for tensor in tensors), default=4)
    return max([own, *(part.itemsize for part in tree if isinstance(part, torch.dtype))])


def _broadcast(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    tree = [*arguments, *keywords.values()]
    tensors = list(_tensors(tree))
    if len(tensors) == 1:
        return tensors[0].numel() * _item_bytes(tensors, tree)
    sizes: list[int] = []
    for tensor in tensors:
        shape = tensor.shape[::-1]
        sizes += [1] * (len(shape) - len(sizes))
        for at, size in enumerate(shape):
            sizes[at] = max(sizes[at], size)
    return math.prod(sizes) * _item_bytes(tensors, tree)


def _one_of_its_inputs(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    return max((t.numel() * t.element_size() for t in _tensors([arguments, keywords])), default=0)


def _all_inputs(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    tensors = list(_tensors([arguments, keywords]))
    return sum(t.numel() for t in tensors) * _item_bytes(tensors, ())


def _of_sizes(position: int) -> Rule:
    """Return the rule of operators that say the result's sizes themselves."""

    def rule(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
        tree = [*arguments, *keywords.values()]
        own = [tensor for tensor in tree if isinstance(tensor, torch.Tensor)]
        given = arguments[position] if position < len(arguments) else keywords.get("size", ())
        sizes = given if isinstance(given, (list, tuple)) else [given]
        asked = [part.itemsize for part in tree if isinstance(part, torch.dtype)]
        item = max([*asked, *(t.element_size() for t in own)], default=8)
        known = iter(reversed(own[0].shape)) if own else iter(())
        # -1 of `expand` keeps a size.
        return item * math.prod(
            next(known, 1) if n < 0 else max(n, next(known, 1)) for n in sizes[::-1]
        )

    return rule


def _sizes_only(position: int) -> Rule:
    def rule(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
        tree = [*arguments, *keywords.values()]
        given = arguments[position] if position < len(arguments) else keywords.get("size", ())
        sizes = given if isinstance(given, (list, tuple)) else [given]
        asked = [part.itemsize for part in tree if isinstance(part, torch.dtype)]
        own = [tensor.element_size() for tensor in tree if isinstance(tensor, torch.Tensor)]
        return int(max([*asked, *own], default=8) * math.prod(max(n, 0) for n in sizes))

    return rule


def _drawn(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """As many as sizes or inputs say, or the one number does.

    torch isn't asked for the form of what is drawn: whoever counts draws would see one more.
    """
    sizes = next((part for part in arguments if isinstance(part, (list, tuple))), None)
    if sizes is not None:
        return int(8 * math.prod(max(n, 0) for n in sizes))
    if next(_tensors(arguments), None) is not None:
        return _broadcast(arguments, keywords)
    return 8 * max((n for n in arguments if isinstance(n, int)), default=1)


def _linear(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    x, weight = arguments[0], arguments[1]
    rows = x.numel() // max(1, x.shape[-1]) if x.dim() else 1
    return int(rows * weight.shape[0] * max(x.element_size(), 2)) if weight.dim() else 0


def _product(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Result of a product of matrices, and its operands where they are repeated for it."""
    first, second = list(_tensors(arguments))[-2:]
    a, b = list(first.shape), list(second.shape)
    if not a or not b:
        return 0
    a, b = ([1, *a] if len(a) == 1 else a), ([*b, 1] if len(b) == 1 else b)
    batch = 1
    for at in range(3, max(len(a), len(b)) + 1):
        batch *= max(a[-at] if at <= len(a) else 1, b[-at] if at <= len(b) else 1)
    item = max(first.element_size(), second.element_size())
    repeated = 0
    if max(len(a), len(b)) > 2:
        for matrix in (a, b):
            wanted = batch * matrix[-1] * matrix[-2]
            repeated += wanted if wanted > math.prod(matrix) else 0
    return item * (batch * a[-2] * b[-1] + repeated)


def _lookup(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    weight, indices = arguments[0], arguments[1]
    return int(indices.numel() * math.prod(weight.shape[1:]) * weight.element_size())


def _indexed(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Rows that index tensors broadcast to, or as many as a mask has places."""
    x, indices = arguments[0], arguments[1]
    rows, dim = 1, 0
    for index in indices:
        size = x.shape[dim] if dim < x.dim() else 1
        if index is None:
            rows, dim = rows * size, dim + 1
        elif index.dtype in (torch.bool, torch.uint8):
            rows, dim = rows * index.numel(), dim + index.dim()
        else:
            rows, dim = rows * max(1, index.numel()), dim + 1
    own = [index.numel() for index in indices if index is not None]
    if all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in indices):
        # Index tensors are broadcast, not combined.
        shapes = [index.shape for index in indices if index is not None]
        rows = math.prod(torch.broadcast_shapes(*shapes)) if own else 1  # type: ignore[no-untyped-call]
        rows *= math.prod(x.shape[at] for at, index in enumerate(indices) if index is None)
    return int(rows * math.prod(x.shape[dim:]) * x.element_size())


def _repeated(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    x, repeats = arguments[0], arguments[1]
    dim = arguments[2] if len(arguments) > 2 else None
    along = x.numel() if dim is None or not x.dim() else x.shape[dim]
    if isinstance(repeats, torch.Tensor):
        each = 1 if repeats.numel() == along else along
        total = sum(max(n, 0) for n in repeats.flatten().tolist()) * each
    else:
        total = max(repeats, 0) * along
    return int((total * (x.numel() // max(1, along)) + total) * max(x.element_size(), 8))


def _one_of_classes(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Without a number of classes, the largest says it."""
    x = arguments[0]
    classes = arguments[1] if len(arguments) > 1 else -1
    if classes < 0:
        classes = int(x.max()) + 1 if x.numel() else 1
    return int(8 * x.numel() * max(1, classes))


def _places(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    x = arguments[0]
    return int(8 * x.numel() * max(1, x.dim()))


def _attention(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Result and one score a query and key: kernels that do without them can't be relied on.

    Where scores are many, torch is asked which kernel it takes.
    """
    query, key, value = arguments[:3]
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return 0
    rows = query.numel() // max(1, query.shape[-1])
    item = query.element_size()
    scores = rows * key.shape[-2] * item
    if scores > _MANY and _is_fused(arguments, keywords):
        scores = 0
    return int(rows * value.shape[-1] * item + 3 * scores)


_MANY = 1 << 28


def _is_fused(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    try:
        return bool(torch.ops.aten._fused_sdp_choice.default(*arguments, **keywords))
    except RuntimeError:  # it will say why itself
        return False


def _window(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    values, size = arguments[0], arguments[1]
    return int((values.numel() + 1) * max(size, 1) * values.element_size()) * 2


# Recurrent layers, by the shapes that their functions' docstrings give; all in float32.


def _scan(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    key, value = arguments[1], arguments[2]
    heads = value.shape[2]
    state = heads * key.shape[3] * value.shape[3]
    chunk = 64 * 64 * heads
    return int(4 * (2 * _num_elements([arguments, keywords]) + 4 * state + 4 * chunk))


def _selective(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    inputs, rates = arguments[0], arguments[2]
    return int(4 * inputs.numel() * (4 * rates.shape[-1] + 4))


def _state_space(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    (batch, length, heads, width), states, chunk = (
        arguments[0].shape,
        arguments[3].shape[-1],
        arguments[5],
    )
    tokens = batch * (length + abs(chunk)) * heads
    at_ends = batch * heads * width * states * (length // max(1, abs(chunk)) + 2)
    return int(4 * (tokens * (4 * abs(chunk) + 6 * width + 6 * states) + 3 * at_ends))


def _delta_rule(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    query, value, chunk = arguments[0], arguments[2], abs(arguments[5])
    batch, length, heads, width = query.shape
    tokens = batch * (length + chunk) * heads
    return int(4 * (tokens * (8 * width + 6 * value.shape[-1] + 8 * chunk) + 2 * chunk * chunk))


def _lightning(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    query, block = arguments[0], abs(arguments[7])
    batch, heads, length, width = query.shape
    block = min(block, length)
    return int(4 * batch * heads * (3 * length * width + 3 * block * block + 4 * width * width))


def _matrix_memory(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """For gradients, the memory after each token is kept."""
    query, value = arguments[0], arguments[2]
    batch, heads, length, width = query.shape
    kept = 2 * length if torch.is_grad_enabled() and query.requires_grad else 4
    return int(4 * batch * heads * width * value.shape[-1] * kept) + 3 * _all_inputs(arguments, {})


def _few_copies(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    return 16 * max((t.numel() for t in _tensors([arguments, keywords])), default=0)


def _num_elements(tree: Any) -> int:
    return sum(tensor.numel() for tensor in _tensors(tree))


def _histogram(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    bins = arguments[1] if len(arguments) > 1 else keywords.get("bins", 100)
    return int(8 * max(bins, 0) + 4 * _num_elements(arguments[:1]))


def _covariance(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    rows = arguments[0].shape[0] if arguments[0].dim() else 1
    return int(3 * arguments[0].element_size() * int(rows * rows + arguments[0].numel()))


def _from_spectrum(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Return the frames and the signal that they overlap to."""
    given = dict(zip(("self", "n_fft", "hop_length"), arguments, strict=False)) | dict(keywords)
    frames, count = given["self"], max(1, given["n_fft"])
    hop = given.get("hop_length") or count
    rows = max(1, frames.numel() // max(1, frames.shape[-1])) if frames.dim() else 1
    return int(16 * rows * 4 * (count + (abs(hop) + count) * frames.shape[-1]))


def _nothing(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    return 0


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn", "full"), _sizes_only(0)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), _sizes_only(1)),
    **dict.fromkeys(("expand", "broadcast_to"), _of_sizes(1)),
    **dict.fromkeys(
        ("linear", "dagflow.linear_packed.default", "dagflow.linear_int8.default"), _linear
    ),
    "dagflow.linear_int4.default": lambda a, k: _linear(a, k) + 16 * a[1].numel(),
    **dict.fromkeys(
        ("matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot", "linalg_matmul"), _product
    ),
    **dict.fromkeys(
        ("cat", "stack", "concat", "concatenate", "hstack", "vstack", "dstack"), _all_inputs
    ),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unbind", "getitem", "alias"), _nothing),
    **dict.fromkeys(("cov", "corrcoef"), _covariance),
    "histc": _histogram,
    "istft": _from_spectrum,
    "index": _indexed,
    # Not the packet: torch.where(mask, a, b) is pointwise.
    **dict.fromkeys(("nonzero", "nonzero_numpy", "argwhere", "aten.where.default"), _places),
    "masked_select": lambda a, k: _broadcast(a, k) + _places(a, k),
    "repeat_interleave": _repeated,
    "one_hot": _one_of_classes,
    "embedding": _lookup,
    "scaled_dot_product_attention": _attention,
    "dagflow.attend.default": lambda a, k: a[0].numel() * a[0].element_size() * 4,
    "dagflow.window.default": _window,
    **dict.fromkeys(
        ("_grouped_mm", "transformers.grouped_mm_fallback.default"),
        lambda a, k: a[0].shape[0] * a[1].shape[-1] * a[0].element_size(),
    ),
    "dagflow.whole": lambda a, k: 16 * math.prod(a[1]),
    **dict.fromkeys(("_assert_async", "_assert_tensor_metadata"), _nothing),
    "dagflow.scan.default": _scan,
    "dagflow.selective_scan.default": _selective,
    "dagflow.state_space_chunks.default": _state_space,
    "dagflow.delta_rule_chunks.default": _delta_rule,
    "dagflow.kimi_delta_chunks.default": _delta_rule,
    "dagflow.lightning_blocks.default": _lightning,
    "dagflow.matrix_memory.default": _matrix_memory,
    **dict.fromkeys(
        ("dagflow.linear_recurrence.default", "dagflow.weighted_sums.default"), _few_copies
    ),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), lambda a, k: _recurrent(a)),
}


def _recurrent(arguments: Sequence[Any]) -> int:
    """Every layer's gates for every token."""
    x, weights = arguments[0], arguments[2]
    rows = x.numel() // max(1, x.shape[-1]) if x.dim() else 1
    return int(rows * sum(w.shape[0] for w in weights if w.dim() == 2) * 2 * x.element_size())


def _computed(op: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> int:
    """Have torch compute the form of what an operator makes, and of what it makes on the way."""
    packet, overload = op.split(".")[1:]
    operator = getattr(getattr(torch.ops.aten, packet), overload)
    given = {k: _without_data(v) for k, v in keywords.items()}
    try:
        with torch.no_grad(), _Made() as made:
            result = operator(*map(_without_data, arguments), **given)
    except (RuntimeError, ValueError, TypeError, IndexError):
        # The call fails alike, most likely; else torch's own account of forms knows less than its
        # kernels (of dtypes, say), and what is made is counted when it is there.
        return 0
    largest = max((t.numel() * t.element_size() for t in _tensors(result)), default=0)
    return int(max(made.most, largest))


def _without_data(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    if isinstance(value, (list, tuple)):
        return [_without_data(item) for item in value]
    return _META if isinstance(value, torch.device) else value


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of what operators make, were it not without data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        makes = "device" in (argument.name for argument in func._schema.arguments)
        if makes and (named.get("device") is not None or next(_tensors(args), None) is None):
            named["device"] = _META
        result = func(*args, **named)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._alive)
        return result

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._alive -= num_bytes
