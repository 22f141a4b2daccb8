"""The tensors of the simulated card: bytes in host memory that the host may not read when it likes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

PAGE = 512
"""Memory that no tensor has yet begins at a multiple of so many bytes, on a card."""


class HostRead(AssertionError):
    """The host wants a value that the card may not have computed yet."""


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated card. `host` has its bytes; only the card's operations touch them."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )

    def __init__(self, host: torch.Tensor) -> None:
        super().__init__()
        self.host = host

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def data_ptr(self) -> int:
        if not self.host.is_meta:
            return self.host.data_ptr()
        return self.host.untyped_storage()._cdata * PAGE + self.host.storage_offset() * self.host.itemsize

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        raise HostRead("tolist() of a tensor on the card")

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside the simulated card")


@dataclass
class CopiesUnderWay:
    """The copies from the card into one piece of pinned memory that no synchronisation has waited for."""

    count: int = field(default=0)


class PinnedTensor(torch.Tensor):
    """Pinned host memory. Raises HostRead when it is read before the copies into it have been waited for."""

    host: torch.Tensor
    under_way: CopiesUnderWay
    on_other_threads: "ClassVar[Callable[..., Any] | None]" = None
    """Dispatches operators of threads that are not in the card's mode, which is one thread's."""

    @staticmethod
    def __new__(cls, host: torch.Tensor, under_way: CopiesUnderWay) -> "PinnedTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype
        )

    def __init__(self, host: torch.Tensor, under_way: CopiesUnderWay) -> None:
        super().__init__()
        self.host, self.under_way = host, under_way

    def read(self) -> torch.Tensor:
        """The bytes, when nothing is under way to them."""
        if self.under_way.count:
            raise HostRead("pinned memory is read before the copy into it has been waited for")
        return self.host

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.read().tolist()

    def is_pinned(self, device: Any = None) -> bool:
        return True

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert cls.on_other_threads is not None, f"{func} outside the simulated card"
        return cls.on_other_threads(func, args, kwargs or {})
