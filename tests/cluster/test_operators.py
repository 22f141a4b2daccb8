"""`tpserve status`, `report` and `doctor` on real ranks: while they start, when they serve, when they cannot agree."""

import json
import os
import re
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import tiny_model
from tests.http import checks
from tests.server import BIN, Server, free_port, running, serve

KEY, TEAM, ADMIN, PASSWORD = "k3y-of-clients", "k3y-of-team-a", "k3y-of-operators", "hunter2-and-3"
CALM = {"OMP_NUM_THREADS": "1"}


def tpserve(*arguments: str, cwd: Path | None = None, **environ: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [str(BIN / "tpserve"), *arguments], capture_output=True, text=True, timeout=120, check=False, cwd=cwd,
        env={**os.environ, **CALM, **environ},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tiny_model.save(tmp_path)
    tiny_model.add_weights(path)
    return str(path)


def test_status_and_report(tmp_path: Path) -> None:
    port = free_port()
    keys = {"TPSERVE_API_KEY": KEY, "TPSERVE_ADMIN_API_KEY": ADMIN}
    url = ("--url", f"http://127.0.0.1:{port}")
    (tmp_path / "keys").write_text(f"{TEAM} name=team-a requests_per_minute=2\n")
    files = ("--access-log", str(tmp_path / "access"), "--api-key-file", str(tmp_path / "keys"))
    command = serve("-tp", "2", "--device", "cpu", *files, port=port)
    with running(
        [command], port, tmp_path / "log", ready=False, env=CALM | keys | {"NCCL_IB_HCA": "mlx5", "NCCL_HOSTID": PASSWORD}
    ) as server:
        while not server.port_open():
            assert server.processes[0].poll() is None, server.log
        code, page, error = tpserve("status", *url, **keys)
        assert (code, error) == (1, "") and re.search(r": starting, \d+%: ", page), page
        assert page.count("missing") + page.count("starting") >= 2
        server.wait_ready()
        code, page, error = tpserve("status", *url, **keys)
        assert (code, error) == (0, "")
        for other in (f"http://127.0.0.1:{port}/v1", f"127.0.0.1:{port}/", f"http://127.0.0.1:{port}/v1/"):
            assert tpserve("status", "--url", other, **keys)[0] == 0, "as clients of the API are given it"
        first, second, epochs, _, head, *ranks, _, queue = page.splitlines()
        assert first.endswith(f"127.0.0.1:{port}: ready") and "TP 2 x PP 1 on cpu" in second
        assert epochs == "epoch 1, no recoveries"
        assert head.split()[:4] == ["node", "host", "GPUs", "used/visible"] and len(ranks) == 2
        assert all(re.search(rf"^0 +{socket.gethostname()} +0/\d+ +{i} +\d+ .* weights, .* KV of .*running$", line)
                   for i, line in enumerate(ranks)), page  # fmt: skip
        assert queue == "queue: 0 running, 0 waiting; 0.0% of the KV cache in use"
        check_operators_commands(server, url, keys)
        for given, way_out in (({}, "TPSERVE_ADMIN_API_KEY"), ({"TPSERVE_ADMIN_API_KEY": "wrong"}, "TPSERVE_ADMIN_API_KEY")):
            code, _, error = tpserve("status", *url, **given)
            assert code == 2 and error.count("\n") == 1 and "is running (ready)" in error and way_out in error
        code, said, _ = tpserve(
            "report", *url, "--output", "ticket.json", cwd=tmp_path, **keys, MY_PASSWORD=PASSWORD, NCCL_HOSTID=PASSWORD
        )
        text = (tmp_path / "ticket.json").read_text()
        check_drain_in_a_pause(server)
    assert code == 0 and said.startswith("wrote ticket.json: ")
    assert not [secret for secret in (KEY, TEAM, ADMIN, PASSWORD) if secret in text]
    assert json.loads(text)["here"]["nccl_and_gloo"] == {"NCCL_HOSTID": "***"}
    info = json.loads(text)["server"]["server_info"]
    assert info["config"]["api_key"] == info["config"]["admin_api_key"] == "***" and info["layout"]["tp"] == 2
    assert [rank["fingerprint"]["--block-size"] for rank in info["ranks"]] == ["16", "16"]
    traits = {name: text for name, text in info["ranks"][1]["traits"].items() if name.startswith("NCCL")}
    assert traits == {"NCCL_IB_HCA": "mlx5", "NCCL_HOSTID": "***"}
    assert any("tpserve ready" in line for line in info["log"]["first"])
    first, second = (rank["log"]["first"] for rank in info["ranks"])
    assert any("[n0 r0 s0]" in line and "NCCL_HOSTID=*** is set" in line for line in first), first
    assert any("memory of rank" in line for line in first) and not any("r0" in line for line in second)


def check_operators_commands(server: Server, url: tuple[str, str], keys: dict[str, str]) -> None:
    """What is asked of a server, and what its access log has of it."""

    def ask(*arguments: str, code: int = 0) -> str:
        found, said, error = tpserve(*arguments, *url, **keys)
        assert found == code, (said, error)
        return said + error

    assert "paused; `tpserve resume` goes on" in ask("pause")
    assert ": paused (keep); POST /resume" in ask("status", code=1)
    assert "0 requests are ended" in ask("pause", "--mode", "abort") and "paused" in server.get("/health")[1]["state"]
    assert "resumed" in ask("resume") and "the prefix cache is empty" in ask("reset-prefix-cache")
    assert "ended 0 requests" in ask("abort", "--all")
    assert "no open request has such an id" in ask("abort", "--request-id", "a", "b", code=2)
    assert "give either" in ask("abort", code=2)
    assert "needs the admin key" in tpserve("resume", *url, TPSERVE_API_KEY=KEY)[2]
    lines = [json.loads(line) for line in (server.log_path.parent / "access").read_text().splitlines()]
    asked = [(line["path"], line["status"]) for line in lines if line["method"] == "POST"]
    paths = ["/pause", "/pause", "/resume", "/reset_prefix_cache", "/abort_request"]
    assert asked == [*((path, 200) for path in paths), ("/abort_request", 404), ("/resume", 401)]
    check_limits(server)


def check_drain_in_a_pause(server: Server) -> None:
    """What is open comes to its end."""
    client = checks.Client(server.url, {"Authorization": f"Bearer {KEY}"})
    assert checks.Client(server.url, {"Authorization": f"Bearer {ADMIN}"}).send("POST", "/pause").status == 200
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completion, max_tokens=3, ignore_eos=True)
        while not client.get("/load").json["server_load"]:
            assert not waiting.done()
        assert server.stop() == [0] and waiting.result().json["usage"]["completion_tokens"] == 3


def check_limits(server: Server) -> None:
    """A key's limit, its name in /metrics, and a deadline."""
    team = checks.Client(server.url, {"Authorization": f"Bearer {TEAM}"})
    assert [team.completion(max_tokens=1).status for _ in range(3)] == [200, 200, 429]
    refused = 'tpserve:key_requests_refused_total{api_key_name="team-a",limit="requests_per_minute",'
    metrics = team.get("/metrics").body.decode()
    assert any(line.startswith(refused) and line.endswith(" 1.0") for line in metrics.splitlines()) and TEAM not in metrics
    quick = checks.Client(server.url, {"Authorization": f"Bearer {KEY}", "X-Request-Timeout": "0.05"})
    checks.is_error(quick.completion(max_tokens=900, ignore_eos=True), 504, code="request_timeout")
    lines = [json.loads(line) for line in (server.log_path.parent / "access").read_text().splitlines()]
    assert [line["status"] for line in lines if line["key"] == "team-a"] == [200, 200, 429]


def test_errors_of_one_line(tmp_path: Path) -> None:
    code, _, error = tpserve("status", "--url", f"http://127.0.0.1:{free_port()}")
    assert code == 2 and error.count("\n") == 1 and "Connection refused (errno 111)" in error
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            line, _ = other.accept()
            with line:
                line.recv(1000)
                line.sendall(b"HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Length: 2\r\n\r\n{}")

        threading.Thread(target=answer, daemon=True).start()
        code, _, error = tpserve("status", "--url", f"127.0.0.1:{other.getsockname()[1]}")
    assert code == 2 and error.count("\n") == 1 and "is not a tpserve server" in error
    code, said, _ = tpserve("report", "--url", f"127.0.0.1:{free_port()}", cwd=tmp_path)
    (written,) = tmp_path.glob("tpserve-report-*.json")
    assert code == 0 and "about this host only" in said and json.loads(written.read_text())["here"]["packages"]["torch"]
    code, _, error = tpserve("status", "--url", "http://host:port")
    assert code == 2 and "--url must be an address such as http://127.0.0.1:8000, not 'http://host:port'" in error
    code, _, error = tpserve("report", "--output", str(tmp_path / "no" / "file"))
    assert code == 2 and "--output" in error


def test_the_doctor_on_one_node(model: str) -> None:
    code, page, error = tpserve("doctor", model, "-tp", "2", "-pp", "2", "--device", "cpu")
    assert (code, error) == (0, ""), page
    for what in (
        "fingerprint",
        "reachability",
        "clocks",
        "/dev/shm",
        "memory",
        "disk",
        "mesh",
        "transport",
        "all-reduce in stage 1",
        "all-reduce across stages",
    ):
        assert re.search(rf"^(good|slow) +{what}", page, re.MULTILINE), page
    assert re.search(r"^torch +\d", page, re.MULTILINE) and re.search(r"^4\.0 KiB +\S+ \S+ +\S+ GB/s$", page, re.MULTILINE)
    assert re.search(r"disk .* of weights load in", page)
    code, page, error = tpserve("doctor", model, "--device", "cpu", "--block-size", "0")
    assert code == 2 and error.startswith("tpserve: error: ") and error.count("\n") == 1


def test_nodes_that_differ_are_a_table_of_who_has_what(model: str, tmp_path: Path) -> None:
    """Of the doctor, and of a server's start."""
    for what in (("doctor", model), (model, "--port", str(free_port()))):
        port = free_port()
        agent = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port))
        flags = (*what, "-tp", "2", "--device", "cpu", "--block-size")
        lines = [
            [str(BIN / "torchrun"), *agent, "--node_rank", str(node), "-m", "tpserve", *flags, size]
            for node, size in enumerate(("8", "16"))
        ]
        log = tmp_path / str(port)
        with log.open("wb") as file:
            both = [subprocess.Popen(line, stdout=file, stderr=file, env={**os.environ, **CALM}) for line in lines]
            assert all(process.wait(100) == 1 for process in both)  # torchrun's own
        said = log.read_text()
        host = socket.gethostname()
        assert re.search(rf"rank 0 on {host} +rank 1 on {host}\n", said), said
        assert re.search(r"--block-size +8 +16\n", said) or re.search(r"--block-size +16 +8\n", said)
        assert "tpserve: error: rank" in said and "start every node with the same version and arguments" in said
