"""Draw the pictures of docs/page.md, of a server of two nodes on this host: python -m tests.browser.screenshots"""

import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from tests.browser.chromium import Tab, chromium
from tests.server import Server, free_port, running, torchrun

DOCS = Path(__file__).resolve().parents[2] / "docs"
ANSWERS = ".message.assistant[aria-busy=false]"


def commands(port: int) -> list[list[str]]:
    """Two nodes of two ranks each."""
    meeting = free_port()
    where = ["--master-addr", "127.0.0.1", "--master-port", str(meeting), "--max-restarts", "3", "--nnodes", "2", "--node-rank"]
    flags = ("--device", "cpu", "-tp", "2", "-pp", "2")
    return [torchrun(*flags, ranks=2, port=port, options=[*where, str(node)]) for node in (0, 1)]


def ask(tab: Tab, text: str) -> None:
    count = tab.js(f"document.querySelectorAll('{ANSWERS}').length")
    tab.type(text, "#prompt")
    tab.key("Enter")
    tab.wait(f"document.querySelectorAll('{ANSWERS}').length === {count + 1}")


def chat(tab: Tab) -> None:
    """A conversation with the probabilities of a token."""
    tab.view(1000, 640)
    tab.wait("!document.querySelector('#send').disabled && document.querySelector('#model').options.length")
    for name, value in (("temperature", "0.7"), ("seed", "3")):
        tab.js(f"document.querySelector('[data-field={name}]').value = '{value}'")
    ask(tab, "Who is Mina?")
    tab.js("document.querySelector('#show-tokens').checked = true")
    ask(tab, "What does she like?")
    if tab.js("document.querySelector('#settings').hidden"):
        tab.click("#toggle-settings")
    tab.hover(".token:nth-child(3)")
    tab.screenshot(DOCS / "page-chat.png")


def phone(tab: Tab) -> None:
    """The same on a phone, in the dark."""
    tab.click("#close-settings")
    tab.view(360, 640, phone=True, dark=True)
    tab.screenshot(DOCS / "page-phone.png")


def status(tab: Tab, server: Server) -> None:
    """Two nodes under a load."""
    tab.view(1000, 720)
    tab.click("#tab-status")
    stop = threading.Event()

    def load(size: int) -> None:
        while not stop.is_set():
            server.post("/v1/completions", {"prompt": "Once upon a time", "max_tokens": size})

    threads = [threading.Thread(target=load, args=(size,)) for size in (20, 60, 90)]
    for thread in threads:
        thread.start()
    tab.wait("document.querySelector('.line').getAttribute('points').split(' ').length > 24", 120.0)
    tab.screenshot(DOCS / "page-status.png")
    stop.set()
    for thread in threads:
        thread.join()


def main() -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        profile = Path(directory) / "profile"
        profile.mkdir()
        with running(commands(port), port, Path(directory) / "log") as server, chromium(profile) as browser:
            tab = browser.open(server.url + "/")
            chat(tab)
            phone(tab)
            status(tab, server)
            server.stop()
    for name in ("chat", "phone", "status"):
        path = DOCS / f"page-{name}.png"
        if pngquant := shutil.which("pngquant"):
            subprocess.run([pngquant, "--force", "--ext", ".png", "64", str(path)], check=True)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
