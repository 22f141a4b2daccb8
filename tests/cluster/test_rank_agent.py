"""A rank's control thread in a process of its own, against a coordinator's socket held by the test."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from tpserve.errors import UserError
from tpserve.observe.log import LogRingBuffer
from tpserve.process import exit_rules, rank_agent, signals
from tpserve.process.orders import Stopped
from tpserve.types.messages import (
    RESTART_CODE,
    CoordinatorMessage,
    Drain,
    Fault,
    Heartbeat,
    Hello,
    LogLines,
    MemoryLedger,
    RankMessage,
    Ready,
    Run,
    Start,
    Stop,
)
from tpserve.wire import codec
from tpserve.wire.channels import bind, open_socket, wait

LEDGER = MemoryLedger(0, 0, 0, 0, 0, 0, 0, 1, 16, 256)


class Coordinator:
    """The test's end of the control channel, and the rank it has forked."""

    def __init__(self, where: Path) -> None:
        self.socket = open_socket(zmq.ROUTER, codec.RANK.max_bytes)
        self.address = bind(self.socket, f"ipc://{where}/control")
        self.name = b""
        self.pid = 0

    def fork(self, main: Callable[[rank_agent.RankAgent], int], **how: object) -> None:
        """Run `main` as a rank; it exits with what `main` returns."""
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                signals.block_signals()
                arguments = {"host": "h", "agent_pid": os.getppid(), **how}
                rank = rank_agent.RankAgent(3, self.address, identity=7, **arguments)  # type: ignore[arg-type]
                rank.start()
                code = main(rank)
            finally:
                sys.stderr.flush()
                os._exit(code)

    def hear(self, kind: type[RankMessage], timeout_s: float = 5.0) -> RankMessage:
        """The next message of a kind."""
        deadline_s = time.monotonic() + timeout_s
        while self.socket.poll(max(0, deadline_s - time.monotonic()) * 1000):
            self.name, frame = self.socket.recv_multipart()
            for message in codec.RANK.decode(frame):
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind}")

    def rest(self) -> list[RankMessage]:
        """All that was said and not heard yet."""
        said: list[RankMessage] = []
        while self.socket.poll(100):
            said += codec.RANK.decode(self.socket.recv_multipart()[1])
        return said

    def say(self, *messages: CoordinatorMessage) -> None:
        self.socket.send_multipart([self.name, codec.COORDINATOR.encode(messages)])

    def code(self, timeout_s: float = 8.0) -> int:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise AssertionError("the rank lives on")


@pytest.fixture
def coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    for name, seconds in {"GRACE_S": 0.6, "STOP_WAIT_S": 0.6, "SAME_SIGNAL_S": 0.6, "HEARTBEAT_S": 0.1, "GONE_S": 0.5}.items():
        for module in (rank_agent, exit_rules):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, seconds)  # the rank is a fork and inherits them
    it = Coordinator(tmp_path)
    yield it
    it.socket.close(linger=0)
    if it.pid:
        os.kill(it.pid, signal.SIGKILL)
        os.waitpid(it.pid, 0)


def obedient(rank: rank_agent.RankAgent) -> int:
    """A rank's life; says with its code how far it came if something is wrong."""
    rank.report_progress("loading weights", 40)
    rank.hello({"store": "a:1"}, {"version": "1"}, {})
    try:
        if rank.wait_start(10.0).epoch != 5:
            return 50
        rank.ready(LEDGER, {"vocab_size": 1})
        if rank.wait_run(10.0) != 5:
            return 51
    except Stopped as stopped:
        return stopped.code + 60
    rank.report_step(17)
    while rank.stop is None:
        wait(5.0, rank)
        rank.clear()
    return rank.leave()


def blocked(rank: rank_agent.RankAgent) -> int:
    """A main thread that is lost in C."""
    rank.hello({}, {}, {})
    time.sleep(60)
    return 98


def started(coordinator: Coordinator) -> None:
    coordinator.hear(Hello)
    coordinator.say(Start(5, {}))
    coordinator.hear(Ready)
    coordinator.say(Run(5))


def test_a_life(coordinator: Coordinator) -> None:
    coordinator.fork(obedient)
    hello = coordinator.hear(Hello)
    assert isinstance(hello, Hello)
    assert (hello.rank, hello.identity, hello.pid, hello.endpoints) == (3, 7, coordinator.pid, {"store": "a:1"})
    assert coordinator.name == b"3.7"
    assert coordinator.hear(Hello) == hello  # again, until it is answered
    heartbeat = coordinator.hear(Heartbeat)
    assert isinstance(heartbeat, Heartbeat) and (heartbeat.phase, heartbeat.percent) == ("loading weights", 40)
    coordinator.say(Start(5, {}), Start(6, {}))  # the second one changes nothing
    assert coordinator.hear(Ready) == coordinator.hear(Ready)
    coordinator.say(Run(4))
    coordinator.hear(Ready)
    coordinator.say(Run(5))
    while (heartbeat := coordinator.hear(Heartbeat)) and isinstance(heartbeat, Heartbeat) and heartbeat.step != 17:
        assert heartbeat.epoch == 5
    coordinator.say(Stop(0, ""))
    assert coordinator.code() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_for_a_drain_until_it_is_heard(coordinator: Coordinator, number: signal.Signals) -> None:
    coordinator.fork(obedient)
    started(coordinator)
    os.kill(coordinator.pid, number)
    assert coordinator.hear(Drain) == coordinator.hear(Drain) == Drain(3)
    coordinator.say(Drain())
    coordinator.say(Stop(0, ""))
    assert coordinator.code() == 0


def test_a_second_signal_is_a_fault(coordinator: Coordinator) -> None:
    coordinator.fork(obedient)
    started(coordinator)
    os.kill(coordinator.pid, signal.SIGINT)
    coordinator.hear(Drain)
    os.kill(coordinator.pid, signal.SIGTERM)  # the same Ctrl-C, passed on by the agent
    with pytest.raises(AssertionError):
        coordinator.hear(Fault, 0.3)
    time.sleep(signals.SAME_SIGNAL_S)
    os.kill(coordinator.pid, signal.SIGTERM)
    fault = coordinator.hear(Fault)
    assert isinstance(fault, Fault) and "second signal" in fault.text


def test_a_signal_after_a_siblings_death_ends_at_once(coordinator: Coordinator) -> None:
    """This process, in the agent's place, has fewer live children than ranks were started."""
    coordinator.fork(obedient, local_ranks=50)
    started(coordinator)
    os.kill(coordinator.pid, signal.SIGTERM)
    assert coordinator.code(2.0) == 1
    said = coordinator.rest()
    assert any(isinstance(message, Fault) for message in said)
    assert not any(isinstance(message, Drain) for message in said)  # nobody has asked the service to end


def test_a_signal_is_not_lost_between_two_incarnations(coordinator: Coordinator) -> None:
    def returning(rank: rank_agent.RankAgent) -> int:
        rank.hello({}, {}, {})
        while not rank._heartbeat.drain_requested:
            time.sleep(0.01)
        rank.close()  # its collective has failed, too
        again = rank_agent.RankAgent(3, coordinator.address, identity=8, host="h", agent_pid=os.getppid(), local_ranks=50)
        again.start()
        time.sleep(30)
        return 98

    coordinator.fork(returning, local_ranks=50)
    coordinator.hear(Hello)
    os.kill(coordinator.pid, signal.SIGTERM)
    assert coordinator.code(3.0) == 1


def test_a_signal_before_control_has_taken_over_ends_the_process() -> None:
    pid = os.fork()
    if pid == 0:
        signals._taken_over.clear()
        signals.block_signals()
        time.sleep(30)
        os._exit(99)
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_blocked_main_thread_is_ended_with_the_code_of_stop(coordinator: Coordinator) -> None:
    coordinator.fork(blocked)
    coordinator.hear(Hello)
    coordinator.say(Stop(2, "no such model"))
    asked_s = time.monotonic()
    assert coordinator.code() == 2
    assert exit_rules.FAILED_GRACE_S - 0.2 < time.monotonic() - asked_s < exit_rules.FAILED_GRACE_S + 1


def test_a_step_that_does_not_come_back_is_a_fault(coordinator: Coordinator) -> None:
    def hanging(rank: rank_agent.RankAgent) -> int:
        rank.set_step_deadline((12, time.monotonic() + 0.3))
        return blocked(rank)

    coordinator.fork(hanging)
    began_s = time.monotonic()
    fault = coordinator.hear(Fault)
    assert fault == Fault(3, 0, "overdue", "step 12 does not come back: a rank hangs")
    assert time.monotonic() - began_s > 0.2
    assert coordinator.hear(Fault) == fault, "until it does"
    coordinator.say(Stop(1, fault.text))
    assert coordinator.code() == 1


def test_an_overdue_step_that_comes_back_is_no_fault_any_more(coordinator: Coordinator) -> None:
    def slow(rank: rank_agent.RankAgent) -> int:
        rank.hello({}, {}, {})
        rank.report_busy("compiling attention")
        rank.set_step_deadline((12, time.monotonic()))
        time.sleep(1.0)
        rank.report_step(12)
        rank.set_step_deadline((13, time.monotonic() + 60))
        time.sleep(60)
        return 98

    coordinator.fork(slow)
    coordinator.hear(Fault)
    heartbeat = coordinator.hear(Heartbeat)
    assert isinstance(heartbeat, Heartbeat) and heartbeat.busy == "compiling attention"
    while isinstance(heartbeat, Heartbeat) and heartbeat.step != 12:
        heartbeat = coordinator.hear(Heartbeat)
    assert isinstance(heartbeat, Heartbeat) and not heartbeat.busy
    assert not any(isinstance(message, Fault) for message in coordinator.rest())


def test_a_control_thread_that_fails_ends_the_rank_and_says_why(coordinator: Coordinator) -> None:
    def wrong(rank: rank_agent.RankAgent) -> int:
        log_buffer = LogRingBuffer()
        log_buffer.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger().addHandler(log_buffer)
        rank.report_log(log_buffer)
        rank.hello({"plan": object()}, {}, {})  # type: ignore[dict-item]
        time.sleep(60)
        return 98

    coordinator.fork(wrong)
    fault = coordinator.hear(Fault)
    assert isinstance(fault, Fault) and "its control thread failed with TypeError: Encoding objects of type object" in fault.text
    said = coordinator.hear(LogLines)
    assert isinstance(said, LogLines) and fault.text in said.last_error
    assert coordinator.code() == 1


def test_an_error_is_told_at_once(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_agent, "HEARTBEAT_S", 60.0)

    def main(rank: rank_agent.RankAgent) -> int:
        log_buffer = LogRingBuffer()
        logging.getLogger().addHandler(log_buffer)
        log_buffer.on_error = rank.wake
        rank.report_log(log_buffer)
        rank.hello({}, {}, {})
        time.sleep(0.3)
        logging.getLogger("tpserve.x").error("no space left \ud800 on %s", "disk")
        time.sleep(60)
        return 98

    coordinator.fork(main)
    said = coordinator.hear(LogLines, 3.0)
    assert isinstance(said, LogLines) and said.last_error == "no space left ? on disk"


def test_a_failure_whose_text_no_frame_can_hold_is_told_all_the_same(coordinator: Coordinator) -> None:
    coordinator.fork(lambda rank: rank.fail(RuntimeError("\udcff" + "x" * (3 << 20))))
    fault = coordinator.hear(Fault)
    assert isinstance(fault, Fault) and fault.text.startswith("RuntimeError: ?xxx") and len(fault.text) < 3000
    assert coordinator.code() == RESTART_CODE


def test_what_goes_on_beside_a_blocked_main_thread(coordinator: Coordinator) -> None:
    def main(rank: rank_agent.RankAgent) -> int:
        rank.run_periodically(lambda: rank.report_progress("beside", 1 + rank._heartbeat.percent))
        return blocked(rank)

    coordinator.fork(main)
    heartbeat = coordinator.hear(Heartbeat)
    while isinstance(heartbeat, Heartbeat) and heartbeat.percent < 5:
        heartbeat = coordinator.hear(Heartbeat)


def test_stop_raises_in_who_waits(coordinator: Coordinator) -> None:
    coordinator.fork(obedient)
    coordinator.hear(Hello)
    coordinator.say(Stop(1, "rank 0 failed"))
    assert coordinator.code() == 61


def test_a_failure_is_told_and_the_verdict_is_the_exit_code(coordinator: Coordinator) -> None:
    coordinator.fork(lambda rank: rank.fail(UserError("no such file")))
    assert coordinator.hear(Fault) == coordinator.hear(Fault) == Fault(3, 0, "user", "no such file")
    coordinator.say(Stop(2, "no such file"))
    assert coordinator.code() == 2


def test_a_failure_nobody_answers_ends_all_the_same(coordinator: Coordinator) -> None:
    coordinator.fork(lambda rank: rank.fail(RuntimeError("boom")))
    assert coordinator.hear(Fault) == Fault(3, 0, "engine", "RuntimeError: boom")
    assert coordinator.code() == RESTART_CODE


def test_a_coordinator_that_is_gone_ends_the_rank(coordinator: Coordinator) -> None:
    coordinator.fork(obedient)
    started(coordinator)
    coordinator.socket.close(linger=0)
    assert coordinator.code(4.0) == 1


def test_a_dead_frontend_ends_the_rank_at_once(coordinator: Coordinator) -> None:
    frontend = os.fork()
    if frontend == 0:
        time.sleep(60)
        os._exit(0)
    coordinator.fork(obedient, frontend_pid=frontend)
    started(coordinator)
    os.kill(frontend, signal.SIGKILL)
    os.waitpid(frontend, 0)
    assert coordinator.code(1.0) == 1


def test_a_rank_does_not_outlive_its_agent(tmp_path: Path) -> None:
    """An agent that is killed takes the rank along, wherever the rank's main thread is."""
    reader, writer = os.pipe()
    agent = os.fork()
    if agent == 0:
        coordinator = Coordinator(tmp_path)
        coordinator.fork(blocked)
        os.write(writer, str(coordinator.pid).encode())
        time.sleep(60)
        os._exit(0)
    rank = int(os.read(reader, 20))
    time.sleep(0.3)
    pidfd = os.pidfd_open(rank)
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    poller = zmq.Poller()
    poller.register(pidfd, zmq.POLLIN)
    assert poller.poll(2000)
    os.close(pidfd)
