"""`tpserve report`: writes one JSON file for a ticket, without secrets.

made, by      time and tpserve version of the report
url, error    the server's URL, and why it could not be reached
status        the output of `tpserve status`; read it first
server        /readyz, /server_info (resolved flags, layout, every rank's fingerprint, first and last log lines), /metrics
here          the host of the report: system, packages, GPUs, memory, variables of NCCL and gloo
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

from tpserve.admin.client import Unreachable, fetch_facts
from tpserve.admin.redact import is_secret, redact
from tpserve.admin.status import status_lines
from tpserve.cli.command import Command
from tpserve.cli.server_url import URL, server_url
from tpserve.config import env
from tpserve.config.flags import Flag
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
    """The flags of `tpserve report`."""

    url: Annotated[str, Flag("Server", "Where the server answers HTTP.", parse=server_url, metavar="URL")] = URL
    output: Annotated[
        Path | None, Flag("Output", "Where to write. Default: tpserve-report-DATE-TIME.json in this directory.")
    ] = None


COMMAND = Command(
    "report",
    "One file for a ticket: versions, resolved flags, every rank's fingerprint, the layout, the first and last lines of the\n"
    "server's log, and this host. Keys, tokens and secrets are taken out. Where the server has an admin key,\n"
    "set TPSERVE_ADMIN_API_KEY. Without a server the file describes only this host.",
    ReportFlags,
)


def run(argv: Sequence[str]) -> int:
    """Write the report; returns the exit code. Raises UserError, or HelpWanted."""
    flags = COMMAND.parse(argv).flags
    now = datetime.datetime.now().astimezone()
    output = flags.output or Path(f"tpserve-report-{now:%Y%m%d-%H%M%S}.json")
    found = report(flags.url) | {"made": now.isoformat(timespec="seconds"), "by": f"tpserve {__version__}"}
    try:
        output.write_text(json.dumps(redact(found, env.values(is_secret)), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}", param="output") from error
    about = f" about this host only ({found['error']})" if "error" in found else ""
    sys.stdout.write(f"wrote {output}{about}: read it before you share it\n")
    return 0


def report(url: str) -> dict[str, Any]:
    """The report's content, secrets included. Raises UserError when the server answers but refuses."""
    here = _here()
    try:
        facts = fetch_facts(url)
    except Unreachable as error:
        return {"url": url, "error": str(error), "here": here}
    server = {"readyz": facts.ready, "server_info": facts.info, "metrics": facts.metrics.splitlines()}
    return {"url": url, "status": status_lines(facts), "server": server, "here": here}


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
