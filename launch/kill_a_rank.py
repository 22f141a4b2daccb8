"""A stream that goes on while a rank is killed: the demonstration of the README.

    python launch/kill_a_rank.py [URL] [RANK]

Asks the server at URL (default http://127.0.0.1:8000, on this machine) twice for the same text, and kills -9 rank RANK (default
1) in the middle of the second answer. Prints the stream with the time in front, and whether both answers are the same. Standard
library only. Exit code 1 when they differ.
"""

import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

BODY = {"prompt": "Once upon a time", "max_tokens": 260, "ignore_eos": True, "temperature": 0.8, "seed": 11, "stream": True}
KILL_AT = 150
"""Tokens of the second answer before the kill."""


def events(url: str) -> Iterator[str]:
    """The text of each event of one stream."""
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(f"the server answers with an error: {event['error']['message']}")
                yield event["choices"][0]["text"]


def info(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/server_info") as response:
        return json.load(response)


def main(url: str = "http://127.0.0.1:8000", rank: str = "1") -> int:
    undisturbed = "".join(events(url))
    pid = info(url)["ranks"][int(rank)]["pid"]
    begin_s = last_s = time.monotonic()
    text, line, gap_s = "", "", 0.0
    for count, piece in enumerate(events(url), 1):
        now_s = time.monotonic()
        gap_s, last_s = max(gap_s, now_s - last_s if count > 1 else 0.0), now_s
        text, line = text + piece, line + piece
        if len(line) > 90 or count == KILL_AT:
            say(now_s - begin_s, line)
            line = ""
        if count == KILL_AT:
            os.kill(pid, signal.SIGKILL)
            say(now_s - begin_s, f"--- kill -9 {pid}: that was rank {rank} ---")
    say(time.monotonic() - begin_s, line)
    same = text == undisturbed
    epoch = info(url)["epoch"]
    verdict = "the same text" if same else "NOT the same text"
    sys.stdout.write(f"\n{verdict} as without the kill; longest gap {gap_s:.2f} s; epoch {epoch} runs\n")
    return 0 if same else 1


def say(at_s: float, text: str) -> None:
    sys.stdout.write(f"{at_s:6.2f} s  {' '.join(text.split())}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
