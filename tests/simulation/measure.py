"""What a recovery costs, against the number of ranks, the table of docs/reliability.md: python -m tests.simulation.measure

One rank after another is killed while requests are open. Messages and time are those of the simulation, in which a new process
says Hello after 0.1 s and is ready 0.05 s after the mesh has formed; the coordinator's time is that of this machine.
"""

import statistics
from random import Random
from typing import NamedTuple

from tests.simulation.world import ServicePlan, SimulatedService, quiet

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
KILLS = 5
BETWEEN_S = 3.0
NODE_RANKS = 8


class Cost(NamedTuple):
    """The medians of `KILLS` recoveries."""

    size: int
    messages: float
    took_s: float
    coordinator_ms: float


def measure(size: int) -> Cost:
    """Kill a random rank `KILLS` times."""
    plan = ServicePlan(size, nodes=max(1, size // NODE_RANKS), prepare_s=0.1, load_s=0.05)
    service = SimulatedService(plan, Random(size))
    events, frontend = service.events, service.frontend
    assert events.run_until(60.0, lambda: service.whole, 50)
    costs: list[Cost] = []
    for number in range(KILLS):
        service.open()
        events.run_until(events.now + BETWEEN_S)
        sent, busy_s = service.network.num_messages, frontend.busy_s
        service.random.choice(service.running).die("SIGKILL")
        assert events.run_until(events.now + 60.0, lambda wanted=number + 1: len(frontend.recoveries) == wanted)
        messages, spent_s = service.network.num_messages - sent, frontend.busy_s - busy_s
        costs.append(Cost(size, messages, frontend.recoveries[-1], 1e3 * spent_s))
    service.close()
    return Cost(size, *(statistics.median(values) for values in zip(*(cost[1:] for cost in costs), strict=True)))


def table(costs: list[Cost]) -> str:
    """In the form of the document."""
    lines = ["| ranks | messages | messages a rank | back in RUN | the coordinator computes |", "|---|---|---|---|---|"]
    for cost in costs:
        a_rank = cost.messages / cost.size
        lines.append(f"| {cost.size} | {cost.messages:.0f} | {a_rank:.1f} | {cost.took_s:.2f} s | {cost.coordinator_ms:.1f} ms |")
    return "\n".join(lines)


def main() -> None:
    quiet()
    print(table([measure(size) for size in SIZES]))


if __name__ == "__main__":
    main()
