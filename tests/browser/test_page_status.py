"""The status view in headless Chromium; keys, a proxy, a phone, and what screen readers get."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from aiohttp import ClientSession, web

from tests.browser.chromium import Browser, Tab, program
from tests.browser.driver import ANSWERS, LAST, answer_text, ask, ready
from tests.http.inprocess import serving
from tests.server import Server, free_port, running, serve

pytestmark = pytest.mark.skipif(program() is None, reason="there is no Chromium (Debian: apt-get install chromium)")


def test_names_for_screen_readers_and_keys(tab: Tab) -> None:
    ask(tab, "Who is Mina?")
    spoken = tab.js("document.querySelector('#announcer').textContent")
    assert answer_text(tab) in spoken and spoken.endswith("The answer is complete.")
    assert tab.js("document.querySelector('#announcer').ariaLive") == "polite"
    found = tab.accessible()
    used = {"button", "textbox", "combobox", "checkbox", "tab", "spinbutton", "image", "article", "log", "tablist"}
    assert used - {"image"} <= {role for role, _ in found}
    assert not [role for role, name in found if role in used and not name], found
    assert {("tab", "Chat"), ("log", "Conversation"), ("textbox", "Message"), ("article", "Model")} <= set(found)
    tab.js("document.querySelector('#tab-chat').focus()")
    tab.key("ArrowRight")
    tab.wait("!document.querySelector('#view-status').hidden && document.activeElement.id === 'tab-status'")
    tab.wait("document.querySelectorAll('.shard').length === 2")
    assert not [role for role, name in tab.accessible() if role in used and not name]
    assert ("tabpanel", "Status") in tab.accessible()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_and_the_dark(tab: Tab, dark: bool) -> None:
    ask(tab, "Who is Mina? " + "x" * 300)
    tab.click("#close-settings")
    tab.view(360, 700, phone=True, dark=dark)
    for name in ("chat", "status"):
        tab.click(f"#tab-{name}")
        tab.wait(f"!document.querySelector('#view-{name}').hidden")
        if name == "status":
            tab.wait("document.querySelectorAll('.shard').length === 2")
        wide = "[...document.querySelectorAll('body, main, #messages, .message, #view-status, #stages')]"
        assert (
            tab.js(f"{wide}.filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.id || e.className)") == []
        )
        assert tab.js("innerWidth") == 360
    back = tab.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back.strip("rgb()").split(", "))) < 150) == dark


def test_a_server_with_a_key(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, api_key="s3cret") as server:
        tab = browser.open(server.url + "/")
        tab.wait("document.querySelector('#keys').open")
        tab.key("Escape")
        time.sleep(0.3)
        assert not tab.js("document.querySelector('#keys').open"), "who closes it without a key is left alone"
        tab.type("Hello", "#prompt")
        tab.key("Enter")
        tab.wait("document.querySelector('#keys').open")
        tab.type("wrong", "#api-key")
        tab.key("Enter")
        tab.wait("document.querySelector('#keys').open && document.querySelector('#api-key').value === 'wrong'")
        tab.type("s3cret", "#api-key")
        tab.key("Enter")
        tab.wait("document.querySelector('#model').options.length === 2")
        assert "missing or wrong" in tab.js(f"{LAST}.querySelector('.error').textContent")
        tab.click(".message.assistant [aria-label=Regenerate]")
        tab.wait(f"{LAST}.querySelector('.error').hidden && document.querySelector('{ANSWERS}')")
        assert answer_text(tab) and not tab.js(f"{LAST}.querySelector('.error').textContent")
        tab.click("#copy-curl")
        assert "$TPSERVE_API_KEY" in (text := tab.js("document.querySelector('#snippet-text').value")) and "s3cret" not in text
        tab.close()


def test_behind_a_proxy_with_a_prefix(browser: Browser, server: Server) -> None:
    with proxy(server.url, "/llm") as url:
        for path in ("/llm/", "/llm"):
            tab = browser.open(url + path)
            ready(tab)
            assert ask(tab, "Who is Mina?")
            tab.click("#tab-status")
            tab.wait("document.querySelectorAll('.shard').length === 2")
            assert tab.problems == [] and all(each.startswith((url + "/llm", "data:")) for each in tab.requests[1:])
            tab.close()


def test_an_answer_that_it_cannot_read_does_not_end_the_status(tab: Tab) -> None:
    tab.answer("server_info", "{}")
    tab.click("#tab-status")
    tab.wait("true")
    count = len([url for url in tab.requests if "readyz" in url])
    deadline = time.monotonic() + 30
    while len([url for url in tab.requests if "readyz" in url]) < count + 3:
        assert time.monotonic() < deadline, "the page has stopped asking"
        tab.js("1")
        time.sleep(0.1)
    assert tab.problems and tab.js("document.querySelector('#state').textContent") == "ready"
    tab.problems.clear()


@contextmanager
def proxy(target: str, prefix: str) -> Iterator[str]:
    """A reverse proxy that serves `target` below a prefix."""

    async def forward(request: web.Request) -> web.StreamResponse:
        path = request.path.removeprefix(prefix) or "/"
        headers = {name: value for name, value in request.headers.items() if name in ("Content-Type", "Origin", "Authorization")}
        async with (
            ClientSession() as session,
            session.request(request.method, target + path, data=await request.read(), headers=headers) as answer,
        ):
            kept = ("Content-Type", "Content-Security-Policy")
            response = web.StreamResponse(status=answer.status, headers={n: v for n, v in answer.headers.items() if n in kept})
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            return response

    async def start() -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.router.add_route("*", prefix + "{rest:.*}", forward)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, int(runner.addresses[0][1])

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_the_status_of_a_start_and_of_a_recovery(browser: Browser, tmp_path: Path) -> None:
    """A page that is open before the first rank is there sees the phases, the ranks, the charts, and a rank that is killed."""
    port = free_port()
    command = serve("--device", "cpu", "-tp", "2", "-pp", "2", "--nproc-per-node", "4", port=port)
    with running([command], port, tmp_path / "log", ready=False) as server:
        wait_for_port(server)
        tab = browser.open(f"{server.url}/#status")
        tab.wait("document.querySelector('#state').dataset.state === 'starting'")
        assert tab.js("!document.querySelector('#loading').hidden && document.querySelectorAll('#phases li').length > 0")
        server.wait_ready()
        tab.wait("document.querySelector('#state').textContent === 'ready' && document.querySelector('#loading').hidden")
        tab.wait("document.querySelectorAll('.stage').length === 2 && document.querySelectorAll('.shard.good').length === 4")
        memory = tab.js("document.querySelector('.memory').ariaLabel")
        assert "weights" in memory and "KV cache" in memory and "GiB" in memory
        server.complete("Once upon a time", max_tokens=50)
        label = "document.querySelector('.chart svg').ariaLabel"
        tab.wait(f"/^Tokens a second: generated [0-9.]+, prompt/.test({label}) && !/generated 0.0/.test({label})")
        tab.wait("/first token: median [0-9.]+ m?s/.test(document.querySelectorAll('.chart svg')[1].ariaLabel)")
        os.kill(server.rank_pids()[1], signal.SIGKILL)
        tab.wait("document.querySelector('#faults li')?.textContent.includes('recovered in')")
        assert "rank 1" in tab.js("document.querySelector('#faults li').textContent")
        assert tab.js("document.querySelector('#recoveries').textContent").startswith("1 so far")
        tab.wait("document.querySelectorAll('.shard.good').length === 4")
        assert tab.js("document.querySelector('#server-log').textContent").count("\n") > 3
        refused = [problem for problem in tab.problems if "503" not in problem]
        assert refused == []
        tab.close()


def wait_for_port(server: Server) -> None:
    """Wait until the frontend answers, which it does long before a rank is there."""
    deadline = time.monotonic() + 60
    while True:
        with suppress(OSError):
            server.get("/livez", 5.0)
            return
        assert time.monotonic() < deadline, server.log
        time.sleep(0.02)
