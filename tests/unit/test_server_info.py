"""What /server_info says of ranks that come one by one; and that it keeps secrets."""

import json
import logging

from msgspec import json as fast
from msgspec.structs import replace

from tests.specs import small
from tpserve.cli.server_flags import parse
from tpserve.config.resolve import resolve
from tpserve.coordinator.actions import EpochLost, EpochReady
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.roster import Peer, RankInfo
from tpserve.engine_client.recovery import MAX_FAULTS, Recovery
from tpserve.engine_client.requests import RequestTable
from tpserve.engine_client.server_info import cpu_kernels, numerics, server_info
from tpserve.engine_client.status import EngineStatus
from tpserve.observe.log import LogRingBuffer
from tpserve.observe.metrics import Metrics
from tpserve.types.machine import Machine
from tpserve.types.messages import Heartbeat, Hello, MemoryLedger, Numerics, Ready
from tpserve.types.model_files import ModelFiles

CONFIG = resolve(
    parse(["m", "-tp", "2", "-pp", "2", "--device", "cpu", "--api-key", "s3cret", "--admin-api-key", "r00t"]),
    ModelFiles("m", "m"),
    small(),
    Machine(4, 4, 1, 0, 2, "torchrun"),
)


def test_while_starting_what_is_known_so_far() -> None:
    c = Coordinator(4, 0.0)
    c.receive(Peer(3, 1), Hello(3, 1, 77, "node1", {}, {}), 1.0)
    c.receive(Peer(3, 1), Heartbeat(3, 0, "waiting for all ranks", 0, -1), 1.25)
    info = server_info(
        CONFIG, EngineStatus("starting", c.phase, c.percent), c.epoch, c.ranks, 2.0, None, [LogRingBuffer() for _ in c.ranks]
    )
    assert [rank["state"] for rank in info["ranks"]] == ["missing"] * 3 + ["starting"]
    assert info["ranks"][3] == {
        "rank": 3, "node": 0, "host": "node1", "address": "", "visible_gpus": 0, "pid": 77, "stage": 1,
        "state": "starting", "phase": "waiting for all ranks", "percent": 0,
        "shard": {"tp_rank": 1, "layers": [2, 4], "heads": None, "kv_heads": None}, "last_step": None,
        "silent_s": 0.75, "memory": None, "fingerprint": {}, "processor": {}, "traits": {}, "log": {"first": [], "last": []},
        "busy": "", "last_error": "",
    }  # fmt: skip
    assert info["numerics"] is None
    assert (info["ranks"][0]["pid"], info["ranks"][0]["silent_s"]) == (None, None)


def test_faults_and_how_long_each_took() -> None:
    c = Coordinator(1, 0.0)
    recovery = Recovery(c, RequestTable(lambda inputs: None, Metrics("m")))
    c.receive(Peer(0, 1), Hello(0, 1, 77, "node1", {}, {}), 1.0)
    for at in (10.0, 11.0):  # the second loss is of the epoch that was to replace the first
        recovery.on_action(EpochLost(1, f"rank 1 ended at {at}"), at)
    assert server_info(CONFIG, EngineStatus("recovering"), 2, [], 12.0, None, [], recovery.faults)["faults"] == [
        {"epoch": 1, "reason": "rank 1 ended at 10.0", "ago_s": 2.0, "took_s": None}
    ]
    recovery.on_action(EpochReady(2), 12.5)
    for at in range(100, 100 + 2 * MAX_FAULTS):
        recovery.on_action(EpochLost(3, "again"), float(at))
        recovery.on_action(EpochReady(4), at + 0.25)
    faults = server_info(CONFIG, EngineStatus("running"), 4, [], 200.0, None, [], recovery.faults)["faults"]
    assert len(faults) == MAX_FAULTS and faults[-1] == {"epoch": 3, "reason": "again", "ago_s": 61.0, "took_s": 0.25}


def test_the_first_and_the_last_lines_of_the_log() -> None:
    log_buffer = LogRingBuffer(first=2, last=3)
    log_buffer.setFormatter(logging.Formatter("[frontend] %(message)s"))
    for i in range(9):
        log_buffer.handle(logging.makeLogRecord({"msg": f"line {i}", "levelno": logging.ERROR if i == 7 else logging.INFO}))
    info = server_info(CONFIG, EngineStatus("running"), 1, [], 0.0, log_buffer, [])
    assert info["log"]["first"] == ["[frontend] line 0", "[frontend] line 1"]
    assert info["log"]["last"] == ["[frontend] line 6", "[frontend] line 7", "[frontend] line 8"]
    assert (log_buffer.last_error, log_buffer.num_errors) == ("line 7", 1)


def test_lines_of_another_process() -> None:
    """Told bit by bit, twice, with a gap, and more than are kept: in order, none twice, and what is missing is said."""
    theirs, ours = LogRingBuffer(first=2, last=3), LogRingBuffer(first=4, last=4)
    for upto in (1, 4, 5):
        while theirs.total < upto:
            theirs.add(f"line {theirs.total}")
        ours.take(*theirs.since(ours.total))
        ours.take(*theirs.since(max(0, ours.total - 2)))
    assert ours.shown() == {"first": ["line 0", "line 1", "line 2", "line 3"], "last": ["line 4"]}
    for _ in range(6):
        theirs.add(f"line {theirs.total} \udcff")
    ours.take(*theirs.since(ours.total))
    assert ours.shown()["last"] == ["(3 lines are missing)", "line 8 ?", "line 9 ?", "line 10 ?"]
    assert theirs.since(theirs.total) == (11, [])
    long = LogRingBuffer()
    for i in range(400):
        long.add(f"{i}" * 2000)
    start, lines = long.since(20)
    assert (start, len(lines), len(lines[-1])) == (20, 80, 1000), "no further than where lines may be missing"
    assert [long.since(100)[0], len(long.since(100)[1])] == [200, 100]


def test_secrets_are_not_shown() -> None:
    text = json.dumps(server_info(CONFIG, EngineStatus("running"), 1, [], 0.0, None, []))
    assert "s3cret" not in text and "r00t" not in text
    shown = json.loads(text)["config"]
    assert (shown["api_key"], shown["admin_api_key"], shown["num_gpu_blocks_override"]) == ("***", "***", None)
    assert replace(CONFIG, api_key=None).redacted()["api_key"] is None
    assert "s3cret" in fast.encode(CONFIG).decode(), "the frontend itself needs them"


def test_what_the_self_tests_of_all_ranks_say() -> None:
    def seen(*found: Numerics | None) -> list[RankInfo]:
        ledger = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 0, 16, 256)
        return [
            RankInfo(None, Ready(rank, 1, ledger, {}, each), Heartbeat(rank, 1, "", 0, 0), 0.0) for rank, each in enumerate(found)
        ]

    good = Numerics()
    assert numerics(seen(good, good)) == "batch-invariant"
    assert numerics(seen(good, Numerics(untested=("a", "b")), Numerics(untested=("b", "c")))) == "untested: a, b, c"
    both = Numerics(("x",), ("a",)), Numerics(("y", "x"), ("x",))
    assert numerics(seen(*both)) == "not on this processor: x, y; untested: a"
    assert numerics(seen(None, None)) == "not promised on CUDA"
    assert cpu_kernels(seen(good, Numerics(kernels="avx2 1f"), Numerics(kernels="avx2 1f"))) == "none, avx2 1f"
    assert cpu_kernels(seen(None, None)) is None and cpu_kernels([]) is None
    assert numerics([*seen(good), RankInfo(None, None, Heartbeat(1, 1, "", 0, 0), 0.0)]) is None
