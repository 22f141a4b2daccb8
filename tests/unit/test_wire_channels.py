"""The channels over real sockets: order, gaps, foreign epochs, and that a sender never blocks."""

import threading
import time
from pathlib import Path

import pytest
import zmq

from tpserve.errors import EngineFailure
from tpserve.types.messages import Abort, Done, Truncate
from tpserve.types.packed import pack
from tpserve.types.plan import Chunk, StepPlan, StepResult
from tpserve.wire import codec
from tpserve.wire.channels import (
    EngineLink,
    EngineServer,
    PlanBroadcaster,
    PlanReceiver,
    ResultReceiver,
    ResultSender,
    TcpEndpoint,
    tcp,
    wait,
)
from tpserve.wire.curve import Keyring, ZapAuthenticator, rank_role


def plan(step: int, epoch: int = 1) -> StepPlan:
    return StepPlan.of(epoch, step, [Chunk(0, step, 1, True)])


def open_plans(where: Path, num_receivers: int) -> tuple[PlanBroadcaster, list[PlanReceiver]]:
    sender = PlanBroadcaster(f"ipc://{where}/plan")
    receivers = [PlanReceiver(sender.endpoint, 1) for _ in range(num_receivers)]
    sender.begin(1, num_receivers, 5.0)
    return sender, receivers


def test_every_receiver_gets_every_plan_in_order(tmp_path: Path) -> None:
    sender, receivers = open_plans(tmp_path, 3)
    for step in range(2000):  # far over any default high-water mark
        sender.send(plan(step))
    for receiver in receivers:
        assert [receiver.receive(5.0) for _ in range(2000)] == [plan(step) for step in range(2000)]
        assert receiver.receive(0.0) is None
        receiver.close()
    sender.close()


def test_begin_names_how_many_listen(tmp_path: Path) -> None:
    sender = PlanBroadcaster(f"ipc://{tmp_path}/plan")
    receiver = PlanReceiver(sender.endpoint, 1)
    with pytest.raises(EngineFailure, match="1 of 2 ranks"):
        sender.begin(1, 2, 0.3)
    receiver.close()
    sender.close()


def test_a_lost_plan_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop plans 1 and 2 on their way, and plan 4, after which nothing comes that would show the gap."""
    sender, (receiver,) = open_plans(tmp_path, 1)
    real = codec.PLAN.decode
    drops = {1, 2, 4}

    def lossy(frame: bytes) -> list[StepPlan]:
        plans = real(frame)
        kept = [p for p in plans if p.step not in drops]
        drops.difference_update(p.step for p in plans)
        return kept

    monkeypatch.setattr(codec.PLAN, "decode", lossy)
    for step in range(5):
        sender.send(plan(step))
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            wait(0.05, sender)
            sender.resend_missed()

    thread = threading.Thread(target=serve)
    thread.start()
    got = [receiver.receive(5.0) for _ in range(5)]
    stop.set()
    thread.join()
    assert got == [plan(step) for step in range(5)]
    assert receiver.receive(0.0) is None
    receiver.close()
    sender.close()


def test_a_retired_plan_stays_lost_and_that_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpserve.wire.channels.GAP_S", 0.2)
    monkeypatch.setattr("tpserve.wire.channels.RESEND_AFTER_S", 0.1)
    sender, (receiver,) = open_plans(tmp_path, 1)
    sender.send(plan(0))
    assert receiver.receive(5.0) == plan(0)
    receiver._next = 1
    sender._next = 2  # plan 1 never was
    sender.send(plan(2))
    with pytest.raises(EngineFailure, match="plan 1 of epoch 1 is lost: plan 2"):
        receiver.receive(5.0)
    receiver.close()
    sender.close()


def test_a_plan_of_another_epoch_is_a_failure(tmp_path: Path) -> None:
    sender = PlanBroadcaster(f"ipc://{tmp_path}/plan")
    receiver = PlanReceiver(sender.endpoint, epoch=2)
    sender.begin(1, 1, 5.0)
    sender.send(plan(0))
    with pytest.raises(EngineFailure, match="epoch 1 arrived in epoch 2"):
        receiver.receive(5.0)
    receiver.close()
    sender.close()


def test_plans_are_numbered_without_a_gap(tmp_path: Path) -> None:
    sender = PlanBroadcaster(f"ipc://{tmp_path}/plan")
    sender.begin(1, 0, 1.0)
    sender.send(plan(0))
    with pytest.raises(AssertionError):
        sender.send(plan(2))
    sender.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_inside_a_node_and_over_tcp(tmp_path: Path, address: str) -> None:
    keyring = Keyring.open(None)
    curve_server = keyring.curve_server(rank_role(0), 3)
    zap_authenticator = ZapAuthenticator(curve_server.allowed)
    sender = PlanBroadcaster(f"ipc://{tmp_path}/plan", TcpEndpoint(tcp(address), curve_server))
    assert int(sender.remote_endpoint.rpartition(":")[2]) > 0
    near = PlanReceiver(sender.endpoint, 1)
    far = PlanReceiver(sender.remote_endpoint, 1, keyring.curve_client(2, rank_role(0)))
    sender.begin(1, 2, 5.0)
    sender.send(plan(0))
    assert near.receive(5.0) == far.receive(5.0) == plan(0)
    zap_authenticator.close()
    for channel in (near, far, sender):
        channel.close()


def test_results_keep_their_order_and_their_epoch(tmp_path: Path) -> None:
    receiver = ResultReceiver(f"ipc://{tmp_path}/result")
    receiver.begin(3)
    sender = ResultSender(receiver.endpoint)
    sent = [StepResult(3, step, pack([step])) for step in range(3)]
    for result in sent:
        sender.send(result)
    got: list[StepResult] = []
    while len(got) < 3:
        got += receiver.receive(5.0)
    assert got == sent
    sender.send(StepResult(3, 4, b""))
    with pytest.raises(EngineFailure, match=r"step 4 .* step 3"):
        receiver.receive(5.0)
    receiver.close()
    sender.close()


def test_the_frontend_speaks_only_with_the_engine_of_the_epoch(tmp_path: Path) -> None:
    server = EngineServer(f"ipc://{tmp_path}/engine")
    old, new = EngineLink(server.endpoint, 1), EngineLink(server.endpoint, 2)
    old.send([Done(1, "stop", 1)])
    new.send([Done(2, "stop", 1)])
    server.attach(2)
    deadline_s, got = time.monotonic() + 5, []
    while not got and time.monotonic() < deadline_s:
        server.wait(0.1)
        got += server.receive()
    time.sleep(0.05)
    assert got + server.receive() == [Done(2, "stop", 1)]
    server.send([Abort(5), Truncate(6, 7)])
    assert new.poll(5.0) == [Abort(5), Truncate(6, 7)]
    assert old.poll(0.1) == []
    for channel in (server, old, new):
        channel.close()


def test_what_is_said_before_the_engine_connects_waits_for_it(tmp_path: Path) -> None:
    server = EngineServer(f"ipc://{tmp_path}/engine")
    server.attach(1)
    server.send([Abort(1)])
    link = EngineLink(server.endpoint, 1)
    assert server.wait(5.0) and server.receive() == []
    assert link.poll(5.0) == [Abort(1)]
    link.close()
    deadline_s = time.monotonic() + 5
    with pytest.raises(EngineFailure, match="cannot be reached"):
        while time.monotonic() < deadline_s:
            server.send([Abort(2)])
            time.sleep(0.01)
    server.close()


def test_a_frame_over_the_bound_never_arrives(tmp_path: Path) -> None:
    receiver = ResultReceiver(f"ipc://{tmp_path}/result")
    receiver.begin(0)
    push = zmq.Context.instance().socket(zmq.PUSH)
    push.connect(receiver.endpoint)
    push.send(bytes(codec.RESULT.max_bytes + 1))
    assert receiver.receive(0.5) == []
    push.close(linger=0)
    receiver.close()
