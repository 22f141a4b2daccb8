"""How many kernels an operator of torch launches on a card: assumed, until a profile on a card confirms them.

Contiguous inputs of a few thousand rows; what a shape changes (a matrix product that splits K, a large sort) is not told apart.
"""

# fmt: off
VIEWS = frozenset((
    "alias", "as_strided", "detach", "expand", "narrow", "permute", "select", "slice", "squeeze", "t", "transpose",
    "unbind", "unfold", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "split", "split_with_sizes", "lift_fresh",
    "view_as", "detach_", "numpy_T",
))
"""No launch: another look at the same memory."""
ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",))
"""No launch: memory of the caching allocator."""
ONE = (
    "mm", "addmm", "bmm", "baddbmm", "grouped_mm", "_grouped_mm", "add", "sub", "rsub", "mul", "div", "neg", "exp", "log",
    "erf", "relu", "tanh", "sigmoid", "rsqrt", "square", "pow", "sqrt", "bitwise_and", "bitwise_or", "bitwise_xor",
    "bitwise_not", "bitwise_right_shift", "bitwise_left_shift", "__and__", "__rshift__", "__lshift__", "__or__", "__xor__",
    "logical_and", "logical_not", "floor_divide", "remainder", "eq", "ne", "lt", "le", "gt", "ge", "where", "maximum",
    "minimum", "clamp", "clamp_min", "clamp_max", "ceil", "floor", "round", "abs", "isinf", "isnan", "zeros", "zeros_like",
    "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones", "new_full", "fill", "zero", "arange", "index",
    "gather", "index_select", "index_put", "scatter", "scatter_add", "index_copy", "index_add", "masked_fill", "embedding",
    "cat", "stack", "_to_copy", "clone", "copy", "constant_pad_nd", "roll", "repeat", "bincount", "sum", "mean", "amax",
    "amin", "max", "min", "argmax", "argmin", "any", "all", "_softmax", "_log_softmax", "cumsum",
)
LAUNCHES = {**dict.fromkeys(ONE, 1), "sort": 4, "topk": 3, "argsort": 4, "logsumexp": 4}
"""Name to launches."""
WAITS = frozenset((
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2", "item",
    "repeat_interleave",
))
"""The host waits for the card."""
# fmt: on


def launches(name: str) -> int:
    """The launches of the operator `name` (no namespace, no overload, in place or not). KeyError: it is new."""
    if name in VIEWS or name in ALLOCATIONS:
        return 0
    return LAUNCHES[name if name.endswith("__") else name.removesuffix("_")]
