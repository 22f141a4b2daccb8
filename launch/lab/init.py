"""The first process of a lab host, and what its namespaces live by: when it dies, the kernel ends all that runs in the host.

Started as `unshare ... python init.py tpserve-lab:NAME:NETWORK:INDEX HOSTNAME` with the host's /etc/hosts on stdin. Gives the
host its name, loopback, /dev/shm and /etc/hosts, then does nothing but bury the dead. Never touches a network but loopback.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SHM_BYTES = 256 << 20


def main() -> None:
    """Set up, then reap for ever."""
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
    own.unlink()  # the mount keeps it
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
