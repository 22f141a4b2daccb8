"""A schedule: one service, its faults and its end, all of it a function of one number.

python -m tests.simulation.schedule --seed 17             one schedule, told event by event
python -m tests.simulation.schedule --count 100000        many, from --seed on; a failing one is named
python -m tests.simulation.schedule --count 100 --size 1024
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from tests.simulation.events import Weather
from tests.simulation.rank import BROKEN, FINE, REFUSED
from tests.simulation.world import ServicePlan, SimulatedService, quiet
from tpserve.coordinator.actions import EpochFailed, EpochFinished

SIZES, SIZE_WEIGHTS = (2, 3, 4, 6, 8, 12, 16), (46, 24, 16, 6, 4, 2, 2)
FAULTS = {
    "kill": 10,
    "crash": 3,
    "error": 3,
    "freeze": 4,
    "hang": 2,
    "orphan": 2,
    "cut": 4,
    "block": 2,
    "kill node": 2,
    "kill two": 2,
}
POISONS = ("SIGSEGV", "error", "exit code 1", "SIGKILL")
STRAYS = ("crash", "error", "hang")
"""Faults of which a request is suspected that happens to be alone."""
BACK_S = 400.0
"""Every request is answered, and the service runs, at most this long after the last fault: a hang costs a minute to notice."""
END_S = 60.0
"""Told to end, everything has ended after this long."""


@dataclass
class Story:
    """What happened in a schedule."""

    seed: int
    size: int
    end: str = ""
    faults: list[tuple[float, str]] = field(default_factory=list)
    num_events: int = 0
    num_messages: int = 0
    epochs: int = 0
    clients: int = 0
    recoveries: list[float] = field(default_factory=list)


def run_schedule(seed: int, size: int | None = None, *, verbose: bool = False) -> Story:
    """Run a schedule; AssertionError when something does not hold."""
    random = Random(seed)
    plan = _plan(random, size)
    ending = random.choices(("quiet", "drain", "signal"), (6, 3, 1))[0]
    schedule = _Schedule(SimulatedService(plan, random), Story(seed, plan.size), verbose)
    try:
        schedule.run(ending)
    finally:
        schedule.close()
    return schedule.story


def _plan(random: Random, size: int | None) -> ServicePlan:
    """A service at random. Large ones have a mild network and small models, for the sake of time."""
    size = size or random.choices(SIZES, SIZE_WEIGHTS)[0]
    poison = random.choice(POISONS) if random.random() < 0.1 else ""
    weather = random.choice([Weather(), Weather(0.05, 0.1, 0.05), Weather(0.3, 0.2, 0.3), Weather(0.1, 0.3, 1.5)])
    return ServicePlan(
        size=size,
        nodes=random.choice([1, 1, 2, min(4, size)]),
        restarts=random.random() < 0.9,
        weather=weather if size <= 16 else Weather(0.02, 0.02, 0.05),
        step_s=random.choice([0.05, 0.15, 0.4]),
        prepare_s=random.choice([0.05, 0.5, 2.0]),
        load_s=random.choice([0.01, 0.3, 2.0]),
        collectives_hang=random.choice([0.0, 0.0, 0.3, 1.0]),
        deaths_unseen=random.choice([0.0, 0.0, 0.5]),
        agent_kills_stopped=random.random() < 0.5,
        engine_late_s=0.01 if poison else random.choice([0.01, 1.0]),
        poison=poison,
        num_blocks=random.choice([14, 24, 60]),
    )


class _Schedule:
    """A schedule that runs."""

    def __init__(self, service: SimulatedService, story: Story, verbose: bool) -> None:
        self.service, self.story, self.verbose = service, story, verbose
        self.random = service.random

    def run(self, ending: str) -> None:
        service, random, events = self.service, self.random, self.service.events
        if random.random() < 0.3:
            self._plan_faults(1, events.now, 2.0)  # while the first epoch forms
        runs = events.run_until(120.0, lambda: bool(service.epochs or service.ends))
        assert runs, f"the first epoch does not run: {self._where()}"
        begin_s = events.now
        for _ in range(random.randint(1, 4)):
            events.after(random.random() * 4.0, service.open)
        if service.plan.poison:
            events.after(random.random() * 2.0, self._open_poison)
        last_s = self._plan_faults(random.randint(1, 5), begin_s, random.choice([1.0, 4.0, 10.0]))
        self._plan_reloads()
        if ending == "drain":
            events.after(random.random() * 6.0, service.frontend.drain)
        elif ending == "signal":
            events.after(random.random() * 6.0, self._signal)
        events.run_until(max(last_s, begin_s + 4.0) + 0.01)
        self._tell("calm")
        service.calm()
        if ending == "quiet":
            back = events.run_until(events.now + BACK_S, lambda: bool(service.ends) or (service.answered and service.whole), 20)
            assert back, f"not back: {self._where()}"
            if not service.ends:
                events.run_until(events.now + 2.0, lambda: service.schedulers[-1].idle)
                service.check_idle()
                self._tell("drain")
                service.frontend.drain()
        assert events.run_until(events.now + END_S, lambda: service.gone, 20), f"the end does not come: {self._where()}"
        service.check_end()
        self._judge()

    def close(self) -> None:
        """Keep what is told of the schedule."""
        story, service = self.story, self.service
        service.close()
        story.end = str(service.ends[0]) if service.ends else "no end"
        story.num_events, story.num_messages = service.events.num_done, service.network.num_messages
        story.epochs, story.clients = len(service.epochs), len(service.clients)
        story.recoveries = service.frontend.recoveries

    def _judge(self) -> None:
        """The service may end only as it should."""
        end, plan = self.service.ends[0], self.service.plan
        if plan.restarts:
            assert isinstance(end, EpochFinished), end
            self._judge_quarantine()
        if isinstance(end, EpochFinished):
            asked = {code for _, code in self.service.exits[-1:]}
            assert asked <= {0, 75}, self.service.exits
        if not plan.restarts:
            assert self.service.epochs in ([], [1]), self.service.epochs

    def _judge_quarantine(self) -> None:
        """A request that ends ranks does so twice, and no other is taken for one without at least two strays."""
        service, faults = self.service, [kind.partition(" of ")[0] for _, kind in self.story.faults]
        innocent = [client.answers for client in service.clients if client.quarantined and not client.poison]
        strays = sum(kind in STRAYS for kind in faults) + bool(service.plan.poison)
        assert not innocent or strays >= 2, f"quarantined: {innocent}"
        deaths = 15 if service.plan.poison == "SIGKILL" else 2
        assert service.num_poisoned <= deaths + len(faults), f"{service.num_poisoned} deaths of one request"

    # Faults

    def _plan_faults(self, number: int, begin_s: float, span_s: float) -> float:
        """Let faults happen in the next seconds; returns the time of the last one."""
        times = sorted(begin_s + self.random.random() * span_s for _ in range(number))
        for at_s in times:
            kind = self.random.choices(list(FAULTS), list(FAULTS.values()))[0]
            self.service.events.at(at_s, self._fault, kind)
        return times[-1]

    def _plan_reloads(self) -> None:
        """In a quarter of the schedules an operator reloads, whatever else happens."""
        random = Random(f"reloads of {self.story.seed}")
        for _ in range(random.choice([0] * 9 + [1, 1, 2])):
            changes = random.choice([FINE, FINE, REFUSED, BROKEN])
            self.service.events.after(random.random() * 5.0, self._reload, changes)

    def _reload(self, changes: bytes) -> None:
        self._tell(f"reload, {changes.decode()}")
        self.service.frontend.reload(changes)

    def _fault(self, kind: str) -> None:
        service, random = self.service, self.random
        running = service.running
        if not running:
            return
        process = random.choice(running)
        self._tell(f"{kind} of rank {process.rank}")
        match kind:
            case "kill":
                process.die("SIGKILL")
            case "kill two":
                process.die("SIGKILL")
                service.events.after(random.random() * 0.5, self._fault, "kill")
            case "crash":
                process.die("SIGSEGV")
            case "error":
                process.incarnation.raise_error()
            case "freeze":
                service.freeze(process, random.choice([0.5, 2.0, 60.0]))
            case "hang":
                process.incarnation.hang()
            case "orphan":
                process.slot.replace()
            case "cut":
                service.cut(process.node, random.choice([0.5, 2.0, 7.0, 15.0]))
            case "block":
                service.frontend.block(random.choice([0.5, 2.0, 6.0]))
            case _:
                service.kill_node(process.node)

    def _open_poison(self) -> None:
        self.service.open(poison=True)

    def _signal(self) -> None:
        """SIGTERM to a rank."""
        for process in self.service.running[:1]:
            process.incarnation.heartbeat.drain_requested = True
        if self.service.ends or self.service.frontend.coordinator.draining:
            return
        self.service.events.after(0.5, self._signal)  # a process that was started again knows nothing of it

    # For the reader

    def _tell(self, what: str) -> None:
        self.story.faults.append((self.service.events.now, what))
        if self.verbose:
            print(f"{self.service.events.now:8.3f}  {what}")

    def _where(self) -> str:
        coordinator = self.service.frontend.coordinator
        ranks = [
            (p.rank, p.incarnation.phase, p.incarnation.running, "blocked" * p.incarnation.blocked, "orphan" * p.orphan)
            for p in self.service.processes
            if p.alive
        ]
        waiting = [client.answers for client in self.service.clients if not client.done]
        return f"{coordinator.state} {coordinator.phase}, epoch {coordinator.epoch}, processes {ranks}, unanswered {waiting}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--size", type=int, default=None, help="number of ranks; at random without it")
    options = parser.parse_args()
    quiet()
    begin_s, totals, failed = time.monotonic(), Counter[str](), list[int]()
    for seed in range(options.seed, options.seed + options.count):
        try:
            story = run_schedule(seed, options.size, verbose=options.count == 1)
        except Exception:
            failed.append(seed)
            traceback.print_exc()
            size = f" --size {options.size}" if options.size else ""
            print(f"FAILED: python -m tests.simulation.schedule --seed {seed}{size}", flush=True)
            continue
        totals.update(events=story.num_events, messages=story.num_messages, epochs=story.epochs, clients=story.clients)
        totals.update(recoveries=len(story.recoveries), failed=story.end.startswith(EpochFailed.__name__))
        if options.count == 1:
            print(story)
        elif (seed + 1 - options.seed) % 1000 == 0:
            print(f"{seed + 1 - options.seed} schedules, {time.monotonic() - begin_s:.0f} s", flush=True)
    print(f"{options.count} schedules in {time.monotonic() - begin_s:.1f} s: {dict(totals)}; failing seeds: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
