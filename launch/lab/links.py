"""What happens to the links of a lab: cut, silenced, slowed, healed. Knows hosts and iproute2, nothing of what they run.

                 loud: who sends learns it           silent: packets vanish, as behind a dead switch or a firewall
    a host       its cable is pulled (no carrier)    its port on the bridge forwards nothing
    a pair       each has no route to the other      each sends to an address that nobody has

The kernel is the only state here too: `state` reads it back.
"""

import json
import subprocess
from typing import Any

from launch.lab.hosts import Host, LabError, ip

NOBODY = "02:00:00:00:00:0d"
"""A hardware address that no host has: the bridge floods what is sent to it, and nobody takes it."""


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
                    here.run("ip", family, "neigh", "replace", address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")
                else:
                    here.run("ip", family, "route", "replace", "unreachable", address)


def heal(host: Host, others: list[Host]) -> None:
    """Undo every cut of this host, and what makes it slow. `others`: the lab's."""
    ip("link", "set", host.port, "up")
    _bridge("link", "set", "dev", host.port, "state", "3")
    for other in others:
        for here, there in ((host, other), (other, host)):
            for family, address in _addresses(here, there):
                if here.run("ip", family, "route", "show", "type", "unreachable", address):
                    here.run("ip", family, "route", "del", "unreachable", address)
                if NOBODY in here.run("ip", family, "neigh", "show", address, "dev", "eth0"):
                    here.run("ip", family, "neigh", "del", address, "dev", "eth0")
    subprocess.run(["tc", "qdisc", "del", "dev", host.port, "root"], check=False, capture_output=True)  # there may be none
    host.start(["tc", "qdisc", "del", "dev", "eth0", "root"], stderr=subprocess.DEVNULL).wait()


def slow(host: Host, rate: str | None, delay: str | None) -> None:
    """Limit a host's link, both ways: to `rate` (such as 10mbit, by tbf), by `delay` (such as 20ms, by netem). One of them."""
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
    """What is the matter with a host's link, in a few words; "up" when nothing is."""
    found = []
    if _shown(host.port, "ip", "-j", "link", "show", "dev").get("operstate") != "UP":
        found.append("cut")
    elif _shown(host.port, "bridge", "-j", "link", "show", "dev").get("state") == "disabled":
        found.append("silent")
    routes, neighbours = host.run("ip", "route", "show", "type", "unreachable").split(), host.run("ip", "neigh", "show")
    found += [f"cut from {other.name}" for other in others if other.address in routes]
    silent = {line.split()[0] for line in neighbours.splitlines() if NOBODY in line}
    found += [f"silent to {other.name}" for other in others if other.address in silent]
    shape = _shown(host.port, "tc", "-j", "qdisc", "show", "dev")
    if shape.get("kind") in ("tbf", "netem"):
        found.append(f"slow ({shape['kind']})")
    return ", ".join(found) or "up"


def _shown(port: str, *words: str) -> dict[str, Any]:
    """The one thing that iproute2 shows of a port."""
    done = subprocess.run([*words, port], capture_output=True, text=True, check=False)
    shown = json.loads(done.stdout) if done.stdout.strip() else []
    return dict(shown[0]) if shown else {}


def _addresses(here: Host, there: Host) -> list[tuple[str, str]]:
    """What `here` calls `there`, of the families that it has itself; each with the family's option."""
    has6 = here.address6 in here.run("ip", "-6", "addr", "show", "dev", "eth0")
    return [("-4", there.address), *([("-6", there.address6)] if has6 else [])]


def _bridge(*words: str) -> None:
    done = subprocess.run(["bridge", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"bridge {' '.join(words)}: {done.stderr.strip()}")
