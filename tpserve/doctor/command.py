"""`tpserve doctor MODEL`: whether these machines can serve MODEL together. Takes the server's flags, and is loaded without torch.

Under torchrun this process is one of the ranks; alone, it starts the ranks of one node as `tpserve serve` would.
Exit codes: 0 nothing is broken, 1 something is, 2 what the user can mend, such as ranks that differ. (torchrun makes 1 of both.)
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from tpserve.agent import AGENT_COMMAND, AgentJob
from tpserve.cli import server_flags
from tpserve.cli.command import Command
from tpserve.config import env
from tpserve.config.resolve import num_local_ranks
from tpserve.config.schema import Flags
from tpserve.errors import UserError
from tpserve.host.resources import visible_gpus


class DoctorFlags(Struct, frozen=True, kw_only=True):
    """It has no flags of its own."""


COMMAND = Command(
    "doctor",
    "Whether these machines can serve MODEL together, and how well: versions and flags, who reaches whom, what carries the\n"
    "all-reduce and how fast it is, clocks, /dev/shm, free memory, the disk. Takes the flags of `tpserve serve`. On several\n"
    "nodes start it as the server is started: `torchrun --nnodes 2 --node_rank N --nproc_per_node 8 --master_addr HEAD -m\n"
    "tpserve doctor MODEL ...` on each. Exit code 0 when nothing is broken, 1 when something is, 2 for what you can mend.",
    DoctorFlags,
    takes_server_flags=True,
)


def run(argv: Sequence[str]) -> int:
    """Examine; returns the exit code. Raises UserError, or HelpWanted."""
    rest = COMMAND.parse(argv).rest
    if not env.under_torchrun():
        flags, notice = server_flags.read_line(rest, env.overrides())
        if notice:
            sys.stderr.write(f"tpserve doctor: {notice}\n")
        return _run_locally(flags)
    from tpserve.doctor.rank import examine

    return examine(env.rank_env(), rest)


def _run_locally(flags: Flags) -> int:
    """Start the ranks of one node."""
    if flags.nnodes > 1:
        rest = shlex.join(server_flags.to_argv(flags))
        raise UserError(
            f"`tpserve doctor` starts one node only: on each node run `torchrun --nnodes {flags.nnodes} --node_rank N "
            f"--nproc_per_node RANKS --master_addr {flags.master_addr or 'HEAD'} -m tpserve doctor {rest}`",
            param="nnodes",
        )
    nproc = num_local_ranks(flags, visible_gpus())
    with tempfile.TemporaryDirectory(prefix="tpserve-doctor-") as directory:
        job = AgentJob(
            supervisor_pid=os.getpid(),
            nproc=nproc,
            world_size=nproc,
            start_timeout_s=flags.start_timeout,
            runtime_dir=directory,
            log_level="error",
            argv=["doctor", *server_flags.to_argv(flags)],
        )

        environ = env.for_ranks(directory, quiet=True)
        return subprocess.run(AGENT_COMMAND, input=msgspec.json.encode(job), env=environ, check=False).returncode
