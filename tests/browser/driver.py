"""How tests use the page: it gets ready, is asked, and its fields are set."""

import json

from tests.browser.chromium import Tab

ANSWERS = ".message.assistant[aria-busy=false]"
LAST = "[...document.querySelectorAll('.message.assistant')].at(-1)"


def ready(tab: Tab) -> None:
    tab.wait("!document.querySelector('#send').disabled && document.querySelector('#model').options.length")
    if tab.js("document.querySelector('#settings').hidden"):
        tab.click("#toggle-settings")
    tab.type("0", "[data-field=temperature]")


def ask(tab: Tab, text: str, answers: int = 1) -> str:
    """Ask and wait; the text of the last of so many answers."""
    tab.type(text, "#prompt")
    tab.key("Enter")
    tab.wait(f"document.querySelectorAll('{ANSWERS}').length === {answers}")
    return answer_text(tab)


def answer_text(tab: Tab) -> str:
    return str(tab.js(f"{LAST}.querySelector(':scope > .text').textContent"))


def set_field(tab: Tab, selector: str, value: str) -> None:
    tab.js(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
        " e.dispatchEvent(new Event('change')); })()"
    )
