"""`tpserve doctor MODEL`: checks whether these machines can serve MODEL together. Takes the server's flags. Never imports torch.

Under torchrun this process is one of the ranks. Without it, this process starts the ranks of one node as `tpserve serve` does.
Exit codes: 0 nothing is broken, 1 something is broken, 2 a mistake, such as ranks that differ. (torchrun turns 2 into 1.)
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from tpserve.agent.job import AGENT_COMMAND, AgentJob
from tpserve.cli import server_flags
from tpserve.cli.command import Command
from tpserve.config import env
from tpserve.config.flags import Flags
from tpserve.config.resolve import num_local_ranks
from tpserve.errors import UserError
from tpserve.host.resources import visible_gpus


class DoctorFlags(Struct, frozen=True, kw_only=True):
    """The command has no flags of its own."""


COMMAND = Command(
    "doctor",
    "Checks whether these machines can serve MODEL together, and how well: versions and flags, connections between all ranks,\n"
    "transport and speed of the all-reduce, clocks, /dev/shm, memory, the disk. Takes the flags of `tpserve serve`. On several\n"
    "nodes start it as the server is started: `torchrun --nnodes 2 --node_rank N --nproc_per_node 8 --master_addr HEAD -m\n"
    "tpserve doctor MODEL ...` on each. Exit code 0 when nothing is broken, 1 when something is, 2 for a mistake.",
    DoctorFlags,
    takes_server_flags=True,
)


def run(argv: Sequence[str]) -> int:
    """Run all checks; returns the exit code. Raises UserError, or HelpWanted."""
    server_argv = COMMAND.parse(argv).rest
    if not env.under_torchrun():
        flags, note = server_flags.read_line(server_argv, env.overrides())
        if note:
            sys.stderr.write(f"tpserve doctor: {note}\n")
        return _run_locally(flags)
    from tpserve.doctor.rank import run_rank

    return run_rank(env.rank_env(), server_argv)


def _run_locally(flags: Flags) -> int:
    """Start the ranks of one node and wait for them; returns the exit code."""
    if flags.nnodes > 1:
        arguments = shlex.join(server_flags.to_argv(flags))
        raise UserError(
            f"`tpserve doctor` starts one node only: on each node run `torchrun --nnodes {flags.nnodes} --node_rank N "
            f"--nproc_per_node RANKS --master_addr {flags.master_addr or 'HEAD'} -m tpserve doctor {arguments}`",
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
            restart=False,
        )
        environ = env.for_ranks(directory, quiet=True)
        return subprocess.run(AGENT_COMMAND, input=msgspec.json.encode(job), env=environ, check=False).returncode
