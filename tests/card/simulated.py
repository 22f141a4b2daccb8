"""A card that is not there: the engine runs its CUDA branches, bytes lie in host memory, kernels run in Triton's interpreter.

Every launch, allocation, copy and wait is recorded by name. A value of the card that the host reads before it has waited for it
is an error, and so is a wait where none is allowed. `capture` and the function it returns do what `torch.cuda.graph` and `replay`
do: the launches of a step, with their tensors, again on what the same memory holds by then.

What this cannot show: races between streams, time, the real number of kernels of an operator (`operators`).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

from tests.card.operators import ALLOCATIONS, VIEWS, WAITS, launches
from tests.card.tensors import CopiesUnderWay, DeviceTensor, HostRead, PinnedTensor
from tests.card.variants import Variant, variant_of

CUDA = torch.device("cuda", 0)


@dataclass
class Record:
    """What has happened since it was made. Each list has names, in order."""

    launches: list[str] = field(default_factory=list)
    """An operator of several kernels is there several times."""
    allocations: list[str] = field(default_factory=list)
    collectives: list[str] = field(default_factory=list)
    to_device: list[str] = field(default_factory=list)
    to_host: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    replays: int = 0
    variants: set[Variant] = field(default_factory=set)
    """Compilations that the launches of Triton's kernels need."""

    def counted(self) -> dict[str, int]:
        """How often each launch occurs."""
        return dict(Counter(self.launches))


class SimulatedEvent:
    """In place of torch.Event("cuda")."""

    def __init__(self, device: object = None, **_: object) -> None:
        assert SimulatedCard.current is not None
        self._card = SimulatedCard.current
        self._mark = 0

    def record(self, stream: object = None) -> None:
        self._mark = self._card.queued

    def query(self) -> bool:
        return self._card.done >= self._mark

    def synchronize(self) -> None:
        if not self.query():
            self._card.wait_for(self._mark, "event")


Replayed = Callable[[], None]


class SimulatedCard:
    """The mode in which the engine runs. `record` begins anew with `recording`."""

    current: "SimulatedCard | None" = None

    def __init__(self, *, computes: bool = True) -> None:
        """`computes` false: tensors have shapes only, so that models of any size run; what is read of them is zero."""
        self.computes = computes
        self._memory = torch.device("cpu" if computes else "meta")
        self.record = Record()
        self.queued = self.done = 0
        """Copies between host and card: begun, and known to be complete."""
        self._under_way: deque[Callable[[], None]] = deque()
        self._graph: list[Callable[[], object]] | None = None
        self._mode = _Mode(self)
        self._stack = ExitStack()

    def __enter__(self) -> "SimulatedCard":
        self._stack = ExitStack()
        for change in (
            torch.inference_mode(),
            patch.object(SimulatedCard, "current", self),
            patch.object(torch, "Event", SimulatedEvent),
            patch.object(torch.Tensor, "pin_memory", _pinned_copy),
            patch.object(torch.cuda, "_lazy_init", lambda: None),
            patch.object(InterpretedFunction, "run", self._launcher()),
            patch.object(PinnedTensor, "on_other_threads", self.dispatch),
        ):
            self._stack.enter_context(change)
        lifts_host_only = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") begins on the host
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, lifts_host_only)
        self._stack.enter_context(self._mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextmanager
    def recording(self) -> Iterator[Record]:
        """A record of what happens inside."""
        outer, self.record = self.record, Record()
        try:
            yield self.record
        finally:
            self.record = outer

    def capture(self, work: Callable[[], None]) -> Replayed:
        """Run `work` once and return what replays it. A wait, or a copy between host and card, in `work` is a HostRead."""
        assert self._graph is None, "a capture inside another one"
        self._graph = []
        try:
            work()
        finally:
            graph, self._graph = self._graph, None

        def replay() -> None:
            self.record.replays += 1
            with _disable_current_modes():
                for launch in graph:
                    launch()

        return replay

    def wait_for(self, mark: int, why: str) -> None:
        """Complete the copies up to `mark`."""
        self._forbid_in_graph(why)
        self.record.waits.append(why)
        while self.done < mark:
            self._under_way.popleft()()
            self.done += 1

    def finish(self) -> None:
        """What the end of a program waits for."""
        self.wait_for(self.queued, "end")

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the call of an operator of torch does."""
        name = func.name().partition("::")[2].partition(".")[0]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_card = any(isinstance(x, DeviceTensor) for x in tensors)
        target = _target(name, args, kwargs)
        if func.namespace == "c10d" and on_card:
            return self._communicate(func, name, args, kwargs)
        if name in ("to", "_to_copy") and target is not None and (target.type == "cuda") != on_card:
            return self._transfer(args[0], target, kwargs)
        if name == "copy_":
            return self._copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
        if _is_composite(func):
            with self._mode:
                return func.decompose(*args, **kwargs)
        on_card = target.type == "cuda" if target is not None else on_card
        if not on_card:
            return self._on_host(func, args, kwargs)
        return self._on_card(func, name, args, kwargs, tensors)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator on host memory, pinned or not."""
        pinned = kwargs.pop("pin_memory", None)
        states = {}

        def plain(x: Any) -> Any:
            if isinstance(x, PinnedTensor):
                states[x.host.untyped_storage().data_ptr()] = x.under_way
                return x.host if _is_view(func) else x.read()
            if isinstance(x, DeviceTensor):
                assert _is_layout_only(func), f"{func} mixes host and card"
                return x.host
            return x

        if _is_layout_only(func):
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(plain, args), **tree_map(plain, kwargs))

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if pinned:
                return PinnedTensor(x, CopiesUnderWay())
            state = states.get(x.untyped_storage().data_ptr()) if states else None
            return x if state is None else PinnedTensor(x, state)

        return tree_map(wrapped, out)

    def _on_card(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        """An operator on the card: launched, recorded, and kept for a replay while a graph is captured."""
        waits = name in WAITS or (name.startswith("index") and _has_mask(args))
        if waits:
            self._forbid_in_graph(name)
            raise HostRead(f"{name} makes the host wait for the card")
        for x in tensors:
            assert isinstance(x, DeviceTensor) or x.ndim == 0, f"{name} mixes a host tensor {list(x.shape)} with the card's"
        wrappers = {id(x.host): x for x in tensors if isinstance(x, DeviceTensor)}
        own_args, own_kwargs = tree_map(_host_of, (args, {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}))
        if "device" in kwargs:
            own_kwargs["device"] = self._memory
        out = func(*own_args, **own_kwargs)
        self.record.launches.extend([name] * launches(name))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and id(x) not in wrappers]
        if name not in VIEWS:
            memory = {x.host.untyped_storage()._cdata for x in wrappers.values()}
            made = [x for x in made if x.untyped_storage()._cdata not in memory]
            self._keep(func, name, own_args, own_kwargs, made, any_in_place=not made)

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return wrappers[id(x)] if id(x) in wrappers else DeviceTensor(x)

        return tree_map(wrapped, out)

    def _communicate(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A collective or a message: the other ranks' cards are simulated, too, and gloo carries the bytes."""
        own_args, own_kwargs = tree_map(_host_of, (args, kwargs))
        if name in ("send", "recv_"):
            self._forbid_in_graph(name)
        wrappers = {id(x.host): x for x in tree_leaves(args) if isinstance(x, DeviceTensor)}

        def again() -> Any:
            with _disable_current_modes():
                return func(*own_args, **own_kwargs)

        self.record.collectives.append(name)
        if self._graph is not None:
            self._graph.append(lambda: _finished(again()))
        return tree_map(lambda x: wrappers.get(id(x), x), _finished(again()) if self._graph is not None else again())

    def _keep(self, func: Any, name: str, args: Any, kwargs: Any, made: list[torch.Tensor], *, any_in_place: bool) -> None:
        """Count the new memory, and add the operator to the graph under capture."""
        if self._graph is None:
            self.record.allocations.extend([name] * len(made))
        if name in ALLOCATIONS:
            for x in made:
                _spoil(x)
            if self._graph is not None:
                self._graph.extend(partial(_spoil, x) for x in made)
        elif self._graph is not None:
            self._graph.append(_again(func, args, kwargs, made))

    def _transfer(self, x: torch.Tensor, target: torch.device, kwargs: Any) -> torch.Tensor:
        """A new tensor on the other side."""
        dtype = kwargs.get("dtype") or x.dtype
        if target.type != "cuda":
            raise HostRead("a copy to the host that the host waits for")
        self.record.allocations.append("copy to the card")
        there = DeviceTensor(torch.empty_like(_host_of(x), dtype=dtype, device=self._memory))
        self._copy(there, x, non_blocking=True)
        return there

    def _copy(self, there: torch.Tensor, x: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        """`there.copy_(x)`."""
        source, destination = _host_of(x), _host_of(there)
        if isinstance(there, DeviceTensor) and isinstance(x, DeviceTensor):
            self.record.launches.append("copy_")
            destination.copy_(source)
            if self._graph is not None:
                self._graph.append(partial(destination.copy_, source))
        elif isinstance(there, DeviceTensor) and x.ndim == 0 and not isinstance(x, PinnedTensor):
            self.record.launches.append("fill_")  # a number of the host, which a graph repeats
            destination.copy_(source)
            if self._graph is not None:
                self._graph.append(partial(destination.copy_, source))
        elif isinstance(there, DeviceTensor):
            self._forbid_in_graph("a copy from the host")
            self.record.to_device.append("pinned" if isinstance(x, PinnedTensor) else "pageable")
            destination.copy_(x.read() if isinstance(x, PinnedTensor) else source)
            before = source.clone()

            def check() -> None:
                assert torch.equal(_bits(before), _bits(source)), "pinned memory changed while the card was reading it"

            self._queue(check if isinstance(x, PinnedTensor) else lambda: None)
        elif isinstance(x, DeviceTensor):
            self._forbid_in_graph("a copy to the host")
            if not isinstance(there, PinnedTensor) or not non_blocking:
                raise HostRead("a copy to the host that the host waits for")
            self.record.to_host.append("pinned")
            now, state = source.clone() if self.computes else torch.zeros_like(destination), there.under_way
            state.count += 1

            def arrive() -> None:
                destination.copy_(now)
                state.count -= 1

            self._queue(arrive)
        else:
            destination.copy_(x.read() if isinstance(x, PinnedTensor) else source)
        return there

    def _queue(self, work: Callable[[], None]) -> None:
        self._under_way.append(work)
        self.queued += 1

    def _forbid_in_graph(self, what: str) -> None:
        if self._graph is not None:
            raise HostRead(f"{what} inside a graph")

    def _launcher(self) -> Callable[..., None]:
        """In place of `InterpretedFunction.run`."""
        card, run = self, InterpretedFunction.run

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
            name = kernel.fn.__name__
            on_card = [isinstance(x, DeviceTensor) for x in args if isinstance(x, torch.Tensor)]
            assert all(on_card), f"{name} gets host memory"
            own = tuple(_host_of(x) for x in args)

            def again() -> None:
                if card.computes:
                    with _disable_current_modes():
                        run(kernel, *own, grid=grid, warmup=warmup, **options)

            card.record.launches.append(name)
            addresses = {id(x.host): x.data_ptr() for x in args if isinstance(x, DeviceTensor)}
            card.record.variants.add(variant_of(kernel, own, options, addresses))
            again()
            if card._graph is not None:
                card._graph.append(again)

        return launch


class _Mode(TorchDispatchMode):
    """Hands every operator to the card."""

    def __init__(self, card: SimulatedCard) -> None:
        super().__init__()
        self._card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._card.dispatch(func, args, kwargs or {})


def _finished(out: Any) -> Any:
    """The result of a collective, which the card's next launch waits for."""
    work = out[-1] if isinstance(out, tuple) else out
    work.wait()
    return out


def _again(func: Any, args: Any, kwargs: Any, made: list[torch.Tensor]) -> Replayed:
    """The operator once more, its results written where they were."""
    memory = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}

    def again() -> None:
        out = func(*args, **kwargs)
        new = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        new = [x for x in new if x.untyped_storage()._cdata not in memory]
        for old, x in zip(made, new, strict=True):
            old.copy_(x)

    return again


def _pinned_copy(x: torch.Tensor, device: object = None) -> torch.Tensor:
    """In place of Tensor.pin_memory."""
    return x if isinstance(x, PinnedTensor) else PinnedTensor(x.clone(), CopiesUnderWay())


def _host_of(x: Any) -> Any:
    return x.host if isinstance(x, DeviceTensor | PinnedTensor) else x


def _target(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """The device that the call names."""
    named = kwargs.get("device")
    if named is None and name == "to":
        named = next((x for x in args[1:] if isinstance(x, torch.device)), None)
    if named is None and name == "to" and len(args) > 1 and isinstance(args[1], torch.Tensor):
        named = args[1].device
    return None if named is None else torch.device(named)


def _has_mask(args: Any) -> bool:
    """Whether an index is a mask, whose number of ones the host would have to know."""
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))


def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_view(func: Any) -> bool:
    return func.name().partition("::")[2].partition(".")[0] in VIEWS


def _is_layout_only(func: Any) -> bool:
    """Whether only the shape of an argument matters."""
    name = func.name().partition("::")[2].partition(".")[0]
    return name.endswith("_like") or name.startswith("new_")


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def _spoil(x: torch.Tensor) -> None:
    """What memory holds that nobody has written."""
    if x.numel() and not x.is_meta:
        x.fill_(torch.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else 0x55)
