"""The chat of the page in headless Chromium, with real keys and clicks, against a real server with the built-in model.

`make test-page` runs it; it is skipped where there is no Chromium. tests/http/test_page.py has what needs no browser.
"""

import json
import subprocess
import sys
import time

import pytest

from tests.browser.chromium import SHIFT, Tab, program
from tests.browser.driver import ANSWERS, LAST, answer_text, ask, set_field
from tests.server import Server

pytestmark = pytest.mark.skipif(program() is None, reason="there is no Chromium (Debian: apt-get install chromium)")
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
MARKDOWN = f"""# Title {HOSTILE}
A **bold {HOSTILE}** word and `code {HOSTILE}`.

- one
- two
  1. deeper

```html
{HOSTILE}
```
[a link](javascript:alert(1)) and **never closed"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "<b>Rome</b>"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
REASONING = [
    {"delta": {"role": "assistant", "content": ""}}, {"delta": {"reasoning_content": "First I **think**."}},
    {"delta": {"content": "Then I "}}, {"delta": {"content": "answer."}}, {"delta": {}, "finish_reason": "stop"},
]  # fmt: skip


def test_an_answer_comes_in_pieces_and_can_be_stopped(tab: Tab, server: Server) -> None:
    tab.js(
        "(() => { window.lengths = new Set(); new MutationObserver(() => window.lengths.add(document.querySelector("
        "'.message.assistant > .text')?.textContent.length)).observe(document.querySelector('#messages'), "
        "{subtree: true, childList: true, characterData: true}); })()"
    )
    set_field(tab, "#schema", json.dumps({"type": "string", "minLength": 1500}))
    tab.type("Tell me all about Tidewick", "#prompt")
    tab.key("Enter")
    tab.wait("window.lengths.size > 5")
    assert tab.js("document.querySelector('#send').hidden"), "one answer at a time"
    tab.key("Escape")
    tab.wait(f"document.querySelector('{ANSWERS}')")
    assert "stopped" in tab.js(f"{LAST}.querySelector('.note').textContent")
    kept = answer_text(tab)
    assert 0 < len(kept) < 1500
    deadline = time.monotonic() + 10
    while not any("requests_running{" in line and line.endswith(" 0.0") for line in server.get("/metrics")[1].splitlines()):
        assert time.monotonic() < deadline, "the server goes on writing"
        time.sleep(0.1)
    spoken = tab.js("document.querySelector('#announcer').innerText")
    assert "Stopped." in spoken
    tab.click(".message.assistant [aria-label=Regenerate]")
    tab.wait("document.querySelector('.message[data-running] > .text').textContent.length > 5")
    tab.send("Page.reload")
    tab.wait("document.querySelector('.message.assistant .note')?.textContent === 'stopped by a reload'")
    assert not tab.js("document.querySelector('[data-running]')")
    tab.click("#prompt")
    tab.key("Enter", SHIFT)
    assert tab.js("document.querySelector('#prompt').value") == "\n", "Shift+Enter is a line break"


def test_regenerate_and_edit(tab: Tab) -> None:
    first = ask(tab, "Who is Mina?")
    ask(tab, "What does she like?", answers=2)
    tab.click(".message.assistant:nth-child(2) [aria-label=Regenerate]")
    tab.wait(f"document.querySelectorAll('{ANSWERS}').length === 1 && document.querySelectorAll('.message').length === 2")
    assert answer_text(tab) == first, "greedy: the same answer once more"
    tab.key("ArrowUp")
    tab.wait("document.querySelector('form.edit textarea')?.value === 'Who is Mina?'")
    tab.key("Escape")
    tab.click(".message.user [aria-label^=Edit]")
    tab.type("Who is Hugo?", "form.edit textarea")
    tab.click("form.edit .main")
    tab.wait(f"document.querySelectorAll('{ANSWERS}').length === 1 && !document.querySelector('form.edit')")
    assert tab.js("document.querySelector('.message.user > .text').textContent") == "Who is Hugo?"
    assert answer_text(tab) != first and tab.posts[-1]["messages"] == [{"role": "user", "content": "Who is Hugo?"}]
    tab.send("Page.reload")
    tab.wait("document.querySelectorAll('.message').length === 2")
    tab.click("#new-chat")
    tab.wait("document.querySelectorAll('.message').length === 0")


def test_settings_are_what_is_sent(tab: Tab) -> None:
    tab.type("You are Mina.", "#system")
    for name, value in {"top_p": "0.9", "top_k": "5", "seed": "7", "max_tokens": "4", "stop": "moon\nsun"}.items():
        set_field(tab, f"[data-field={name}]", value)
    ask(tab, "Hello")
    sent = tab.posts[-1]
    assert sent["messages"][0] == {"role": "system", "content": "You are Mina."}
    fields = {"temperature": 0, "top_p": 0.9, "top_k": 5, "seed": 7, "max_tokens": 4, "stop": ["moon", "sun"], "stream": True}
    assert fields.items() <= sent.items() and sent["model"] == "tidewick"
    assert not {"response_format", "tools", "tool_choice", "min_p", "logprobs"} & set(sent)
    set_field(tab, "[data-field=top_p]", "7")
    ask(tab, "Hello", answers=2)
    assert "top_p" in tab.js(f"{LAST}.querySelector('.error').textContent"), "what the server refuses is shown"
    tab.problems.clear()  # the browser logs every 400


def test_what_a_model_writes_is_no_markup(tab: Tab) -> None:
    tab.type("{", "#schema")
    tab.type("Hello", "#prompt")
    tab.key("Enter")
    tab.wait("document.querySelector('#schema-error').textContent.includes('no JSON')")
    assert tab.js("document.activeElement.id") == "schema" and not tab.js("document.querySelector('.message')")
    set_field(tab, "#schema", json.dumps({"const": HOSTILE}))
    tab.click("#send")
    tab.wait(f"document.querySelector('{ANSWERS}')")
    assert json.loads(answer_text(tab)) == HOSTILE
    tab.click(".message.assistant [aria-label^=Edit]")
    tab.type(MARKDOWN, "form.edit textarea")
    tab.click("form.edit .main")
    tab.wait(f"{LAST}.querySelector('strong')")
    within = f"{LAST}.querySelector(':scope > .text')"
    assert tab.js(f"[...{within}.querySelectorAll('img, script, a, b')].length") == 0
    assert tab.js("document.title") != "owned"
    assert tab.js(f"[...{within}.querySelectorAll('strong')].map(e => e.textContent)") == [f"Title {HOSTILE}", f"bold {HOSTILE}"]
    assert tab.js(f"{within}.querySelector('p code').textContent") == f"code {HOSTILE}"
    assert tab.js(f"{within}.querySelector('pre code').textContent") == HOSTILE
    assert tab.js(f"{within}.querySelectorAll(':scope > ul > li').length") == 2
    assert tab.js(f"{within}.querySelector('ul ol li').textContent") == "deeper"
    assert "[a link](javascript:alert(1)) and **never closed" in answer_text(tab)


def test_the_policy_holds_in_a_browser(tab: Tab) -> None:
    tried = tab.js("(() => { try { document.body.innerHTML = '<p>'; return 'allowed' } catch (e) { return e.name } })()")
    assert tried == "TypeError"
    assert tab.js("fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'refused')") == "refused"
    tab.wait("true")
    assert any("Content Security Policy" in problem for problem in tab.problems)
    tab.problems.clear()
    tab.requests = [url for url in tab.requests if ":9/" not in url]


def test_probabilities_of_tokens(tab: Tab) -> None:
    plain = ask(tab, "Who is Mina?")
    tab.click("#show-tokens")
    ask(tab, "Who is Mina?", answers=2)
    tokens = tab.js(f"[...{LAST}.querySelectorAll('.token')].map(e => e.textContent)")
    assert len(tokens) > 3 and "".join(tokens).startswith(plain[:3])
    tab.hover(".token:nth-child(2)")
    tab.wait("!document.querySelector('#tip').hidden")
    tip = tab.js("document.querySelector('#tip').innerText")
    assert tip.count("%") == 6 and json.dumps(tokens[1]) in tip
    tab.js(f"{LAST}.querySelector('[role=group]').focus()")
    tab.key("ArrowRight")
    assert tab.js("document.querySelector('.token.current').textContent") == tokens[2]
    tab.key("Escape")
    assert tab.js("document.querySelector('#tip').hidden")
    tab.click(".message:nth-child(4) footer button:last-of-type")
    assert tab.js(f"{LAST}.querySelectorAll('.token').length") == 0


def test_tool_calls_and_their_results(tab: Tab) -> None:
    set_field(tab, "#tools", json.dumps([WEATHER]))
    set_field(tab, "[data-field=tool_choice]", "required")
    ask(tab, "What is the weather in Paris?")
    assert tab.js(f"{LAST}.querySelector('.call h4').textContent") == "calls get_weather"
    arguments = json.loads(tab.js(f"{LAST}.querySelector('.call pre').textContent"))
    assert arguments["city"] in ("Paris", "<b>Rome</b>") and tab.js("document.querySelectorAll('.message b').length") == 0
    set_field(tab, "[data-field=tool_choice]", "none")
    calls = tab.js("document.querySelectorAll('.call').length")
    for at in range(calls):
        tab.js(f"document.querySelectorAll('.results textarea')[{at}].value = 'sunny'")
    tab.click(".results button")
    tab.wait(f"document.querySelectorAll('{ANSWERS}').length === 2")
    history = tab.posts[-1]["messages"]
    assert [message["role"] for message in history] == ["user", "assistant", *["tool"] * calls]
    assert history[2] == {"role": "tool", "tool_call_id": history[1]["tool_calls"][0]["id"], "content": "sunny"}


def test_reasoning_is_folded(tab: Tab) -> None:
    chunks = [json.dumps({"choices": [{"index": 0} | choice]}) for choice in REASONING]
    tab.answer("v1/chat/completions", "".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]))
    assert ask(tab, "Think") == "Then I answer."
    details = f"{LAST}.querySelector('details.reasoning')"
    assert tab.js(f"{details}.open") is False and tab.js(f"{details}.querySelector('strong').textContent") == "think"
    tab.click(".message.assistant details.reasoning summary")
    assert tab.js(f"{details}.open") is True
    tab.answers["v1/chat/completions"] = 'data: {"error": {"message": "the rank has ended", "code": 500}}\n\n'
    ask(tab, "Again", answers=2)
    assert tab.js(f"{LAST}.querySelector('.error').textContent") == "the rank has ended"
    tab.answers["v1/chat/completions"] = f"data: {chunks[0]}\n\n"
    ask(tab, "Again", answers=3)
    assert "cut" in tab.js(f"{LAST}.querySelector('.error').textContent")


def test_the_copied_requests_run(tab: Tab) -> None:
    for name, value in {"seed": "5", "max_tokens": "24", "top_k": "20", "temperature": "1"}.items():
        set_field(tab, f"[data-field={name}]", value)
    tab.type("It's \"Mina\": `$HOME` \\ she's é 🐝", "#system")
    answer = ask(tab, "What's new, Mina?")
    texts = {}
    for name in ("curl", "python"):
        tab.click(f"#copy-{name}")
        tab.wait("document.querySelector('#snippet').open")
        texts[name] = tab.js("document.querySelector('#snippet-text').value")
        tab.click("#snippet form > .row > button:last-child")
    done = subprocess.run(["bash", "-c", texts["curl"]], capture_output=True, text=True, timeout=60, check=True).stdout
    events = [json.loads(line[6:]) for line in done.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]) == answer
    python = subprocess.run([sys.executable, "-c", texts["python"]], capture_output=True, text=True, timeout=60, check=True)
    assert python.stdout == answer + "\n"
