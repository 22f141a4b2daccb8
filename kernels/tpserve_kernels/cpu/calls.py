"""A list of operations that runs again and again in one parallel region, over buffers that stay: what a step costs Python.

Fields of the arguments that change from step to step (the number of rows, addresses of the step's tensors) have names, and are
set together before each run.
"""

import ctypes
from collections.abc import Callable, Mapping

from tpserve_kernels.cpu.library import Call, Operation, library


class CallList:
    """Operations in the order in which they run. `add` comes first, then `run` any number of times."""

    def __init__(self) -> None:
        self._arguments: list[ctypes.Structure] = []
        self._operations: list[Operation] = []
        self._places: dict[str, list[int]] = {}
        self._calls: ctypes.Array[Call] | None = None
        self._arrays: dict[str, ctypes.Array[ctypes.c_void_p]] = {}

    def __len__(self) -> int:
        return len(self._arguments)

    def add(self, operation: Operation, arguments: ctypes.Structure, **varying: str) -> None:
        """Append an operation. `varying`: field of `arguments`, of 8 bytes, to the name of the value that it takes in `run`.

        The tensors whose addresses `arguments` holds must outlive the list, unless the field varies.
        """
        assert self._calls is None
        self._operations.append(operation)
        self._arguments.append(arguments)
        for field, name in varying.items():
            place = getattr(type(arguments), field)
            assert place.size == 8, field
            self._places.setdefault(name, []).append(ctypes.addressof(arguments) + place.offset)

    def run(self, values: Mapping[str, int], wait: Callable[[], None]) -> None:
        """Set the varying fields and run all operations; `wait` as of `Library.run_calls`.

        KeyError for a missing value; names that no operation has are ignored.
        """
        lib = library()
        assert lib is not None
        if self._calls is None:
            calls = [Call(each, ctypes.addressof(of)) for each, of in zip(self._operations, self._arguments, strict=True)]
            self._calls = (Call * len(calls))(*calls)
            self._arrays = {name: (ctypes.c_void_p * len(places))(*places) for name, places in self._places.items()}
        for name, array in self._arrays.items():
            lib.calls.tpserve_set(array, ctypes.c_int64(len(array)), ctypes.c_int64(values[name]))
        lib.run_calls(self._calls, wait)
