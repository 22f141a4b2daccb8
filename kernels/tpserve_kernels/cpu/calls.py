"""A list of operations that runs again and again in one parallel region, over buffers that stay: what a step costs Python.

Fields of the arguments that change from step to step (the number of rows, addresses of the step's tensors) have names, and are
set together before each run.
"""

import ctypes
from collections.abc import Callable, Sequence

from tpserve_kernels.cpu.library import Call, Operation, calls_of, library


class CallList:
    """Operations in the order in which they run. `add` comes first, then `run` any number of times.

    `names`: of the values that change from run to run.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._indices = {name: index for index, name in enumerate(names)}
        self._steps: list[tuple[Operation, ctypes.Structure]] = []
        self._addresses: list[int] = []
        self._which: list[int] = []
        self._values = (ctypes.c_int64 * len(names))()
        self._calls: ctypes.Array[Call] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, operation: Operation, arguments: ctypes.Structure, **varying: str) -> None:
        """Append an operation. `varying`: field of `arguments`, of 8 bytes, to the name of the value that it takes in `run`.

        The tensors whose addresses `arguments` holds must outlive the list, unless the field varies. KeyError for a name that the
        list has not.
        """
        assert self._calls is None
        self._steps.append((operation, arguments))
        for field, name in varying.items():
            place = getattr(type(arguments), field)
            assert place.size == 8, field
            self._addresses.append(ctypes.addressof(arguments) + place.offset)
            self._which.append(self._indices[name])

    def run(self, values: Sequence[int], wait: Callable[[], None]) -> None:
        """Set the varying fields and run all operations; `wait` as of `Library.run_calls`.

        `values`: integers and addresses, in the order of the names. ValueError when it has another length.
        """
        lib = library()
        assert lib is not None
        if self._calls is None:
            self._seal()
        assert self._calls is not None
        self._values[:] = [*values]
        lib.calls.tpserve_set(*self._places, self._values)
        lib.run_calls(self._calls, wait)

    def _seal(self) -> None:
        """Make the arrays that the library reads."""
        self._calls, count = calls_of(*self._steps), len(self._addresses)
        addresses, which = (ctypes.c_void_p * count)(*self._addresses), (ctypes.c_int32 * count)(*self._which)
        self._places = addresses, which, ctypes.c_int64(count)
