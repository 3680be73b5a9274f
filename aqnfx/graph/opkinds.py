"""The one table from FX targets (``aten.*`` overload packets and ``torch.*`` functions) to operator kinds."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch


class OpKind(StrEnum):
    """Kind of a floating-point operation; the value is the name used in selectors, site ids and artifacts."""

    LINEAR = "linear"
    MATMUL = "matmul"
    BMM = "bmm"
    SDPA = "sdpa"
    SOFTMAX = "softmax"
    LAYER_NORM = "layer_norm"
    RMS_NORM = "rms_norm"
    SILU = "silu"
    GELU = "gelu"
    RELU = "relu"
    GLU = "glu"  # SwiGLU / GeGLU product: act(gate) * up
    EMBEDDING = "embedding"
    ROTARY = "rotary"
    ADD = "add"
    MUL = "mul"
    CONV = "conv"
    GROUPED_MM = "grouped_mm"
    OTHER = "other"


CORE = frozenset({OpKind.LINEAR, OpKind.MATMUL, OpKind.BMM})
EXTENDED = CORE | {OpKind.SOFTMAX, OpKind.SILU, OpKind.GELU, OpKind.LAYER_NORM, OpKind.RMS_NORM}
OP_SETS: dict[str, frozenset[OpKind]] = {"core": CORE, "extended": EXTENDED, "all": frozenset(OpKind)}



def may_be_infinite(op: OpKind, region: str) -> bool:
    """Return whether a mask may have left infinities in a value: in sums of attention scores, and in masks themselves.

    Anywhere else a value that is not finite is a fault of the model.
    """
    sums = op in (OpKind.ADD, OpKind.OTHER)
    return region == "position" or (region in ("attention", "other") and sums)


def channel_dim(op: OpKind, dims: int) -> int:
    """Return which dimension of a value of ``dims`` dimensions holds the channels: the second of a convolution's."""
    return 1 if op is OpKind.CONV and dims > 2 else -1


_NAMES: dict[OpKind, tuple[str, ...]] = {
    OpKind.LINEAR: ("linear", "addmm", "addmv", "linear_relu"),
    OpKind.MATMUL: ("matmul", "mm", "einsum", "dot", "mv", "outer"),
    OpKind.BMM: ("bmm", "baddbmm"),
    OpKind.SDPA: (
        "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_cudnn_attention", "flex_attention",
    ),
    OpKind.SOFTMAX: ("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"),
    OpKind.LAYER_NORM: ("layer_norm", "native_layer_norm", "group_norm", "native_group_norm"),
    OpKind.RMS_NORM: ("rms_norm", "_fused_rms_norm"),
    OpKind.SILU: ("silu", "swish"),
    OpKind.GELU: ("gelu",),
    OpKind.RELU: ("relu", "relu6", "leaky_relu"),
    OpKind.GLU: ("glu",),
    OpKind.EMBEDDING: ("embedding", "embedding_bag"),
    OpKind.ADD: ("add", "sub", "rsub", "iadd", "isub"),
    OpKind.MUL: ("mul", "div", "truediv", "true_divide", "imul", "itruediv", "multiply", "divide"),
    OpKind.CONV: ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"),
    OpKind.GROUPED_MM: ("grouped_mm", "_grouped_mm", "grouped_mm_fallback", "_scaled_grouped_mm"),
}  # fmt: skip
NAME_TO_KIND: dict[str, OpKind] = {name: kind for kind, names in _NAMES.items() for name in names}

# Operations that move, select or cast values without arithmetic: never a site.
MOVES = frozenset({
    "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "transpose", "permute", "t", "mT", "numpy_T", "mH",
    "matrix_H", "adjoint", "contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "float", "half",
    "bfloat16", "slice", "select", "narrow", "getitem", "expand", "expand_as", "unsqueeze", "squeeze", "flatten",
    "unflatten", "chunk", "split", "split_with_sizes", "unbind", "cat", "concat", "stack", "index", "index_select",
    "gather", "index_put", "scatter", "masked_fill", "where", "dropout", "native_dropout", "pad", "constant_pad_nd",
    "repeat", "repeat_interleave", "index_copy", "index_fill", "roll", "flip", "tril", "triu", "sort", "topk",
    "lift_fresh", "lift_fresh_copy", "copy", "slice_scatter", "select_scatter", "movedim", "swapaxes", "unfold",
    "feature_dropout", "alpha_dropout", "masked_scatter", "take_along_dim", "swapdims", "diagonal", "_conj", "real",
    "view_as_real", "view_as_complex", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "zeros", "ones", "full", "empty", "arange", "scalar_tensor", "rand_like", "size",
    "_assert_tensor_metadata", "_assert_scalar", "sym_size", "item", "max_pool2d", "identity",
    "histc", "bincount",  # counts of choices: no derivative, and noise on them is no noise on values
})  # fmt: skip


def base_name(target: Any) -> str | None:
    """Return the operator name of an FX target without namespace, overload or in-place underscore.

    Accepts ``OpOverload``, ``OpOverloadPacket``, Python functions of ``torch`` and ``operator``, and method names.
    Returns None for anything else.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        name = target.__name__
    elif isinstance(target, str):
        name = target
    elif callable(target) and hasattr(target, "__name__"):
        name = target.__name__
    else:
        return None
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def op_kind(target: Any) -> OpKind | None:
    """Return the kind of an FX target: from the table, OTHER for unknown arithmetic, None for moves and non-functions."""
    name = base_name(target)
    if name is None or name in MOVES:
        return None
    return NAME_TO_KIND.get(name.strip("_") if name.startswith("__") else name, OpKind.OTHER)
