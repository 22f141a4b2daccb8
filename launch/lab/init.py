"""The first process of a lab host. When it ends, the kernel kills all processes of the host and removes its namespaces.

Started as `unshare ... python init.py tpserve-lab:NAME:NETWORK:INDEX HOSTNAME` with the host's /etc/hosts on stdin. Sets the host
name, loopback, /dev/shm and /etc/hosts, then reaps orphaned processes. Never touches a network other than loopback.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SHM_BYTES = 256 << 20


def main() -> None:
    """Set up the host, then reap orphans until killed."""
    hostname, hosts = sys.argv[2], sys.stdin.read()
    socket.sethostname(hostname)
    for command in (
        ["ip", "link", "set", "lo", "up"],
        ["mount", "-t", "tmpfs", "-o", f"size={SHM_BYTES}", "tmpfs", "/dev/shm"],
    ):
        subprocess.run(command, check=True)
    own = Path("/dev/shm/hosts")
    own.write_text(hosts)
    subprocess.run(["mount", "--bind", str(own), "/etc/hosts"], check=True)
    own.unlink()  # the bind mount keeps the file
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    os.close(1)
    while True:
        signal.sigwait([signal.SIGCHLD])
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue


if __name__ == "__main__":
    main()
