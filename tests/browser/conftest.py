"""A browser, a real server with the built-in model, and a fresh page of it. Skipped where there is no Chromium."""

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Browser, Tab, chromium
from tests.browser.driver import ready
from tests.server import Server, free_port, running, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    command = serve("--device", "cpu", "-tp", "1", "-pp", "2", "--nproc-per-node", "2", port=port)
    with running([command], port, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def tab(server: Server, browser: Browser) -> Iterator[Tab]:
    """A fresh page of the ready server, wide enough that the settings are open. Nothing may go wrong in it."""
    tab = browser.open(server.url + "/")
    ready(tab)
    yield tab
    tab.wait("true")
    assert tab.problems == []
    assert all(url.startswith((server.url, "data:", "about:")) for url in tab.requests), tab.requests
    tab.close()
