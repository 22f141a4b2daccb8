"""The doctor's verdicts, from what its checks have found; links over real sockets, a disk that is this one."""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore, Store

from tpserve.config.sizes import size
from tpserve.doctor import host, links, traffic
from tpserve.doctor.hang import HangWatchdog, unresponsive_ranks
from tpserve.doctor.host import DiskRead, NodeReport
from tpserve.doctor.links import PingServer, ProbeResult
from tpserve.doctor.verdict import Verdict, duration, exit_code, page, summary
from tpserve.errors import UserError

LOG = """
a:1:9 [0] NCCL INFO Channel 00/0 : 1[1] -> 0[0] [receive] via NET/IB/0/GDRDMA
a:1:9 [0] NCCL INFO Channel 01/0 : 1[1] -> 0[0] [receive] via NET/IB/0/GDRDMA
a:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0
a:1:9 [0] NCCL INFO Channel 00/0 : 2[2] -> 3[3] via P2P/CUMEM/read
a:1:9 [0] NCCL INFO Channel 00 : 3[b000] -> 2[a000] via SHM/direct/direct
a:1:9 [0] NCCL INFO Connected all rings
"""


def test_pages_end_with_what_to_do() -> None:
    verdicts = [Verdict("good", "a", "fine"), Verdict("slow", "much", "meh", "mend it")]
    assert page(verdicts) == ["good  a     fine", "slow  much  meh", "        -> mend it"]
    assert summary(verdicts) == "1 good, 1 slow" and exit_code(verdicts) == 0
    assert exit_code([*verdicts, Verdict("broken", "x", "y")]) == 1
    assert [size(n) for n in (0, 4096, 3 << 29, 5000 << 30)] == ["0 B", "4.0 KiB", "1.5 GiB", "5000.0 GiB"]
    assert [duration(s) for s in (21e-6, 0.0015, 2.5)] == ["21 us", "1.5 ms", "2.5 s"]


def test_who_does_not_answer_is_named() -> None:
    """Three ranks of which one is silent, and one whose port leads nowhere; then all of them answer."""
    hosts, place = ["a", "b", "c"], ("127.0.0.1", (0, 0))

    def ask(store: Store, ranks: Sequence[int]) -> list[list[Verdict]]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda i: unresponsive_ranks(store, i, hosts, place, "all-reduce", 0.5), ranks))

    first, second = ask(HashStore(), (0, 2))
    assert first == second and [verdict.found for verdict in first] == ["rank 1 on b does not answer"]
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        store = HashStore()
        store.set("stuck1", json.dumps({"address": nobody.getsockname()}))
        store.set("dialled1", "[]")
        found = ask(store, (0, 2))[0]
    assert [verdict.found.partition(": ")[0] for verdict in found] == ["rank 0 on a -> rank 1 on b", "rank 2 on c -> rank 1 on b"]
    assert "Connection refused (errno 111)" in found[0].found
    assert ["all ranks answer" in verdict.found for verdict in ask(HashStore(), (0, 1, 2))[1]] == [True]


def test_a_step_that_takes_too_long() -> None:
    late: list[str] = []
    watchdog = HangWatchdog(late.append)
    with watchdog.limit("quick", 5.0):
        pass
    time.sleep(0.2)
    with watchdog.limit("slow", 0.1):
        while not late:
            time.sleep(0.02)
    assert late == ["slow"]


def test_ranks_dial_each_other() -> None:
    echoes = [PingServer("127.0.0.1", (0, 0)) for _ in range(3)]
    places = [("127.0.0.1", ping_server.port) for ping_server in echoes]
    heard = [links.probe_all(rank, places) for rank in range(3)]
    assert [[each.rank for each in all_] for all_ in heard] == [[1, 2], [0, 2], [0, 1]]
    assert all(0 < each.round_trip_s < 1 and abs(each.ahead_s) < 0.1 and not each.error for all_ in heard for each in all_)
    reach, clocks = links.judge(heard, ["a", "a", "b"])
    assert reach.level in ("good", "slow") and "each of 3 ranks" in reach.found and clocks.level == "good"
    for ping_server in echoes:
        ping_server.close()


def test_who_cannot_be_reached_is_named_with_errno() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    (result,) = links.probe_all(0, [("127.0.0.1", 1), ("127.0.0.1", port)])
    (verdict,) = links.judge([[result], []], ["a", "b"])
    assert (verdict.level, verdict.found) == (
        "broken", f"rank 0 on a -> rank 1 on b: 127.0.0.1:{port}: Connection refused (errno 111)",
    )  # fmt: skip
    assert "--port-range" in verdict.remedy


def test_a_clock_that_is_ahead_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as late:

        def answer() -> None:
            line, _ = late.accept()
            with line:
                while line.recv(1):
                    line.sendall(struct.pack("!d", time.time() + 90))

        threading.Thread(target=answer, daemon=True).start()
        (result,) = links.probe_all(0, [("", 0), late.getsockname()])
    assert result.ahead_s == pytest.approx(90, abs=1)
    verdict = links.judge([[result], []], ["a", "b"])[1]
    assert verdict.level == "slow" and verdict.found.startswith("at most 90") and "chrony" in verdict.remedy
    far = links.judge([[ProbeResult(1, "", 0.02, 0.0)], []], ["a", "b"])[0]
    assert far.level == "slow" and "-pp" in far.remedy


def test_the_disk_is_read_for_a_while(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(os.urandom(3 << 20))
    (tmp_path / "notes.txt").write_bytes(b"no weights")
    files = host.weight_files(tmp_path)
    assert [path.name for path in files] == ["model.safetensors"]
    disk = host.read_rate(files)
    assert disk is not None and disk.read == disk.num_bytes == 3 << 20 and disk.took_s > 0
    short = host.read_rate(files, limit_s=0.0)
    assert short is not None and short.read == 0
    assert host.read_rate([]) is None


GIB = 1 << 30


@pytest.mark.parametrize(
    ("found", "device", "levels"),
    [
        (
            NodeReport("a", 16 * GIB, 70 * GIB, "the GPU", 30 * GIB, DiskRead(60 * GIB, 4 * GIB, 2.0, "cold")),
            "cuda",
            ["good"] * 3,
        ),
        (
            NodeReport("a", 64 << 20, 70 * GIB, "the GPU", 65 * GIB, DiskRead(60 * GIB, GIB // 5, 2.0, "warm")),
            "cuda",
            ["slow"] * 3,
        ),
        (NodeReport("a", 1 << 20, 10 * GIB, "the GPU", 30 * GIB, None), "cuda", ["broken", "broken", "good"]),
        (NodeReport("a", None, 10 * GIB, "the machine", GIB, None), "cpu", ["slow", "good", "good"]),
    ],
)
def test_what_a_node_has(found: NodeReport, device: str, levels: list[str]) -> None:
    verdicts = host.judge(found, device)
    assert [verdict.level for verdict in verdicts] == levels
    assert all(bool(verdict.remedy) == (verdict.level != "good") for verdict in verdicts)


def test_what_nccl_says_carries_its_channels() -> None:
    found = traffic.carriers(LOG)
    assert found == {
        "InfiniBand or RoCE, straight from the GPU (GDRDMA)": 1, "TCP (NET/Socket)": 1,
        "GPU to GPU (P2P)": 1, "host memory (SHM)": 1,
    }  # fmt: skip
    assert traffic.judge_nccl(found, 2).level == "slow" and "NCCL_IB_HCA" in traffic.judge_nccl(found, 2).remedy
    assert traffic.judge_nccl(traffic.carriers("... 0[0] -> 1[1] [send] via NET/IB/0\n"), 2).level == "good"
    plain = traffic.carriers("Channel 00/0 : 0[0] -> 1[1] [send] via NET/IB/0\n")
    assert traffic.judge_nccl(plain, 2).level == "slow" and "nvidia-peermem" in traffic.judge_nccl(plain, 2).remedy
    assert traffic.judge_nccl({"GPU to GPU (P2P)": 2}, 1).level == "good"
    for via in ("NET/IB/0(4)/GDRDMA/Shared", "NET/AWS Libfabric/1/GDRDMA(PCI)"):
        (carrier,) = traffic.carriers(f"host:1:2 [0] NCCL INFO Channel 00/0 : 3[3] -> 8[0] [send] via {via}\n")
        assert carrier.endswith("(GDRDMA)")


def test_sums_are_judged_by_what_a_token_and_a_prompt_wait() -> None:
    fast = traffic.judge("x", [(4096, 20e-6), (1 << 26, 1e-3)], 4, 160, 16384)
    assert fast.level == "good" and "101 GB/s" in fast.found
    assert fast.found.endswith("a token waits for 160 of them, 3.2 ms, 1,000 of a prompt 39.1 ms")
    far = traffic.judge("x", [(4096, 500e-6), (1 << 26, 1e-3)], 4, 160, 16384)
    thin = traffic.judge("x", [(4096, 20e-6), (1 << 26, 0.1)], 4, 160, 16384)
    assert far.level == thin.level == "slow" and "-pp" in far.remedy
    assert traffic.lines([(4096, 20e-6)], 2) == [("4.0 KiB", "20 us", "0.205 GB/s")]


def test_several_nodes_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpserve.doctor.command import run

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        UserError, match="torchrun --nnodes 2 --node_rank N --nproc_per_node RANKS --master_addr h -m tpserve doctor --model m`"
    ):
        run(["m", "--nnodes", "2", "--master-addr", "h"])
