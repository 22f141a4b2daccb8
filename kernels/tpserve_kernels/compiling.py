"""Tells when Triton compiles a kernel: it takes seconds, in the middle of the first step whose shapes need it."""

from collections.abc import Callable
from typing import Any


def on_compile(tell: Callable[[str], None]) -> None:
    """From now on call `tell` with a phrase before each compilation in this process. Nothing happens where Triton is missing."""
    try:
        from triton import knobs
    except ImportError:  # nothing is compiled, then
        return

    def begins(*, fn: Any = None, **about: Any) -> bool:
        tell(f"compiling {getattr(fn, 'name', 'a kernel')}")
        return False  # True would skip it

    knobs.runtime.jit_cache_hook = begins
