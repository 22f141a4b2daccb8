"""The one shape of every benchmark's JSON, and what its head says: versions, the machine, when. Never measures anything.

benchmark   which one
workload    all that was asked for, resolved: with the same numbers the benchmark can be repeated
figures     what came out, each with its unit in its name
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
    """Where the benchmark ran. `load_average`: of a minute, when it began; well above 0, others wanted the cores too."""

    cpu: str
    cores: int
    load_average: float

    @staticmethod
    def here() -> "MachineInfo":
        return MachineInfo(_cpu(), available_cores(), round(os.getloadavg()[0], 2))

    def __str__(self) -> str:
        return f"{self.cores} cores of {self.cpu}, load {self.load_average:.2f}"


class BenchReport(msgspec.Struct, frozen=True):
    """What `--output` holds."""

    benchmark: str
    date: str
    versions: dict[str, str]
    machine: MachineInfo
    workload: Any
    figures: Any

    @staticmethod
    def of(benchmark: str, machine: MachineInfo, packages: Sequence[str], workload: Any, figures: Any) -> "BenchReport":
        """`packages`: those, beside Python and tpserve, whose versions matter to the figures."""
        versions = {"tpserve": __version__, "python": platform.python_version()}
        versions |= {package: importlib.metadata.version(package) for package in packages}
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return BenchReport(benchmark, date, versions, machine, workload, figures)

    def write(self, path: Path) -> None:
        write("--output", path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def check(flag: str, path: Path) -> None:
    """See that a file can be written, so that a path that cannot does not cost a measurement. What stands there stays."""
    existed = path.exists()
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}; name a file in a directory that exists") from error


def write(flag: str, path: Path, content: bytes) -> None:
    """Write a file that `flag` names."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from error


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of an ordered, non-empty sequence do not exceed: always one that was measured."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _cpu() -> str:
    """The processor's name, as far as the kernel tells."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
