"""What a running server may reload, and how its ranks come to other flags and back."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.http.tiny_tokenizer import byte_level
from tests.specs import small
from tests.unit.test_coordinator import ENDPOINTS, up
from tpserve import builtin
from tpserve.cli.option import OPTIONS
from tpserve.config.env import RankEnv
from tpserve.config.flags import LAUNCH, SECRETS, Flags
from tpserve.config.reload import RELOADABLE, Candidate, Launched, check_durable_answers, check_same_shape, fixed_because
from tpserve.config.resolve import resolve
from tpserve.coordinator.actions import EpochFailed, EpochLost, EpochReady, Reloaded, ReloadFailed, SendMessage
from tpserve.coordinator.configurations import Configuration
from tpserve.coordinator.coordinator import Coordinator
from tpserve.coordinator.epoch_state import EpochState
from tpserve.coordinator.roster import Peer
from tpserve.engine_client.recovery import EXACT, SEAMLESS, Recovered, Recovery
from tpserve.engine_client.requests import RequestTable
from tpserve.errors import UserError
from tpserve.frontend.openai.sender import send_whole
from tpserve.hub.locate import locate
from tpserve.models.load_config import load_model_config
from tpserve.observe.metrics import Metrics
from tpserve.process.node_configuration import make_configuration_memory, read_configuration, write_configuration
from tpserve.rank_main import _configure
from tpserve.reload_check import check, read_changes
from tpserve.scheduling.sequence import Sequence
from tpserve.text.assembler import Assembler
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.machine import Machine
from tpserve.types.messages import (
    Add,
    Delta,
    Done,
    EngineInput,
    Fault,
    Heartbeat,
    Hello,
    Leave,
    MemoryLedger,
    Numerics,
    Ready,
    Reconfigure,
    Run,
    Start,
    Stop,
)
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams

MACHINE = Machine(2, 2, 1, 0, 2, "serve")
NEW = b'{"max_num_seqs":4}'


# Which flags, and which checkpoints


def present(**flags: Any) -> Candidate:
    """A server of the built-in model, as it was started."""
    given = Flags(**({"model": str(builtin.path()), "device": "cpu"} | flags))
    found, files, spec = load_model_config(given, lambda flags: locate(flags, head=True))
    return Candidate({}, Launched(found, spec, MACHINE), resolve(found, files, spec, MACHINE))


@pytest.fixture(scope="module")
def served() -> Candidate:
    return present()


def copy(place: Path, **config: Any) -> Path:
    """The built-in model's directory, with fields of config.json changed."""
    shutil.copytree(builtin.path(), place)
    fields = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(fields | config))
    return place


def test_every_flag_may_change_or_is_refused_with_a_reason() -> None:
    assert OPTIONS.keys() >= RELOADABLE
    reasons = {name: fixed_because(name, option.about.group) for name, option in OPTIONS.items()}
    assert {name for name, why in reasons.items() if not why} == RELOADABLE
    assert not RELOADABLE & {*SECRETS, *(name for name, option in OPTIONS.items() if option.about.group == LAUNCH)}
    assert "secret" in reasons["api_key"] and "frontend" in reasons["port"] and "arranged" in reasons["nproc_per_node"]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"api_key": "s3cret"}, "--api-key cannot change"),
        ({"tensor_parallel_size": 4}, "--tensor-parallel-size cannot change"),
        ({"--port": 1}, "--port cannot change"),
        ({"max_num_seq": 4}, "did you mean --max-num-seqs"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"max_num_seqs": True}, "no switch"),
        ({"log_level": "loud"}, "one of debug"),
        ({"model": None}, "model names"),
        ({"model": "/nowhere"}, "no model directory /nowhere"),
        ({"max_model_len": 1 << 30}, "beyond the model's"),
        ({"kv_cache_memory": 1, "num_gpu_blocks_override": 900}, "both size the KV cache"),
    ],
)
def test_what_cannot_be_had_is_named(served: Candidate, values: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError) as raised:
        check(served, values)
    assert error in str(raised.value) and "s3cret" not in str(raised.value)


def test_values_are_those_of_the_command_line() -> None:
    assert read_changes({"--max-num-seqs": 4, "max-model-len": "2k", "enforce_eager": True}) == {
        "max_num_seqs": 4, "max_model_len": 2000, "enforce_eager": True,
    }  # fmt: skip
    assert read_changes({"max_num_seqs": None}) == {"max_num_seqs": OPTIONS["max_num_seqs"].default}


def test_changes_add_up_and_the_name_stays(served: Candidate, tmp_path: Path) -> None:
    other = copy(tmp_path / "model")
    first = check(served, {"max_num_seqs": 4})
    assert (first.config.max_num_seqs, first.changes, first.new_weights) == (4, {"max_num_seqs": 4}, False)
    second = check(first, {"model": str(other), "log_level": "debug"})
    assert second.changes == {"max_num_seqs": 4, "model": str(other), "log_level": "debug"} and second.new_weights
    assert second.config.served_model_name == served.config.served_model_name and second.config.max_num_seqs == 4
    assert check(second, {"max_num_seqs": 256}).config.max_num_seqs == 256, "a flag's default can be had again"
    assert msgspec.json.decode(msgspec.json.encode(second), type=Candidate) == second, "it is kept in run.json"


def test_a_checkpoint_of_another_shape_or_tokenizer_is_refused(served: Candidate, tmp_path: Path) -> None:
    wide = copy(tmp_path / "wide", intermediate_size=999)
    with pytest.raises(UserError, match="intermediate_size 999 and not"):
        check(served, {"model": str(wide)})
    eos = copy(tmp_path / "eos", eos_token_id=7)
    (eos / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="eos_ids"):
        check(served, {"model": str(eos)})
    empty = copy(tmp_path / "empty")
    for file in empty.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="put the weights there first"):
        check(served, {"model": str(empty)})
    words = copy(tmp_path / "words")
    (words / "tokenizer.json").write_text((words / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match=r"tokenizer.json differ, .* --tokenizer") as raised:
        check(served, {"model": str(words)})
    assert raised.value.param == "tokenizer"
    check(served, {"model": str(words), "tokenizer": served.config.tokenizer})
    check_same_shape(small(dtype="float32"), small(dtype="bfloat16"))


def test_durable_answers_are_not_continued_by_another_model(tmp_path: Path) -> None:
    durable = present(state_dir=str(tmp_path / "state"))
    check(durable, {"max_num_seqs": 4})
    for values in ({"model": str(copy(tmp_path / "model"))}, {"quantization": "int8"}):
        with pytest.raises(UserError, match="--state-dir"):
            check(durable, values)
    check_durable_answers(present(), check(present(), {"quantization": "int8"}))


# The memory of a node


def test_the_last_order_of_a_node_is_kept() -> None:
    memory = make_configuration_memory()
    try:
        assert read_configuration(memory) is None and read_configuration(-1) is None
        orders = [Reconfigure(2, b'{"model":"/a/long/name"}', b"{}", "why"), Reconfigure(3, b"{}", None, "")]
        for order in orders:
            write_configuration(memory, order)
            assert read_configuration(memory) == order
        write_configuration(memory, orders[0])
        assert read_configuration(memory) == orders[1], "a late order counts no more"
    finally:
        os.close(memory)


def rank_env_of(memory: int) -> RankEnv:
    return RankEnv(1, 2, 0, 1, 1, 2, "", 0, "", True, 1, None, None, configuration=memory)


def test_a_rank_begins_with_what_its_node_has_been_told(tmp_path: Path) -> None:
    flags, memory = Flags(model=str(builtin.path()), device="cpu"), make_configuration_memory()
    try:
        config, _, configuration = _configure(rank_env_of(memory), flags)
        assert (config.max_num_seqs, configuration) == (256, (0, "", False))
        write_configuration(memory, Reconfigure(1, b'{"max_num_seqs":4}', b"{}", "why"))
        config, _, configuration = _configure(rank_env_of(memory), flags)
        assert (config.max_num_seqs, configuration) == (4, (1, "", True))
        missing = json.dumps({"model": str(tmp_path / "none"), "max_num_seqs": 4}).encode()
        write_configuration(memory, Reconfigure(2, missing, b'{"max_num_seqs":5}', "why"))
        config, _, configuration = _configure(rank_env_of(memory), flags)
        assert (config.max_num_seqs, configuration.number) == (5, 2) and "no model directory" in configuration.refused
        for number, fallback in ((3, None), (4, b'{"model":"/gone"}')):
            write_configuration(memory, Reconfigure(number, missing, fallback, "why"))
            with pytest.raises(UserError, match="no model directory .*/none"):
                _configure(rank_env_of(memory), flags)
    finally:
        os.close(memory)


# The coordinator


def come(c: Coordinator, rank: int, incarnation: int, configuration: int, **fields: Any) -> list[Any]:
    hello = Hello(
        rank, incarnation, 100 + rank, f"node{rank}", ENDPOINTS if rank == 0 else {}, {}, configuration=configuration, **fields
    )
    return c.receive(Peer(rank, incarnation), hello, 1.0)


def ready(rank: int, epoch: int, length: int = 256) -> Ready:
    return Ready(rank, epoch, MemoryLedger(0, 0, 0, 0, 0, 0, 0, 8, 16, length), {"max_model_len": length})


def serving() -> Coordinator:
    c = Coordinator(2, 0.0, epoch=4)
    for rank in range(2):
        come(c, rank, 1, 0)
    for rank in range(2):
        c.receive(Peer(rank, 1), ready(rank, 5), 1.0)
    assert c.state is EpochState.RUN
    return c


def sent(actions: list[Any], kind: type) -> list[Any]:
    return [action.message for action in actions if isinstance(action, SendMessage) and isinstance(action.message, kind)]


def reloading() -> Coordinator:
    """Both ranks have been told, and the new ones have said Hello."""
    c = serving()
    actions = c.reload(NEW, 1.0)
    assert sent(actions, Reconfigure) == [Reconfigure(1, NEW, b"{}", "an operator reloads")] * 2 and not sent(actions, Leave)
    assert actions[-1] == EpochLost(5, "an operator reloads", planned=True)
    come(c, 0, 2, 1)
    (measure, _) = sent(come(c, 1, 2, 1), Start)
    assert measure.ledger is None, "other flags may leave other memory"
    return c


def test_ranks_start_again_with_other_flags() -> None:
    c = reloading()
    c.receive(Peer(0, 2), ready(0, 6), 1.0)
    actions = c.receive(Peer(1, 2), ready(1, 6, 300), 1.0)
    assert actions[-2:] == [Reloaded(Configuration(1, NEW)), EpochReady(6)] and len(sent(actions, Run)) == 2
    assert (c.recoveries, c.last_fault, c.configurations.on_trial) == (0, "", False)
    assert sent(come(c, 1, 9, 0), Reconfigure) == [Reconfigure(1, NEW, None, c.reason)], (
        "a rank with the flags of the start is told"
    )


def test_nothing_depends_on_the_order_arriving() -> None:
    c = serving()
    c.reload(NEW, 1.0)
    assert sent(c.receive(Peer(0, 1), Heartbeat(0, 5, "", 0, 7), 1.5), Reconfigure) and not c.reload(NEW, 1.5)
    late = c.receive(Peer(1, 1), Fault(1, 5, "peer", "rank 0 has left"), 1.5)
    assert sent(late, Reconfigure) and c.configurations.on_trial, "the end of the old ranks is no failure of the new flags"


@pytest.mark.parametrize("how", ["user", "engine", "lost", "refused", "mismatch", "shorter", "late", "before-hello"])
def test_flags_that_fail_are_taken_back(how: str) -> None:
    c = reloading() if how not in ("refused", "mismatch", "before-hello") else serving()
    if how in ("refused", "mismatch", "before-hello"):
        c.reload(NEW, 1.0)
        come(c, 0, 2, 1)
    match how:
        case "user" | "engine":
            actions = c.receive(Peer(1, 2), Fault(1, 6, how, "it does not fit"), 1.0)
        case "before-hello":
            actions = c.receive(Peer(1, 2), Fault(1, 0, "user", "no such file"), 1.0)
            assert sent(c.receive(Peer(1, 2), Fault(1, 0, "user", "no such file"), 1.5), Reconfigure), "it repeats itself"
        case "lost":
            actions = c.lost(Peer(1, 2), "ended", 1.0)
        case "refused":
            actions = come(c, 1, 2, 1, refused="no model directory /x")
        case "mismatch":
            wrong = Hello(1, 2, 101, "node1", {}, {"model": "b"}, configuration=1)
            actions = c.receive(Peer(1, 2), wrong, 1.0)
        case "shorter":
            c.receive(Peer(0, 2), ready(0, 6, 200), 1.0)
            actions = c.receive(Peer(1, 2), ready(1, 6, 200), 1.0)
        case _:
            for rank in range(2):
                c.receive(Peer(rank, 2), Heartbeat(rank, 6, "", 0, -1), 121.0)
            c.tick(120.9)
            actions = c.tick(121.5)
    assert isinstance(actions[-1], ReloadFailed) and actions[-1].configuration == Configuration(2, b"{}"), actions
    assert not any(isinstance(action, EpochFailed) for action in actions) and not sent(actions, Stop)
    assert all(order.fallback is None and order.changes == b"{}" for order in sent(actions, Reconfigure))
    come(c, 0, 3, 2)
    starts = sent(come(c, 1, 3, 2), Start)
    assert [start.ledger.max_model_len for start in starts] == [256, 256], "what fitted before is known"
    c.receive(Peer(0, 3), ready(0, c.epoch), 122.0)
    assert isinstance(c.receive(Peer(1, 3), ready(1, c.epoch), 122.0)[-1], EpochReady) and c.recoveries == 0


def test_a_coordinator_that_follows_takes_back_what_was_on_trial() -> None:
    c = serving()
    assert c.configurations.next_start == Configuration()
    c.reload(NEW, 1.0)
    following = c.configurations.next_start
    assert following == Configuration(2, b"{}")
    after = Coordinator(2, 2.0, epoch=5, facts=c.facts, configuration=following)
    assert sent(come(after, 0, 2, 1), Reconfigure) == [Reconfigure(2, b"{}", None, "")]


def test_no_reload_without_somebody_to_start_ranks() -> None:
    c = Coordinator(1, 0.0, restarts=False)
    come(c, 0, 1, 0)
    c.receive(Peer(0, 1), up(0), 0.0)
    assert c.state is EpochState.RUN and c.reload(NEW, 1.0) == []


# The open requests


@pytest.mark.parametrize("same", [True, False])
def test_what_a_reload_means_for_open_requests(same: bool) -> None:
    c = Coordinator(1, 0.0)
    table = RequestTable(lambda inputs: None, Metrics("m"))
    recovery = Recovery(c, table)
    for identity, answers in ((1, "a"), (2, "a" if same else "b")):
        hello = Hello(0, identity, 1, "here", ENDPOINTS, {}, configuration=identity - 1, answers=answers)
        c.receive(Peer(0, identity), hello, 1.0)
        fits = Ready(0, c.epoch, MemoryLedger(0, 0, 0, 0, 0, 0, 0, 8, 16, 64), {"max_model_len": 64}, Numerics())
        news = c.receive(Peer(0, identity), fits, 1.0)
        actions = recovery.on_action(news[-1], 3.0)
        if identity == 1:
            (lost,) = [action for action in c.reload(NEW, 2.0) if isinstance(action, EpochLost)]
            recovery.on_action(lost, 2.0)
    assert Recovered(2, 1.0, planned=True) in actions and not recovery.faults
    assert recovery.resumption == EXACT, "what begins now is exact"
    assert recovery.last_resumption == (EXACT if same else SEAMLESS)


def test_what_has_tokens_of_other_weights_says_so() -> None:
    async def play() -> None:
        sent: list[EngineInput] = []
        table = RequestTable(sent.extend, Metrics("m"))
        tokenizer = Tokenizer(byte_level(), {})
        begun, waiting = (
            table.open([(Request(table.next_id(), pack([1]), EngineSamplingParams(), 1), Assembler(tokenizer))], streaming=True)
            for _ in range(2)
        )
        table.receive([Delta(0, 0, (5,))])
        table.suspend()
        table.note_other_weights()
        again = [message.request for message in table.resubmission("outside") if isinstance(message, Add)]
        assert [(request.id, request.redraw) for request in again] == [(0, False), (1, True)]
        assert (begun.of_other_weights, waiting.of_other_weights) == (True, False)
        table.receive([Delta(0, 1, (6,)), Done(0, "length", 2), Delta(1, 0, (5,)), Done(1, "length", 1)])
        for handle, header in ((begun, "seamless, not identical"), (waiting, None)):
            response = await send_whole(table, handle, SimpleNamespace(encoder=SimpleNamespace(whole=lambda outputs: b"{}")))  # type: ignore[arg-type]
            assert response.headers.get("X-Resumption") == header

    asyncio.run(play())


@pytest.mark.parametrize("redraw", [True, False])
def test_tokens_of_other_weights_are_not_drawn_again(redraw: bool) -> None:
    request = Request(1, pack([1, 2]), EngineSamplingParams(max_tokens=9), 1, output=pack([3, 4, 5]), redraw=redraw)
    sequence = Sequence.of(request, 64, 0.0, 1)
    assert (sequence.redrawing, sequence.num_output) == (redraw, 3)
