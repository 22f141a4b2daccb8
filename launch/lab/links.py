"""Faults of a lab's links: cut, silent, slow, healed. Uses hosts and iproute2; knows nothing of the processes in the hosts.

                 loud: the sender gets an error      silent: packets vanish, as behind a dead switch or a firewall
    a host       its cable is pulled (no carrier)    its port on the bridge forwards nothing
    a pair       each has no route to the other      each sends to a hardware address that no host has

All state is in the kernel; `state` reads it back.
"""

import json
import subprocess
from typing import Any

from launch.lab.hosts import Host, LabError, ip

UNUSED_MAC = "02:00:00:00:00:0d"
"""A hardware address that no host has: the bridge floods frames for it, and no host accepts them."""


def cut(host: Host, other: Host | None = None, *, silent: bool = False) -> None:
    """Cut a host off, or two hosts off from each other."""
    if other is None and silent:
        _bridge("link", "set", "dev", host.port, "state", "0")
    elif other is None:
        ip("link", "set", host.port, "down")
    else:
        for here, there in ((host, other), (other, host)):
            for family, address in _addresses(here, there):
                if silent:
                    here.run("ip", family, "neigh", "replace", address, "lladdr", UNUSED_MAC, "dev", "eth0", "nud", "permanent")
                else:
                    here.run("ip", family, "route", "replace", "unreachable", address)


def heal(host: Host, others: list[Host]) -> None:
    """Undo all cuts and limits of this host. `others`: the other hosts of the lab."""
    ip("link", "set", host.port, "up")
    _bridge("link", "set", "dev", host.port, "state", "3")
    for other in others:
        for here, there in ((host, other), (other, host)):
            for family, address in _addresses(here, there):
                if here.run("ip", family, "route", "show", "type", "unreachable", address):
                    here.run("ip", family, "route", "del", "unreachable", address)
                if UNUSED_MAC in here.run("ip", family, "neigh", "show", address, "dev", "eth0"):
                    here.run("ip", family, "neigh", "del", address, "dev", "eth0")
    subprocess.run(["tc", "qdisc", "del", "dev", host.port, "root"], check=False, capture_output=True)  # there may be none
    host.start(["tc", "qdisc", "del", "dev", "eth0", "root"], stderr=subprocess.DEVNULL).wait()


def slow(host: Host, rate: str | None, delay: str | None) -> None:
    """Limit a host's link in both directions, by either a `rate` (tbf, such as 10mbit) or a `delay` (netem, such as 20ms)."""
    if (rate is None) == (delay is None):
        raise LabError("slow takes either --rate, such as 10mbit, or --delay, such as 20ms")
    shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "200ms"] if rate else ["netem", "delay", str(delay)]
    words = ["tc", "qdisc", "replace", "dev", host.port, "root", *shape]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        why = f"this kernel has no {shape[0]}" if "kind is unknown" in done.stderr else done.stderr.strip()
        raise LabError(f"{' '.join(words)}: {why}")
    host.run("tc", "qdisc", "replace", "dev", "eth0", "root", *shape)


def state(host: Host, others: list[Host]) -> str:
    """The faults of a host's link in a few words; "up" without any."""
    faults = []
    if _shown(host.port, "ip", "-j", "link", "show", "dev").get("operstate") != "UP":
        faults.append("cut")
    elif _shown(host.port, "bridge", "-j", "link", "show", "dev").get("state") == "disabled":
        faults.append("silent")
    routes, neighbours = host.run("ip", "route", "show", "type", "unreachable").split(), host.run("ip", "neigh", "show")
    faults += [f"cut from {other.name}" for other in others if other.address in routes]
    silent = {line.split()[0] for line in neighbours.splitlines() if UNUSED_MAC in line}
    faults += [f"silent to {other.name}" for other in others if other.address in silent]
    shape = _shown(host.port, "tc", "-j", "qdisc", "show", "dev")
    if shape.get("kind") in ("tbf", "netem"):
        faults.append(f"slow ({shape['kind']})")
    return ", ".join(faults) or "up"


def _shown(port: str, *words: str) -> dict[str, Any]:
    """The first object of iproute2's JSON output for a port; empty without one."""
    done = subprocess.run([*words, port], capture_output=True, text=True, check=False)
    shown = json.loads(done.stdout) if done.stdout.strip() else []
    return dict(shown[0]) if shown else {}


def _addresses(here: Host, there: Host) -> list[tuple[str, str]]:
    """The addresses of `there` in the families that `here` has, each with the option of its family."""
    has6 = here.address6 in here.run("ip", "-6", "addr", "show", "dev", "eth0")
    return [("-4", there.address), *([("-6", there.address6)] if has6 else [])]


def _bridge(*words: str) -> None:
    done = subprocess.run(["bridge", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"bridge {' '.join(words)}: {done.stderr.strip()}")
