"""Which of this host's interfaces the cluster uses: found once, for ZeroMQ, gloo and NCCL alike. Where this process listens, and
where it looks names up.

Without `--interface` it is the one from which the kernel would send to the master address; on a single node it is loopback.
"""

import ctypes
import errno
import ipaddress
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tpserve.errors import UserError

LOOPBACK = "127.0.0.1"
_UP = 0x1


class Interface(NamedTuple):
    """An interface and the address on it that other nodes use. `name` is empty where the kernel does not tell it."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.name else self.address


def choose_interface(asked: str | None, nnodes: int, master_addr: str) -> Interface:
    """The interface of this host for a job of `nnodes`. `asked`: a name, a network such as 10.0.0.0/24, or an address.

    UserError when there is no such interface, or no route to the master.
    """
    known = interfaces()
    if asked is not None:
        return _asked(asked, known, _family(master_addr) if nnodes > 1 else socket.AF_INET)
    address = LOOPBACK if nnodes == 1 else route_to(master_addr)
    return next((one for one in known if one.address == address), Interface("", address))


def route_to(master_addr: str) -> str:
    """This host's address on the interface that leads to the master."""
    try:
        routes = socket.getaddrinfo(master_addr, 9, type=socket.SOCK_DGRAM)
        family, kind, proto, _, target = min(routes, key=lambda route: route[0] != socket.AF_INET)  # IPv4 where there is a choice
        with socket.socket(family, kind, proto) as probe:
            probe.connect(target)  # of a datagram socket: chooses the route and sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"no route to the master address {master_addr}: {error.strerror}", param="master_addr") from error


def host_id() -> str:
    """Equal for processes that see the same network: one kernel, one network namespace. Empty when the kernel does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return ""


def interfaces() -> list[Interface]:
    """Every address of every interface that is up, but the link-local ones of IPv6, in the kernel's order."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(first)):
        return []
    found, at = [], first
    while at:
        entry = at.contents
        if entry.flags & _UP and (address := _read(entry.address)):
            found.append(Interface(entry.name.decode(), address))
        at = entry.next
    libc.freeifaddrs(first)
    return found


def kernel_ports() -> str:
    """The ports that it chooses from for who names none; of IPv6 too."""
    try:
        return "-".join(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except OSError:
        return "unknown"


def listen(address: str, ports: tuple[int, int] = (0, 0)) -> socket.socket:
    """A socket that listens on the first free one of `ports`; (0, 0): the kernel chooses. UserError when there is none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    why: OSError | None = None
    for port in range(ports[0], ports[1] + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            why = error
            continue
        return listener
    assert why is not None
    shown = host_port(address, ports[0]) if ports[0] == ports[1] else f"{address} ports {ports[0]}-{ports[1]}"
    param = "port_range" if ports[1] > ports[0] else "master_port"
    raise UserError(f"cannot listen at {shown}: {os_error_text(why)}", param=param)


def host_port(address: str, port: int) -> str:
    """An address and a port as people write them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def os_error_text(error: OSError) -> str:
    """What the kernel said, with its number (that of a resolver is negative)."""
    if error.errno is None:  # a timeout of Python's
        error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return f"{error.strerror} (errno {error.errno})"


_no_dns: list[None] = []
"""One entry for each caller who wants none at present."""
_dns_lock = threading.Lock()


def disable_dns() -> None:
    """From now on all names in this process come from /etc/hosts: a DNS server that does not answer holds nothing up.

    For libraries that look a name up only to log it. Does nothing with a C library other than glibc.
    """
    with _dns_lock:
        if not _no_dns:
            _look_names_up_in("files")
        _no_dns.append(None)


@contextmanager
def without_dns() -> Iterator[None]:
    """The same for a while."""
    disable_dns()
    try:
        yield
    finally:
        with _dns_lock:
            _no_dns.pop()
            if not _no_dns:
                _look_names_up_in(_name_services())


def _look_names_up_in(services: str) -> None:
    if configure := getattr(ctypes.CDLL(None), "__nss_configure_lookup", None):
        configure(b"hosts", services.encode())


def _name_services(path: Path = Path("/etc/nsswitch.conf")) -> str:
    """What this host's administrator wants to be asked for names, and in which order."""
    try:
        found = re.search(r"^\s*hosts:([^#\n]*)", path.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found and found[1].strip() else "dns [!UNAVAIL=return] files"


def _asked(asked: str, known: Sequence[Interface], family: int) -> Interface:
    try:
        network = ipaddress.ip_network(asked, strict=False)
    except ValueError:
        matching = [one for one in known if one.name == asked]
        matching.sort(key=lambda one: (":" in one.address) != (family == socket.AF_INET6))
    else:
        matching = [one for one in known if ipaddress.ip_address(one.address) in network]
    if not matching:
        there = ", ".join(map(str, known)) or "none"
        raise UserError(f"--interface {asked} is none of this host's interfaces: {there}", param="interface")
    return matching[0]


def _family(address: str) -> int:
    """That of a literal address; of a name, IPv4."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class _IfAddrs(ctypes.Structure):
    """struct ifaddrs, as far as it is read here."""


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("other", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]


def _read(address: int | None) -> str:
    """A struct sockaddr as text; empty for families that are not IP, and for link-local addresses of IPv6."""
    if not address:
        return ""
    (family,) = struct.unpack("H", ctypes.string_at(address, 2))
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, ctypes.string_at(address + 4, 4))
    if family == socket.AF_INET6:
        text = socket.inet_ntop(socket.AF_INET6, ctypes.string_at(address + 8, 16))
        return "" if ipaddress.ip_address(text).is_link_local else text
    return ""
