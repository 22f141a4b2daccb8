"""A rank without a model: finds the frontend, says hello, comes up, answers every Add with its own prompt, leaves when told.

python fake_rank.py CONFIG_FILE HOW       HOW: serve | user-error | crash-after-up
"""

import sys
import time
from pathlib import Path

import msgspec

from tpserve.cluster.discovery import find_frontend
from tpserve.config.engine_config import EngineConfig
from tpserve.config.env import rank_env
from tpserve.errors import UserError
from tpserve.process.orders import Stopped
from tpserve.process.rank_agent import RankAgent
from tpserve.process.signals import block_signals
from tpserve.types.messages import Abort, Add, Delta, Done, EngineOutput, MemoryLedger
from tpserve.types.packed import unpack
from tpserve.wire.channels import EngineLink, wait


def main(config_file: str, how: str) -> int:
    block_signals()
    config = msgspec.json.decode(Path(config_file).read_bytes(), type=EngineConfig)
    env = rank_env()
    try:
        frontend_address = find_frontend(env, config, "127.0.0.1", 20.0)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    rank_agent = RankAgent(
        env.rank, frontend_address.control, host="here", frontend_pid=frontend_address.frontend_pid, agent_pid=env.agent_pid
    )
    rank_agent.start()
    try:
        rank_agent.hello({}, {"version": "1"}, {})
        rank_agent.wait_start(20.0)
        if how == "user-error" and env.rank == 1:
            raise UserError("no such model")
        link = EngineLink(frontend_address.engine, rank_agent.identity) if env.rank == 0 else None
        heads = {"first_head": 2 * env.rank, "end_head": 2 * env.rank + 2, "first_kv_head": env.rank, "end_kv_head": env.rank + 1}
        ledger = MemoryLedger(9, 0, 0, 0, 0, 0, 0, 8, 16, config.max_model_len)
        rank_agent.ready(ledger, {"max_model_len": config.max_model_len, "vocab_size": 320, **heads})
        rank_agent.wait_run(20.0)
        if how == "crash-after-up" and env.rank == 1:
            time.sleep(0.5)
            raise SystemExit(7)
        while rank_agent.stop is None:
            wait(1.0, rank_agent, *([link] if link else []))
            rank_agent.clear()
            if link:
                link.send(answers(link))
    except Stopped:
        pass
    except UserError as error:
        return rank_agent.fail(error)
    return rank_agent.leave()


def answers(link: EngineLink) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    for message in link.poll(0):
        match message:
            case Add(request):
                tokens = tuple(unpack(request.prompt))[: request.params.max_tokens]
                outputs += [Delta(request.id, 0, tokens), Done(request.id, "length", len(tokens))]
            case Abort(id):
                outputs.append(Done(id, "abort", 0))
    return outputs


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
