"""What an agent has to do, as its parent writes it to the agent's stdin in JSON."""

import sys
import uuid

from msgspec import Struct, field

from tpserve.host.network import LOOPBACK

AGENT_MODULE = "tpserve.agent.__main__"
"""The program of an agent that a forkserver forks."""
AGENT_COMMAND = (sys.executable, "-m", "tpserve.agent")
"""The command of an agent without a forkserver: it imports torch first, and forks its ranks itself."""
RANK_MODULE = "tpserve.__main__"


class AgentJob(Struct, frozen=True, kw_only=True):
    """What to start; the defaults are those of a single node. `argv`: the ranks' command line after `python -m tpserve`."""

    supervisor_pid: int
    monitor_supervisor: bool = False
    """Also kill the supervisor when it is stopped. Not set for a script or a command at a terminal."""
    nnodes: int = 1
    node_rank: int = 0
    nproc: int
    master_addr: str = LOOPBACK
    master_port: int = 0
    listener: int = -1
    """On node 0 of several, the descriptor of the socket to which the other nodes connect; else -1."""
    configuration: int = -1
    """The descriptor of the memory with the flags of the last reload (`process/node_configuration`); -1 without reloads."""
    address: str = LOOPBACK
    """This node's address, as other nodes use it."""
    address_derived: bool = True
    """The address comes from the route to the master, not from --interface."""
    rendezvous_key: str = ""
    """Key derived from the cluster's secret file, in hexadecimal; empty without a file."""
    port_range: tuple[int, int] = (0, 0)
    world_size: int
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    start_timeout_s: float
    began_s: float | None = None
    """Since when the start of this node takes, a time of `time.monotonic`; the agent's own start by default."""
    recovery_timeout_s: float = 0.0
    """How long another node waits for node 0 when it has lost it. Used with several nodes only."""
    runtime_dir: str
    log_level: str
    argv: list[str]
    module: str = RANK_MODULE
    """The module whose `main(argv)` is a rank."""
    restart: bool = True
    """Start a rank again that died. Without it every end but exit code 0 ends all ranks."""
    restarts: int = 0
    """How many agents of this node were killed before: the ranks of this one count their restarts from here."""
    last_exit: str = ""
    """How the agent before this one ended, for the ranks' TPSERVE_LAST_EXIT; empty for the first."""
