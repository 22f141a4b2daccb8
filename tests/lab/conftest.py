"""Labs for tests, and the proof that nothing of them is left. Where no lab can be, all is skipped, with the reason."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.lab import hosts as lab_hosts
from launch.lab import links
from launch.lab.hosts import Host

NAME = f"t{os.getpid()}"
Hosts = Callable[[int], list[Host]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask the machine once, and only when something here is to run."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and (why := lab_hosts.refusal()) is not None:
        for item in here:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def lab() -> Iterator[Hosts]:
    """The first `count` hosts of a lab that all tests share."""
    for name in lab_hosts.labs():  # of runs that were killed
        if name[:1] == "t" and name[1:].isdecimal() and not Path("/proc", name[1:]).exists():
            lab_hosts.down(name)
    made: list[Host] = []

    def some(count: int) -> list[Host]:
        if len(made) < count:
            made[:] = lab_hosts.up(NAME, count)
        return made[:count]

    yield some
    lab_hosts.down(NAME)


@pytest.fixture
def hosts(lab: Hosts, request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """Two hosts (or `parametrize`d more) with healthy links, in which nothing runs; and nothing is left in them afterwards."""
    chosen = lab(getattr(request, "param", 2))
    yield chosen
    for host in chosen:
        links.heal(host, [other for other in chosen if other is not host])
    left = {host.name: host.processes() for host in chosen if host.processes()}
    shm = [path for host in chosen for path in Path(f"/proc/{host.pid}/root/dev/shm").iterdir()]
    for pid in [pid for pids in left.values() for pid in pids]:
        os.kill(pid, 9)
    assert (left, shm) == ({}, [])


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short TMPDIR for servers, which they leave empty."""
    where = Path("/tmp", f"lab-{os.getpid()}-{len(list(Path('/tmp').glob('lab-*')))}")
    where.mkdir()
    yield where
    left = [path.name for path in where.iterdir() if not path.name.endswith(".log") and not path.name.startswith("torchelastic_")]
    shutil.rmtree(where)
    assert not left
