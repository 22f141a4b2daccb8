"""What grammars made to cost much cost the others: gaps between the tokens of four streams before, during and after each of them.

    python -m tests.bench_bombs                     the built-in model on two CPU ranks
    python -m tests.bench_bombs MODEL FLAGS...      another one

A gap is the time between two events of a stream as its client sees them. All numbers are of one run; on a machine with other work
compare those of a bomb with those before and after it.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.server import Server, free_port, running, serve

STREAMS, CALM_S = 4, 5.0
Form = dict[str, Any]


class Streams:
    """Bystanders that generate without end, and the gaps between their tokens with the time at which each ended."""

    def __init__(self, server: Server) -> None:
        self._server, self._over = server, threading.Event()
        self._gaps: list[tuple[float, float]] = []
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(STREAMS)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        while not self._over.is_set():
            last = None
            body = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True, "seed": seed}
            for _ in self._server.stream("/v1/completions", body):
                now = time.monotonic()
                if last is not None:
                    self._gaps.append((now, now - last))
                last = now
                if self._over.is_set():
                    return

    def since(self, begin: float) -> str:
        """The gaps from a time on, in ms."""
        gaps = sorted(gap * 1e3 for at, gap in list(self._gaps) if at >= begin) or [0.0]
        p50, p99 = statistics.median(gaps), gaps[len(gaps) * 99 // 100]
        return f"p50 {p50:6.1f}  p99 {p99:7.1f}  max {gaps[-1]:7.1f}  ({len(gaps)} tokens)"

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)


def schemas() -> dict[str, list[Form]]:
    """Schemas that are small and describe much, or are large."""
    levels: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"type": "object", "properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "abc"}}] * 3}
        for i in range(30)
    }
    options = [{"type": "object", "properties": {f"p{i}": {"const": i}}, "required": [f"p{i}"]} for i in range(10)]
    chain: dict[str, Any] = {f"c{i}": {"$ref": f"#/$defs/c{i + 1}"} for i in range(2000)}
    wide = {f"p{i}": {"type": "string", "pattern": f"^[a-z]{{0,40}}{i}$"} for i in range(2000)}
    huge = {"type": "array", "maxItems": 10**9, "items": {"type": "array", "maxItems": 10**9, "items": {"type": "string"}}}
    return {
        "nested anyOf, 30 levels of $ref": [{"json": {"$defs": {**levels, "d30": {"type": "string"}}, "$ref": "#/$defs/d0"}}],
        "allOf of anyOf, 10^6 combinations": [{"json": {"allOf": [{"anyOf": options}] * 6}}],
        "a chain of 2,000 $ref": [{"json": {"$defs": {**chain, "c2000": {"type": "string"}}, "$ref": "#/$defs/c0"}}],
        "maxItems 10^9 of maxItems 10^9": [{"json": huge}],
        "2,000 optional properties with patterns": [{"json": {"type": "object", "properties": wide}}],
        "an enum of 1 MB": [{"json": {"enum": [f"{i:032x}" for i in range(30_000)]}}],
        "a choice of 1 MB": [{"choice": [f"{i:032x}" for i in range(30_000)]}],
        "200 requests without a schema at once": [{}] * 200,
        "200 different schemas at once": [
            {
                "json": {
                    "type": "object",
                    "properties": {f"k{i}": {"enum": [f"v{i}"]}, "n": {"type": "number"}},
                    "required": [f"k{i}"],
                }
            }
            for i in range(200)
        ],
    }


def expressions() -> dict[str, list[Form]]:
    """Regular expressions and grammars that are small and describe much."""
    return {
        "nested repetitions": [{"regex": "(((a{1,300}){1,300}){1,300}b?){1,300}"}],
        "20,000 brackets": [{"regex": "(" * 20_000 + ")" * 20_000}],
        "2^40 states": [{"regex": "([ab]*a[ab]{40}|[a-z ]*e[a-z ]{40}|.*o.{40}){1,100}"}],
        "2^40 states in 8 rows": [{"regex": f"([ab]*a[ab]{{40}}|[a-z ]*e[a-z ]{{40}}|.*o.{{4{i}}}){{1,100}}"} for i in range(8)],
        "an ambiguous grammar": [{"grammar": 'start: e\ne: e e | "a" | "b" | e "a" e | /[a-z ]/ | ""\n'}],
        "an ambiguous grammar in 8 rows": [
            {"grammar": f'start: e\ne: e e | "a" | "b" | e "a" e | /[a-z ]/ | "{i}"\n'} for i in range(8)
        ],
    }


def send(server: Server, form: Form) -> str:
    body = {"prompt": "a", "max_tokens": 30, "ignore_eos": True, **({"structured_outputs": form} if form else {})}
    status, answer = server.post("/v1/completions", body, timeout_s=300)
    return str(status) if status == 200 else f"{status} {answer['error']['message'][:90]}"


def main() -> None:
    port, command = free_port(), sys.argv[1:] or ["-tp", "2", "--device", "cpu"]
    with (
        tempfile.TemporaryDirectory() as place,
        running([serve(*command, port=port)], port, Path(place) / "log", env={"OMP_NUM_THREADS": "1"}) as server,
    ):
        streams = Streams(server)
        time.sleep(3)
        begin = time.monotonic()
        time.sleep(2 * CALM_S)
        print(f"{'calm':42} {streams.since(begin)}", flush=True)
        for name, forms in {**schemas(), **expressions()}.items():
            begin = time.monotonic()
            with ThreadPoolExecutor(len(forms)) as pool:
                answers = Counter(pool.map(lambda form: send(server, form), forms))
            took_s = time.monotonic() - begin
            time.sleep(max(0.0, CALM_S - took_s))
            print(f"{name:42} {streams.since(begin)}  {took_s:.1f} s: {dict(answers)}", flush=True)
        begin = time.monotonic()
        time.sleep(2 * CALM_S)
        print(f"{'calm again':42} {streams.since(begin)}", flush=True)
        streams.end()


if __name__ == "__main__":
    main()
