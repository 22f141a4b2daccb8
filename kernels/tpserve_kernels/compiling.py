"""A hook for Triton's compilations: each takes seconds, in the middle of the first step whose shapes need it."""

from collections.abc import Callable
from typing import Any


def on_compile(callback: Callable[[str], None]) -> None:
    """Call `callback("compiling NAME")` before each later compilation in this process, on the compiling thread.

    It replaces Triton's `jit_cache_hook`. Without Triton it does nothing.
    """
    try:
        from triton import knobs
    except ImportError:  # then nothing is compiled
        return

    def hook(*, fn: Any = None, **_: Any) -> bool:
        callback(f"compiling {getattr(fn, 'name', 'a kernel')}")
        return False  # True would skip the compilation

    knobs.runtime.jit_cache_hook = hook
