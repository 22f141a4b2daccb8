"""A headless Chromium over its remote debugging protocol, for tests of the page. Knows nothing of the page.

    with chromium(directory) as browser:
        tab = browser.open(url)
        tab.click("#send"); tab.wait("document.title === 'x'"); tab.screenshot(path)

A tab keeps what went wrong in it (`problems`) and every URL that it asked for (`requests`). Input is that of a device: real key
and mouse events, which only reach what is visible.
"""

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_S = 30.0
KEYS = {
    "Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowUp": (38, ""), "ArrowDown": (40, ""), "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
}  # fmt: skip
SHIFT = 8


def program() -> str | None:
    """The browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """One tab. `js` expressions may be promises."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._number = loop, socket, 0
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.posts: list[Any] = []
        """The JSON bodies that it has sent."""
        self.answers: dict[str, str] = {}
        """Bodies of event streams by a part of the URL: such requests do not reach the server."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """One command; its result."""
        return self._loop.run_until_complete(self._send(method, parameters))

    async def _send(self, method: str, parameters: dict[str, Any]) -> Any:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), WAIT_S)
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            await self._event(message)

    async def _event(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
            if body := parameters["request"].get("postData"):
                self.posts.append(json.loads(body))
        elif method == "Fetch.requestPaused":
            await self._answer(parameters)

    async def _answer(self, paused: dict[str, Any]) -> None:
        body = next((text for part, text in self.answers.items() if part in paused["request"]["url"]), None)
        command: dict[str, Any] = {"requestId": paused["requestId"]}
        method = "Fetch.continueRequest" if body is None else "Fetch.fulfillRequest"
        if body is not None:
            header = {"name": "Content-Type", "value": "text/event-stream"}
            command |= {"responseCode": 200, "responseHeaders": [header], "body": base64.b64encode(body.encode()).decode()}
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": command})

    def close(self) -> None:
        """Close the tab."""
        self.send("Page.close")
        self._loop.run_until_complete(self._socket.close())

    def answer(self, part: str, body: str) -> None:
        """From now on answer requests to a URL that holds `part` with this event stream."""
        self.send("Fetch.enable", patterns=[{"urlPattern": "*"}])
        self.answers[part] = body

    def js(self, expression: str) -> Any:
        """The value of an expression."""
        done = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"].get("exception", {}).get("description", done)
        return done["result"].get("value")

    def wait(self, expression: str, timeout_s: float = WAIT_S) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never: {expression}\n{self.problems}\n{self.js('document.body.innerText')}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        """Load a page and wait for it."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of a visible element, in CSS pixels."""
        found = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e?.scrollIntoView({{block: 'nearest'}});"
            " const r = e?.getBoundingClientRect(); return r?.width ? [r.left + r.width / 2, r.top + r.height / 2] : null; })()"
        )
        assert found, f"{selector} is not visible"
        return found[0], found[1]

    def click(self, selector: str) -> None:
        """A click in the middle of an element."""
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        """Move the pointer over an element."""
        x, y = self.place(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, text: str, selector: str = "") -> None:
        """Insert text where the focus is, or in place of what an element holds."""
        if selector:
            self.click(selector)
            self.js(f"document.querySelector({json.dumps(selector)}).select()")
        self.send("Input.insertText", text=text)

    def key(self, name: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        code, text = KEYS[name]
        common = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.send(
            "Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **({"text": text} if text else {})
        )
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def view(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """The size of the window, and what the user prefers."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        value = "dark" if dark else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, path: Path) -> None:
        """What is visible, as a PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that assistive technology sees."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]


class Browser:
    """A running browser."""

    def __init__(self, loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession, address: str) -> None:
        self._loop, self._session, self._address = loop, session, address

    def open(self, url: str) -> Tab:
        """A new tab, each with a session storage of its own, at a URL."""
        tab = Tab(self._loop, self._loop.run_until_complete(self._tab()))
        tab.open(url)
        return tab

    async def _tab(self) -> aiohttp.ClientWebSocketResponse:
        async with self._session.put(f"http://{self._address}/json/new?about:blank") as response:
            target = await response.json()
        return await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)


@contextlib.contextmanager
def chromium(directory: Path) -> Iterator[Browser]:
    """Start the browser with a profile in `directory`; end it with the block."""
    name = program()
    assert name is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
               f"--user-data-dir={directory}"]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([name, *options, "about:blank"], stdout=log, stderr=log)
    loop = asyncio.new_event_loop()
    try:
        address = _address(directory, process)
        session = loop.run_until_complete(_session())
        try:
            yield Browser(loop, session, address)
        finally:
            loop.run_until_complete(session.close())
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        loop.close()


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


def _address(directory: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the browser listens; it writes that into its profile."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(OSError):
            port, *_ = (directory / "DevToolsActivePort").read_text().splitlines()
            return f"127.0.0.1:{port}"
        assert process.poll() is None and time.monotonic() < deadline, (directory / "log").read_text(errors="replace")
        time.sleep(0.05)
