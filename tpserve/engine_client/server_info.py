"""The JSON value of /server_info: the resolved configuration and every rank as it is known. Pure; shows no secret."""

from collections.abc import Collection, Sequence
from typing import Any

from msgspec.structs import asdict

from tpserve.config.engine_config import EngineConfig
from tpserve.coordinator.roster import RankInfo
from tpserve.engine_client.status import EngineStatus, FaultRecord
from tpserve.observe.log import LogRingBuffer
from tpserve.types.layout import ParallelLayout
from tpserve.version import __version__

Json = dict[str, Any]
INVARIANT, BROKEN, UNTESTED, NOT_PROMISED = "batch-invariant", "not on this processor", "untested", "not promised on CUDA"


def server_info(
    config: EngineConfig,
    status: EngineStatus,
    epoch: int,
    ranks: Sequence[RankInfo],
    now: float,
    log_buffer: LogRingBuffer | None,
    rank_logs: Sequence[LogRingBuffer],
    faults: Collection[FaultRecord] = (),
) -> Json:
    """`now` is a time of the coordinator's clock. `log_buffer` has this process's log lines, `rank_logs` those of each rank."""
    return {
        "version": __version__,
        "state": status.state,
        "phase": status.phase,
        "percent": status.percent,
        "reason": status.reason,
        "epoch": epoch,
        "recoveries": status.recoveries,
        "last_fault": status.last_fault,
        "faults": [_fault(fault, now) for fault in faults],
        "resumption": status.resumption,
        "max_model_len": status.max_model_len,
        "numerics": numerics(ranks),
        "cpu_kernels": cpu_kernels(ranks),
        "layout": asdict(config.layout),
        "config": config.redacted() | {"layout": asdict(config.layout)},
        "ranks": [
            _rank(rank, config.layout, status, info, now) | {"last_error": lines.last_error, "log": lines.shown()}
            for rank, (info, lines) in enumerate(zip(ranks, rank_logs, strict=True))
        ],
        "log": (log_buffer or LogRingBuffer()).shown(),
    }


def _fault(fault: FaultRecord, now: float) -> Json:
    """`took_s`: from the fault to the next epoch that ran; None before it runs."""
    took_s = None if fault.took_s is None else round(fault.took_s, 3)
    return {"epoch": fault.epoch, "reason": fault.reason, "ago_s": round(now - fault.lost_s, 3), "took_s": took_s}


def numerics(ranks: Sequence[RankInfo]) -> str | None:
    """Whether the rest of a batch can change a request's bits, by the self-tests of all ranks; None until all ranks are ready."""
    found = [rank.ready.numerics for rank in ranks if rank.ready is not None]
    if len(found) < len(ranks) or not found:
        return None
    tested = [each for each in found if each is not None]
    if len(tested) < len(found):
        return NOT_PROMISED
    broken = list(dict.fromkeys(name for each in tested for name in each.broken))
    untested = list(dict.fromkeys(name for each in tested for name in each.untested if name not in broken))
    parts = [(BROKEN, broken), (UNTESTED, untested)]
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or INVARIANT


def cpu_kernels(ranks: Sequence[RankInfo]) -> str | None:
    """Instruction set and version of the library of CPU kernels, of each kind of rank; "none" where torch's operators serve.

    None until all ranks are ready, and on CUDA.
    """
    found = [rank.ready.numerics for rank in ranks if rank.ready is not None]
    if len(found) < len(ranks) or not found or None in found:
        return None
    return ", ".join(dict.fromkeys(each.kernels or "none" for each in found if each is not None))


def _rank(rank: int, layout: ParallelLayout, status: EngineStatus, info: RankInfo, now: float) -> Json:
    hello, ready, heartbeat = info.hello, info.ready, info.heartbeat
    stage = layout.stage_of(rank)
    layers = layout.layers_of(stage)
    state: str
    if hello is None:
        state = "missing"
    elif status.state == "starting":
        state = "starting" if ready is None else "up"
    else:
        state = status.state
    return {
        "rank": rank,
        "node": hello and hello.node.node,
        "host": hello and hello.host,
        "address": hello and hello.node.address,
        "visible_gpus": hello and hello.node.gpus,
        "pid": hello and hello.pid,
        "stage": stage,
        "shard": {
            "tp_rank": layout.tp_rank_of(rank),
            "layers": [layers.start, layers.stop],
            "heads": ready and [ready.facts["first_head"], ready.facts["end_head"]],
            "kv_heads": ready and [ready.facts["first_kv_head"], ready.facts["end_kv_head"]],
        },
        "state": state,
        "phase": heartbeat.phase,
        "percent": heartbeat.percent,
        "busy": heartbeat.busy,
        "last_step": heartbeat.step if heartbeat.step >= 0 else None,
        "silent_s": None if info.last_message_s is None else round(now - info.last_message_s, 3),
        "memory": ready and asdict(ready.ledger),
        "fingerprint": hello and hello.fingerprint,
        "processor": hello and hello.processor,
        "traits": hello and hello.traits | hello.node.settings,
    }
