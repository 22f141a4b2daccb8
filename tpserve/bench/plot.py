"""A plot of a load as SVG, written by hand: the distribution of its latencies, and its throughput over time. Pure.

Upper panel: the cumulative distribution of each metric, on a logarithmic axis. Lower panel: generated tokens per second over the
time of the load. A plotting library would be the largest dependency, for two panels of lines.
"""

import math
from collections.abc import Sequence
from html import escape

from tpserve.bench.report import percentile
from tpserve.bench.request_timing import LABELS, Metric, RequestTiming, seconds

WIDTH, HEIGHT = 760, 620
LEFT, RIGHT, TOP, PANEL, GAP = 70, 30, 50, 220, 80
COLOURS: dict[Metric, str] = {"ttft": "#1f77b4", "tpot": "#2ca02c", "itl": "#9467bd", "e2el": "#d62728"}
BINS = 60
MIN_MS = 0.01
MAX_STEPS = 400
"""Steps of a curve; more are not visible."""
INK, PLAIN = "#222", "#444"
DARK = (
    "@media (prefers-color-scheme: dark) "
    "{ .page { fill: #161616 } .ink { fill: #ddd } .grid { stroke: #383838 } .line { stroke: #aaa } }"
)
"""What changes where the reader prefers dark pages; all else stands in the elements themselves."""
Point = tuple[float, float]


def svg(title: str, timings: Sequence[RequestTiming], runs: int = 1) -> str:
    """The plot of completed requests; two empty panels without any. `runs`: the number of equal loads in `timings`, whose
    throughput is averaged."""
    return document(title, [*_latency_panel(timings), *_throughput_panel(timings, runs)], HEIGHT)


def document(title: str, parts: Sequence[str], height: int) -> str:
    """A picture with its title."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f"<style>{DARK}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" fill="white"/>',
        text(LEFT, 24, title, size=14),
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _latency_panel(timings: Sequence[RequestTiming]) -> list[str]:
    logs = {
        metric: sorted(math.log10(max(value * 1e3, MIN_MS)) for value in values) for metric, values in seconds(timings).items()
    }
    all_values = [value for values in logs.values() for value in values] or [0.0]
    first, last = math.floor(min(all_values)), math.floor(max(all_values)) + 1
    parts = panel(TOP, "share", "milliseconds or less")
    for power in range(first, last + 1):
        parts.append(tick_x(TOP, (power - first) / (last - first), f"{10**power:g}"))
    parts += [tick_y(TOP, share, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for index, (metric, values) in enumerate(logs.items()):
        count = min(len(values), MAX_STEPS)
        steps = [
            ((percentile(values, (at + 1) / count) - first) / (last - first), (at + up) / count)
            for at in range(count)
            for up in (0, 1)
        ]
        parts.append(line(TOP, steps, COLOURS[metric]))
        parts.append(text(LEFT + 10, TOP + 18 + 16 * index, LABELS[metric], colour=COLOURS[metric]))
    return parts


def _throughput_panel(timings: Sequence[RequestTiming], runs: int) -> list[str]:
    top = TOP + PANEL + GAP
    parts = panel(top, "generated tokens per second", "seconds")
    begin_s = min((timing.begin_s for timing in timings), default=0.0)
    span_s = max((timing.end_s for timing in timings), default=1.0) - begin_s
    bins = [0.0] * BINS
    for timing in timings:
        at = [(token_s - begin_s) / span_s * BINS for token_s in timing.token_s]
        for before, now in zip([*at[:1], *at], at, strict=False):  # a chunk holds its share of the output tokens
            _spread(bins, before, now, timing.output_tokens / len(at))
    rates = [tokens * BINS / span_s / runs for tokens in bins]
    most = max(rates) or 1.0
    parts += [tick_x(top, share, f"{span_s * share:.3g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts += [tick_y(top, share, f"{most * share:.4g}") for share in (0.0, 0.5, 1.0)]
    parts.append(line(top, [(x / BINS, rate / most) for at, rate in enumerate(rates) for x in (at, at + 1)], PLAIN))
    return parts


def _spread(bins: list[float], first: float, last: float, tokens: float) -> None:
    """Add tokens evenly to the bins from `first` to `last`, which are positions in units of bins."""
    if first == last:
        bins[min(BINS - 1, int(last))] += tokens
    else:
        for bin in range(int(first), min(BINS, math.ceil(last))):
            bins[bin] += tokens * (min(last, bin + 1) - max(first, bin)) / (last - first)


def panel(top: int, above: str, below: str) -> list[str]:
    """An empty panel with the names of its axes."""
    frame = f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{PANEL}" fill="none" stroke="#888"/>'
    return [frame, text(LEFT, top - 6, above), text(WIDTH - RIGHT, top + PANEL + 34, below, anchor="end")]


def line(top: int, points: Sequence[Point], colour: str) -> str:
    """A line through `points`, whose coordinates are shares of the panel."""
    at = " ".join(f"{_x(x):.1f},{top + PANEL * (1 - y):.1f}" for x, y in points)
    kind = ' class="line"' if colour == PLAIN else ""
    return f'<polyline{kind} points="{at}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def tick_x(top: int, share: float, label: str) -> str:
    """A vertical line at a share of the panel's width."""
    x, bottom = _x(share), top + PANEL
    return f'<path class="grid" d="M{x:.1f} {top}V{bottom}" stroke="#ddd"/>' + text(x, bottom + 16, label, anchor="middle")


def tick_y(top: int, share: float, label: str) -> str:
    """A horizontal line at a share of the panel's height."""
    y = top + PANEL * (1 - share)
    return f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>' + text(LEFT - 6, y + 4, label, anchor="end")


def _x(share: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * share


def text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK, size: int = 12) -> str:
    """A line of text at a point of the picture."""
    kind = ' class="ink"' if colour == INK else ""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text{kind} {where} fill="{colour}" font-size="{size}">{escape(words)}</text>'
