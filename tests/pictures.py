"""Draw the pictures of docs/ anew, all of them: python -m tests.pictures

Diagrams by hand, light or dark as the reader prefers, and the chart of what a recovery costs, out of its table in
docs/reliability.md (`tests/simulation/measure.py` makes the table). `tests/unit/test_pictures.py` compares them with the files.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from tpserve.bench.plot import PANEL, TOP, document, line, panel, text, tick_x, tick_y

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLUE, GREEN, RED, GREY = "#2f7fd0", "#2f9e4f", "#d9483b", "#888"
STYLE = "<style>@media (prefers-color-scheme: dark) { .box { fill: #26303a } .area { fill: #1d2228 } }</style>"


def pictures() -> dict[str, str]:
    """File name to SVG."""
    return {
        "architecture.svg": architecture(),
        "plans.svg": plans(),
        "recovery.svg": recovery(),
        "recovery-cost.svg": recovery_cost((DOCS / "reliability.md").read_text()),
    }


def box(x: float, y: float, width: float, height: float, *lines: str, colour: str = GREY) -> list[str]:
    """A rectangle with centred lines; the first is its name."""
    first = y + height / 2 + 4 - 7.5 * (len(lines) - 1)
    return [
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="#eef3f8" stroke="{colour}"/>',
        *(
            text(x + width / 2, first + 15 * at, words, anchor="middle", size=11 if at else 12, colour=GREY if at else "#222")
            for at, words in enumerate(lines)
        ),
    ]


def area(x: float, y: float, width: float, height: float, name: str) -> list[str]:
    """The machine that boxes stand on."""
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
    return [
        f'<rect class="area" {shape} fill="#f8fafc" stroke="{GREY}" stroke-dasharray="4 3"/>',
        text(x + width - 8, y + 16, name, anchor="end"),
    ]


def arrow(*points: tuple[float, float], colour: str, both: bool = False, dashes: bool = False) -> str:
    """A line along horizontal and vertical pieces, with a head at its end, or at both ends."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    heads = head(points[-2], points[-1]) + (head(points[1], points[0]) if both else "")
    style = ' stroke-dasharray="4 3"' if dashes else ""
    return f'<path d="{path}" fill="none" stroke="{colour}"{style}/><path d="{heads}" fill="{colour}"/>'


def head(before: tuple[float, float], tip: tuple[float, float]) -> str:
    (x, y), length = tip, math.dist(before, tip)
    dx, dy = (tip[0] - before[0]) / length, (tip[1] - before[1]) / length
    left, right = (x - 7 * dx - 3 * dy, y - 7 * dy + 3 * dx), (x - 7 * dx + 3 * dy, y - 7 * dy - 3 * dx)
    return f"M{x:g} {y:g}L{left[0]:.4g} {left[1]:.4g}L{right[0]:.4g} {right[1]:.4g}Z"


def architecture() -> str:
    """Processes and sockets."""
    parts = [
        STYLE,
        *area(20, 96, 400, 320, "node 0"),
        *area(470, 96, 270, 320, "node 1: ranks only"),
        *box(40, 42, 150, 32, "clients"),
        *box(40, 124, 360, 50, "frontend (no torch)", "HTTP, open requests, text; coordinator of the ranks"),
        *box(40, 238, 150, 64, "rank 0", "scheduler, KV blocks", "its shard of stage 0"),
        *box(250, 238, 150, 64, "rank 1", "its shard of stage 0"),
        *box(485, 238, 110, 64, "rank 2", "its shard", "of stage 1"),
        *box(625, 238, 105, 64, "rank 3", "its shard", "of stage 1"),
        *box(40, 364, 360, 36, "tpserve serve", "starts the frontend and the ranks, and again what dies"),
        *box(485, 364, 245, 36, "tpserve serve", "starts the ranks, and again what dies"),
        arrow((115, 74), (115, 124), colour=GREY, both=True),
        text(122, 92, "HTTP, one port"),
        arrow((60, 174), (60, 238), colour=BLUE),
        text(66, 198, "Add", colour=BLUE),
        text(66, 213, "Abort", colour=BLUE),
        arrow((130, 238), (130, 174), colour=BLUE),
        text(136, 198, "Delta", colour=BLUE),
        text(136, 213, "Done", colour=BLUE),
        arrow((360, 174), (360, 238), colour=GREEN, both=True),
        arrow((400, 150), (575, 150), (575, 238), colour=GREEN, both=True),
        arrow((400, 140), (705, 140), (705, 238), colour=GREEN, both=True),
        arrow((215, 174), (215, 206), (172, 206), (172, 238), colour=GREEN, both=True),
        arrow((80, 302), (80, 334), (325, 334), (325, 302), colour=BLUE, both=True),
        arrow((80, 302), (80, 334), (540, 334), (540, 302), colour=BLUE, both=True),
        arrow((80, 302), (80, 334), (678, 334), (678, 302), colour=BLUE, both=True),
        text(110, 327, "StepPlan to all, StepResult back", colour=BLUE),
        arrow((190, 270), (250, 270), colour=RED, both=True),
        text(220, 263, "sums", anchor="middle", colour=RED),
        arrow((400, 270), (485, 270), colour=RED, both=True),
        text(444, 263, "activations", anchor="middle", colour=RED),
        arrow((595, 270), (625, 270), colour=RED, both=True),
        text(20, 440, "requests, plans, results: ZeroMQ", colour=BLUE),
        text(230, 440, "control (Hello, Start, Ready, Run, heartbeats): ZeroMQ", colour=GREEN),
        text(20, 458, "tensors: NCCL on GPUs; on CPUs gloo, and shared memory inside a node", colour=RED),
        text(
            20,
            478,
            "One node is the left half alone, and its sockets are files. Between nodes ZeroMQ is encrypted TCP, tensors are not.",
        ),
    ]
    return document("Processes and sockets: two nodes with two ranks each, TP 2 x PP 2", parts, 492)


GROUPS = (BLUE, GREEN, "#c98a1b")
UNIT = 62


def plans() -> str:
    """What the ranks do while plans are in flight: one stage, and two."""
    parts = [
        STYLE,
        text(
            20,
            52,
            "One stage: at most 2 plans in flight. The next one is sent while this one runs; drawn tokens stay on the ranks.",
        ),
    ]
    parts += [text(20, 82, "rank 0 plans"), text(20, 114, "ranks compute")]
    for plan in range(8):
        begin = 130 + UNIT * (plan + 0.35)
        made = 130 + UNIT * 0.35 * plan if plan < 2 else begin - UNIT * 0.88
        parts += cell(made, 66, UNIT * 0.3, str(plan + 1), GREY)
        parts += cell(begin, 98, UNIT, str(plan + 1), GREY)
    top = 160
    parts.append(
        text(20, top, "Two stages: at most 3 plans in flight. Sequences are dealt to them, so that no stage waits for tokens.")
    )
    parts += [text(20, top + 30 + 32 * row, name) for row, name in enumerate(("rank 0 plans", "stage 0", "stage 1"))]
    for plan in range(8):
        colour = GROUPS[plan % 3]
        begin = 130 + UNIT * (plan + 0.35)
        back = begin + 2 * UNIT
        made = 130 + plan * UNIT * 0.32 if plan < 3 else begin - UNIT * 0.95
        parts += cell(made, top + 14, UNIT * 0.3, str(plan + 1), colour)
        parts += cell(begin, top + 46, UNIT, str(plan + 1), colour)
        if plan < 7:
            parts += cell(begin + UNIT, top + 78, UNIT, str(plan + 1), colour)
        if plan < 6:
            parts += cell(made, top + 114 + 18 * (plan % 3), back - made, str(plan + 1), colour, 16)
    parts.append(text(20, top + 138, "in flight"))
    parts.append(
        text(
            20,
            top + 192,
            "A number is a plan, a color its sequences. The tokens of plan 1 are back when plan 4 is made, which continues the",
        )
    )
    parts.append(text(20, top + 208, "same sequences; the stages have plans 2 and 3 meanwhile. Times are not to scale."))
    return document("Plans in flight", parts, top + 222)


def cell(x: float, y: float, width: float, name: str, colour: str, height: int = 24) -> list[str]:
    """A plan while it is made, is computed or is in flight."""
    shape = f'x="{x:.4g}" y="{y:g}" width="{width:.4g}" height="{height}"'
    return [
        f'<rect class="page" {shape} fill="white" stroke="{colour}" stroke-width="1.5"/>',
        text(x + width / 2, y + height / 2 + 4, name, anchor="middle", colour=colour),
    ]


LANES = {"client": 70, "frontend": 205, "rank 0": 365, "rank 1": 565, "agent": 695}
EVENTS: tuple[tuple[str, str, str, str], ...] = (
    ("rank 0", "frontend", "Delta: tokens", BLUE),
    ("frontend", "client", "tokens", BLUE),
    ("rank 1", "", "kill -9", RED),
    ("rank 1", "frontend", "its pidfd: the epoch is over", RED),
    ("frontend", "rank 0", "Leave", GREEN),
    ("rank 0", "", "leaves the mesh, keeps weights", GREY),
    ("agent", "rank 1", "starts it again", GREY),
    ("rank 1", "", "maps its weights", GREY),
    ("rank 0", "frontend", "Hello", GREEN),
    ("rank 1", "frontend", "Hello", GREEN),
    ("frontend", "rank 1", "Start: the next epoch, to both", GREEN),
    ("rank 0", "rank 1", "form a new mesh", GREY),
    ("rank 1", "frontend", "Ready, from both", GREEN),
    ("frontend", "rank 1", "Run, to both", GREEN),
    ("frontend", "rank 0", "Add, again", BLUE),
    ("rank 0", "", "recomputes the context", GREY),
    ("rank 0", "frontend", "Delta: the next", BLUE),
    ("frontend", "client", "the next token", BLUE),
)
"""Who says what to whom; without a receiver, what it does by itself."""


def recovery() -> str:
    """From the death of a rank to the next token."""
    step, top = 27, 62
    bottom = top + 14 + step * len(EVENTS)
    parts = [STYLE]
    for name, x in LANES.items():
        parts.append(f'<path class="line" d="M{x} {top + 6}V{bottom}" stroke="#bbb"/>')
        parts += box(x - 45, top - 20, 90, 26, name)
    killed, again = (top + 18 + step * at for at in (2, 6))
    parts.append(
        f'<path class="page" d="M{LANES["rank 1"]} {killed}V{again}" stroke="{RED}" stroke-dasharray="5 4" stroke-width="3"/>'
    )
    for at, (sender, receiver, words, colour) in enumerate(EVENTS):
        y, x = top + 18 + step * at, LANES[sender]
        if receiver:
            for end in (receiver, "rank 0") if words.endswith("to both") else (receiver,):
                parts.append(arrow((x, y + 6), (LANES[end], y + 6), colour=colour, both=words.startswith("form")))
            places = ("rank 0", "rank 1") if {sender, receiver} == {"frontend", "rank 1"} else (sender, receiver)
            x = sum(LANES[lane] for lane in places) / 2  # beside the line of rank 0, not across it
            parts.append(text(x, y + 1, words, anchor="middle", colour=colour, size=11))
        else:
            parts.append(f'<circle cx="{x}" cy="{y + 6}" r="4" fill="{colour}"/>')
            parts.append(text(x + 8, y + 10, words, colour=colour, size=11))
    silent = top + 18 + step * 2
    parts.append(
        f'<path d="M{LANES["client"]} {silent}V{bottom - step}" stroke="{BLUE}" stroke-dasharray="5 4" stroke-width="2"/>'
    )
    parts.append(text(LANES["client"] + 10, (silent + bottom) / 2, "silence: the", colour=BLUE, size=11))
    parts.append(text(LANES["client"] + 10, (silent + bottom) / 2 + 15, "connection stays", colour=BLUE, size=11))
    return document("A recovery under tpserve serve: rank 1 is killed in the middle of an answer", parts, bottom + 14)


def recovery_cost(page: str) -> str:
    """Messages, and milliseconds of both times, on logarithmic axes; `page` holds the table."""
    rows = re.findall(r"(?m)^\| (\d+) \| (\d+) \| [\d.]+ \| ([\d.]+) s \| ([\d.]+) ms \|$", page)
    sizes = [int(row[0]) for row in rows]
    series: Sequence[tuple[str, str, list[float]]] = (
        ("messages", "#1f77b4", [float(row[1]) for row in rows]),
        ("milliseconds until RUN (simulated)", "#2ca02c", [1e3 * float(row[2]) for row in rows]),
        ("milliseconds that the coordinator computes", "#d62728", [float(row[3]) for row in rows]),
    )
    logs = [math.log10(value) for _, _, values in series for value in values]
    first, last = math.floor(min(logs)), math.ceil(max(logs))
    width = math.log2(sizes[-1])
    parts = panel(TOP, "", "ranks")
    parts += [tick_x(TOP, math.log2(size) / width, str(size)) for size in sizes]
    parts += [tick_y(TOP, (power - first) / (last - first), f"{10.0**power:g}") for power in range(first, last + 1)]
    for index, (name, colour, values) in enumerate(series):
        points = [
            (math.log2(size) / width, (math.log10(value) - first) / (last - first))
            for size, value in zip(sizes, values, strict=True)
        ]
        parts.append(line(TOP, points, colour))
        parts.append(text(90, TOP + 18 + 16 * index, name, colour=colour))
    return document("The cost of a recovery", parts, TOP + PANEL + 60)


if __name__ == "__main__":
    for name, drawn in pictures().items():
        (DOCS / name).write_text(drawn)
        print(DOCS / name, len(drawn))
