"""What fails on one host is back within seconds, and no client sees it. What cannot come back ends all, with the reason."""

import http.client
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.lab import links
from launch.lab.hosts import Host
from launch.lab.jobs import commands, environment
from tests.lab.cluster import PORT, Cluster, cluster
from tests.lab.faults import CUT, CUTS, FLAGS, KILL, LINK, PARTS, QUESTION, SILENCE, STOP, Outcome, alone, happen, save, survive
from tests.server import ReadyWatch

END_S = 10.0
BACK_S = {KILL: 15.0, STOP: 20.0, **{how: 15.0 + seconds for how, seconds in CUTS.items()}}
"""How long a part may be away. Starting `tpserve serve` again, with torch's import, is in it."""
HEAD = "serve 0"
SURVIVED = [
    *(("running", how, part) for how in (KILL, STOP) for part in PARTS if part != HEAD),
    *(("running", how, LINK) for how in CUTS),
    *(("forming", how, part) for how in (KILL, STOP) for part in ("rank 0", "rank 3", "frontend", "agent 1", "serve 1")),
    *(("loading", how, part) for how, part in ((KILL, "rank 1"), (STOP, "rank 2"))),
    *(("idle", how, part) for how, part in ((KILL, "rank 3"), (STOP, "frontend"))),
    *(("draining", how, part) for how, part in ((KILL, "rank 2"), (STOP, "rank 1"), (KILL, "agent 0"), (KILL, "agent 1"))),
]
ENDED = [
    *((moment, how, HEAD) for moment, how in (("running", KILL), ("running", STOP), ("alone", STOP), ("forming", KILL))),
    *((moment, how, LINK) for moment, how in (("running", CUT), ("running", SILENCE))),
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("failing"))


@pytest.fixture(scope="session")
def calm(lab: Any, model: str, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The tokens of an undisturbed answer."""
    with cluster(lab(2), [model, *FLAGS], tmp_path_factory.mktemp("calm"), [2]) as server:
        server.wait_ready()
        return list(server.post("/v1/completions", QUESTION)[1]["choices"][0]["token_ids"])


@pytest.mark.lab
@pytest.mark.parametrize(("moment", "how", "part"), SURVIVED)
def test_the_service_goes_on(
    hosts: list[Host], model: str, place: Path, calm: list[int], moment: str, how: str, part: str
) -> None:
    survival = survive(hosts, model, place, part, how, moment, calm)
    print(f"{moment}, {how} {part}: {survival.took_s:.1f} s, {survival.answers} answers")
    assert not survival.errors, (survival.errors, survival.log)
    assert survival.took_s < BACK_S[how], (survival.took_s, survival.log)
    wanted = [0, -9, 0] if part == "serve 1" else [0, 0]
    if (moment, part) == ("draining", "agent 1"):  # its successor may find that node 0 has ended
        wanted[1] = survival.codes[1] if survival.codes[1] in (0, 1) else 0
    assert survival.codes == wanted and "Traceback" not in survival.log, survival.log


@pytest.mark.lab
@pytest.mark.parametrize(("moment", "how", "part"), ENDED)
def test_the_service_ends(hosts: list[Host], model: str, place: Path, moment: str, how: str, part: str) -> None:
    """With node 0's `tpserve serve`, and when a link stays cut for longer than --recovery-timeout."""
    outcome = happen(hosts, model, place, part, how, moment, "--recovery-timeout", "8")
    print(f"{moment}, {how} {part}: {outcome.ended_s:.1f} s")
    check(outcome, END_S + 8.0 * (part == LINK) + 5.0 * (part == LINK))
    wanted = [-9 if part == HEAD else 1, 1]
    assert all(code == each for code, each in zip(outcome.codes, wanted, strict=False)), outcome.codes
    check_word(outcome, reason(part, how, moment))


@pytest.mark.lab
@pytest.mark.parametrize("part", ["rank 2", "frontend", "agent 0", "agent 1"])
@pytest.mark.parametrize("how", [KILL, STOP])
def test_under_bare_torchrun_without_restarts(hosts: list[Host], model: str, place: Path, part: str, how: str) -> None:
    """What torchrun itself leaves behind and prints is its own."""
    outcome = happen(hosts, model, place, part, how, "running", torchrun=True)
    outcome.files = [name for name in outcome.files if not name.startswith("torchelastic_")]
    check(outcome, tracebacks=True)
    if part != "frontend":
        ended = next(line for line in reversed(outcome.log.splitlines()) if " ended: " in line)
        assert re.search(reason(part, how, "running"), ended), outcome.log


def reason(part: str, how: str, moment: str) -> str:
    """What the last line of node 0 says, as far as the moment lets it be known."""
    name, _, number = part.partition(" ")
    if how in (CUT, SILENCE):
        return r"ranks 2-3 did not come back within 8 s, after rank [23] on node1 \(pid \d+\) .*"
    if part in ("rank 2", "rank 3", "agent 1", "serve 1"):
        words = (
            "closed its connection without a word|another rank of this node has ended|has been silent for 4 s|has been stopped"
        )
        return rf"(rank [23] on node1 \(pid \d+\):? .*({words}).*|node 1 \(node1, .*\) has ended)"
    if name == "rank":
        return rf"rank {number}( on node0)? \(pid \d+\) (ended without a word|was killed|has been silent for 4 s)"
    if how == KILL and part == HEAD:
        return r"`tpserve serve` \(pid \d+\) of node 0 has ended: it was killed"
    if how == KILL:
        return r"the agent \(pid \d+\) that started the ranks has ended: .*; look at"
    return r"(`tpserve serve` of node 0|torchrun) \(pid \d+\) has been stopped for 4\.5 s"


def check(outcome: Outcome, end_s: float = END_S, *, tracebacks: bool = False) -> None:
    """Whatever failed."""
    assert outcome.ended_s < end_s and outcome.left == [], (outcome.ended_s, outcome.left, outcome.log)
    assert (outcome.ports, outcome.files) == ([], [])
    assert tracebacks or "Traceback" not in outcome.log, outcome.log
    statuses = "".join({200: "r", 503: "n"}[status] for status, _ in outcome.ready)
    assert re.fullmatch("n*r*n*", statuses), "it may become ready before anybody notices, and then never again"
    assert all(body["phase"] for status, body in outcome.ready if status == 503)
    for events in outcome.streams:
        assert events[-1] in ("[DONE]", "it broke off", "ConnectionResetError", "IncompleteRead"), events
        if events[-1] == "[DONE]":
            assert json.loads(events[-2])["error"]["message"], "a stream that was open ends with the reason"


def check_word(outcome: Outcome, why: str) -> None:
    """The reason: the log's last line, and what clients hear."""
    last = outcome.last(0)
    assert re.search(rf"^\[frontend\] \S+ ERROR ended: {why}", last), outcome.log
    said = last.partition("ended: ")[2].partition("; ")[0]
    assert all(events[-1] == "[DONE]" and said in events[-2] for events in outcome.streams), (said, outcome.streams)


@pytest.mark.lab
def test_a_cut_of_two_seconds_is_not_noticed(hosts: list[Host], model: str, place: Path, calm: list[int]) -> None:
    with cluster(hosts, [model, *FLAGS], place, [2]) as server:
        server.wait_ready()
        watch = ReadyWatch(server)
        time.sleep(0.5)
        links.cut(hosts[1], silent=True)
        time.sleep(2.0)
        links.heal(hosts[1], [hosts[0]])
        assert server.post("/v1/completions", QUESTION)[1]["choices"][0]["token_ids"] == calm
        assert {status for status, _ in watch.end()} == {200}
        assert set(server.stop()) == {0}


def status(server: Cluster, *arguments: str) -> tuple[int, str]:
    """`tpserve status`, asked on node 0, as exit code and page."""
    line = [sys.executable, "-m", "tpserve", "status", "--url", server.url, *arguments]
    child = server.hosts[0].start(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    said, _ = child.communicate(timeout=30)
    return child.returncode, said


@pytest.mark.lab
def test_status_at_every_phase(hosts: list[Host], model: str, place: Path) -> None:
    """While node 1 is not there, while ranks come, when it serves, while it drains and while it fails."""
    lines = commands(hosts, [model, *FLAGS, "--admin-api-key", "k"], [2])
    env = {"TPSERVE_ADMIN_API_KEY": "k"}
    with cluster(hosts, [], place, start=[], lines=lines, env=env) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPSERVE_ADMIN_API_KEY", "k")
        alone(server)
        code, page = status(server)
        assert code == 1 and page.count("missing") == 4 and "waiting for ranks 0-3" in page.splitlines()[0], page
        server.start(1)
        server.wait_ready()
        code, page = status(server)
        assert code == 0 and re.search(r"^1 +node1 +0/\d+ +3 ", page, re.MULTILINE), page
        streams: list[Any] = [_stream(server) for _ in range(2)]
        server.processes[0].terminate()
        while server.get("/readyz")[1]["phase"] != "draining":
            time.sleep(0.01)
        code, page = status(server)
        assert code == 1 and ": draining, 100%: draining" in page, page
        for stream in streams:
            stream.close()
        assert server.wait(20.0) == [0, 0]
        code, page = status(server)
        assert code == 2 and page.count("\n") == 1 and "no server answers at" in page


def _stream(server: Cluster) -> Any:
    connection = http.client.HTTPConnection(server.hosts[0].address, PORT, timeout=30)
    body = json.dumps({"prompt": "The cat", "max_tokens": 8000, "ignore_eos": True, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    return connection
