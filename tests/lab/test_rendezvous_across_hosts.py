"""How nodes find each other across hosts: late, at wrong addresses, over IPv6, through narrow firewalls; and what is refused."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.lab import links
from launch.lab.hosts import Host
from launch.lab.jobs import MASTER_PORT, commands
from tests.cluster import tiny_model
from tests.lab.cluster import Cluster, cluster

FLAGS = ("--load-format", "dummy", "-tp", "2")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.save(tmp_path_factory.mktemp("tiny")))


def changed(lines: Sequence[Sequence[str]], node: int, **flags: str) -> list[list[str]]:
    """The commands with other values of some flags on one node."""
    own = [list(line) for line in lines]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if flag in own[node]:
            own[node][own[node].index(flag) + 1] = value
        else:
            own[node] += [flag, value]
    return own


def said(server: Cluster, node: int, text: str) -> list[str]:
    return [line for line in server.log.splitlines() if line.startswith(f"node{node} | ") and text in line]


def serves(server: Cluster) -> None:
    server.wait_ready()
    assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
    assert set(server.stop()) == {0}


@pytest.mark.lab
@pytest.mark.parametrize("first", [0, 1])
def test_hosts_started_far_apart(hosts: list[Host], model: str, place: Path, first: int) -> None:
    with cluster(hosts, [model, *FLAGS], place, start=[first]) as server:
        time.sleep(20.0)
        server.start(1 - first)
        serves(server)
        where = rf"at {hosts[0].address}:{MASTER_PORT}"
        waited = [line.rpartition("INFO  ")[2] for line in said(server, first, "waiting for node")]
        refused = r": Connection refused \(errno 111\)" if first else ""
        assert re.fullmatch(rf"waiting for node {1 - first} of 2 {where}, 2 s{refused}", waited[0])
        assert len(waited) in (4, 5), "after 1.5, 3, 6, 12 and 24 seconds"


def test_a_closed_port_and_giving_up(hosts: list[Host], model: str, place: Path) -> None:
    """Node 1 says within 10 s what it cannot reach and why; both give up when they said they would, naming the missing ranks."""
    lines = changed(commands(hosts, [model, *FLAGS, "--start-timeout", "9"], [1]), 1, master_port="1")
    with cluster(hosts, [], place, lines=lines) as server:
        server.wait_said(" s: Connection refused (errno 111)", 10.0)
        assert f"waiting for node 0 of 2 at {hosts[0].address}:1, " in said(server, 1, "Connection refused")[0]
        status, body = server.get("/readyz")
        assert status == 503 and "waiting for ranks 0-1" in str(body)
        assert server.wait(15.0) == [1, 1]
        assert (
            f"did not answer at {hosts[0].address}:1 within 9 s (Connection refused (errno 111)), so rank 0 is missing"
            in (said(server, 1, "")[-1])
        )
        last = said(server, 0, "")[-1]
        assert f"node 1 of 2 did not come to {hosts[0].address}:{MASTER_PORT} within 9 s, so rank 1 is missing" in last


@pytest.mark.lab
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_node_that_vanishes_while_others_are_waited_for(hosts: list[Host], model: str, place: Path) -> None:
    """It does not hold its place: when it comes back, it is let in again."""
    lines = commands(hosts, [model, "--load-format", "dummy", "-tp", "3"], [1])
    with cluster(hosts, [], place, start=[0, 1], lines=lines) as server:
        server.wait_said("waiting for node 2 of 3", 15.0)
        links.cut(hosts[1], silent=True)
        server.wait_said("node 1 (node1) has gone", 10.0)
        links.heal(hosts[1], [hosts[0], hosts[2]])
        server.start(2)
        serves(server)


@pytest.mark.lab
def test_a_wrong_address(hosts: list[Host], model: str, place: Path) -> None:
    nobody = hosts[0].address.rpartition(".")[0] + ".99"
    lines = changed(commands(hosts, [model, *FLAGS], [1]), 1, master_addr=nobody, start_timeout="14")
    with cluster(hosts, [], place, start=[1], lines=lines) as server:
        server.wait_said(f"waiting for node 0 of 2 at {nobody}:{MASTER_PORT}, ", 10.0)
        assert "No route to host (errno 113)" in server.log
        assert server.wait(20.0) == [1]


@pytest.mark.lab
@pytest.mark.parametrize("open_too", [False, True])
def test_a_firewall_between_the_hosts(hosts: list[Host], model: str, place: Path, open_too: bool) -> None:
    """It swallows all but our ports: gloo's are named in seconds. With the kernel's range open, as the page says, all is well."""
    closed = ["1-7999", "8001-29500", "29502-30999", "31021-39999", "45000-65534", *([] if open_too else ["40000-44999"])]
    was = hosts[0].run("sysctl", "-n", "net.ipv4.ip_local_port_range").split()
    swallow = ("pref", "10", "iif", "eth0", "ipproto", "tcp")
    for host in hosts:
        host.run("ip", "rule", "add", "pref", "100", "lookup", "local")
        host.run("ip", "rule", "del", "pref", "0")
        host.run("sysctl", "-w", "net.ipv4.ip_local_port_range=40000 44999")
        for ports in closed:
            # what comes to a port of the kernel's choice from one is gloo's; from ours it is an answer
            source = ("sport", "40000-44999") if ports == "40000-44999" else ()
            host.run("ip", "rule", "add", *swallow, *source, "dport", ports, "blackhole")
    try:
        with cluster(hosts, [model, *FLAGS, "--port-range", "31000-31020"], place) as server:
            if open_too:
                serves(server)
                return
            assert server.wait(30.0) == [1, 1]
            last = said(server, 0, "ERROR")[-1]
            assert f"rank 0 cannot reach rank 1 at {hosts[1].address}:" in last and "Connection timed out (errno 110)" in last
            assert "40000-44999 here, net.ipv4.ip_local_port_range" in last
    finally:
        for host in hosts:
            host.run("ip", "rule", "add", "pref", "0", "lookup", "local")
            host.run("ip", "rule", "del", "pref", "100")
            host.run("sysctl", "-w", f"net.ipv4.ip_local_port_range={' '.join(was)}")
            for _ in closed:
                host.run("ip", "rule", "del", "pref", "10")


def test_what_cannot_heal_is_said_at_once_where_a_person_looks(hosts: list[Host], model: str, place: Path) -> None:
    good = commands(hosts, [model, *FLAGS], [1])
    cases: list[tuple[int, list[list[str]], str]] = [
        (1, changed(good, 1, master_addr="127.0.0.1"), "--master-addr 127.0.0.1 is loopback, which other machines cannot reach"),
        (1, changed(good, 1, interface="lo"), f"--interface lo is loopback and --master-addr {hosts[0].address} is not"),
        (1, changed(good, 1, interface="ib0"), "--interface ib0 is none of this host's interfaces: lo (127.0.0.1), "),
        (1, changed(good, 1, node_rank="2"), "--node-rank 2 with --nnodes 2: nodes count from 0 to 1"),
        (0, changed(good, 0, master_addr=hosts[1].address), f"--master-addr {hosts[1].address} is not an address of this node"),
    ]
    for node, lines, line in cases:
        with cluster(hosts, [], place, start=[node], lines=lines) as server:
            assert server.wait(10.0) == [2]
            assert f"tpserve: error: {line}" in server.log and len(server.log.splitlines()) == 1


@pytest.mark.lab
def test_versions_differ(hosts: list[Host], model: str, place: Path) -> None:
    """Node 1's Python says that it is an older tpserve."""
    old = place / "old.log"
    old.mkdir()
    (old / "sitecustomize.py").write_text("import tpserve.version as v\nv.__version__ = '0.0.9'\n")
    lines = commands(hosts, [model, *FLAGS], [1])
    lines[1] = ["sh", "-c", f'PYTHONPATH={old}:$PYTHONPATH exec "$0" "$@"', *lines[1]]
    with cluster(hosts, [], place, lines=lines) as server:
        began_s = time.monotonic()
        assert server.wait(20.0) == [2, 2], server.log
        assert time.monotonic() - began_s < 12.0
        for node in (0, 1):
            assert "tpserve: error: node 1 (node1, " in said(server, node, "")[-1]
            assert "runs tpserve 0.0.9, node 0 (node0) runs " in said(server, node, "")[-1]


@pytest.mark.lab
@pytest.mark.parametrize("torchrun", [False, True])
def test_one_address_on_two_hosts(hosts: list[Host], model: str, place: Path, torchrun: bool) -> None:
    """As with Docker's own bridge: both hosts have the same network beside the one that they share."""
    for host in hosts:
        host.run("ip", "link", "add", "docker0", "type", "bridge")
        host.run("ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
        host.run("ip", "link", "set", "docker0", "up")
    try:
        with cluster(hosts, [model, *FLAGS, "--interface", "docker0"], place, torchrun=torchrun) as server:
            if torchrun:
                server.wait_said("node 0 calls itself 172.17.0.1, which on this node is docker0: pass --interface")
                server.stop()
            else:
                assert server.wait(20.0) == [2, 2]
                for node in (0, 1):
                    line = "node 1 (node1, 172.17.0.1) and node 0 (node0) both call themselves 172.17.0.1: pass --interface"
                    assert line in said(server, node, "tpserve: error: ")[-1]
    finally:
        for host in hosts:
            host.run("ip", "link", "del", "docker0")


@pytest.mark.lab
@pytest.mark.parametrize("torchrun", [False, True])
def test_over_ipv6(hosts: list[Host], model: str, place: Path, torchrun: bool) -> None:
    with cluster(hosts, [model, *FLAGS], place, ipv6=True, torchrun=torchrun) as server:
        server.wait_ready()
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        server.stop()
        assert f"node 1 of 2 uses eth0 ({hosts[1].address6})" in server.log


@pytest.mark.lab
def test_ports_and_interface_are_as_told(hosts: list[Host], model: str, place: Path) -> None:
    """What tpserve listens on between hosts is in the range, on the interface; the user's own settings win, and are shown."""
    flags = [model, *FLAGS, "--interface", hosts[0].address.rpartition(".")[0] + ".0/24", "--port-range", "31000-31009"]
    lines = commands(hosts, flags, [1])
    lines[1] = ["env", "NCCL_DEBUG=INFO", "GLOO_SOCKET_IFNAME=eth0", *lines[1]]
    with cluster(hosts, [], place, lines=lines) as server:
        server.wait_ready()
        listening = hosts[0].run("ss", "-Hltnp")
        ours = {line.split()[3] for line in listening.splitlines() if hosts[0].address in line.split()[3]}
        ports = {int(address.rpartition(":")[2]) for address in ours}
        own = {port for port in ports if 31000 <= port <= 31009}
        assert len(own) == 5, "the agents' store, the coordinator, the epoch's store, plans, results"
        assert MASTER_PORT not in ports, "closed once all have met"
        assert not [line for line in listening.splitlines() if line.split()[3].startswith(("0.0.0.0", "*", "[::]"))]
        assert "NCCL_DEBUG=INFO is set and stays as it is" in server.log
        assert re.search(r"rank 0 on node0 +rank 1 on node1\n(.*\n)?.*NCCL_DEBUG +none +INFO\n", server.log)
        assert server.stop() == [0, 0]
