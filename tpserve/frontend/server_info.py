"""What /server_info shows: the resolved configuration, and every rank as far as it is known. Owns nothing, shows no secret."""

from collections.abc import Sequence
from typing import Any

from msgspec.structs import asdict

from tpserve.config.schema import EngineConfig
from tpserve.frontend.roster import Seen
from tpserve.frontend.status import Status
from tpserve.observe.log import Kept
from tpserve.types.layout import ParallelLayout
from tpserve.version import __version__

Json = dict[str, Any]
INVARIANT, BROKEN, UNTESTED, NOT_PROMISED = "batch-invariant", "not on this processor", "untested", "not promised on CUDA"


def server_info(
    config: EngineConfig, status: Status, epoch: int, ranks: Sequence[Seen], now: float, kept: Kept | None, said: Sequence[Kept]
) -> Json:
    """`now`: of the coordinator's clock. `kept`: lines of this process's log, if any were; `said`: of every rank's."""
    return {
        "version": __version__,
        "state": status.state,
        "phase": status.phase,
        "percent": status.percent,
        "reason": status.reason,
        "epoch": epoch,
        "max_model_len": status.max_model_len,
        "numerics": numerics(ranks),
        "layout": asdict(config.layout),
        "config": config.shown() | {"layout": asdict(config.layout)},
        "ranks": [
            _rank(rank, config.layout, status, seen, now) | {"last_error": lines.last_error, "log": lines.shown()}
            for rank, (seen, lines) in enumerate(zip(ranks, said, strict=True))
        ],
        "log": (kept or Kept()).shown(),
    }


def numerics(ranks: Sequence[Seen]) -> str | None:
    """Whether a request gets the same bits whatever is computed beside it, by the self-tests of all ranks; None before."""
    found = [rank.up.numerics for rank in ranks if rank.up is not None]
    if len(found) < len(ranks) or not found:
        return None
    tested = [each for each in found if each is not None]
    if len(tested) < len(found):
        return NOT_PROMISED
    broken = list(dict.fromkeys(name for each in tested for name in each.broken))
    untested = list(dict.fromkeys(name for each in tested for name in each.untested if name not in broken))
    parts = [(BROKEN, broken), (UNTESTED, untested)]
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or INVARIANT


def _rank(rank: int, layout: ParallelLayout, status: Status, seen: Seen, now: float) -> Json:
    hello, up, beat = seen.hello, seen.up, seen.beat
    stage = layout.stage_of(rank)
    layers = layout.layers_of(stage)
    state: str
    if hello is None:
        state = "missing"
    elif status.state == "starting":
        state = "starting" if up is None else "up"
    else:
        state = status.state
    return {
        "rank": rank,
        "node": hello and hello.place.node,
        "host": hello and hello.host,
        "address": hello and hello.place.address,
        "visible_gpus": hello and hello.place.gpus,
        "pid": hello and hello.pid,
        "stage": stage,
        "shard": {
            "tp_rank": layout.tp_rank_of(rank),
            "layers": [layers.start, layers.stop],
            "heads": up and [up.facts["first_head"], up.facts["end_head"]],
            "kv_heads": up and [up.facts["first_kv_head"], up.facts["end_kv_head"]],
        },
        "state": state,
        "phase": beat.phase,
        "percent": beat.percent,
        "busy": beat.busy,
        "last_step": beat.step if beat.step >= 0 else None,
        "silent_s": None if seen.heard_s is None else round(now - seen.heard_s, 3),
        "memory": up and asdict(up.ledger),
        "fingerprint": hello and hello.fingerprint,
        "processor": hello and hello.processor,
        "traits": hello and hello.traits | hello.place.settings,
    }
