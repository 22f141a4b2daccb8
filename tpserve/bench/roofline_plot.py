"""The picture of `bench roofline` as SVG: operations a second over operations a byte, both logarithmic, under the roof. Pure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tpserve.bench.plot import LEFT, PANEL, PLAIN, TOP, WIDTH, document, line, panel, text, tick_x, tick_y
from tpserve.bench.roofline_work import MachineRates, StepWork

HEIGHT = TOP + PANEL + 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b")


class MeasuredPoint(NamedTuple):
    """A measured step. `label`: beside it."""

    model: str
    label: str
    work: StepWork
    seconds: float


def svg(title: str, rates: dict[str, MachineRates], cases: Sequence[MeasuredPoint]) -> str:
    """One roof for each kind of numbers, and a point for each case: on the roof is as fast as the machine allows."""
    reached = [(case.work.flops / case.work.num_bytes, case.work.flops / case.seconds) for case in cases]
    first_x = math.floor(math.log10(min([0.5, *(x for x, _ in reached)])))
    last_x = math.ceil(math.log10(max([100.0, *(x for x, _ in reached)])))
    roofs = [each.flops_per_s for each in rates.values()]
    first_y = math.floor(math.log10(min([*roofs, *(y for _, y in reached)])))
    last_y = math.ceil(math.log10(max(roofs)))

    def at(intensity: float, flops_per_s: float) -> tuple[float, float]:
        return (
            (math.log10(intensity) - first_x) / (last_x - first_x),
            (math.log10(flops_per_s) - first_y) / max(1, last_y - first_y),
        )

    parts = panel(TOP, "operations a second", "operations a byte read")
    parts += [tick_x(TOP, (power - first_x) / (last_x - first_x), f"{10.0**power:g}") for power in range(first_x, last_x + 1)]
    for power in range(first_y, last_y + 1):
        parts.append(tick_y(TOP, (power - first_y) / max(1, last_y - first_y), f"{10.0 ** (power - 9):g} G"))
    for each in rates.values():
        ridge = each.flops_per_s / each.bytes_per_s
        lowest = max(10.0**first_x, 10.0**first_y / each.bytes_per_s)
        points = [(lowest, lowest * each.bytes_per_s), (ridge, each.flops_per_s), (10.0**last_x, each.flops_per_s)]
        parts.append(line(TOP, [at(*point) for point in points], PLAIN))
    models = list(dict.fromkeys(case.model for case in cases))
    for case, point in zip(cases, reached, strict=True):
        parts.append(_point(*at(*point), COLOURS[models.index(case.model) % len(COLOURS)], case.label))
    for index, model in enumerate(models):
        parts.append(text(LEFT + 10, TOP + 18 + 16 * index, model, colour=COLOURS[index % len(COLOURS)]))
    return document(title, parts, HEIGHT)


def _point(x: float, y: float, colour: str, label: str) -> str:
    x, y = LEFT + (WIDTH - LEFT - 30) * x, TOP + PANEL * (1 - y)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' + text(x + 6, y + 12, label, colour=colour, size=10)
