"""How the backward graph reads a saved tensor, and so whether a small error in it stays small.

A rule on the graph, not a measurement. From the tensor, follow operations that pass an error on unchanged (views, casts, sums,
products with other tensors). Where they end in

- exp, log, a division by the tensor, a root, a softmax, sine or cosine: an absolute error becomes a relative one, or worse;
- a comparison with a constant 0: only the sign matters, and whether it is zero;
- any other comparison or rounding: a small error flips the result;

the error is amplified. A query or a key of a fused attention is read through the exponential of their product: an error of
relative size e becomes one of e·|score|. Its value and output enter dS = P∘(dP − δ), dP = dO vᵀ, δ = rowsum(dO∘O): where
attention is sharp dP − δ is a small difference of large numbers, whose errors are independent. All four take ten bits unless
a codec is asked for by name. ``lowmem::attention_backward`` makes P and δ of the same Q, K and V that it reads, so that rows of
P sum to one and rows of dS to zero whatever their error; there eight bits do. Products of the tensor with itself, sigmoid, tanh,
erf and matrix products bound or average it. What is read as the input of a norm alone (:mod:`lowmem_compile.normalised`) needs
fewer bits than any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import fx

from lowmem_compile._torch import OpOverload, op_types
from lowmem_compile.graph import VIEW_OPS, numel
from lowmem_compile.kernels.attention_backward import attention_backward
from lowmem_compile.kernels.group_codes import in_memory
from lowmem_compile.normalised import only_normalised

aten = torch.ops.aten
prims = torch.ops.prims
IN_MEMORY = in_memory._opoverload
ATTENTION_BACKWARD = attention_backward._opoverload
QUERY_OR_VALUE = f"{ATTENTION_BACKWARD} (query or value)"


Kind = Literal["normalised", "plain", "attended", "difference", "compared with zero", "score", "amplified"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""From the least demanding to the most."""


@dataclass(frozen=True)
class Use:
    """How a tensor is read; ``through`` names the operation that decided."""

    kind: Kind
    through: str = ""

    @property
    def as_query_or_value(self) -> bool:
        """Whether it is query or value, and not key, of ``lowmem::attention_backward``."""
        return self.through == QUERY_OR_VALUE


PASSED_ON = VIEW_OPS | {
    IN_MEMORY,
    aten.clone.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.neg.default,
    aten.abs.default,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.where.self,
    aten.cat.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.var_mean.correction,
    aten.maximum.default,
    aten.minimum.default,
    aten.clamp.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.constant_pad_nd.default,
}
AMPLIFIED = {
    aten.exp.default,
    aten.exp2.default,
    aten.expm1.default,
    aten.log.default,
    aten.log2.default,
    aten.log10.default,
    aten.log1p.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Tensor,
    aten.sin.default,
    aten.cos.default,
    aten.tan.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.logsumexp.default,
    aten.sign.default,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.eq.Tensor,
    aten.ne.Tensor,
    aten.lt.Tensor,
    aten.le.Tensor,
    aten.gt.Tensor,
    aten.ge.Tensor,
    aten.argmax.default,
    aten.topk.default,
    aten.sort.default,
}
COMPARED = {aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar}


def use_of(placeholder: fx.Node) -> Use:
    """The worst way in which the backward graph reads its input."""
    if only_normalised(placeholder):
        return Use("normalised", "a norm")
    worst = Use("plain")
    seen = {placeholder}
    work = [placeholder]
    while work:
        node = work.pop()
        for user in node.users:
            use = _read(user, node)
            if use.kind == "amplified":
                return use
            worst = max(worst, use, key=lambda u: (KINDS.index(u.kind), u.as_query_or_value))
            if use.kind == "compared with zero":
                if node is not placeholder and not _keeps_sign(node, placeholder):
                    return Use("amplified", use.through)
            elif user not in seen and _passes_on(user, node):
                seen.add(user)
                work.append(user)
    return worst


def becomes_gradient(placeholder: fx.Node) -> bool:
    """Whether the backward graph only scales, casts or adds to the tensor, or to rows of it, on its way to one of its results.

    Such a tensor is a gradient already (of a weight, computed with the loss): it is as large at the end of the backward pass, so
    that keeping it in codes in between adds a copy and frees nothing.
    """
    ops = op_types()
    seen, work = {placeholder}, [placeholder]
    while work:
        node = work.pop()
        grown = any(_adds_rows(u, node) for u in node.users)
        for user in node.users:
            if user.op == "output" or user in seen or (grown and user.target == aten._unsafe_index.Tensor):
                continue
            alike = user.target in VIEW_OPS or user.target is IN_MEMORY or _adds_rows(user, node)
            if not alike and not ops.is_fusible(user):
                return False
            if numel(user) < numel(placeholder):
                return False
            seen.add(user)
            work.append(user)
    return len(seen) > 1


def _adds_rows(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is ``node`` with some rows replaced, which the embedding_gradient pass makes of a sum."""
    return user.target == aten._unsafe_index_put.default and user.args[0] is node


def _read(user: fx.Node, node: fx.Node) -> Use:
    name = str(user.target)
    if user.op != "call_function":
        return Use("plain")
    if isinstance(user.target, OpOverload) and "attention" in name and "backward" in name:
        names = [a.name for a in user.target._schema.arguments]
        read = {n for n, value in zip(names, user.args, strict=False) if value is node}
        if user.target is ATTENTION_BACKWARD:
            role = QUERY_OR_VALUE if "key" not in read and read & {"query", "value"} else name
            return Use("attended" if read & {"query", "key"} else "plain", role)
        if read & {"query", "key"}:
            return Use("score", name)
        return Use("difference" if read & {"value", "out"} else "plain", name)
    if user.target in COMPARED:
        zero = len(user.args) > 1 and user.args[1] == 0
        return Use("compared with zero" if zero else "amplified", name)
    if user.target is aten.pow.Tensor_Scalar:
        exponent = user.args[1]
        plain = isinstance(exponent, (int, float)) and exponent >= 1
        return Use("plain" if plain else "amplified", name)
    if user.target is aten.div.Tensor and user.args[1] is node:
        return Use("amplified", "division by it")
    if user.target is aten.exp.default and _is_logistic(user):
        return Use("plain")
    if user.target in AMPLIFIED:
        return Use("amplified", name)
    return Use("plain")


def _is_logistic(exponential: fx.Node) -> bool:
    """Whether exp(·) is only the middle of 1 / (1 + exp(·)), whose slope is bounded."""
    sums = list(exponential.users)
    return bool(sums) and all(n.target is aten.add.Tensor and n.args[1] == 1 and _divides(n) for n in sums)


def _divides(node: fx.Node) -> bool:
    return all(
        n.target is aten.reciprocal.default or (n.target is aten.div.Tensor and n.args[1] is node and n.args[0] is not node)
        for n in node.users
    )


def _passes_on(user: fx.Node, node: fx.Node) -> bool:
    """Whether an error of ``node`` arrives in ``user`` unchanged, up to a factor."""
    if user.op != "call_function" or user.target not in PASSED_ON:
        return False
    return sum(a is node for a in user.args) == 1 or user.target in (aten.cat.default, aten.index.Tensor)


def _keeps_sign(node: fx.Node, source: fx.Node) -> bool:
    """Whether ``node`` is ``source`` seen through views and casts alone."""
    casts = (aten.clone.default, aten._to_copy.default, prims.convert_element_type.default)
    while node is not source:
        if node.target not in VIEW_OPS and node.target not in casts:
            return False
        node = node.all_input_nodes[0]
    return True
