"""The lab itself, by its command line: hosts that reach each other until a link is cut, and nothing left of them afterwards."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.lab import hosts as lab_hosts
from launch.lab import links
from launch.lab.hosts import Host, LabError
from launch.lab.jobs import ROOT, commands

NAME = f"c{os.getpid()}"


def lab(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "launch/lab", "--name", NAME, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


WRONG = [
    (("cut", "7"), "there is no host 7: the lab has 0, 1, 2"),
    (("cut", "1", "1"), "cut takes one host, or two different ones"),
    (("slow", "9", "--rate", "1mbit"), "there is no host 9: the lab has 0, 1, 2"),
    (("slow", "1"), "slow takes either --rate, such as 10mbit, or --delay, such as 20ms"),
    (("kill", "--signal", "FOO"), "there is no signal 'FOO': say KILL, STOP, CONT or TERM"),
    (("exec", "0"), "exec takes a command, such as `exec 1 -- ip addr`"),
    (("exec", "0", "--", "no-such-thing"), "no-such-thing: No such file or directory"),
    (("up", "--hosts", "9"), "a lab has 2 to 8 hosts, not 9"),
]


@pytest.fixture
def three() -> Iterator[list[Host]]:
    made = lab("up", "--hosts", "3")
    assert made.returncode == 0, made.stderr
    yield lab_hosts.hosts(NAME)
    lab_hosts.down(NAME)


def reaches(host: Host, address: str) -> str:
    """What the kernel says to a connection that nobody accepts: "refused" where packets come and go."""
    code = f"import socket\ntry: socket.create_connection(({address!r}, 9), 0.5)\nexcept OSError as e: print(type(e).__name__)"
    return host.run(sys.executable, "-S", "-c", code).strip()


def transfer_s(source: Host, target: Host, num_bytes: int) -> float:
    """How long so much takes from one host to another."""
    take = "import socket, sys; s = socket.create_server((sys.argv[1], 7077)); print('up', flush=True); c = s.accept()[0]"
    take += "\nimport time\nc.recv(1); began = time.monotonic()\nwhile c.recv(1 << 16): pass\nprint(time.monotonic() - began)"
    give = f"import socket, sys; socket.create_connection((sys.argv[1], 7077)).sendall(bytes({num_bytes}))"
    taker = target.start([sys.executable, "-S", "-c", take, target.address], stdout=subprocess.PIPE, text=True)
    assert taker.stdout is not None and taker.stdout.readline() == "up\n"
    source.run(sys.executable, "-S", "-c", give, target.address)
    return float(taker.communicate(timeout=30)[0])


def test_the_command_line(three: list[Host]) -> None:
    table = lab("status").stdout.splitlines()
    assert [line.split()[:3] for line in table[1:4]] == [[host.name, host.address, "up"] for host in three]
    assert "no answer at port 8000" in table[4]
    assert lab("exec", "2", "--", "hostname").stdout == "node2\n"
    assert lab("exec", "0", "--", "sh", "-c", "exit 3").returncode == 3
    for words, why in WRONG:
        done = lab(*words)
        assert (done.returncode, done.stderr) == (2, f"lab: error: {why}\n")
    sleeping = three[1].start(["sleep", "60"])
    assert f"node1: sleep (pid {sleeping.pid})" in lab("kill", "1").stdout and sleeping.wait() == -signal.SIGKILL
    assert lab("kill", "1").returncode == 1
    lab("cut", "1", "2", "--silent")
    assert "silent to node2" in lab("status").stdout
    lab("heal")
    lab("slow", "0", "--rate", "10mbit")
    assert "slow (tbf)" in lab("status").stdout
    assert lab("heal").returncode == 0 and "slow" not in lab("status").stdout
    assert lab("down").returncode == lab("down").returncode == 0
    assert lab("status").returncode == 2


def test_a_slow_link_is_as_slow_as_told(three: list[Host]) -> None:
    """Both ways, by a transfer; a delay that this kernel cannot make changes nothing and says so in one line."""
    zero, one, _ = three
    lab("slow", "1", "--rate", "20mbit")
    assert all(transfer_s(*ends, 1 << 20) > 0.3 for ends in ((zero, one), (one, zero))), "1 MiB is 0.42 s of 20 Mbit/s"
    done = lab("slow", "1", "--delay", "20ms")
    if done.returncode == 2:
        assert re.fullmatch(r"lab: error: .*: this kernel has no netem\n", done.stderr)
        assert "slow (tbf)" in lab("status").stdout and transfer_s(zero, one, 1 << 20) > 0.3
    lab("heal", "1")
    assert transfer_s(zero, one, 1 << 20) < 0.3


def test_labs_with_names_alike_and_who_is_not_root(three: list[Host]) -> None:
    command = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "launch/lab", "--name", NAME, "down"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "lab: error: a lab needs root: it makes network namespaces\n")
    lab_hosts.down(NAME[:-1])
    assert {f"tp-{NAME}", *(host.port for host in three)} <= {path.name for path in Path("/sys/class/net").iterdir()}


@pytest.mark.parametrize("silent", [False, True])
def test_cuts(three: list[Host], silent: bool) -> None:
    zero, one, two = three
    addresses = [one.address, one.address6] if lab_hosts.has_ipv6() else [one.address]
    assert {reaches(zero, address) for address in addresses} == {"ConnectionRefusedError"}
    links.cut(zero, one, silent=silent)
    assert {reaches(zero, address) for address in addresses} == {"TimeoutError" if silent else "OSError"}
    assert reaches(zero, two.address) == reaches(two, one.address) == "ConnectionRefusedError", "only this pair"
    links.heal(one, [zero, two])
    assert {reaches(zero, address) for address in addresses} == {"ConnectionRefusedError"}
    links.cut(one, silent=silent)
    assert reaches(zero, one.address) == reaches(two, one.address) == reaches(one, zero.address) == "TimeoutError"
    assert links.state(one, [zero, two]) == ("silent" if silent else "cut")
    links.heal(one, [zero, two])
    assert {reaches(zero, address) for address in addresses} == {"ConnectionRefusedError"}
    assert links.state(one, [zero, two]) == "up"


def test_nothing_is_left_whoever_crashed() -> None:
    """A lab whose maker was killed half-way, with a process that ignores signals: `down` from elsewhere takes all of it away."""
    code = f"from launch.lab import hosts\nmade = hosts.up({NAME!r}, 2)\n"
    code += "made[0].start(['sh', '-c', 'trap \"\" TERM INT HUP; sleep 1000'])\n"
    code += "import os\nos.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    hosts = lab_hosts.hosts(NAME)
    deadline_s = time.monotonic() + 5.0
    while not hosts[0].processes() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    pids = [pid for host in hosts for pid in (host.pid, *host.processes())]
    assert len(pids) >= 3 and NAME in lab_hosts.labs()
    assert lab("down").returncode == 0
    assert not [pid for pid in pids if (stat := Path(f"/proc/{pid}/stat")).exists() and ") Z " not in stat.read_text()]
    assert NAME not in lab_hosts.labs() and not list(Path("/sys/class/net").glob(f"tp-{NAME}*"))


def test_commands_for_unequal_hosts(three: list[Host]) -> None:
    lines = commands(three, ["M", "-tp", "6"], [1, 2, 3])
    assert [line[line.index("--nproc-per-node") + 1] for line in lines] == ["1", "2", "3"]
    assert "--headless" not in lines[0] and all("--headless" in line for line in lines[1:])
    with pytest.raises(LabError, match="--ranks 1,2 for 3 hosts"):
        commands(three, ["M"], [1, 2])
