"""A headless rank's main loop: take the next plan, run it, send what it drew. Decides nothing, not even when to stop."""

from collections import deque

from tpserve.observe.trace import Trace
from tpserve.wire.channels import PlanReceiver, ResultSender
from tpserve.wire.control import Control
from tpserve.worker.executor import Executor, Pending

IDLE_S = 1.0
"""How long to sleep for a plan before looking round; a Stop wakes the sleeper at once."""


def serve_plans(plans: PlanReceiver, executor: Executor, results: ResultSender | None, control: Control, trace: Trace) -> None:
    """Run plans in the order they come until the coordinator says stop. `results` is given on the sampling rank."""
    pending: deque[Pending] = deque()
    while control.stop is None:
        plan = plans.receive(0 if pending else IDLE_S, wake=(control.fileno(),))
        if plan is not None:
            with trace.span("run", plan.step):
                launched = executor.launch(plan)
            control.step(plan.step)
            if results is not None:
                pending.append(launched)
        while pending and (pending[0].ready() or plan is None):
            finished = pending.popleft()
            assert results is not None
            results.send(finished.wait())
        control.clear()
