"""`tpserve serve`, bare torchrun and launch/two_nodes.sh with real processes: how they start, end, and are ended."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import tiny_model
from tests.cluster.conftest import assert_nothing_left, of_place
from tests.server import BIN, Server, arguments, comm, descendants, free_port, running, serve, torchrun
from tpserve_kernels.cpu.library import Isa, library

ROOT = Path(__file__).resolve().parents[2]
SECOND_NODE = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--interface", "lo")
DUMMY = ("--load-format", "dummy", "--served-model-name", "tiny")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.save(tmp_path_factory.mktemp("tiny")))


@contextlib.contextmanager
def started(place: Path, *commands: list[str], port: int, ready: bool = True) -> Iterator[Server]:
    environ = {"TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    with running(commands, port, place / "server.log", ready=ready, env=environ) as server:
        try:
            yield server
        finally:
            for pid in of_place(place):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def run(command: list[str], place: Path, timeout_s: float = 60.0) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, "TMPDIR": str(place)}
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains(number: signal.Signals, model: str, place: Path) -> None:
    port = free_port()
    with started(place, serve(model, *DUMMY, port=port), port=port) as server:
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        assert server.stop(number) == [0]
        assert_nothing_left(place)
    lines = server.log.splitlines()
    introduction = r"\[n0 r0 s0\] \d\d:\d\d:\d\d INFO  tpserve .*: tiny \(.*\), TP 1 x PP 1 \(layers 3\), float32 on cpu; "
    assert any(re.match(introduction, line) for line in lines)
    assert any(
        re.search(rf"tpserve ready: tiny on {server.url}, 1 CPU rank on 1 node, TP 1 x PP 1, \d+ s$", line) for line in lines
    )
    assert not [line for line in lines if "Traceback" in line or "ERROR" in line or "The cat" in line]


@pytest.mark.parametrize("delay_s", [0.0, 1.5])
def test_a_signal_while_starting_ends_it(delay_s: float, model: str, place: Path) -> None:
    port = free_port()
    with started(place, serve(model, *DUMMY, "-tp", "2", port=port), port=port, ready=False) as server:
        while not list(place.glob("tpserve-*")):
            time.sleep(0.01)
        time.sleep(0.1 + delay_s)
        assert server.stop() == [0]
        assert_nothing_left(place)
    assert "Traceback" not in server.log


def test_a_second_signal_kills_at_once(model: str, place: Path) -> None:
    port = free_port()
    with started(place, serve(model, *DUMMY, "-tp", "2", port=port), port=port) as server:
        os.kill(server.rank_pids()[0], signal.SIGSTOP)  # with a rank like this no drain ends
        server.processes[0].terminate()
        time.sleep(1.3)
        assert server.processes[0].poll() is None
        assert server.stop(timeout_s=2.0) == [128 + signal.SIGTERM]
        assert_nothing_left(place)


def test_nothing_outlives_a_killed_supervisor(model: str, place: Path) -> None:
    port = free_port()
    with started(place, serve(model, *DUMMY, port=port), port=port) as server:
        server.stop(signal.SIGKILL)
        assert_nothing_left(place, timeout_s=8.0)


def test_a_rank_that_wakes_up_as_an_orphan_ends(model: str, place: Path) -> None:
    """The agent can die while its rank's interpreter still starts; then the rank's parent is somebody else."""
    rank = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TPSERVE_RUNTIME_DIR": str(place / "run")}
    dead = subprocess.Popen(["true"])
    dead.wait()
    environ = {**os.environ, **rank, "TPSERVE_AGENT_PID": str(dead.pid)}
    command = [sys.executable, "-m", "tpserve", model, "-tp", "2"]
    assert subprocess.run(command, env=environ, timeout=20, check=False).returncode == 1


def test_a_killed_rank_is_started_again_and_answers_go_on(model: str, place: Path) -> None:
    port = free_port()
    with started(place, serve(model, *DUMMY, "-tp", "2", port=port), port=port) as server:
        body = {"prompt": "The cat", "max_tokens": 200, "ignore_eos": True, "temperature": 1.0, "seed": 3, "logprobs": 1}
        whole = server.complete(**body)
        for rank in (1, 0):
            events = server.stream("/v1/completions", body | {"stream": True})
            tokens = [next(events)]
            os.kill(server.rank_pids()[rank], signal.SIGKILL)
            tokens += events
            choices = [event["choices"][0] for event in tokens]
            assert "".join(choice["text"] for choice in choices) == whole["text"] and choices[-1]["finish_reason"] == "length"
        assert server.stop() == [0]
        assert_nothing_left(place)
    assert "ended without a word" in server.log and "recovered in" in server.log
    assert "Traceback" not in server.log


def test_whoever_is_killed_is_started_again(model: str, place: Path) -> None:
    """A rank, the agent, both forkservers, the frontend; and nobody who connects meanwhile is refused."""
    port = free_port()
    with started(place, serve(model, *DUMMY, "-tp", "2", port=port), port=port) as server:
        supervisor = server.processes[0].pid
        asked = {"prompt": "The cat", "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        calm = server.complete(**asked)["text"]
        for name in ("tpserve rank 1", "tpserve agent", "tpserve forks", "tpserve.frontend"):
            before = [pid for pid in descendants(supervisor) if name in (comm(pid), *arguments(pid))]
            assert len(before) == (2 if name == "tpserve forks" else 1)
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            assert server.get("/livez")[0] == 200  # during a restart of the frontend the connection waits in the backlog
            server.wait_ready()
            assert server.complete(**asked)["text"] == calm
        assert server.stop() == [0]
        assert_nothing_left(place)
    killed = "was killed by SIGKILL: starting"
    for who in ("rank 1", "the agent of node 0", "the forkserver", "the frontend"):
        assert re.search(rf"WARN  {who} \(pid \d+\) {killed}", server.log), server.log
    assert "Traceback" not in server.log


def test_a_rank_that_does_not_come_back_ends_the_service(model: str, place: Path) -> None:
    """Its weights are gone, so it cannot be started again: the reason is told to clients and is the last line of the log."""
    port = free_port()
    copy = place / "model"
    shutil.copytree(model, copy)
    with started(place, serve(str(copy), *DUMMY, "-tp", "2", "--recovery-timeout", "3", port=port), port=port) as server:
        events = server.stream("/v1/completions", {"prompt": "x", "max_tokens": 230, "ignore_eos": True, "stream": True})
        next(events)
        (copy / "config.json").unlink()
        os.kill(server.rank_pids()[1], signal.SIGKILL)
        assert any("error" in event for event in events), "or it ended before"
        assert server.wait() == [2]
        shutil.rmtree(copy)
        assert_nothing_left(place)
    assert "config.json" in server.log.splitlines()[-1]


def test_two_nodes(model: str, place: Path) -> None:
    """The second node comes first, waits, and is the one that is told to end."""
    port, meet = free_port(), str(free_port())
    nodes = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--interface", "lo", "--master-port", meet, "-pp", "2")
    second = serve(model, *DUMMY, *nodes, "--node-rank", "1", "--headless", port=port)
    with started(place, second, serve(model, *DUMMY, *nodes, port=port), port=port) as server:
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        server.processes[0].terminate()
        assert server.wait() == [0, 0]
        assert_nothing_left(place)
    assert "2 CPU ranks on 2 nodes, TP 1 x PP 2" in server.log


def test_unlike_processors(model: str, place: Path) -> None:
    """Serve together as stages, which say what their self-tests found. Ranks of one stage must compute alike: with the lowest
    instruction set of theirs, and all with the library of CPU kernels or none."""
    port, common = free_port(), ("--nnodes", "2", "--master-addr", "127.0.0.1", "--interface", "lo")

    def node(rank: int, meet: int, layout: str, *unlike: str) -> list[str]:
        flags = (*DUMMY, *common, "--master-port", str(meet), layout, "2", "--node-rank", str(rank))
        variables = ("env", *unlike) if rank else ()
        return [*variables, *serve(model, *flags, *(("--headless",) if rank else ()), port=port)]

    torch_only = ("TPSERVE_ISA=off", "ONEDNN_MAX_CPU_ISA=AVX")

    meet = free_port()
    with started(place, node(1, meet, "-pp", *torch_only), node(0, meet, "-pp"), port=port) as server:
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        info = server.get("/server_info")[1]
        assert re.fullmatch("batch-invariant|(untested|not on this processor): .+", info["numerics"]), info["numerics"]
        levels = [(rank["processor"] | rank["traits"])["CPU level"] for rank in info["ranks"]]
        assert [level.endswith(" ONEDNN_MAX_CPU_ISA=AVX") for level in levels] == [False, True]
        assert info["cpu_kernels"].endswith("none")
        server.processes[0].terminate()
        assert server.wait() == [0, 0]
    assert ("may depend on the batch" in server.log) == (info["numerics"] != "batch-invariant")
    assert "torch's operators serve, which are slower than the library of CPU kernels: TPSERVE_ISA is off\n" in server.log
    meet = free_port()
    with started(place, node(1, meet, "-tp", "TPSERVE_ISA=portable"), node(0, meet, "-tp"), port=port) as server:
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        info = server.get("/server_info")[1]
        server.processes[0].terminate()
        assert server.wait() == [0, 0]
    if (native := library()) is not None:
        assert info["cpu_kernels"] == f"portable {native.version}"
        lowered = f"rank 0 computes with portable instructions, not {native.isa.name.lower()}: another rank of its stage"
        assert (lowered in server.log) == (native.isa > Isa.PORTABLE), server.log
    meet = free_port()
    with started(place, node(1, meet, "-tp", *torch_only), node(0, meet, "-tp"), port=port, ready=False) as server:
        assert 2 in server.wait(60)
        assert_nothing_left(place)
    host = socket.gethostname()
    assert re.search(rf"rank 0 on {host} +rank 1 on {host}\n", server.log), server.log
    assert re.search(r"CPU level  .* ONEDNN_MAX_CPU_ISA=AVX\n", server.log)
    remedy = "tensor parallel ranks must compute alike" if native is None else "need the library of CPU kernels all or none"
    assert remedy in server.log and "Traceback" not in server.log


def test_an_unknown_instruction_set_is_a_line(model: str, place: Path) -> None:
    done = run(["env", "TPSERVE_ISA=sse9", *serve(model, *DUMMY, port=0)], place)
    assert done.returncode == 2
    assert "TPSERVE_ISA is 'sse9'; it takes portable, avx2, avx512, avx512_bf16, amx and off" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_node_that_waits_for_its_head_can_be_ended(model: str, place: Path) -> None:
    port = free_port()
    nodes = (*SECOND_NODE, "--master-port", str(free_port()))
    with started(place, serve(model, *DUMMY, *nodes, "-pp", "2", port=port), port=port, ready=False) as server:
        while "headless" not in server.log:
            time.sleep(0.05)
        assert server.stop(timeout_s=3.0) == [0]
        assert_nothing_left(place)


def test_a_node_whose_head_does_not_answer(model: str, place: Path) -> None:
    port = free_port()
    nodes = (*SECOND_NODE, "--master-port", str(port))
    done = run(serve(model, *DUMMY, *nodes, "-pp", "2", "--start-timeout", "1", port=0), place)
    assert done.returncode == 1
    said = f"node 0 did not answer at 127.0.0.1:{port} within 1 s (Connection refused (errno 111)), so rank 0 is missing"
    assert said in done.stderr.splitlines()[-1]


def test_a_name_that_means_nothing_yet_is_waited_for(model: str, place: Path) -> None:
    nodes = ("--nnodes", "2", "--node-rank", "1", "--master-addr", "no.such.host.invalid", "-pp", "2")
    done = run(serve(model, *DUMMY, *nodes, "--start-timeout", "6", port=0), place)
    assert done.returncode == 2
    *waiting, error = done.stderr.splitlines()
    assert waiting and all("waiting for the name no.such.host.invalid, " in line for line in waiting)
    assert error.startswith("tpserve: error: --master-addr no.such.host.invalid: ") and "(errno -" in error
    assert_nothing_left(place)


def test_a_port_in_use_is_one_line(model: str, place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(serve(model, *DUMMY, port=port), place)
    assert done.returncode == 2
    assert done.stderr == f"tpserve: error: port {port} on 127.0.0.1 is in use: choose another with --port\n"
    assert_nothing_left(place)


def test_an_error_that_only_a_rank_meets_is_the_last_line(model: str, place: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "m")
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    done = run(serve(str(broken), "-tp", "2", port=free_port()), place)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "killed the ranks that did not end" not in line]  # a busy machine
    assert lines[-1].startswith("tpserve: error: ") and "model.safetensors" in lines[-1]
    assert "Traceback" not in done.stderr and done.stderr.count("tpserve: error: ") == 1
    assert_nothing_left(place)


def test_bare_torchrun_says_the_line_once_and_then_reports_in_its_own_way(model: str, place: Path) -> None:
    done = run(torchrun(model, "-tp", "4", ranks=2, port=free_port()), place)
    assert done.returncode == 1  # torchrun's, whatever its ranks end with
    lines = [line for line in done.stderr.splitlines() if line.startswith("tpserve: error: ")]
    assert len(lines) == 1 and "start 4 ranks, `torchrun --nproc-per-node 4 -m tpserve" in lines[0]
    assert "traceback : tpserve: error: 2 ranks were started but" in done.stderr


def test_two_nodes_script(model: str, place: Path) -> None:
    """Two torchrun agents on this machine stand for two nodes."""
    port, meet = free_port(), str(free_port())
    script = [str(ROOT / "launch" / "two_nodes.sh"), "127.0.0.1"]
    rest = ["1", model, *DUMMY, "--port", str(port)]
    with started(
        place, ["env", f"MASTER_PORT={meet}", *script, "0", *rest], ["env", f"MASTER_PORT={meet}", *script, "1", *rest], port=port
    ) as server:
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        server.stop()
    assert "2 CPU ranks on 2 nodes, TP 1 x PP 2" in server.log


def test_two_nodes_script_tells_how_it_is_used(place: Path) -> None:
    for line in ([], ["head", "2", "8"], ["head", "0", "x"]):
        done = run([str(ROOT / "launch" / "two_nodes.sh"), *line], place)
        assert done.returncode == 2 and "launch/two_nodes.sh HEAD NODE_RANK NPROC" in done.stderr


def test_the_command_is_installed(place: Path) -> None:
    assert run([str(BIN / "tpserve"), "--version"], place).stdout.startswith("tpserve ")
