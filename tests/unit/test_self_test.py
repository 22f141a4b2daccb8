"""The self-test of a rank's products: what it finds, what it leaves for the next start, and what may be wrong with its file."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.specs import LATENTS, small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.quant import processor
from tpserve.quant.packed import can_pack
from tpserve.quant.product import Product
from tpserve.types.layout import ParallelLayout
from tpserve.types.messages import Numerics
from tpserve.weights.dummy import dummy
from tpserve.worker import self_test as module
from tpserve.worker.self_test import Known, examine, self_test
from tpserve_kernels.cpu.library import Isa, library, load, serves


class Clock:
    """Stands still but for what products take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def product(self, name: str, width: int, breaks_above: int = 1000) -> Product:
        """Takes 1 ms a row and 1,024 channels; above some rows all rows come out a little larger."""

        def run(x_TK: torch.Tensor) -> torch.Tensor:
            self.calls.append((name, len(x_TK)))
            self.now += 1e-6 * max(4, len(x_TK)) * width
            return x_TK * (1.001 if len(x_TK) > breaks_above else 1)

        return Product(name, width, width, torch.float32, run)


def test_what_breaks_is_named() -> None:
    clock, known = Clock(), Known()
    kinds = [clock.product("a", 64), clock.product("b", 32, 64), clock.product("c", 16, 599)]
    assert examine(kinds, known, 0.3, clock)
    good = {"33": True, "65": True, "600": True}
    assert known == {"a": good, "b": good | {"65": False, "600": False}, "c": good | {"600": False}}
    assert not examine(kinds, known, 0.3, clock), "nothing is left to try"


def test_only_the_last_row_breaks() -> None:
    def run(x_TK: torch.Tensor) -> torch.Tensor:
        return torch.cat((x_TK[:-1], x_TK[-1:] * 1.001)) if len(x_TK) % 2 and len(x_TK) > 1 else x_TK

    known = Known()
    examine([Product("tail", 8, 8, torch.float32, run)], known, 1e9)
    assert known["tail"]["33"] is known["tail"]["65"] is False


def test_the_time_is_kept_and_the_next_start_goes_on() -> None:
    clock, known = Clock(), Known()
    kinds = [clock.product(name, width) for name, width in (("a", 4096), ("b", 1024), ("c", 1000), ("d", 500), ("e", 40))]
    starts = 0
    while any(str(rows) not in known.get(kind.name, {}) for kind in kinds[1:] for rows in module.ROWS):
        began, starts = clock.now, starts + 1
        examine(kinds, known, 0.3, clock)
        assert clock.now - began <= 0.3
        assert starts < 5
    assert starts > 1 and "33" in known["a"]
    once = [call for call in clock.calls if call[1] > 1]
    assert len(once) == len(set(once)), "what was tried is not tried again"


def test_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "BUDGET_S", 1e9)
    kinds = [clock.product("a", 8), clock.product("b", 4, 40)]
    place = tmp_path / "deep" / "er"
    assert self_test([*kinds, *kinds], ["cpu"], place) == Numerics(broken=("b",))
    first = len(clock.calls)
    assert self_test(kinds, ["cpu"], place) == Numerics(broken=("b",)) and len(clock.calls) == first, "a restart repeats nothing"
    [file] = place.iterdir()
    self_test(kinds, ["another cpu"], place)
    assert len(clock.calls) == 2 * first and len(list(place.iterdir())) == 2
    for content in (b"", b"{", b'{"a": 3}', b"\xff" * 100):
        file.write_bytes(content)
        before = len(clock.calls)
        assert self_test(kinds, ["cpu"], place) == Numerics(broken=("b",)) and len(clock.calls) == before + first
    occupied = tmp_path / "file"
    occupied.write_text("")
    for nowhere in (occupied, occupied / "below", Path("/proc/nowhere"), None):
        assert self_test(kinds, ["cpu"], nowhere) == Numerics(broken=("b",))


def test_what_there_was_no_time_for_is_named(tmp_path: Path) -> None:
    def slow(x_TK: torch.Tensor) -> torch.Tensor:
        torch.ones(2000, 400) @ torch.ones(400, 2000)
        return x_TK

    kinds = [Product(name, 8, 1 << 40, torch.float32, slow) for name in "ab"]
    found = self_test(kinds, [], tmp_path)
    assert not found.broken and (not found.untested or found.untested[-1] == "b")
    assert examine(kinds, {}, budget_s=0.0), "tried in vain"


@pytest.mark.parametrize("int8", ["", "int8 "])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_product_of_a_model(dtype: torch.dtype, int8: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture with latents and projections has every kind, and this processor keeps its rows' bits."""
    spec = small(**LATENTS, embedding_size=48)
    decoder = Decoder(spec, ParallelLayout(1, 1, (4,)), 0, Group(), dtype, torch.device("cpu"), 64)
    dummy(decoder.parameters())
    if int8 and library() is None:
        pytest.skip("int8 needs the library of CPU kernels")
    decoder.prepack("int8" if int8 else None)
    kinds = {product.name: product for product in decoder.products()}
    short = str(dtype).removeprefix("torch.")
    wanted = {"matmul float32 64x12", f"{int8}experts {short} 64x88", f"{int8}experts {short} 44x64"}
    wanted |= {f"{int8}12 heads {short} 12x32", f"{int8}12 heads {short} 32x20"}
    wanted |= {f"{int8}matmul {short} 172x64", f"matmul {short} 48x517"}
    assert wanted <= kinds.keys(), sorted(kinds)
    assert ("attention float32 40x32" in kinds) != serves(torch.device("cpu"), dtype)
    known, threads = Known(), torch.get_num_threads()
    torch.set_num_threads(1)
    if can_pack(torch.ones(1, 1, dtype=dtype)):  # nothing is multiplied plainly, where the number of rows may choose the path
        monkeypatch.setattr(F, "linear", None)
    examine(list(kinds.values()), known, 1e9)
    torch.set_num_threads(threads)
    assert [(name, found) for name, found in known.items() if found != {"33": True, "65": True, "600": True}] == []


def test_what_of_the_processor_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library its version and the operator of torch that routes; without it all that torch computes with."""
    facts = partial(processor.facts, experts=False)
    limits = {"ONEDNN_MAX_CPU_ISA": "AVX"}
    for equal, others in (facts({}, torch.float16), facts(limits, torch.float16)):
        assert equal["CPU kernels"] == "none" and len(equal["CPU operators"]) == 12 and others == {}
    plain, limited = facts({}, torch.float16)[0], facts(limits, torch.float16)[0]
    assert limited == plain | {"CPU level": plain["CPU level"] + " ONEDNN_MAX_CPU_ISA=AVX"}
    native, _ = load()
    if native is None:
        return
    equal, others = facts({}, torch.bfloat16)
    assert equal == facts(limits, torch.bfloat16)[0] and equal["CPU kernels"] == native.version
    assert equal.keys() == {"CPU kernels"}
    with_experts = processor.facts({}, torch.bfloat16, experts=True)[0]["CPU operators"]
    assert with_experts != plain["CPU operators"]
    for operator in ("bmm", "softmax", "exp"):
        with monkeypatch.context() as other:
            usual = getattr(torch, operator)
            other.setattr(torch, operator, lambda *x, usual=usual: usual(*x) * 1.0001)
            assert facts({}, torch.bfloat16)[0] == equal, operator
            found = processor.facts({}, torch.bfloat16, experts=True)[0]["CPU operators"]
            assert (found != with_experts) == (operator == "softmax"), operator
    assert others == {"CPU level": plain["CPU level"], "instruction set": native.isa.name.lower()}
    monkeypatch.setattr(native, "isa", Isa.PORTABLE)
    assert facts({}, torch.bfloat16) == (equal, others | {"instruction set": "portable"}), "a stage agrees on it"
