"""The scripts of a torchrun job among themselves: who comes late, who asks again, and what an end tells."""

import asyncio
from pathlib import Path

from tpserve.errors import UserError
from tpserve.llm.rpc_server import RpcConnection, RpcError, RpcReply, RpcServer, rpc_error


async def heard(rpc_server: RpcServer, connection: RpcConnection, call: int) -> RpcReply | RpcError | None:
    """Ask once, let rank 0 read, and hear."""
    connection.poll(call)
    for _ in range(50):
        rpc_server.read()
        if (message := connection.receive(call)) is not None:
            return message
        await asyncio.sleep(0.01)
    return None


def test_calls_are_numbered_and_kept_until_all_have_them(tmp_path: Path) -> None:
    async def scene() -> None:
        rpc_server = RpcServer(2, f"ipc://{tmp_path}/callers", None)
        one, two = (RpcConnection(rank, f"ipc://{tmp_path}/callers") for rank in (1, 2))
        rpc_server.reply(RpcReply(0, []))  # before anybody has come
        rpc_server.reply(rpc_error(1, UserError("no")))
        assert await heard(rpc_server, one, 0) == RpcReply(0, [])
        assert await heard(rpc_server, one, 0) == RpcReply(0, []), "who missed it asks again"
        assert await heard(rpc_server, one, 1) == RpcError(1, "user", "no")
        assert await heard(rpc_server, two, 0) == RpcReply(0, []), "the slower one finds all of them"
        assert await heard(rpc_server, two, 1) == RpcError(1, "user", "no")
        one.poll(2)
        two.poll(2)
        await rpc_server.wait_delivered(2.0)
        rpc_server.end("engine", "rank 1 is dead")
        for connection in (one, two):
            assert connection.receive(2) == RpcError(2, "engine", "rank 1 is dead"), "who waits is told"
            assert await heard(rpc_server, connection, 3) == RpcError(3, "engine", "rank 1 is dead")
        one.leave("closed")
        while rpc_server.first_close is None:
            rpc_server.read()
        assert (rpc_server.first_close.rank, rpc_server.first_close.text) == (1, "closed")
        for end in (rpc_server, one, two):
            end.close()

    asyncio.run(asyncio.wait_for(scene(), 20))
