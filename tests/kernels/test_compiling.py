"""Triton's own call of the hook by which a rank says that it compiles. No card is needed for that."""

from types import SimpleNamespace

import pytest

from tpserve_kernels.compiling import on_compile

triton = pytest.importorskip("triton")


def test_triton_tells_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    def scale_rows() -> None:
        """A kernel without arguments."""

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
    told: list[str] = []
    on_compile(told.append)
    kernel = JITFunction(scale_rows)
    options = SimpleNamespace(
        num_warps=4, num_ctas=1, num_stages=3, enable_fp_fusion=True, launch_cooperative_grid=False, extern_libs=()
    )
    skip = kernel._call_hook(
        triton.knobs.runtime.jit_cache_hook, ("", ()), {}, GPUTarget("cuda", 90, 32), 0, {}, options, [{}], False
    )
    assert not skip and len(told) == 1 and told[0].startswith("compiling ") and told[0].endswith("scale_rows")
