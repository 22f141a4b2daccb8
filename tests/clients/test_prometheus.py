"""Prometheus itself: promtool on a live /metrics, and every query of the dashboard in a server of Prometheus that scrapes it.

Skipped where Debian's package `prometheus` is not installed.
"""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None, reason="needs promtool and prometheus"
)

SERVER = os.environ["TPSERVE_URL"].removesuffix("/v1")
PROMETHEUS = os.environ["TPSERVE_FREE_ADDRESS"]
"""An address of this host that nobody listens on."""
GRAFANA = Path(__file__).resolve().parents[2] / "launch" / "grafana"
VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}
READY_S = 60.0
KNOWN = re.compile(r"[\w:]+ metric names should not contain ':'|tpserve:iteration_tokens_total non-counter metrics should not .*")
"""What promtool says of vLLM's names: the colon, and a histogram whose name ends in _total."""
MAY_BE_EMPTY = ("expert_tokens", "recovery_seconds", "request_success")
"""Series that begin with an expert's first token, with a fault, and with another way to end."""


def queries() -> list[str]:
    """The expressions of the dashboard, with its variables filled in."""
    dashboard = json.loads((GRAFANA / "tpserve.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for name, value in VARIABLES.items():
        found = [query.replace(name, value) for query in found]
    return found


def get(url: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of Prometheus that has scraped the metrics of some requests several times; its URL."""
    where = tmp_path_factory.mktemp("prometheus")
    config = {"scrape_configs": [{"job_name": "tpserve", "static_configs": [{"targets": [SERVER.removeprefix("http://")]}]}]}
    (where / "config.yml").write_text(json.dumps({"global": {"scrape_interval": "1s"}, **config}))
    options = [f"--config.file={where / 'config.yml'}", f"--storage.tsdb.path={where / 'data'}"]
    with (where / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *options, f"--web.listen-address={PROMETHEUS}"], stdout=log, stderr=log)
    try:
        url, deadline_s = f"http://{PROMETHEUS}", time.monotonic() + READY_S
        count = "count_over_time(tpserve:num_requests_running[1m]) > 4"
        while True:
            get(f"{SERVER}/v1/completions", b'{"prompt": "Once", "max_tokens": 4}')
            try:
                if result(url, count):
                    break
            except OSError:
                pass
            assert process.poll() is None and time.monotonic() < deadline_s, (where / "log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def result(url: str, query: str) -> Any:
    return json.loads(get(f"{url}/api/v1/query?query={quote(query)}"))["data"]["result"]


def test_promtool_reads_the_metrics() -> None:
    checked = subprocess.run(["promtool", "check", "metrics"], input=get(f"{SERVER}/metrics"), capture_output=True, check=False)
    lines = checked.stderr.decode().splitlines() + checked.stdout.decode().splitlines()
    assert checked.returncode in (0, 3) and not [line for line in lines if not KNOWN.fullmatch(line)]


def test_promtool_reads_the_queries(tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:{number}", "expr": query} for number, query in enumerate(queries())]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", path], check=True)
    subprocess.run(["promtool", "check", "config", GRAFANA / "prometheus.yaml"], check=True)


@pytest.mark.parametrize("query", queries())
def test_each_query_has_an_answer(prometheus: str, query: str) -> None:
    found = result(prometheus, query)
    if not any(name in query for name in MAY_BE_EMPTY):
        assert found and all(len(series["value"]) == 2 for series in found)
