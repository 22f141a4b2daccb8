"""The main loop of ranks other than 0: receive a plan, run it, send its result. Decides nothing, not even when to stop."""

from collections import deque

from tpserve.observe.trace import Trace
from tpserve.process.rank_agent import RankAgent
from tpserve.wire.channels import PlanReceiver, ResultSender
from tpserve.worker.model_runner import ModelRunner, PendingStep

IDLE_S = 1.0
"""How long to wait for a plan before checking for Stop; a Stop also ends the wait at once."""


def serve_plans(
    plans: PlanReceiver, model_runner: ModelRunner, results: ResultSender | None, rank_agent: RankAgent, trace: Trace
) -> None:
    """Run plans in the order of arrival until the epoch is over, or Stop. `results`: on the sampling rank only, else None."""
    pending: deque[PendingStep] = deque()
    while not rank_agent.over:
        plan = plans.receive(0 if pending else IDLE_S, wake=(rank_agent.fileno(),))
        if plan is not None:
            with trace.span("run", plan.step):
                launched = model_runner.launch(plan)
            rank_agent.report_step(plan.step)
            if results is not None:
                pending.append(launched)
        while pending and (pending[0].ready() or plan is None):
            finished = pending.popleft()
            assert results is not None
            results.send(finished.wait())
        rank_agent.clear()
