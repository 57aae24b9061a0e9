"""What the backward pass may recompute: pointwise operations, matmul inputs included, and everything made of parameters.

Inductor's default bans recomputing a tensor that a backward matmul reads, so gelu(h) is saved beside h, and a bf16 copy of
every weight under autocast. Here:

- a pointwise operation may be recomputed, also where a matmul reads it (Inductor's ``ban_recompute_materialized_backward`` off);
- views, casts and pointwise operations with a single large input may always be recomputed: their input is one tensor that is at
  hand, so "used far apart" and "long chain" do not apply (this is what keeps fp32 twins of bf16 tensors from being saved);
- tensors computed from parameters alone (autocast copies, folded weights) must be recomputed, and so must copies of an input
  that take no fewer bytes than the input;
- a pinned tensor (codes, normalised outputs) is never recomputed.

Numerics class: EXACT.
"""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from lowmem_compile._torch import (
    MinCutOptions,
    NodeInfo,
    functorch_config,
    op_types,
    solve_min_cut,
    stock_choose_saved_values,
    with_required_forward,
)
from lowmem_compile.graph import VIEW_OPS, numel, parameter_only, storage_root, tensor_of

aten = torch.ops.aten
MOVES = {*VIEW_OPS, aten.clone.default}
AFTER_EVERY_CHECKPOINT = 1 << 30


def choose_saved(joint: fx.Graph, info: NodeInfo, memory_budget: float, *, pointwise: bool) -> list[fx.Node]:
    """The tensors to save: a minimum cut under the rules above (stock rules when ``pointwise`` is false)."""
    pins = [n for n in joint.nodes if n.meta.get("lowmem_pin") and not info.is_required_fw(n)]
    wanted = _with_ancestors(pins, info)
    info = with_required_forward(info, joint, wanted)
    for node in pins:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        node.dist_from_bw = 1
    for node in wanted:
        if not hasattr(node, "dist_from_bw"):
            node.dist_from_bw = 1
    for node in (*parameter_only(joint, info.static_lifetime_input_nodes), *_copies_of_inputs(joint)):
        if info.is_required_fw(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = AFTER_EVERY_CHECKPOINT
    if not pointwise or memory_budget != 1:
        return stock_choose_saved_values(joint, info, memory_budget)
    options = MinCutOptions(
        ban_if_used_far_apart=functorch_config.ban_recompute_used_far_apart,
        ban_if_long_fusible_chains=functorch_config.ban_recompute_long_fusible_chains,
        ban_if_materialized_backward=False,
        ban_if_not_in_allowlist=functorch_config.ban_recompute_not_in_allowlist,
        ban_if_reduction=functorch_config.ban_recompute_reductions,
    )
    free = type(info.required_bw_nodes)(n for n in joint.nodes if _cheap(n))
    saved, _ = solve_min_cut(joint, info, options, free)
    return saved


def _with_ancestors(pins: list[fx.Node], info: NodeInfo) -> list[fx.Node]:
    found: list[fx.Node] = []
    work = list(pins)
    while work:
        node = work.pop()
        if node in found or info.is_required_fw(node) or node.op == "placeholder":
            continue
        found.append(node)
        work.extend(node.all_input_nodes)
    return found


def _copies_of_inputs(joint: fx.Graph) -> list[fx.Node]:
    """Copies of an input of the graph in another order, with the views between, of as many elements."""
    source: dict[fx.Node, fx.Node] = {n: n for n in joint.find_nodes(op="placeholder")}
    for node in joint.nodes:
        if node.target in MOVES and (first := node.args[0]) in source and numel(node) == numel(source[first]):
            source[node] = source[first]
    copied = {n for n in source if n.target is aten.clone.default}
    for node in joint.nodes:
        if node in source and any(i in copied for i in node.all_input_nodes):
            copied.add(node)
    return [n for n in source if n in copied]


def _cheap(node: fx.Node) -> bool:
    """A view, cast or pointwise operation whose only large input is one tensor."""
    if node.op != "call_function" or tensor_of(node) is None:
        return False
    if node.target in VIEW_OPS:
        return True
    ops = op_types()
    if not ops.is_recomputable(node) or ops.is_random(node) or node.meta.get("lowmem_pin"):
        return False
    size = numel(node)
    sources = {storage_root(i) for i in node.all_input_nodes if numel(i) * 4 > size}
    return len(sources) <= 1 and all(numel(i) <= size * math.e for i in node.all_input_nodes)
