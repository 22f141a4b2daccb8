"""A process builds its vocabulary for grammars before it serves, because the build holds the interpreter lock for seconds."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.http import inprocess
from tpserve.config.reload import RankConfiguration
from tpserve.engine import start
from tpserve.llm import api
from tpserve.structured_output import checker, compiler
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.layout import ParallelLayout

MODEL = "tpserve/builtin/model"


class Events(list[str]):
    """What happened, in order."""

    def slow(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """`build`, for which nobody would have to wait who does not want to."""

        def built(*arguments: Any) -> Any:
            time.sleep(0.05)
            self.append("vocabulary")
            return build(*arguments)

        return built

    def at(self, name: str) -> Callable[..., None]:
        """Something that happens."""
        return lambda *_arguments, **_named: self.append(name)


class Over(Exception):
    """The test has seen enough."""


@pytest.mark.parametrize("incarnation", [1, 2])
def test_a_rank_builds_it_before_its_hello(monkeypatch: pytest.MonkeyPatch, incarnation: int) -> None:
    events = Events()

    class Agent:
        report_progress = staticmethod(lambda phase, percent: None)

        def hello(self, *_facts: Any) -> None:
            events.append("hello")
            raise Over

    monkeypatch.setattr(start, "vocabulary", events.slow(compiler.vocabulary))
    monkeypatch.setattr(start, "check_frames", lambda *_: None)
    monkeypatch.setattr(start, "processor", lambda *_: ({}, {}))
    monkeypatch.setattr(start, "fingerprint", lambda *_: {})
    monkeypatch.setattr(start, "of_answers", lambda *_: {})
    loaded = lambda *arguments: SimpleNamespace(processor={}, ledger=None)  # noqa: E731
    monkeypatch.setattr(start, "LoadedModel", loaded)
    monkeypatch.setattr(start.devices, "choose", lambda *_: torch.device("cpu"))
    config = SimpleNamespace(
        step_trace=None, device="cpu", dtype="float32", quantization=None, binding=False, snapshot=None, tokenizer=MODEL,
        layout=ParallelLayout(2, 1, (1,)),
    )  # fmt: skip
    env = SimpleNamespace(rank=1, local_rank=1, local_world_size=2, last_exit="")
    spec = SimpleNamespace(vocab_size=2048, windows=(), eos_ids=())
    timer = SimpleNamespace(first=True, mark=lambda name: None)
    rank: Any = start._ServingRank(config, spec, env, None, None, timer, RankConfiguration())  # type: ignore[arg-type]
    for _ in range(incarnation):  # a later one of the same process has it
        with pytest.raises(Over):
            rank.serve(Agent(), None)
    assert events == ["vocabulary", *["hello"] * incarnation]


def test_the_frontend_builds_it_before_it_can_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    events = Events()
    monkeypatch.setattr(checker, "vocabulary", events.slow(compiler.vocabulary))
    made = inprocess.create_app

    def create_app(*arguments: Any, **named: Any) -> Any:
        app = made(*arguments, **named)
        events.append("application")
        return app

    monkeypatch.setattr(inprocess, "create_app", create_app)
    with inprocess.serving(tmp_path):
        assert events == ["vocabulary", "application"]


def test_an_offline_model_has_it_when_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    monkeypatch.setattr(checker, "vocabulary", events.slow(compiler.vocabulary))
    session = SimpleNamespace(
        start=events.at("start"), wait_bound=lambda: None, wait_ready=lambda: None, send_to_followers=events.at("made"),
        close=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(api, "Session", lambda *_arguments, **_named: session)
    config = SimpleNamespace(sampling_defaults=None, max_num_seqs=8, tokenizer=MODEL, chat_template=None)
    launcher: Any = SimpleNamespace(
        config=lambda: config, runtime_dir=None, start=None, remote=None, num_followers=0, restarts=False, publish=lambda _: None
    )
    api.LLM._start_session(api.LLM.__new__(api.LLM), launcher)
    assert sorted(events[:2]) == ["start", "vocabulary"] and events[2:] == ["made"]


def test_byte_level_pieces_are_read_as_the_bytes_that_they_spell() -> None:
    tokenizer = Tokenizer.load(MODEL)
    for text in ("Grüße, 日本 🙂\n\tx", "\x00\x7f\xa0"):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special_tokens=False))) == text.encode()
