"""The child of `tpserve serve` that runs torchrun's elastic agent in-process: it starts this node's ranks and watches them.

Started as `python -m tpserve.agent` with a `Job` as JSON on stdin. Owns the ranks' lives and nothing else. It dies with the
supervisor, and its ranks die with it. Unlike torchrun it reports nothing of its own but a rank's violent death, and on
SIGTERM it asks its ranks to end, without a limit of 30 s: who has the last word is the supervisor.
Exit codes: 0 all ranks ended well, 2 a rank met something the user can mend, 1 anything else.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec
from msgspec import Struct

from tpserve.config import env
from tpserve.observe import log
from tpserve.wire.lifetime import die_with

logger = logging.getLogger("tpserve.agent")

SLOW_S = 5.0
"""Who starts all nodes at once hears nothing of waiting; who waits longer is told for whom."""


class Job(Struct, frozen=True, kw_only=True):
    """What to start. `argv`: the ranks' command line after `python -m tpserve`."""

    supervisor_pid: int
    nnodes: int
    node_rank: int
    nproc: int
    master_addr: str
    master_port: int
    run_id: str
    start_timeout_s: float
    runtime_dir: str
    log_level: str
    argv: list[str]


def main() -> int:
    """Run the ranks to their end."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    signal.signal(signal.SIGTERM, _ask_ranks_to_end)
    die_with(job.supervisor_pid)
    env.announce_agent()
    log.setup(job.log_level, f"n{job.node_rank} agent")
    if job.node_rank > 0 and not _wait_for_head(job):
        logger.error(
            "node 0 did not answer at %s port %d within %g s: check --master-addr and --master-port and that tpserve runs there",
            job.master_addr,
            job.master_port,
            job.start_timeout_s,
        )
        return 1
    return _run(job)


def _run(job: Job) -> int:
    gc.disable()  # nothing that torch makes while it is imported is garbage, and looking for it costs a sixth of the time
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gc.enable()
    if job.log_level != "debug":
        _silence("torch.distributed.elastic", "torch.distributed.launcher")
    config = LaunchConfig(
        min_nodes=job.nnodes,
        max_nodes=job.nnodes,
        nproc_per_node=job.nproc,
        logs_specs=DefaultLogsSpecs(log_dir=f"{job.runtime_dir}/agent"),
        run_id=job.run_id,
        rdzv_backend="static",
        rdzv_endpoint=f"{job.master_addr}:{job.master_port}",
        rdzv_configs={"rank": job.node_rank, "timeout": int(job.start_timeout_s)},
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGUSR2",  # none that is ever sent: SIGTERM is ours
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tpserve", *job.argv)
    except ChildFailedError as failed:
        for rank, failure in failed.failures.items():  # the others ended because of it
            if failure.exitcode < 0:
                logger.warning("rank %d was killed by %s", rank, signal.Signals(-failure.exitcode).name)
        return 2 if any(failure.exitcode == 2 for failure in failed.failures.values()) else 1
    except Exception as error:  # the edge of a process: torch names the store's troubles in many ways
        logger.error("the ranks of this node could not be started: %s", error, exc_info=job.log_level == "debug")
        return 1
    return 0


def _silence(*names: str) -> None:
    """No reports of torch's own: each of its modules sets its own logger's level, so levels above them do not reach."""
    for name, existing in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith(names) and isinstance(existing, logging.Logger):
            existing.setLevel(logging.CRITICAL + 1)


def _wait_for_head(job: Job) -> bool:
    """Wait until node 0's agent listens. torch would wait too, but silently, and deaf to signals."""
    begin_s, told = time.monotonic(), False
    while (waited_s := time.monotonic() - begin_s) < job.start_timeout_s:
        try:
            socket.create_connection((job.master_addr, job.master_port), 1.0).close()
            return True
        except OSError as error:
            if waited_s > SLOW_S and not told:
                told = True
                logger.info("waiting for node 0 at %s port %d: %s", job.master_addr, job.master_port, error)
            time.sleep(0.2)
    return False


def _ask_ranks_to_end(number: int, frame: FrameType | None) -> None:
    children = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not children:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
