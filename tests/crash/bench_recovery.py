"""How long streams pause when a process is killed.

    python -m tests.crash.bench_recovery [--kills 40] [--streams 16] [-- MODEL AND FLAGS OF tpserve serve]

Serves at TP 2 and keeps `--streams` streams open, without an end; kills rank 0, rank 1 and the agent in turn, and takes for each
kill the longest time that any of the streams got nothing. Prints the best, the median, the 99th percentile and the worst; "epoch"
is the time from the fault to the next epoch, of all kills.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from tests.crash.chaos import agent, supervisor
from tests.server import Server, children, free_port, rank_of, running, serve

LENGTH = 300
"""Tokens of each answer. Their context has to be computed again after each kill, which is most of the pause with long ones."""
PAUSE_S = 3.2
"""Streams run undisturbed for so long before each kill."""


class Gaps:
    """The longest time without a token on any stream, since `reset`."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    def reset(self) -> None:
        self.worst_s = 0.0


async def stream(session: aiohttp.ClientSession, url: str, seed: int, gaps: Gaps) -> None:
    """One stream after the other, for ever."""
    body = {"prompt": f"Story {seed}", "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0.8, "stream": True}
    while True:
        seed += 1000
        async with session.post(f"{url}/v1/completions", json=body | {"seed": seed}) as response:
            last_s = time.monotonic()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    assert "error" not in json.loads(line[6:]), line
                    now_s = time.monotonic()
                    gaps.worst_s, last_s = max(gaps.worst_s, now_s - last_s), now_s


def target(server: Server, what: str) -> int:
    """The process to kill."""
    of_agent = agent(server, None)  # type: ignore[arg-type]
    assert of_agent is not None
    if what == "agent":
        return of_agent
    return next(child for child in children(of_agent) if rank_of(child) == int(what.removeprefix("rank ")))


async def measure(server: Server, kills: int, streams: int) -> dict[str, list[float]]:
    """The longest gap for each kill, by what was killed."""
    gaps, found = Gaps(), dict[str, list[float]]()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None)) as session:
        clients = [asyncio.create_task(stream(session, server.url, seed, gaps)) for seed in range(streams)]
        await asyncio.sleep(3 * PAUSE_S)
        for number in range(kills):
            what = ("rank 1", "rank 0", "rank 1", "agent")[number % 4]
            gaps.reset()
            os.kill(target(server, what), signal.SIGKILL)
            await asyncio.sleep(0.2)
            while (await asyncio.to_thread(server.get, "/readyz"))[0] != 200:
                await asyncio.sleep(0.05)
            await asyncio.sleep(PAUSE_S)
            found.setdefault("agent" if what == "agent" else "rank", []).append(gaps.worst_s)
            assert not [client for client in clients if client.done()], "a stream has ended with an error"
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return found


def main() -> None:
    arguments = sys.argv[1:]
    flags = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--streams", type=int, default=16)
    options = parser.parse_args(arguments[: len(arguments) - len(flags) - bool(flags)])
    port = free_port()
    with tempfile.TemporaryDirectory() as place:
        command = serve(*flags, "--nproc-per-node", "2", port=port)
        with running([command], port, Path(place) / "log") as server:
            assert supervisor(server)
            found = asyncio.run(measure(server, options.kills, options.streams))
            found["epoch"] = [float(took) for took in re.findall(r"recovered in ([\d.]+) s", server.log)]
    sys.stdout.write(f"{'killed':<8}{'kills':>6}{'best':>8}{'median':>8}{'p99':>8}{'worst':>8}  seconds\n")
    for what, gaps_s in found.items():
        ordered = sorted(gaps_s)
        p99 = ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
        row = (ordered[0], statistics.median(ordered), p99, ordered[-1])
        sys.stdout.write(f"{what:<8}{len(ordered):>6}" + "".join(f"{value:>8.2f}" for value in row) + "\n")


if __name__ == "__main__":
    main()
