"""The frame of the house without a model: ranks that form a mesh and add numbers, a frontend that only owns the epoch.

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

from tpserve.config.env import RankEnv, rank_env
from tpserve.errors import EngineFailure
from tpserve.frontend.coordinator import Action, Coordinator, Failed, Finished, State
from tpserve.frontend.ranks import Ranks
from tpserve.host.network import LOOPBACK
from tpserve.wire.attach import (
    Attachment,
    Frontend,
    attach_remote,
    hold_lock,
    publish,
    remove_runtime_dir,
    runtime_dir,
    wait_ready,
    write,
)
from tpserve.wire.auth import FRONTEND, Doorkeeper, Keyring
from tpserve.wire.channels import Door, tcp
from tpserve.wire.control import Control
from tpserve.wire.lifetime import open_pidfd
from tpserve.wire.orders import Stopped
from tpserve.wire.signals import SIGNALS, block_signals

WAIT_S = 60.0


def rank_main() -> int:
    """Take part in epoch after epoch until told to stop."""
    block_signals()
    env = rank_env()
    found: Attachment | None = None
    if env.node_rank == 0:
        where = runtime_dir(env)
        record = wait_ready(where, None, WAIT_S)
        keyring = None if record.remote is None else record.remote.accept(None)
        found = Attachment(record.control, LOOPBACK, keyring, record.remote, "", record.pid, where)
    from tests.crash.mesh_rank import agent_store, take_part  # torch comes only now

    if env.nnodes > 1 and (found is None or env.rank == 0):
        store = agent_store(env.master_addr, env.master_port, env.rank, env.use_agent_store, WAIT_S)
        if found is None:
            found = attach_remote(env, store, LOOPBACK, WAIT_S)
        else:
            publish(env, found, store)
    assert found is not None
    while True:
        control = begin(env, found)
        try:
            take_part(env, control, found, WAIT_S)
        except Stopped as stopped:
            control.close()
            return stopped.code
        except (RuntimeError, EngineFailure):
            if control.stop is not None:
                return control.leave()
            control.close()


def begin(env: RankEnv, found: Attachment) -> Control:
    """A new incarnation of this rank."""
    control = Control(
        env.rank,
        found.control,
        host=f"node{env.node_rank}",
        key=found.key(env.rank, FRONTEND),
        frontend_pid=found.frontend_pid,
        agent_pid=env.agent_pid,
        local_ranks=env.local_world_size,
    )
    control.start()
    return control


async def frontend_main(where: Path, watch_pid: int, world_size: int, address: str) -> int:
    """Own the epoch until a signal ends it, or the process `watch_pid` has ended."""
    held = hold_lock(where)
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_action(action: Action) -> None:
        if isinstance(action, Failed | Finished):
            ended.set_result(action.code if isinstance(action, Failed) else 0)

    coordinator = Coordinator(world_size, time.monotonic(), survive=True, form_timeout_s=120.0)
    keyring = Keyring.open(None)
    lock = keyring.lock(FRONTEND, world_size)
    doorkeeper = Doorkeeper(lock.allowed)
    ranks = Ranks(coordinator, f"ipc://{where}/control", Door(tcp(address), lock) if address else None, on_action)
    invitation = keyring.invitation(ranks.remote_endpoint, with_secret=True) if address else None
    write(where, Frontend(os.getpid(), ranks.local_endpoint, invitation))

    def drain() -> None:
        ranks.carry_out(coordinator.drain(time.monotonic()))
        ranks.carry_out(coordinator.drained(time.monotonic()))

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, drain)
    watched = open_pidfd(watch_pid)
    assert watched is not None
    loop.add_reader(watched, lambda: ranks.carry_out(coordinator.fail(1, "the harness is gone", time.monotonic())))
    tasks = [loop.create_task(ranks.run()), loop.create_task(note(coordinator, Path(f"{where}.events")))]
    await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
    code = ended.result()
    if not await ranks.all_gone(5.0):
        ranks.kill()
        code = code or 3
    for task in tasks:
        task.cancel()
    loop.remove_reader(watched)
    doorkeeper.close()
    ranks.close()
    remove_runtime_dir(where)
    os.close(held)
    return code


async def note(coordinator: Coordinator, path: Path) -> None:
    """Write down every change of state, with the processes that take part."""
    said: tuple[State, int] | None = None
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
