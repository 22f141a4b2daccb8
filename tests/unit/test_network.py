"""Which interface a host uses: found through the kernel, or as asked; and what is refused before anybody waits."""

import socket

import pytest
import zmq

from tpserve.cli.server_flags import parse
from tpserve.config import env
from tpserve.config.resolve import _port_range
from tpserve.errors import UserError
from tpserve.host import network
from tpserve.host.launch import check_launch, node_interface
from tpserve.host.network import Interface, choose_interface
from tpserve.wire.channels import bind, open_socket, tcp
from tpserve.wire.curve import FRONTEND, Keyring

LO = Interface("lo", "127.0.0.1")
KNOWN = [LO, Interface("eth0", "10.0.0.1"), Interface("ib0", "192.168.7.1"), Interface("eth0", "fd00::1")]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: KNOWN)


def test_the_kernel_knows_loopback() -> None:
    assert LO in network.interfaces()
    assert (
        choose_interface(None, 1, "10.1.2.3")
        == choose_interface("lo", 2, "10.1.2.3")
        == choose_interface("127.0.0.0/8", 1, "x")
        == LO
    )
    assert choose_interface(None, 2, "127.0.0.1") == LO, "the route to the master"


@pytest.mark.parametrize(
    ("asked", "master", "found"),
    [
        ("eth0", "10.0.0.9", KNOWN[1]),
        ("eth0", "fd00::9", KNOWN[3]),
        ("192.168.0.0/16", "10.0.0.9", KNOWN[2]),
        ("10.0.0.1", "10.0.0.9", KNOWN[1]),
        ("fd00::/64", "10.0.0.9", KNOWN[3]),
    ],
)
def test_as_asked(known: None, asked: str, master: str, found: Interface) -> None:
    assert choose_interface(asked, 2, master) == found


def test_what_there_is_not(known: None) -> None:
    for asked in ("eth1", "10.0.1.0/24", "10.0.0.2"):
        with pytest.raises(UserError, match=rf"--interface {asked} is none of .*: lo \(127.0.0.1\), eth0 \(10.0.0.1\), ib0"):
            choose_interface(asked, 2, "10.0.0.9")
    with pytest.raises(UserError, match=r"no route to the master address no\.such\.host\.invalid"):
        choose_interface(None, 2, "no.such.host.invalid")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--node-rank 1 --master-addr 127.0.0.1", "--master-addr 127.0.0.1 is loopback, which other machines cannot reach"),
        ("--master-addr localhost", "--master-addr localhost is loopback"),
        ("--master-addr 192.0.2.1 --interface lo", "--interface lo is loopback and --master-addr 192.0.2.1 is not"),
        ("--master-addr no.such.host.invalid --interface lo", "--master-addr no.such.host.invalid: "),
    ],
)
def test_what_nodes_could_not_use(line: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        node_interface(parse(["m", "--nnodes", "2", *line.split()]))
    assert said in str(error.value)


def test_node_0_is_where_its_address_is(known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpserve.host import launch

    monkeypatch.setattr(launch, "interfaces", lambda: KNOWN)
    monkeypatch.setattr(network, "route_to", lambda master: "10.0.0.1")
    nodes = ["m", "--nnodes", "2", "--master-addr"]
    assert node_interface(parse([*nodes, "10.0.0.1"])) == KNOWN[1]
    assert node_interface(parse([*nodes, "10.0.0.9", "--node-rank", "1"])) == KNOWN[1]
    assert node_interface(parse([*nodes, "10.0.0.9", "--interface", "eth0"])) == KNOWN[1]
    with pytest.raises(UserError, match=r"10.0.0.9 is not an address of this node, .* are eth0 \(10.0.0.1\), ib0 \("):
        node_interface(parse([*nodes, "10.0.0.9"]))


def test_what_the_user_set_wins() -> None:
    environ = {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO", "PATH": "/bin"}
    assert env.network_variables(environ) == {"NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "ib0"}
    env.use_interface("eth0", environ)
    assert (environ["GLOO_SOCKET_IFNAME"], environ["NCCL_SOCKET_IFNAME"]) == ("eth0", "ib0")
    env.use_interface("", empty := {})
    assert not empty


def test_a_range_of_ports() -> None:
    assert _port_range(None) == (0, 0) and _port_range("30000-30100") == (30000, 30100)
    for wrong in ("30000", "5-4", "0-9", "1-65536", "a-b"):
        with pytest.raises(UserError, match="--port-range must be two ports"):
            _port_range(wrong)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        curve_server = Keyring.open(None).curve_server(FRONTEND, 2)
        receiver = bind(opened := open_socket(zmq.PULL, 100), tcp("127.0.0.1", (first, min(first + 20, 65535))), curve_server)
        opened.close()
    assert first < int(receiver.rpartition(":")[2]) <= first + 20


@pytest.mark.parametrize("address", ["[::1]", "10.0.0.1:29501", "http://node-0"])
def test_a_master_address_is_no_more_than_that(address: str) -> None:
    with pytest.raises(UserError, match="is neither a name nor an address: no brackets, and the port is --master-port"):
        check_launch(parse(["m", "--nnodes", "2", "--master-addr", address]))
    for plain in ("fd00::1", "10.0.0.1", "node-0.pods.svc"):
        check_launch(parse(["m", "--nnodes", "2", "--master-addr", plain]))
