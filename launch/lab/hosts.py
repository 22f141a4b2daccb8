"""Virtual hosts on one machine: up to eight, each with its own network, process, mount and name namespaces, joined by a bridge.

    bridge tp-NAME        in the machine's own network namespace, from which every host is reachable
    host i                node<i>, 10.77.N.<i+1> and fd77:<N+1>::<i+1>, N the first free number; own loopback, process
                          ids, /dev/shm and /etc/hosts; the machine's files

All state is in the kernel: a lab is found by its bridge and by the command lines of its hosts' first processes, so that `down`
leaves nothing behind, even after a crash. Needs root. Faults of links are in `links`.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MOST_HOSTS = 8
EXIT_S = 5.0
NO_ROOT = "a lab needs root: it makes network namespaces"
_INIT = Path(__file__).with_name("init.py")
_UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child")
_ENTERED = ("net", "uts", "ipc", "mnt")
"""The namespaces that the child enters itself. A process namespace applies only to the children of the process that enters it."""
_entering = threading.Lock()
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """A mistake of the user; the message is one line."""


@dataclass(frozen=True)
class Host:
    """One host. `network`: the lab's number in addresses. `pid`: its first process, in the machine's process ids."""

    lab: str
    network: int
    index: int
    pid: int

    @property
    def name(self) -> str:
        """The host name."""
        return f"node{self.index}"

    @property
    def address(self) -> str:
        """The IPv4 address."""
        return f"10.77.{self.network}.{self.index + 1}"

    @property
    def address6(self) -> str:
        """The IPv6 address."""
        return f"fd77:{self.network + 1:x}::{self.index + 1:x}"

    @property
    def port(self) -> str:
        """The interface at the machine's end of the host's link; eth0 is the host's end."""
        return f"{bridge(self.lab)}.{self.index}"

    def processes(self) -> list[int]:
        """All processes of the host but the first, in the machine's process ids."""
        namespace, found = Path(f"/proc/{self.pid}/ns/pid").stat().st_ino, []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (entry / "ns/pid").stat().st_ino == namespace and int(entry.name) != self.pid:
                    found.append(int(entry.name))
        return sorted(found)

    def start(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """subprocess.Popen inside the host. The process is a normal child, which can be waited for and signalled."""
        here = Path.cwd()
        descriptors = [os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _ENTERED]

        def enter() -> None:
            for descriptor in descriptors:
                _setns(descriptor)
            os.chdir(here)  # entering a mount namespace changes to its root

        with _entering, _children_in(self.pid):
            try:
                return subprocess.Popen(command, preexec_fn=enter, **options)  # noqa: PLW1509 - only system calls
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def run(self, *command: str) -> str:
        """Run a command inside the host and return its output. Raises LabError when it fails."""
        child = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, error = child.communicate(timeout=60)
        if child.returncode:
            raise LabError(f"{self.name}: {' '.join(command)}: {error.strip() or child.returncode}")
        return str(out)


def up(lab: str, count: int) -> list[Host]:
    """Create a lab of `count` hosts, after removing the remains of a lab with this name. Raises LabError."""
    if not 2 <= count <= MOST_HOSTS:
        raise LabError(f"a lab has 2 to {MOST_HOSTS} hosts, not {count}")
    if (why := refusal()) is not None:
        raise LabError(why)
    down(lab)
    try:
        network = _free_network()
        ip("link", "add", bridge(lab), "type", "bridge", "mcast_snooping", "0")
        ip("addr", "add", f"10.77.{network}.254/24", "dev", bridge(lab))
        ip("link", "set", bridge(lab), "up")
        if has_ipv6():
            ip("addr", "add", f"fd77:{network + 1:x}::fe/64", "dev", bridge(lab), "nodad")
        return [_create(Host(lab, network, index, 0), count) for index in range(count)]
    except BaseException:
        down(lab)
        raise


def down(lab: str) -> None:
    """Remove every host with its processes, and every link. Does nothing without a lab of this name."""
    first = [host.pid for host in _first_processes(lab)]
    for pid in first:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + EXIT_S
    while not all(_has_ended(pid) for pid in first):
        if time.monotonic() > deadline_s:
            raise LabError(f"processes {first} of lab {lab} do not end")
        time.sleep(0.02)
    for pid in first:
        with contextlib.suppress(ChildProcessError):  # they are children of this process if it has created them
            os.waitpid(pid, 0)
    links = [link for link in Path("/sys/class/net").glob("tp-*") if link.name.partition(".")[0] == bridge(lab)]
    for link in sorted(links, reverse=True):
        subprocess.run(["ip", "link", "del", link.name], check=False, capture_output=True)  # it may have gone with its host


def hosts(lab: str) -> list[Host]:
    """The running hosts, in order."""
    found = {host.index: host for host in _first_processes(lab) if not _is_unshare(host.pid)}
    return [found[index] for index in sorted(found)]


def labs() -> list[str]:
    """The names of all labs of this machine."""
    return sorted(link.name.removeprefix("tp-") for link in Path("/sys/class/net").glob("tp-*") if "." not in link.name)


def refusal() -> str | None:
    """The reason why this machine cannot run a lab; None when it can."""
    if os.geteuid():
        return NO_ROOT
    missing = [tool for tool in ("ip", "bridge", "tc", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"a lab needs {', '.join(missing)} (apt-get install -y iproute2 util-linux)"
    probe = "mount -t tmpfs tmpfs /dev/shm && ip link add tp-probe type bridge && ip link add veth-a type veth peer name veth-b"
    done = subprocess.run([*_UNSHARE, "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"namespaces, veth or bridges are not allowed here: {done.stderr.strip()}" if done.returncode else None


def check_root() -> None:
    """Raise LabError unless the user is root. Even reading the state of a host needs root."""
    if os.geteuid():
        raise LabError(NO_ROOT)


def has_ipv6() -> bool:
    """Whether the kernel has IPv6 and it is enabled."""
    setting = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")
    return setting.exists() and setting.read_text().strip() == "0"


def bridge(lab: str) -> str:
    """The name of the lab's bridge. Raises LabError for a name that is no valid one."""
    if not (lab.isascii() and lab.isalnum()) or len(lab) > 10:
        raise LabError(f"a lab's name is at most ten letters and digits, not {lab!r}")
    return f"tp-{lab}"


def ip(*words: str) -> None:
    """Run iproute2's `ip`. Raises LabError with its message."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _create(wanted: Host, count: int) -> Host:
    """Start the host and connect it to the bridge. `wanted` has all fields but the pid; `count`: hosts of the lab."""
    names = "127.0.0.1 localhost\n::1 localhost\n"
    for index in range(count):
        peer = replace(wanted, index=index)
        names += f"{peer.address} {peer.name}\n{peer.address6} {peer.name}\n"
    command = [*_UNSHARE, sys.executable, str(_INIT), f"tpserve-lab:{wanted.lab}:{wanted.network}:{wanted.index}", wanted.name]
    pipes: Mapping[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = subprocess.Popen(command, start_new_session=True, text=True, cwd="/", **pipes)
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    with child.stdin, child.stdout, child.stderr:
        child.stdin.write(names)
        child.stdin.close()
        if child.stdout.readline() != "ready\n":
            raise LabError(f"{wanted.name} could not be created: {child.stderr.read().strip()}")
    host = next(host for host in hosts(wanted.lab) if host.index == wanted.index)
    ip("link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
    ip("link", "set", host.port, "master", bridge(host.lab), "up")
    host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
    host.run("ip", "link", "set", "eth0", "up")
    if has_ipv6():
        host.run("ip", "addr", "add", f"{host.address6}/64", "dev", "eth0", "nodad")
    return host


def _free_network() -> int:
    """The first network number whose addresses this machine does not use."""
    known = subprocess.run(["ip", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    return next(number for number in range(256) if f" 10.77.{number}." not in known)


def _first_processes(lab: str) -> list[Host]:
    """The hosts' first processes, and the `unshare` that waits for each."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")[-4:]
            if len(words) == 4 and words[0].endswith(b"/lab/init.py") and words[1].startswith(f"tpserve-lab:{lab}:".encode()):
                network, index = (int(part) for part in words[1].split(b":")[2:])
                found.append(Host(lab, network, index, int(entry.name)))
    return found


def _has_ended(pid: int) -> bool:
    """Whether a process has ended. A host's first process ends after all others of the host."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


def _is_unshare(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"unshare\0")


@contextlib.contextmanager
def _children_in(pid: int) -> Iterator[None]:
    """Inside the block, new children of this thread are in the process namespace of `pid`."""
    own, theirs = (os.open(f"/proc/{p}/ns/pid", os.O_RDONLY | os.O_CLOEXEC) for p in ("self", pid))
    try:
        _setns(theirs)
        yield
    finally:
        _setns(own)
        os.close(own)
        os.close(theirs)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), "setns")
