"""Memory that a library call takes while it runs, beside what it returns.

Two kinds of call take much, on a CPU: the chunked loss, by a formula (``scatter_rows`` likewise: an index of each row), and
convolutions, for which oneDNN chooses an algorithm by shape and dtype (a bf16 patch embedding of DINOv2 takes 104 MB for a
result of 0.8 MB). No formula gives the latter, so each convolution is run twice on zeros of its shapes, the second time under
PyTorch's profiler: the highest sum of the blocks of the allocator, less the result. Convolutions of more than ``LARGEST`` bytes,
on other devices, of dynamic size, or first met while a profiler of the user's runs, count as taking none.

Attention on a CPU takes a block of scores for each thread, whatever the batch and the heads: it is tried on one head; the
project's own backward pass on the heads that it takes at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lowmem_compile._torch import profiler_is_on, unset_fake_temporarily
from lowmem_compile.demo.measure import peak_bytes
from lowmem_compile.graph import concrete, nbytes, tensor_of, tensor_value
from lowmem_compile.kernels.attention_backward import attention_backward, chunk_of
from lowmem_compile.kernels.linear_cross_entropy.op import chunk_rows

log = logging.getLogger(__name__)
aten = torch.ops.aten
LARGEST = 1 << 28
"""Bytes of arguments: a larger call would take noticeable time and memory to try."""
SCATTER_ROWS = "lowmem.scatter_rows.default"
INDEX = torch.int64.itemsize
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
OWN_ATTENTION = attention_backward._opoverload


def scratch_bytes(node: fx.Node) -> int:
    """Bytes that the call takes beside its results."""
    if str(node.target) == "lowmem.linear_cross_entropy.default":
        return _of_loss(node)
    if str(node.target) == SCATTER_ROWS:
        return INDEX * concrete(tensor_value(node.all_input_nodes[1]).shape[0])
    if node.target in CONVOLUTIONS:
        return _of_convolution(node)
    if node.target in ATTENTION:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), tensor_value)
        return _of_attention(node.target, args, kwargs)
    if node.target is OWN_ATTENTION:
        return _of_own_attention(fx.node.map_arg(node.args, tensor_value))
    return 0


def call_scratch(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> int:
    """The same for a call with tensors, such as fake ones, in place of nodes."""
    if target in ATTENTION:
        return _of_attention(target, args, kwargs or {})
    if target is OWN_ATTENTION:
        return _of_own_attention(args)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if str(target) == "lowmem.linear_cross_entropy.default":
        return _chunks(tensors[0], tensors[1])
    if str(target) == SCATTER_ROWS:
        return INDEX * concrete(tensors[1].shape[0])
    if target not in CONVOLUTIONS or any(t.device.type != "cpu" for t in tensors):
        return 0
    if sum(t.numel() * t.element_size() for t in tensors) > LARGEST:
        return 0
    return _measured(target, tuple(_argument(a) for a in args))


def _of_loss(node: fx.Node) -> int:
    """Logits of a chunk, whose place their gradient takes."""
    return _chunks(tensor_value(node.all_input_nodes[0]), tensor_value(node.all_input_nodes[1]))


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> int:
    rows, vocabulary = concrete(hidden.shape[0]), concrete(weight.shape[0])
    return min(rows, chunk_rows(rows, vocabulary, hidden.element_size())) * vocabulary * hidden.element_size()


def _of_convolution(node: fx.Node) -> int:
    given = [_signature(a) for a in node.args]
    tensors = [v for n in node.all_input_nodes if (v := tensor_of(n)) is not None]
    fixed = all(isinstance(s, int) for v in tensors for s in v.shape)
    if not fixed or any(v.device.type != "cpu" for v in tensors) or sum(map(nbytes, node.all_input_nodes)) > LARGEST:
        return 0
    return _measured(node.target, tuple(given))


def _of_attention(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of one head: every tensor with 1 in the place of its first two dimensions, but for a mask of two.

    The backward pass copies the gradient [B, H, S, D] where it does not lie as [B, S, H, D].
    """
    if not all(isinstance(n, int) for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) for n in a.shape):
        return 0

    def of_one_head(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return _argument(argument)
        shape = argument.shape if argument.dim() < 3 else (1, 1, *argument.shape[2:])
        return _argument(torch.empty(shape, dtype=argument.dtype, device="meta"))

    given = {name: of_one_head(value) for name, value in kwargs.items()}
    grad = args[0]
    copied = int(grad.numel() * grad.element_size()) if target is ATTENTION[1] and not grad.transpose(1, 2).is_contiguous() else 0
    return copied + _measured(target, tuple(map(of_one_head, args)), tuple(given.items()))


def _of_own_attention(args: Sequence[Any]) -> int:
    """Of one chunk: every tensor cut to its rows of the batch and its heads, as far as it has more than one."""
    if not all(isinstance(n, int) for a in args if isinstance(a, torch.Tensor) for n in a.shape):
        return 0
    query, key = args[1], args[2]
    chunk = chunk_of(query.shape[0], query.shape[1], query.shape[2], key.shape[2])

    def of_one_chunk(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor) or argument.dim() < 4:
            return _argument(argument)
        first = [min(n, most) for n, most in zip(argument.shape, chunk, strict=False)]
        order = (0, 2, 1, 3) if argument is not args[4] else (0, 1, 2, 3)
        laid_out = torch.empty([(*first, *argument.shape[2:])[d] for d in order], dtype=argument.dtype, device="meta")
        return _argument(laid_out.permute(order))

    return _measured(OWN_ATTENTION, tuple(map(of_one_chunk, args)))


def _signature(argument: Any) -> Any:
    if not isinstance(argument, fx.Node):
        return _argument(argument)
    value = tensor_value(argument)  # what is known before code is generated: Inductor lays images out with the channels last
    format = torch.channels_last if value.dim() == 4 else torch.contiguous_format  # noqa: A001
    return _argument(torch.empty(value.shape, dtype=value.dtype, device="meta").to(memory_format=format))


def _argument(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return ("tensor", tuple(argument.shape), tuple(argument.stride()), argument.dtype)
    return tuple(argument) if isinstance(argument, list) else argument


Call = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]
_MEASURED: dict[Call, int] = {}


def _measured(target: Any, given: tuple[Any, ...], named: tuple[tuple[str, Any], ...] = ()) -> int:
    """What one call on zeros of these layouts takes beyond its results; 0 where a profiler of the user's keeps us from trying."""
    if (target, given, named) not in _MEASURED:
        if profiler_is_on():
            return 0
        _MEASURED[target, given, named] = _measure(target, given, named)
    return _MEASURED[target, given, named]


def _measure(target: Any, given: tuple[Any, ...], named: tuple[tuple[str, Any], ...]) -> int:
    with unset_fake_temporarily(), torch.no_grad():
        args, kwargs = [_zeros(a) for a in given], {name: _zeros(a) for name, a in named}
        target(*args, **kwargs)  # the first call of a shape also builds its kernels
        found = peak_bytes(lambda: target(*args, **kwargs), lambda _: None)
    log.info("%s on %s takes %d bytes of scratch memory", target, given, found.peak - found.end)
    return found.peak - found.end


def _zeros(argument: Any) -> Any:
    if isinstance(argument, tuple) and argument[:1] == ("tensor",):
        return torch.empty_strided(argument[1], argument[2], dtype=argument[3]).zero_()
    return list(argument) if isinstance(argument, tuple) else argument
