"""The reason codes: what each means and what a user can do about it.

A code never changes its meaning and is never used again; a code no longer issued stays in the table, so that
old reports can be read. The hundreds digit is the family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple


class Reason(NamedTuple):
    """What a code means: a title, one sentence, and the way out (empty where none is needed)."""

    title: str
    explanation: str
    way_out: str


FAMILIES: Final[Mapping[str, str]] = {
    "LM1": "rewritten",
    "LM2": "declined: the rewrite is not possible or not allowed here",
    "LM3": "declined: the rewrite would not pay",
    "LM9": "failed: the graph was compiled without this pass",
}

REASONS: Final[Mapping[str, Reason]] = {
    "LM100": Reason(
        "Rewritten",
        "The place was rewritten.",
        "",
    ),
    "LM200": Reason(
        "Switched off by an option",
        "The options in force keep this pass from rewriting anything.",
        "Leave the option named in the reason at its default.",
    ),
    "LM201": Reason(
        "Approximate gradients are switched off",
        "The rewrite would change gradients slightly, and the options in force ask for exact ones.",
        "Compile with options={'gradients': 'approximate'}.",
    ),
    "LM202": Reason(
        "No step table for this activation",
        "The slope of this activation, with these arguments, is in no table of the project.",
        "Use GELU or SiLU where the model allows it.",
    ),
    "LM203": Reason(
        "Input of an unsupported kind",
        "The rewrite is defined for floating-point tensors of certain dtypes, and this input is something else.",
        "Run this part of the model in float32, bfloat16 or float16.",
    ),
    "LM204": Reason(
        "Output of the norm is not read in a narrow dtype",
        "The rewrite needs every matrix product that reads the norm to read it in one and the same 2-byte dtype.",
        "Train under autocast to bfloat16 or float16.",
    ),
    "LM205": Reason(
        "dtype or shape changes inside",
        "The operations compute or return another dtype or shape than that of their input, which the "
        "library's operation would not.",
        "",
    ),
    "LM206": Reason(
        "An intermediate value is read elsewhere",
        "Another operation reads a value that the rewrite would remove.",
        "",
    ),
    "LM207": Reason(
        "Logits are needed as they are",
        "The logits are returned, read elsewhere or cut along the vocabulary, so they have to exist whole.",
        "Let the model return the loss alone while training.",
    ),
    "LM208": Reason(
        "This form of the loss is not supported",
        "The loss has arguments or a dtype for which there is no computation in chunks.",
        "Use class indices, the reduction mean or sum, no class weights, and bfloat16 or float32.",
    ),
    "LM209": Reason(
        "Dropout stands in between",
        "The linear layers read the norm through a dropout, so they and the norm cannot share one value.",
        "Set the dropout to 0 where the model allows it.",
    ),
    "LM210": Reason(
        "Nothing to fold",
        "The norm has neither a scale nor a shift.",
        "",
    ),
    "LM211": Reason(
        "Kept exact by an option",
        "The options in force name this module among those whose saved tensors are not encoded.",
        "Remove the name from options['keep_exact'].",
    ),
    "LM212": Reason(
        "A small error would grow",
        "The backward pass reads the tensor through an exponential, a division, a comparison or the like, or it is a "
        "statistic of another tensor, so a small error in it would not stay small.",
        "",
    ),
    "LM214": Reason(
        "A side effect stands in between",
        "Between the two operations the graph changes grad mode or autocast, or writes to a value in place, so they cannot be "
        "computed together.",
        "",
    ),
    "LM215": Reason(
        "A gradient already",
        "The tensor was computed with the loss and becomes the gradient of a weight, so it is as large again as soon as the "
        "backward pass begins; codes in between would add a copy.",
        "",
    ),
    "LM216": Reason(
        "Kept exact by the plan",
        "The plan for options['memory_budget'] meets the budget at less error and time with this tensor as it is.",
        "Ask for a smaller budget.",
    ),
    "LM217": Reason(
        "The optimizer needs the whole gradient",
        "The optimizer that holds this weight cannot use a projected gradient: its method or this step needs the whole one, the "
        "weight is not projected, or someone else (another optimizer, DistributedDataParallel) reads the gradient.",
        "",
    ),
    "LM218": Reason(
        "The weight is read by something else too",
        "The gradient of the weight is a sum over everything that reads it, and only that of linear layers can be projected as "
        "it is computed: the weight is tied to an embedding, belongs to a chunked loss or is read inside a checkpoint.",
        "",
    ),
    "LM219": Reason(
        "The gradient of the weight is projected",
        "Folding a vector into the weight would make the gradient of the vector need the whole gradient of the weight, which is "
        "computed as its projection and never exists.",
        "",
    ),
    "LM221": Reason(
        "Measured: codes would do harm",
        "In ten bits this tensor would give the gradient of some parameter a cosine below four nines; options['calibrate'] "
        "measured it.",
        "Give a memory_budget: it weighs the error against the bytes.",
    ),
    "LM222": Reason(
        "No bound of the integers is proved",
        "A narrower dtype is taken only where the graph proves that every value fits: nothing is measured.",
        "",
    ),
    "LM300": Reason(
        "No fewer bytes in the end",
        "The graph was partitioned with this rewrite and without it, and with it no fewer bytes were kept.",
        "",
    ),
    "LM301": Reason(
        "Computing it again is as small",
        "The backward pass can compute the value again from something that takes no more bytes, and exactly.",
        "",
    ),
    "LM302": Reason(
        "Alive anyway",
        "The value is an input or an output of the graph, so it stays in memory whatever the backward pass keeps.",
        "",
    ),
    "LM303": Reason(
        "No gradient flows here",
        "The backward pass does not go through this operation, so it keeps nothing for it.",
        "",
    ),
    "LM304": Reason(
        "No linear layer reads it",
        "The rewrite pays where a linear layer and the norm share one kept value, and no linear layer reads this norm.",
        "",
    ),
    "LM305": Reason(
        "Too small to matter",
        "The tensor has so few bytes that the extra work would not pay.",
        "",
    ),
    "LM306": Reason(
        "What would be kept instead is larger",
        "In place of the value the rewrite keeps or makes others (gradients of the head, a scaled weight, a sum), and for "
        "these shapes they take more bytes.",
        "",
    ),
    "LM307": Reason(
        "Folding saves no bytes",
        "The backward pass rebuilds the affine from the normalised value for nothing, so folding it into the "
        "weights would free nothing.",
        "options={'fold_norm_affine': 'always'} folds nevertheless.",
    ),
    "LM308": Reason(
        "The scale is frozen",
        "Without a gradient of the scale, the output of the linear layer is not kept for it.",
        "",
    ),
    "LM310": Reason(
        "Nothing to launch it with",
        "No other encode or decode is near enough to share a launch.",
        "",
    ),
    "LM311": Reason(
        "The library is as fast",
        "For this dtype and these sizes the library's own operation takes no longer than what would replace it.",
        "",
    ),
    "LM900": Reason(
        "The pass raised an error",
        "The pass stopped with an error, its changes to this graph were dropped, and the graph was compiled without it.",
        "Please report it with the graph dump (options={'dump': 'folder'}); options={'strict': True} raises the error.",
    ),
}

REWRITES: Final[Mapping[str, Reason]] = {
    "recognise_activation": Reason(
        "Activation written by hand recognised",
        "The operations that spell out an activation became the library's own operation, which keeps its input alone.",
        "",
    ),
    "recognise_norm": Reason(
        "Norm recognised",
        "The norm became one operation whose backward pass can work from its output.",
        "",
    ),
    "norm_from_output": Reason(
        "Norm kept once, as its output",
        "The normalised output is kept in the compute dtype and serves the norm and every linear layer that"
        " reads it, in place of the wider input.",
        "",
    ),
    "approximate_activation": Reason(
        "Activation input kept as codes",
        "The backward pass reads the slope of the activation from a code of a few bits in place of the full input.",
        "",
    ),
    "fold_norm_affine": Reason(
        "Affine of the norm folded into the next linears",
        "The linear layers read the normalised value with scaled weights, so it is the only value kept.",
        "",
    ),
    "fold_layer_scale": Reason(
        "Layer scale folded into the linear before it",
        "The scale became part of the weight, so the output of the linear layer is not kept for its gradient.",
        "",
    ),
    "chunk_loss": Reason(
        "Loss computed in chunks",
        "The last linear layer and the loss run over a part of the batch at a time, so the logits are never whole and not kept.",
        "",
    ),
    "projection_taps": Reason(
        "Gradient of the weight computed as its projection",
        "The backward pass computes what the optimizer keeps of the gradient, and the whole gradient never exists.",
        "",
    ),
    "recompute_saved": Reason(
        "Computed again in the backward pass",
        "The plan for options['memory_budget'] gives the tensor up; the operations that make it, matrix products included, are "
        "repeated where the backward pass first reads it.",
        "",
    ),
    "encode_saved": Reason(
        "Kept as integer codes",
        "The tensor is kept as codes of a few bits with a scale for each group of elements, and decoded where backward reads it.",
        "",
    ),
    "unfold_patches": Reason(
        "Patches embedded by a linear layer",
        "The convolution's windows tile its input, so it is a matrix product; the library's algorithm took scratch memory.",
        "",
    ),
    "attention_backward": Reason(
        "Attention's gradients computed from its inputs",
        "Matrix products on some heads at a time take less time than the library's kernel, and read neither the output nor the "
        "logsumexp.",
        "",
    ),
    "accumulate_sums": Reason(
        "Gradient of a shared vector summed term by term",
        "Each sum is added as it is made, and what it reads is freed; one loop read all of it at the end of the backward pass.",
        "",
    ),
    "update_in_backward": Reason(
        "Updated in the backward pass",
        "The parameter changes as soon as its gradient is there, and the gradient need not live until all are there.",
        "",
    ),
    "embedding_gradient": Reason(
        "Embedding gradient summed over the rows that occur",
        "The float32 sum has a row for each index of the batch in place of one for each entry of the vocabulary, or the rows are "
        "added to another gradient in place.",
        "",
    ),
    "compute_once": Reason(
        "Computed once",
        "A small result of a costly function lies in memory; it would have been computed again wherever it is read.",
        "",
    ),
    "launch_together": Reason(
        "Codes of several tensors in one launch",
        "On a GPU each of them would have been a kernel launch of its own.",
        "",
    ),
    "narrow_integers": Reason(
        "Integers kept in a narrower dtype",
        "The graph proves bounds of the integers, and they are kept in the narrowest dtype that holds them.",
        "",
    ),
    "flatten_saved_inputs": Reason(
        "Input handed over as it is",
        "A convolution reads the input in another layout; the backward pass gets the input itself, and no copy of it is kept.",
        "",
    ),
    "pack_masks": Reason(
        "Mask packed to one bit per element",
        "A mask holds only true or false, and it is kept as one bit per element in place of eight.",
        "",
    ),
}
"""What LM100 means for each pass."""

_CODE = re.compile(r"LM[1-9]\d\d", re.ASCII)


def explain_code(code: str, pass_name: str = "") -> Reason:
    """Return the meaning of `code`; for one this version does not know, what its family says.

    A generic code (LM100) is explained by the words of the pass that issued it.
    """
    if code == "LM100" and pass_name in REWRITES:
        return REWRITES[pass_name]
    known = REASONS.get(code)
    if known is not None:
        return known
    if _CODE.fullmatch(code) and code[:3] in FAMILIES:
        family = FAMILIES[code[:3]]
        return Reason(f"{family[0].upper()}{family[1:]}", "This version does not know the code.", "")
    return Reason("Unknown reason", "This version does not know the code.", "")
