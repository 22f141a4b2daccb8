"""The JSON report of every benchmark, with versions, machine and date. Never measures anything.

benchmark   its name
workload    all inputs, resolved: the same values repeat the benchmark
figures     the results, each with its unit in its name
"""

import datetime
import importlib.metadata
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tpserve.errors import UserError
from tpserve.host.resources import available_cores
from tpserve.version import __version__


class MachineInfo(msgspec.Struct, frozen=True):
    """The machine of the benchmark. `load_average`: over the minute before the start; above 0, other processes used cores."""

    cpu: str
    cores: int
    load_average: float

    @staticmethod
    def here() -> "MachineInfo":
        """This machine, now."""
        return MachineInfo(_cpu(), available_cores(), round(os.getloadavg()[0], 2))

    def __str__(self) -> str:
        return f"{self.cores} cores of {self.cpu}, load {self.load_average:.2f}"


class BenchReport(msgspec.Struct, frozen=True):
    """The content of the file of `--output`."""

    benchmark: str
    date: str
    versions: dict[str, str]
    machine: MachineInfo
    workload: Any
    figures: Any

    @staticmethod
    def of(benchmark: str, machine: MachineInfo, packages: Sequence[str], workload: Any, figures: Any) -> "BenchReport":
        """A report of today. `packages`: those whose versions matter to the figures, besides Python and tpserve."""
        versions = {"tpserve": __version__, "python": platform.python_version()}
        versions |= {package: importlib.metadata.version(package) for package in packages}
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return BenchReport(benchmark, date, versions, machine, workload, figures)

    def write(self, path: Path) -> None:
        """Write the report as JSON. Raises UserError."""
        write("--output", path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def check_writable(output: Path | None, plot: Path | None = None) -> None:
    """Raise UserError before the measurement when a file of --output or --plot cannot be written. Existing files stay as they
    are."""
    for flag, path in (("--output", output), ("--plot", plot)):
        if path is not None:
            _check_writable(flag, path)


def _check_writable(flag: str, path: Path) -> None:
    existed = path.exists()
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; name a file in a directory that exists") from error


def write(flag: str, path: Path, content: bytes) -> None:
    """Write the file of the flag `flag`. Raises UserError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of an ordered, non-empty sequence, which is always one of its values. `share`: 0 to 1."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _cpu() -> str:
    """The processor's name in /proc/cpuinfo, or the architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
