"""`tpserve report`: one file of JSON for a ticket, in which nothing is secret.

made, by      when, and by which version
url, error    the server that was asked; why it did not tell
status        the page of `tpserve status`, to be read first
server        /readyz, /server_info (resolved flags, layout, every rank's fingerprint, first and last log lines), /metrics
here          the host that asked: system, packages, GPUs, memory, what is set for NCCL and gloo
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Struct

from tpserve.admin.client import Unreachable, ask
from tpserve.admin.redact import is_secret, redacted
from tpserve.admin.status import page
from tpserve.cli.command import Command
from tpserve.cli.server_url import URL, server_url
from tpserve.config import env
from tpserve.config.schema import Flag
from tpserve.errors import UserError
from tpserve.host import resources
from tpserve.host.network import interfaces
from tpserve.version import __version__

PACKAGES = ("torch", "triton", "tpserve", "safetensors", "tokenizers", "pyzmq", "msgspec", "aiohttp", "uvloop", "numpy")
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,memory.used,temperature.gpu,mig.mode.current",
    "--format=csv",
)
NVIDIA_SMI_S = 10.0


class ReportFlags(Struct, frozen=True, kw_only=True):
    """The flags."""

    url: Annotated[str, Flag("Server", "Where the server answers HTTP.", parse=server_url, metavar="URL")] = URL
    output: Annotated[
        Path | None, Flag("Output", "Where to write. Default: tpserve-report-DATE-TIME.json in this directory.")
    ] = None


COMMAND = Command(
    "report",
    "One file for a ticket: versions, resolved flags, every rank's fingerprint, the layout, the first and last lines of the\n"
    "server's log, and this host. Keys, tokens and secrets are taken out. Where the server has an admin key,\n"
    "TPSERVE_ADMIN_API_KEY must be that; without a server the file tells of this host alone.",
    ReportFlags,
)


def run(argv: Sequence[str]) -> int:
    """Write it; returns the exit code. Raises UserError, or HelpWanted."""
    flags = COMMAND.parse(argv).flags
    now = datetime.datetime.now().astimezone()
    output = flags.output or Path(f"tpserve-report-{now:%Y%m%d-%H%M%S}.json")
    found = report(flags.url) | {"made": now.isoformat(timespec="seconds"), "by": f"tpserve {__version__}"}
    try:
        output.write_text(json.dumps(redacted(found, env.values(is_secret)), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}", param="output") from error
    about = f" of this host alone ({found['error']})" if "error" in found else ""
    sys.stdout.write(f"wrote {output}{about}: look through it before you pass it on\n")
    return 0


def report(url: str) -> dict[str, Any]:
    """What it says, secrets and all. UserError when there is a server that will not tell."""
    here = _here()
    try:
        facts = ask(url)
    except Unreachable as error:
        return {"url": url, "error": str(error), "here": here}
    server = {"readyz": facts.ready, "server_info": facts.info, "metrics": facts.metrics.splitlines()}
    return {"url": url, "status": page(facts), "server": server, "here": here}


def _here() -> dict[str, Any]:
    memory = resources.available_memory()
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "python": sys.version,
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": resources.available_cores(),
        "memory": {"free": memory.free, "total": memory.total, "of": memory.of},
        "visible_gpus": resources.visible_gpus(),
        "nvidia_smi": _nvidia_smi(),
        "interfaces": list(map(str, interfaces())),
        "nccl_and_gloo": env.network_variables(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> list[str] | str:
    try:
        return subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
