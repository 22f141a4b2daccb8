"""`tpserve status`: a server's nodes, ranks, GPUs, memory, phase and queue as one table. Exit code 0 only when it is ready."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Struct

from tpserve.admin.client import ServerFacts, fetch_facts, gauge
from tpserve.cli.command import Command
from tpserve.cli.server_url import URL, server_url
from tpserve.config.flags import Flag
from tpserve.config.sizes import size
from tpserve.observe.table import table

READY, NOT_READY = 0, 1
Json = dict[str, Any]


class StatusFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve status`."""

    url: Annotated[str, Flag("Server", "Where the server answers HTTP.", parse=server_url, metavar="URL")] = URL


COMMAND = Command(
    "status",
    "A server's nodes, ranks, GPUs, memory, phase and queue as one table, also while it starts. Exit code 0 when it is ready, 1\n"
    "when it starts or ends, 2 when no server answers or it refuses. If the server has an admin key, set\n"
    "TPSERVE_ADMIN_API_KEY.",
    StatusFlags,
)


def run(argv: Sequence[str]) -> int:
    """Print the table; returns the exit code. Raises UserError, or HelpWanted."""
    flags = COMMAND.parse(argv).flags
    facts = fetch_facts(flags.url)
    sys.stdout.write("\n".join(status_lines(facts)) + "\n")
    return READY if facts.ready["state"] == "running" else NOT_READY


def status_lines(facts: ServerFacts) -> list[str]:
    """The lines to print: the server, a table of its ranks, its queue."""
    info, ranks = facts.info, facts.info["ranks"]
    config, layout = info["config"], info["layout"]
    state = f"{info['state']}, {info['percent']}%: {info['phase']}"
    if info["state"] in ("running", "paused"):
        state = "ready" if info["state"] == "running" else info["phase"]
    lines = [
        f"{facts.url}: {state}",
        f"tpserve {info['version']}, {', '.join(config['served_model_name'])} in {config['dtype']}, "
        f"TP {layout['tp']} x PP {layout['pp']} on {config['device']}, up to {_tokens(info['max_model_len'])} tokens a sequence",
    ]
    if info["reason"]:
        lines.append(info["reason"])
    lines.append(_epochs(info))
    lines += _last_reload(info)
    heads = ("node", "host", "GPUs used/visible", "rank", "pid", "layers", "heads", "memory", "state")
    lines += ["", *table([heads, *(_row(rank, ranks, config["device"]) for rank in ranks)]), ""]
    return [*lines, _queue(facts.metrics)]


def _epochs(info: Json) -> str:
    """The epoch, how often the ranks have recovered, and from what the last time."""
    recoveries = info["recoveries"]
    if not recoveries:
        return f"epoch {info['epoch']}, no recoveries"
    times = f"recovered {recoveries} time{'s' * (recoveries != 1)}, answers {info['resumption']}"
    return f"epoch {info['epoch']}, {times}; last fault: {info['last_fault']}"


def _last_reload(info: Json) -> list[str]:
    """How the last reload went; nothing without one."""
    if not info["reloads"]:
        return []
    last = info["reloads"][-1]
    changes = ", ".join(f"{name}={value}" for name, value in last["changes"].items()) or "the flags of the start"
    why = f": {last['reason']}" if last["reason"] else ""
    return [f"last reload {last['ago_s']:.0f} s ago, {last['outcome']}, {changes}{why}"]


def _row(rank: Json, ranks: Sequence[Json], device: str) -> tuple[str, ...]:
    node, shard = rank["node"], rank["shard"]
    phase = f"{rank['percent']}% {rank['phase']}" if rank["state"] in ("missing", "starting") and rank["phase"] else ""
    silent = f"silent for {rank['silent_s']:.0f} s" if (rank["silent_s"] or 0) > 2 else ""
    return (
        "?" if node is None else str(node),
        rank["host"] or "?",
        "?" if node is None else f"{_used(node, ranks, device)}/{rank['visible_gpus']}",
        str(rank["rank"]),
        str(rank["pid"] or "?"),
        _range(shard["layers"]),
        _range(shard["heads"]),
        _memory(rank["memory"]),
        ", ".join(filter(None, (rank["state"], phase, silent))),
    )


def _used(node: int, ranks: Sequence[Json], device: str) -> int:
    """Number of GPUs of a node that ranks use; ranks may share GPUs."""
    here = [rank for rank in ranks if rank["node"] == node]
    return min(len(here), here[0]["visible_gpus"]) if device == "cuda" else 0


def _memory(ledger: Json | None) -> str:
    if ledger is None:
        return "?"
    on_card = "".join(f", {size(ledger[part])} {part}" for part in ("graphs", "communication") if ledger.get(part))
    return f"{size(ledger['weights'])} weights, {size(ledger['kv_cache'])} KV{on_card} of {size(ledger['total'])}"


def _range(ends: Sequence[int] | None) -> str:
    return "?" if ends is None else f"{ends[0]}-{ends[1] - 1}" if ends[1] > ends[0] else "none"


def _tokens(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _queue(metrics: str) -> str:
    running, waiting, used = (gauge(metrics, f"tpserve:{name}") for name in
                              ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))  # fmt: skip
    if running is None or waiting is None or used is None:
        return "queue: /metrics needs a key: set TPSERVE_METRICS_KEY"
    return f"queue: {running:.0f} running, {waiting:.0f} waiting; {100 * used:.1f}% of the KV cache in use"
