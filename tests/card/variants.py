"""What decides that Triton compiles a kernel anew: its constants, and what it sees of its arguments."""

from typing import Any, NamedTuple

import torch

ALIGNMENT = 16
"""Triton's compiler looks whether addresses and integers are multiples of this, and whether an integer is 1."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "num_ctas", "maxnreg")


class Variant(NamedTuple):
    """One compilation. `arguments`: name, and a constant ("= 64"), a type ("i32") or a type with what is known ("i32 % 16")."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.kernel}({', '.join(f'{name} {known}' for name, known in self.arguments)})"


def variant_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], addresses: dict[int, int]) -> Variant:
    """The variant that a launch needs. `kernel`: an InterpretedFunction; `addresses`: by id, of tensors that have none."""
    named = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    constants = {name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
    not_looked_at = set(kernel.kwargs.get("do_not_specialize") or ())
    any_address = set(kernel.kwargs.get("do_not_specialize_on_alignment") or ())
    arguments = []
    for name, value in named.items():
        if name in constants:
            known = f"= {value!r}"
        elif isinstance(value, torch.Tensor):
            address = addresses.get(id(value), value.data_ptr())
            aligned = address % ALIGNMENT == 0 and name not in any_address
            known = f"*{str(value.dtype).removeprefix('torch.')}" + (" % 16" if aligned else "")
        elif isinstance(value, bool) or value is None:
            known = f"= {value!r}"
        elif isinstance(value, int):
            known = "i32" if -(2**31) <= value < 2**31 else "i64"
            if name not in not_looked_at:
                known = "= 1" if value == 1 else known + (" % 16" if value % ALIGNMENT == 0 else "")
        else:
            known = "fp32"
        arguments.append((name, known))
    chosen = tuple((name, options[name]) for name in OPTIONS if name in options)
    return Variant(kernel.fn.__module__, kernel.fn.__name__, tuple(arguments), chosen)
