"""One request never ends the server, and what does end it is named: two real ranks, hostile requests, faults inside a rank."""

import http.client
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import faulty_rank
from tests.server import BIN, Server, free_port, running

HOSTILE: dict[str, dict[str, Any]] = {
    "a seed of more than 64 bits": {"seed": 2**70},
    "a bias on an id that there is not": {"logit_bias": {"999999": 1}},
    "a bias on an id of more than 64 bits": {"logit_bias": {str(2**70): 1}},
    "an allowed id below 0": {"allowed_token_ids": [-1]},
    "an allowed id that there is not": {"allowed_token_ids": [3, 10**6]},
    "a stop id of more than 64 bits": {"stop_token_ids": [2**70]},
    "min_tokens of more than 64 bits": {"min_tokens": 2**70},
    "a prompt of ids that there are not": {"prompt": [1, 2, 2**40]},
    "a prompt of ids below 0": {"prompt": [-5]},
    "an empty bad word": {"bad_words": [" "]},
    "half a character as a salt": {"cache_salt": "\ud800"},
}
SERVED: dict[str, dict[str, Any]] = {
    "only what is banned": {"allowed_token_ids": [300], "logit_bias": {"300": -100}, "bad_words": ["the"]},
    "the smallest numbers": {"temperature": 1e-300, "top_p": 5e-324, "min_p": 5e-324},
    "the largest numbers": {"temperature": 2, "repetition_penalty": 100, "frequency_penalty": -2, "presence_penalty": -2},
    "top_k of more than 64 bits": {"top_k": 2**70},
    "every score": {"logprobs": 20, "echo": True, "prompt_logprobs": 20},
    "stop strings that never end": {"stop": ["\U0001f389" * 200] * 60},
    "many words": {"bad_words": ["\U0001f389" * 60] * 128},
}


def prompt(length: int) -> list[int]:
    return [100 + 7 * length + i for i in range(length)]


def refused(server: Server, **body: Any) -> str:
    """The error's text."""
    status, answer = server.post("/v1/completions", {"prompt": "Once", "max_tokens": 4, **body})
    assert 400 <= status < 600 and "error" in answer, (body, status, answer)
    return str(answer["error"]["message"])


def check_alive(server: Server) -> None:
    choice = server.complete([17, 300, 5, 42], max_tokens=3, temperature=0, ignore_eos=True, return_token_ids=True)
    assert len(choice["token_ids"]) == 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    port = free_port()
    agent = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), faulty_rank.__file__]
    command = [*agent, "--tensor-parallel-size", "2", "--port", str(port)]
    root = Path(__file__).parents[2]
    paths = ":".join(filter(None, (str(root), str(root / "kernels"), os.environ.get("PYTHONPATH"))))
    with running([command], port, tmp_path_factory.mktemp("one") / "log", env={"PYTHONPATH": paths}) as it:
        yield it


def test_hostile_requests_fail_alone(server: Server) -> None:
    for name, body in HOSTILE.items():
        assert refused(server, **body), name
    for name, body in SERVED.items():
        status, answer = server.post("/v1/completions", {"prompt": "Once upon", "max_tokens": 8, **body})
        assert status == 200, (name, answer)
    check_alive(server)


def test_what_rank_0_cannot_read_fails_alone_with_its_number_in_the_log(server: Server) -> None:
    text = refused(server, prompt=prompt(faulty_rank.UNREADABLE))
    assert "what nobody has thought of" in text
    assert re.search(r"WARN  request \d+ cannot be added: ValueError: what nobody has thought of", server.log)
    check_alive(server)


def test_a_plan_that_is_lost_while_rank_0_waits_in_a_collective_comes_again(server: Server) -> None:
    """Rank 0 computes the plan, and waits for rank 1, which waits for the plan."""
    began_s = time.monotonic()
    server.complete(prompt(faulty_rank.LOST_PLAN), max_tokens=3)
    assert time.monotonic() - began_s < 20.0 and "loses plan" in server.log
    check_alive(server)


def test_an_error_of_a_ranks_control_thread_is_the_reason_that_everybody_hears(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    body = {"prompt": prompt(faulty_rank.BROKEN_THREAD), "max_tokens": 1900, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    events = connection.getresponse().read().decode()
    server.wait()
    reason = r"rank 1 on \S+ \(pid \d+\): its control thread failed with RuntimeError: the counter is broken"
    assert re.search(reason, events), events
    assert re.search(rf"ERROR ended: {reason}", server.log), server.log
    assert "without a word" not in server.log
    server.assert_nothing_left()
