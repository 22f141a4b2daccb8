"""A stream that survives `kill -9` of a rank, with the standard library alone: the demonstration of the README.

    python docs/examples/kill_a_rank.py [URL]

Asks a server on this machine twice for the same text and kills rank 1 in the middle of the second answer. Prints the stream
with the time in front. Exit code 1 when the two answers differ.
"""

import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
BODY = {"prompt": "Once upon a time", "max_tokens": 260, "ignore_eos": True, "temperature": 0.8, "seed": 11, "stream": True}


def stream() -> Iterator[str]:
    request = urllib.request.Request(f"{URL}/v1/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"})
    for line in urllib.request.urlopen(request):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                sys.exit(f"the server answers with an error: {event['error']['message']}")
            yield event["choices"][0]["text"]


def server_info() -> Any:
    return json.load(urllib.request.urlopen(f"{URL}/server_info"))


def show(words: str) -> None:
    print(f"{time.monotonic() - begin_s:6.2f} s  {' '.join(words.split())}", flush=True)


undisturbed, pid = "".join(stream()), server_info()["ranks"][1]["pid"]
begin_s = last_s = time.monotonic()
text, line, gap_s, killed = "", "", 0.0, False
for piece in stream():
    gap_s, last_s = max(gap_s, time.monotonic() - last_s if text else 0.0), time.monotonic()
    text, line = text + piece, line + piece
    kills = not killed and len(text) > len(undisturbed) / 2
    if len(line) > 90 or kills:
        show(line)
        line = ""
    if kills:
        os.kill(pid, signal.SIGKILL)
        show(f"--- kill -9 {pid}: that was rank 1 ---")
        killed = True
show(line)
verdict = "the same text" if text == undisturbed else "NOT the same text"
print(f"\n{verdict} as without the kill; longest gap {gap_s:.2f} s; epoch {server_info()['epoch']} runs")
sys.exit(text != undisturbed)
