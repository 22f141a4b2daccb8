"""The log: one line an event, prefixed; tracebacks and other ranks' chatter only at debug."""

import io
import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from tpserve.observe import log, progress
from tpserve.observe.progress import ByteProgress, PromptProgress


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, shown = logging.getLogger(), warnings.showwarning
    before = (root.handlers[:], root.level)
    yield
    root.handlers[:], root.level, warnings.showwarning = *before, shown
    logging.getLogger("tpserve").setLevel(logging.NOTSET)


def said(level: str, lead: bool = True) -> list[str]:
    stream = io.StringIO()
    log.setup(level, log.rank_prefix(0, 1, 2), lead=lead, stream=stream)
    logger = logging.getLogger("tpserve.test")
    logger.debug("fine")
    logger.info("told\nin two lines")
    logger.warning("careful")
    logging.getLogger("library").info("chatter")
    try:
        raise ValueError("broken\npipe")
    except ValueError:
        logger.exception("failed")
    return stream.getvalue().splitlines()


def test_a_line_says_who_when_how_bad_and_what() -> None:
    lines = said("info")
    assert [re.sub(r"\d\d:\d\d:\d\d", "T", line) for line in lines] == [
        "[n0 r1 s2] T INFO  told in two lines",
        "[n0 r1 s2] T WARN  careful",
        "[n0 r1 s2] T ERROR failed: ValueError: broken pipe",
    ]


def test_other_ranks_speak_from_warning() -> None:
    assert len(said("info", lead=False)) == 2
    assert len(said("error", lead=False)) == 1


def test_debug_has_all_ranks_and_tracebacks() -> None:
    text = "\n".join(said("debug", lead=False))
    assert "fine" in text and "Traceback" in text


def test_a_warning_is_one_line() -> None:
    stream = io.StringIO()
    log.setup("info", "x", stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = log._warn
        warnings.warn("two\n lines", UserWarning, stacklevel=1)
    assert stream.getvalue().endswith("WARN  two lines\n") and stream.getvalue().count("\n") == 1


def test_an_error_of_the_user_is_one_line() -> None:
    assert log.user_error("no\nmodel") == "tpserve: error: no model"


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    stream = io.StringIO()
    log.setup("info", "x", stream=stream)
    for visible in (False, True):
        with ByteProgress("loading weights", visible, stream) as bar:
            bar.update(500_000_000, 2_000_000_000)
            bar.update(2_000_000_000, 2_000_000_000)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "loading weights: 25% of 2.0 GB, " in lines[0]
    assert re.search(r"loading weights: 2 GB in 0\.\d s, [\d.]+ GB/s$", lines[2])


def test_progress_on_a_terminal_draws_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, stream = Terminal(), io.StringIO()
    log.setup("info", "x", stream=stream)
    with ByteProgress("loading weights", True, terminal) as bar:
        bar.update(1_000_000, 1_000_000)
    assert "loading weights" in terminal.getvalue()
    assert len(stream.getvalue().splitlines()) == 1


def test_answered_prompts_are_a_bar_on_a_terminal_and_a_line_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Notebook(io.StringIO):
        __module__ = "ipykernel.iostream"

    shown = []
    for stream in (Terminal(), io.StringIO(), Notebook()):
        with PromptProgress(3, True, stream) as bar:
            bar._line_s -= 1.0  # a second has gone by
            bar.update(1, 12_000_000)
            bar.update(3, 120)
        shown.append(stream.getvalue())
    assert "3/3" in shown[0] and "tokens/s" in shown[0]
    assert re.fullmatch(r"3/3 prompts in \d\.\d s, [\d,]+ tokens/s\n", shown[1])
    assert re.fullmatch(r"\r1/3 prompts in \d\.\d s, [\d,]+ tokens/s\r3/3 prompts in \d\.\d s, [\d,]+ tokens/s *\n", shown[2])
    first, last = shown[2].strip("\r\n").split("\r")
    assert len(first) == len(last), "what was there is written over"


def test_colors_are_for_terminals_alone() -> None:
    shown, kept = io.StringIO(), logging.getLogger("tpserve.test")
    log.setup("info", "n0 r0 s0", stream=shown, color=True)
    ring = log.keep_log()
    kept.info("ready")
    kept.error("gone")
    assert re.sub(r"\d\d:\d\d:\d\d", "T", shown.getvalue()).splitlines() == [
        "[\033[2mn0 r0 s0\033[0m] T \033[32mINFO \033[0m ready",
        "[\033[2mn0 r0 s0\033[0m] T \033[1;31mERROR\033[0m gone",
    ]
    assert "\033" not in "".join(ring.first) and ring.first[0].startswith("[n0 r0 s0] "), "a ticket has none"
    assert "\033" not in "".join(said("info"))
