"""A real agent and its forkserver with stand-in ranks: what a forked rank finds, and which ends start it again."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.crash.stand_in_rank import Found
from tests.server import children, comm
from tpserve.agent.job import AGENT_MODULE, AgentJob
from tpserve.cluster.discovery import read_failure
from tpserve.config import env
from tpserve.process.fork_client import ForkClient, ForkRequest, adopt_orphans

RANKS = 2


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkClient]:
    """A forkserver of this process, which adopts what is forked."""
    adopt_orphans()
    client = ForkClient.spawn(os.environ)
    yield client
    client.close()
    os.waitpid(client.pid, 0)
    ctypes.CDLL(None).prctl(36, 0)


def wait(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.002)
    return found


class Agent:
    """An agent of two stand-in ranks, forked by a forkserver."""

    def __init__(self, forks: ForkClient, place: Path, *argv: str, **job: Any) -> None:
        self.place = place
        self.code: int | None = None
        (place / "run").mkdir()
        found = {"argv": [str(place), *argv], "module": "tests.crash.stand_in_rank"}
        agent_job = AgentJob(
            supervisor_pid=os.getpid(), nproc=RANKS, world_size=RANKS, start_timeout_s=20.0, runtime_dir=str(place / "run"),
            log_level="info", **(found | job),
        )  # fmt: skip
        environ = env.for_ranks(str(place / "run"), quiet=True)
        forks.request(ForkRequest.of(AGENT_MODULE, [], environ, "tpserve agent"), msgspec.json.encode(agent_job))
        reply = wait(forks.receive)
        assert not reply.error
        self.pid: int = reply.pid

    def found(self, rank: int, number: int) -> Found:
        """What the process `number` of a rank found."""
        path = self.place / f"rank{rank}.{number}"
        wait(path.exists)
        return msgspec.json.decode(path.read_bytes(), type=Found)

    def forkserver(self) -> int:
        """The process id of the agent's forkserver."""
        return int(wait(lambda: [pid for pid in children(self.pid) if comm(pid) == "tpserve forks"])[0])

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for its end; the exit code. It leaves no process but those that the kernel has killed with it."""
        left = children(self.pid)
        ended = wait(lambda: (found := os.waitpid(self.pid, os.WNOHANG))[0] and found, timeout_s)
        self.code = os.waitstatus_to_exitcode(ended[1])
        for pid in left if self.code < 0 else ():  # this process has adopted them
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
        return self.code


@pytest.fixture
def agent(forks: ForkClient, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def start(*argv: str, **job: Any) -> Agent:
        agents.append(Agent(forks, tmp_path, *argv, **job))
        return agents[-1]

    yield start
    for one in agents:
        if one.code is None:
            os.kill(one.pid, signal.SIGKILL)
            one.wait()


def test_a_forked_rank_is_like_a_new_program(agent: Callable[..., Agent]) -> None:
    ours = agent()
    forkserver = ours.forkserver()
    assert len(list(Path(f"/proc/{forkserver}/task").iterdir())) == 1
    found = [ours.found(rank, 0) for rank in range(RANKS)]
    for rank, one in enumerate(found):
        assert (one.parent, one.session, one.threads, one.torch_loaded) == (ours.pid, one.pid, 1, True)
        assert sorted(one.descriptors) == [0, 1, 2, 3] and one.descriptors[0] == "/dev/null"
        assert one.descriptors[3].startswith("socket:") and one.environ["TPSERVE_WEIGHTS_SOCKET"] == "3"
        assert one.name == f"tpserve rank {rank}"
        assert one.argv[0].endswith("stand_in_rank.py") and one.argv[1:] == [str(ours.place)]
        assert one.handlers[signal.SIGTERM] == one.handlers[signal.SIGUSR2] == str(signal.Handlers.SIG_DFL)
        torchrun = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RESTART_COUNT": "0", "TPSERVE_LAST_EXIT": "",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TPSERVE_AGENT_PID": str(ours.pid),
        }  # fmt: skip
        assert torchrun.items() <= one.environ.items() and int(one.environ["MASTER_PORT"])
        assert one.environ.get("OPENBLAS_NUM_THREADS") == os.environ.get("OPENBLAS_NUM_THREADS")
    os.kill(ours.pid, signal.SIGTERM)
    assert ours.wait() == 0


def test_one_rank_starts_again(agent: Callable[..., Agent]) -> None:
    """Whatever ended it; at once three times, then after a pause. The other rank goes on."""
    ours = agent(restarts=4)
    other = ours.found(1, 0).pid
    ends = [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGSEGV, "SIGSEGV"),
        (signal.SIGUSR1, "exit code 1"),
        (signal.SIGKILL, "SIGKILL"),
    ]
    took_s = []
    for number, (end, said) in enumerate(ends):
        before = ours.found(0, number)
        ended_s = time.monotonic()
        os.kill(before.pid, end)
        after = ours.found(0, number + 1)
        took_s.append(after.at_s - ended_s)
        assert (after.environ["TPSERVE_LAST_EXIT"], after.environ["TORCHELASTIC_RESTART_COUNT"]) == (said, str(number + 5))
    assert ours.found(1, 0).pid == other and not (ours.place / "rank1.1").exists()
    assert min(took_s[:3]) < 0.5, "an import of torch takes longer"
    assert took_s[3] > 0.1
    os.kill(ours.pid, signal.SIGTERM)
    assert ours.wait() == 0
    print("from a rank's death to the main function of the next:", *(f"{1000 * s:.0f} ms" for s in took_s))


@pytest.mark.parametrize(("end", "code"), [(signal.SIGUSR2, 2), (signal.SIGHUP, 1)])
def test_ends_that_are_meant(end: signal.Signals, code: int, agent: Callable[..., Agent]) -> None:
    ours = agent()
    ours.found(0, 0)
    os.kill(ours.found(1, 0).pid, end)
    assert ours.wait() == code
    failure = read_failure(ours.place / "run")
    assert failure is not None and failure.code == code and failure.why.startswith("rank 1 ended with exit code")


def test_a_rank_that_cannot_stay_is_tried_with_pauses(agent: Callable[..., Agent]) -> None:
    ours = agent("crash")
    starts = [ours.found(0, number).at_s for number in range(7)]
    pauses = [late - early for early, late in zip(starts, starts[1:], strict=False)]
    assert all(pause > floor for pause, floor in zip(pauses, (0.0, 0.0, 0.0, 0.1, 0.2, 0.4), strict=True))
    os.kill(ours.pid, signal.SIGTERM)
    assert ours.wait() in (0, 1)  # 0 when there was no rank that moment


def test_without_restarts_a_death_ends_the_others(agent: Callable[..., Agent]) -> None:
    ours = agent(restart=False)
    ours.found(0, 0)
    os.kill(ours.found(1, 0).pid, signal.SIGKILL)
    assert ours.wait() == 1


def test_ranks_survive_the_forkserver_and_not_the_agent(agent: Callable[..., Agent]) -> None:
    ours = agent()
    first = [ours.found(rank, 0).pid for rank in range(RANKS)]
    forkserver = ours.forkserver()
    os.kill(forkserver, signal.SIGKILL)
    os.kill(first[0], signal.SIGKILL)
    again = ours.found(0, 1)  # a new forkserver has imported everything
    assert again.parent == ours.pid and sorted(again.descriptors) == [0, 1, 2, 3] and again.threads == 1
    assert Path(f"/proc/{first[1]}").exists() and not Path(f"/proc/{forkserver}").exists()
    living = children(ours.pid)
    assert len(living) == 3
    os.kill(ours.pid, signal.SIGKILL)
    assert ours.wait() == -signal.SIGKILL
