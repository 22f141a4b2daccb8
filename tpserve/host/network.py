"""This host's network: the interface that the cluster uses (ZeroMQ, gloo and NCCL alike), listening sockets, name look-ups.

Without `--interface` the cluster uses the interface with the route to the master address; on a single node it is loopback.
"""

import ctypes
import errno
import ipaddress
import os
import re
import socket
import ssl
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
    """An interface and the address on it that other nodes use. `name` is empty when it is unknown."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        return ipaddress.ip_address(self.address).is_loopback

    def __str__(self) -> str:
        return f"{self.name} ({self.address})" if self.name else self.address


def choose_interface(requested: str | None, nnodes: int, master_addr: str) -> Interface:
    """This host's interface for a job of `nnodes`. `requested`: a name, a network such as 10.0.0.0/24, an address, or None.

    Raises UserError when there is no such interface, or no route to the master.
    """
    known = interfaces()
    if requested is not None:
        return _match_interface(requested, known, _family(master_addr) if nnodes > 1 else socket.AF_INET)
    address = LOOPBACK if nnodes == 1 else route_to(master_addr)
    return next((one for one in known if one.address == address), Interface("", address))


def route_to(master_addr: str) -> str:
    """This host's address on the interface with the route to the master. Raises UserError without a route."""
    try:
        routes = socket.getaddrinfo(master_addr, 9, type=socket.SOCK_DGRAM)
        family, kind, proto, _, target = min(routes, key=lambda route: route[0] != socket.AF_INET)  # prefer IPv4
        with socket.socket(family, kind, proto) as probe:
            probe.connect(target)  # on a datagram socket this chooses the route and sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"no route to the master address {master_addr}: {error.strerror}", param="master_addr") from error


def host_id() -> str:
    """An id of the kernel and the network namespace, equal for processes that share both. Empty if it cannot be read."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return ""


def interfaces() -> list[Interface]:
    """Every address of every interface that is up, in the kernel's order, without IPv6 link-local addresses."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(first)):
        return []
    found, at = [], first
    while at:
        entry = at.contents
        if entry.flags & _UP and (address := _sockaddr_text(entry.address)):
            found.append(Interface(entry.name.decode(), address))
        at = entry.next
    libc.freeifaddrs(first)
    return found


def kernel_ports() -> str:
    """The range from which the kernel chooses ports, such as "32768-60999", for IPv4 and IPv6."""
    try:
        return "-".join(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except OSError:
        return "unknown"


def listen(address: str, ports: tuple[int, int] = (0, 0)) -> socket.socket:
    """Listen on the first free port of `ports` (inclusive); (0, 0): any free port. Raises UserError when none is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    last_error: OSError | None = None
    for port in range(ports[0], ports[1] + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            last_error = error
            continue
        return listener
    assert last_error is not None
    where = host_port(address, ports[0]) if ports[0] == ports[1] else f"{address} ports {ports[0]}-{ports[1]}"
    param = "port_range" if ports[1] > ports[0] else "master_port"
    raise UserError(f"cannot listen at {where}: {os_error_text(last_error)}", param=param)


def listen_http(host: str, port: int) -> socket.socket:
    """Open the HTTP port, so that clients can connect from the start. UserError when it is in use or `host` is not local."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, proto)
    except socket.gaierror as error:
        raise UserError(f"--host {host} is no address of this machine: {error.strerror}", param="host") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} on {host} is in use: choose another with --port", param="port") from error
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror}", param="port") from error
    return listener


def host_port(address: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def os_error_text(error: OSError) -> str:
    """The text of an OSError with its errno (negative for errors of name look-ups)."""
    if error.errno is None:  # a timeout from Python itself
        error = OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return f"{error.strerror} (errno {error.errno})"


def unreachable_text(url: str, error: Exception) -> str:
    """Why no server answers at `url`, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {url} is not trusted: {error.verify_message}; SSL_CERT_FILE=FILE names one to trust"
    reason = os_error_text(error) if isinstance(error, OSError) else str(error) or type(error).__name__
    return f"no server answers at {url}: {reason}; give its address with --url"


_no_dns: list[None] = []
"""One entry for each caller that has disabled DNS."""
_dns_lock = threading.Lock()


def disable_dns() -> None:
    """Resolve names in this process only from /etc/hosts, so that a DNS server that does not answer blocks nothing.

    For libraries that look a name up only to log it. Has no effect with a C library other than glibc.
    """
    with _dns_lock:
        if not _no_dns:
            _set_name_services("files")
        _no_dns.append(None)


@contextmanager
def without_dns() -> Iterator[None]:
    """`disable_dns` for the duration of a with block."""
    disable_dns()
    try:
        yield
    finally:
        with _dns_lock:
            _no_dns.pop()
            if not _no_dns:
                _set_name_services(_name_services())


def _set_name_services(services: str) -> None:
    if configure := getattr(ctypes.CDLL(None), "__nss_configure_lookup", None):
        configure(b"hosts", services.encode())


def _name_services(path: Path = Path("/etc/nsswitch.conf")) -> str:
    """This host's configured name services, in order; glibc's default if there are none."""
    try:
        found = re.search(r"^\s*hosts:([^#\n]*)", path.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found and found[1].strip() else "dns [!UNAVAIL=return] files"


def _match_interface(requested: str, known: Sequence[Interface], family: int) -> Interface:
    """The interface of this name, network or address; of several addresses one of `family` if possible. Raises UserError."""
    try:
        network = ipaddress.ip_network(requested, strict=False)
    except ValueError:
        matching = [one for one in known if one.name == requested]
        matching.sort(key=lambda one: (":" in one.address) != (family == socket.AF_INET6))
    else:
        matching = [one for one in known if ipaddress.ip_address(one.address) in network]
    if not matching:
        existing = ", ".join(map(str, known)) or "none"
        raise UserError(f"--interface {requested} is none of this host's interfaces: {existing}", param="interface")
    return matching[0]


def _family(address: str) -> int:
    """The family of a literal address; IPv4 for a name."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class _IfAddrs(ctypes.Structure):
    """struct ifaddrs of getifaddrs(3)."""


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
    ("other", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
]


def _sockaddr_text(address: int | None) -> str:
    """A struct sockaddr as text; empty for families other than IP, and for IPv6 link-local addresses."""
    if not address:
        return ""
    (family,) = struct.unpack("H", ctypes.string_at(address, 2))
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, ctypes.string_at(address + 4, 4))
    if family == socket.AF_INET6:
        text = socket.inet_ntop(socket.AF_INET6, ctypes.string_at(address + 8, 16))
        return "" if ipaddress.ip_address(text).is_link_local else text
    return ""
