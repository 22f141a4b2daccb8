"""A host whose DNS server never answers, and whose own name nobody knows: run in it what must start all the same.

    unshare --net --mount --uts ... python silent_dns.py QUESTIONS COMMAND...   in namespaces of its own, then the command
    silence(QUESTIONS)                                                          in namespaces that are there (a lab host)

A real resolver asks a real server, which notes the questions in the file QUESTIONS and says nothing: each costs ten seconds.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SERVER = "127.9.9.53"
HOSTS = "127.0.0.1 localhost\n"
ALONE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


def refusal() -> str | None:
    """Why this machine cannot have such a host; None when it can."""
    if os.geteuid():
        return "needs root: it makes network and mount namespaces"
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "needs unshare and ip (apt-get install -y iproute2 util-linux)"
    done = subprocess.run([*ALONE, "true"], capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


def command(questions: Path, *words: str) -> list[str]:
    """What runs `words` on such a host."""
    questions.touch()
    return [*ALONE, sys.executable, __file__, str(questions), *words]


def silence(questions: str) -> None:
    """Make this process's namespaces such a host's, but for /etc/hosts."""
    put("/etc/resolv.conf", f"nameserver {SERVER}\n")
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((SERVER, 53))
    if os.fork() == 0:  # it ends with the process namespace
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        with Path(questions).open("ab", buffering=0) as noted:
            while True:
                noted.write(server.recv(4096)[12:].split(b"\0")[0] + b"\n")


def put(target: str, text: str) -> None:
    """In this mount namespace a file has this content."""
    with tempfile.NamedTemporaryFile("w", delete=False) as file:
        file.write(text)
    subprocess.run(["mount", "--bind", file.name, target], check=True)
    Path(file.name).unlink()  # the mount keeps it


def main() -> None:
    """Become such a host, then run the command."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    socket.sethostname("airgapped")
    put("/etc/hosts", HOSTS)
    silence(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
