"""The frame of tpserve without a model: ranks that form a mesh and add numbers, a frontend that only owns the epoch.

    python skeleton.py rank                                              under a torchrun agent with --max-restarts
    python skeleton.py frontend RUNTIME_DIR WATCH_PID WORLD_SIZE ADDRESS

Unlike the server of today this one survives: on a fault the coordinator goes back to FORMING, killed ranks are started again by
their agent, and ranks whose collective failed leave the mesh and take part in the next epoch as a new incarnation. What happens
is appended to RUNTIME_DIR.events, one JSON object a line.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from tpserve.cluster.discovery import (
    FrontendAddress,
    FrontendRecord,
    acquire_lock,
    find_remote_frontend,
    publish_frontend,
    remove_runtime_dir,
    runtime_dir,
    wait_ready,
    write_frontend,
)
from tpserve.config.env import RankEnv, rank_env
from tpserve.coordinator.coordinator import Action, Coordinator, EpochFailed, EpochFinished, EpochState
from tpserve.coordinator.rank_monitor import RankMonitor
from tpserve.errors import EngineFailure
from tpserve.host.network import LOOPBACK
from tpserve.process.orders import Stopped
from tpserve.process.process_utils import open_pidfd
from tpserve.process.rank_agent import RankAgent
from tpserve.process.signals import SIGNALS, block_signals
from tpserve.wire.channels import TcpEndpoint, tcp
from tpserve.wire.curve import FRONTEND, Keyring, ZapAuthenticator

WAIT_S = 60.0


def rank_main() -> int:
    """Take part in epoch after epoch until told to stop."""
    block_signals()
    env = rank_env()
    frontend_address: FrontendAddress | None = None
    if env.node_rank == 0:
        where = runtime_dir(env)
        record = wait_ready(where, None, WAIT_S)
        keyring = None if record.remote is None else record.remote.keyring(None)
        frontend_address = FrontendAddress(record.control, LOOPBACK, keyring, record.remote, "", record.pid, where)
    from tests.crash.mesh_rank import agent_store, take_part  # torch comes only now

    if env.nnodes > 1 and (frontend_address is None or env.rank == 0):
        store = agent_store(env.master_addr, env.master_port, env.rank, env.use_agent_store, WAIT_S)
        if frontend_address is None:
            frontend_address = find_remote_frontend(env, store, LOOPBACK, WAIT_S)
        else:
            publish_frontend(env, frontend_address, store)
    assert frontend_address is not None
    while True:
        rank_agent = begin(env, frontend_address)
        try:
            take_part(env, rank_agent, frontend_address, WAIT_S)
        except Stopped as stopped:
            rank_agent.close()
            return stopped.code
        except (RuntimeError, EngineFailure):
            if rank_agent.stop is not None:
                return rank_agent.leave()
            rank_agent.close()


def begin(env: RankEnv, frontend_address: FrontendAddress) -> RankAgent:
    """A new incarnation of this rank."""
    rank_agent = RankAgent(
        env.rank,
        frontend_address.control,
        host=f"node{env.node_rank}",
        curve_client=frontend_address.curve_client(env.rank, FRONTEND),
        frontend_pid=frontend_address.frontend_pid,
        agent_pid=env.agent_pid,
        local_ranks=env.local_world_size,
    )
    rank_agent.start()
    return rank_agent


async def frontend_main(where: Path, watch_pid: int, world_size: int, address: str) -> int:
    """Own the epoch until a signal ends it, or the process `watch_pid` has ended."""
    held = acquire_lock(where)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_action(action: Action) -> None:
        if isinstance(action, EpochFailed | EpochFinished):
            ended.set_result(action.code if isinstance(action, EpochFailed) else 0)

    coordinator = Coordinator(world_size, time.monotonic(), survive=True, form_timeout_s=120.0)
    keyring = Keyring.open(None)
    curve_server = keyring.curve_server(FRONTEND, world_size)
    zap_authenticator = ZapAuthenticator(curve_server.allowed)
    rank_monitor = RankMonitor(
        coordinator, f"ipc://{where}/control", TcpEndpoint(tcp(address), curve_server) if address else None, on_action
    )
    connect_info = keyring.connect_info(rank_monitor.remote_endpoint, with_secret=True) if address else None
    write_frontend(where, FrontendRecord(os.getpid(), rank_monitor.local_endpoint, connect_info))

    def drain() -> None:
        rank_monitor.perform(coordinator.drain(time.monotonic()))
        rank_monitor.perform(coordinator.drained(time.monotonic()))

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, drain)
    watched = open_pidfd(watch_pid)
    assert watched is not None
    loop.add_reader(watched, lambda: rank_monitor.perform(coordinator.fail(1, "the harness is gone", time.monotonic())))
    tasks = [loop.create_task(rank_monitor.run()), loop.create_task(note(coordinator, Path(f"{where}.events")))]
    await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
    code = ended.result()
    if not await rank_monitor.wait_exited(5.0):
        rank_monitor.kill()
        code = code or 3
    for task in tasks:
        task.cancel()
    loop.remove_reader(watched)
    zap_authenticator.close()
    rank_monitor.close()
    remove_runtime_dir(where)
    os.close(held)
    return code


async def note(coordinator: Coordinator, path: Path) -> None:
    """Write down every change of state, with the processes that take part."""
    said: tuple[EpochState, int] | None = None
    with path.open("a") as out:
        while True:
            if said != (coordinator.state, coordinator.epoch):
                said = (coordinator.state, coordinator.epoch)
                event = {"s": time.monotonic(), "state": said[0].value, "epoch": said[1], "reason": coordinator.reason}
                event["pids"] = [hello.pid for hello in coordinator.hellos]
                out.write(json.dumps(event) + "\n")
                out.flush()
            await asyncio.sleep(0.005)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        code = rank_main()
        os._exit(code)  # a mesh of which a part has died may hang in its destructors
    sys.exit(asyncio.run(frontend_main(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))
