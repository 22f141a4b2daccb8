"""The frontend as a process: its HTTP port, its event loop and its exit code.

    clients   the HTTP port, which listens before anything else is read, so that a port in use is an error at once
    ranks     an `EngineClient`, which owns the request table and the coordinator
    parent    the supervisor, or under bare torchrun the agent, by its pidfd; this process ends with it

Owns the order of start and shutdown; decides nothing about requests. Clients' sockets are here, so they outlive a crash of the
ranks. Invariants: frontend.json is written only once every socket is bound, or with the error that prevents it; the runtime
directory is removed when the service has ended.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import select
import socket
import sys
import time
from pathlib import Path

import msgspec
import uvloop
from aiohttp import web

from tpserve.cluster.discovery import FrontendRecord, acquire_lock, remove_runtime_dir, write_frontend
from tpserve.config import env
from tpserve.config.engine_config import EngineConfig
from tpserve.coordinator.actions import EpochFailed, EpochReady
from tpserve.engine_client.engine_client import EngineClient, EpochNews
from tpserve.engine_client.recovery import EXACT
from tpserve.errors import EngineFailure, UserError
from tpserve.frontend.access_log import AccessLogFile
from tpserve.frontend.api_keys import ApiKeys
from tpserve.frontend.app import create_app, runner
from tpserve.frontend.openai.chat_answer import ChatAnswers
from tpserve.frontend.tls import server_context
from tpserve.host.network import host_port, listen_http
from tpserve.journal.identity import answer_digest
from tpserve.journal.journal import Journal
from tpserve.observe import log
from tpserve.observe.spans import SpanExporter
from tpserve.process.process_utils import open_pidfd
from tpserve.process.signals import SAME_SIGNAL_S, SIGNALS, unblock_signals
from tpserve.response_template.detect import detect
from tpserve.response_template.lark import SpecialTokens
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer
from tpserve.text.tokenizer_config import CONFIG, read_json
from tpserve.version import __version__

logger = logging.getLogger(__name__)

ANSWER_S = 2.0
"""The time that the last answers have to reach their clients."""
AGENT_EXIT_S = 2.0
"""The time that the agent has for its own last lines, so that the reason of a failure is the last line of the log."""


def main(arguments: list[str]) -> int:
    """Serve until a signal or a failure; returns the exit code: 0 after a drain, 1 engine failure, 2 user error.

    `arguments`: the runtime directory, the process id of the parent, the number of nodes, this node's address, and under `tpserve
    serve` the descriptor of the listening HTTP socket. Stdin has the `EngineConfig` as JSON.
    """
    started_s = time.monotonic()
    unblock_signals()  # inherited from the rank that started us
    runtime_dir, watch_pid, nnodes, address = Path(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3]
    inherited = int(arguments[4]) if len(arguments) > 4 else None
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig)
    log.setup(config.log_level, "frontend", color=env.color(sys.stderr))
    log_buffer = log.keep_log()
    try:
        lock = acquire_lock(runtime_dir)
    except BlockingIOError:
        logger.error("another frontend runs in %s", runtime_dir)
        return 1
    try:
        code = uvloop.run(_run(config, runtime_dir, watch_pid, nnodes, address, started_s, log_buffer, inherited))
    except UserError as error:
        return _report(runtime_dir, str(error), 2)
    except EngineFailure as error:
        return _report(runtime_dir, str(error), 1)
    remove_runtime_dir(runtime_dir)
    os.close(lock)
    return code


def _report(runtime_dir: Path, error: str, code: int) -> int:
    """Write the error for the process that spawned this one, which prints it and removes the directory."""
    write_frontend(runtime_dir, FrontendRecord(os.getpid(), error=error, code=code))
    return code


async def _run(
    config: EngineConfig,
    runtime_dir: Path,
    watch_pid: int,
    nnodes: int,
    address: str,
    started_s: float,
    log_buffer: log.LogRingBuffer,
    inherited: int | None,
) -> int:
    """`inherited`: the descriptor of the HTTP socket, if the parent is `tpserve serve`, which listens already."""
    with listen_http(config.host, config.port) if inherited is None else socket.socket(fileno=inherited) as listener:
        listener.setblocking(False)
        tls = server_context(config.ssl_certfile, config.ssl_keyfile)
        url = http_url(config.host, listener.getsockname()[1], "http" if tls is None else "https")
        exposed = not ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        service = FrontendServer(config, runtime_dir, nnodes, address, url, started_s, exposed, log_buffer)
        server = runner(service.app, config.root_path)
        await server.setup()
        await web.SockSite(server, listener, ssl_context=tls).start()
        if not service.keyed and exposed:
            address_and_port = host_port(*listener.getsockname()[:2])
            logger.warning("anyone who can reach %s may use it: set --api-key, or listen on 127.0.0.1", address_and_port)
        gc.collect()
        gc.freeze()  # the collector need not visit long-lived objects again
        service.announce()
        code = await service.serve(watch_pid, supervised=inherited is not None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.cleanup(), ANSWER_S)
        service.close()
        return code


class FrontendServer:
    """The HTTP application, its engine client, and the signals that end both."""

    def __init__(
        self,
        config: EngineConfig,
        runtime_dir: Path,
        nnodes: int,
        address: str,
        url: str,
        started_s: float,
        exposed: bool,
        log_buffer: log.LogRingBuffer,
    ) -> None:
        """Bind the sockets for the ranks and load the tokenizer. UserError or EngineFailure when one of them fails.

        `exposed`: the HTTP port listens beyond loopback.
        """
        self._config = config
        self._runtime_dir = runtime_dir
        self._nnodes = nnodes
        self._url = url
        self._started_s = started_s
        api_keys = ApiKeys(config.api_key, config.api_key_file)
        endpoint = config.otlp_traces_endpoint
        self._spans = None if endpoint is None else SpanExporter(endpoint)
        self._access_log = None if config.access_log is None else AccessLogFile(config.access_log)
        self._first_signal_s: float | None = None
        self._final_reason = ""
        self._was_ready = False
        self._engine_client = EngineClient(
            config,
            runtime_dir,
            address if nnodes > 1 else None,
            started_s,
            self._on_epoch_news,
            log_buffer,
            restarts=env.ranks_restart(),
        )
        tokenizer = Tokenizer.load(config.tokenizer)
        template = ChatTemplate.load(config.tokenizer, tokenizer.special_tokens, config.chat_template)
        found = detect(template, read_json(Path(config.tokenizer) / CONFIG), config.tool_call_parser, config.reasoning_parser)
        on = [f"{feature} (from {source})" for feature, source in found.source.items()]
        logger.info(
            "answers are read as %s", "; ".join([", ".join(on), *(f"no {name}: {why}" for name, why in found.off.items())])
        )
        tokens = SpecialTokens.of(tokenizer, config.eos_ids, config.vocab_size)
        answers = ChatAnswers.of(found, tokenizer, tokens, config.tool_strict_level)
        self._journal = open_journal(config)
        engine_client = self._engine_client
        self.app = create_app(
            config,
            engine_client.request_table,
            engine_client.status,
            tokenizer,
            template,
            answers,
            journal=self._journal,
            info=engine_client.info,
            control=engine_client.control,
            api_keys=api_keys,
            access_log=self._access_log,
            spans=self._spans,
            exposed=exposed,
        )
        self.keyed = api_keys.required
        """Whether clients need a key."""

    def announce(self) -> None:
        """Write frontend.json, by which the ranks find this process."""
        self._engine_client.announce(self._url)

    async def serve(self, watch_pid: int, *, supervised: bool) -> int:
        """Run until the service and the ranks on this host have ended; returns the exit code.

        `supervised`: the parent `watch_pid` is `tpserve serve`, which starts a killed agent again; else it is the agent.
        """
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        agent = None if supervised else open_pidfd(watch_pid)
        code = await self._engine_client.serve(watch_pid, supervised=supervised)
        if self._final_reason:
            if agent is not None:
                await asyncio.to_thread(select.select, [agent], [], [], AGENT_EXIT_S)
            logger.error(self._final_reason)
        return code

    def close(self) -> None:
        """Close the sockets, send the last spans, and close the access log."""
        self._engine_client.close()
        if self._spans is not None:
            self._spans.close()
        if self._access_log is not None:
            self._access_log.close()

    def _on_signal(self) -> None:
        now = time.monotonic()
        if self._first_signal_s is None:
            self._first_signal_s = now
            self._engine_client.drain()
        elif now - self._first_signal_s > SAME_SIGNAL_S:
            self._engine_client.fail(1, "ended at once by a second signal")

    def _on_epoch_news(self, news: EpochNews) -> None:
        if self._journal is not None and isinstance(news, EpochReady):
            self._journal.exact = self._engine_client.status().resumption == EXACT
        match news:
            case EpochReady() if not self._was_ready:
                self._was_ready = True
                logger.info(ready_line(self._config, self._nnodes, self._url, time.monotonic() - self._started_s))
            case EpochFailed(code, reason, _) if code == 2:
                sys.stderr.write(log.user_error(reason) + "\n")
            case EpochFailed(_, reason, advice):
                logger.error(reason)
                self._final_reason = "; ".join(filter(None, (f"ended: {reason}", advice)))


def open_journal(config: EngineConfig) -> Journal | None:
    """The durable table of answers; None without --state-dir. UserError when the directory cannot be used."""
    if config.state_dir is None:
        return None
    facts, model, tokenizer = {"version": __version__, **config.of_answers()}, Path(config.model), Path(config.tokenizer)
    directories = [tokenizer] if tokenizer == model else [tokenizer, model]
    if config.snapshot is not None:  # its weights may still be on their way
        facts["commit"] = f"{config.snapshot.repository}@{config.snapshot.commit}"
        directories = [directory for directory in directories if directory != model]
    return Journal(Path(config.state_dir), answer_digest(facts, directories), config.resume_window)


def http_url(host: str, port: int, scheme: str = "http") -> str:
    """The URL for clients on this host."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{shown}:{port}"


def ready_line(config: EngineConfig, nnodes: int, url: str, took_s: float) -> str:
    """The log line of a finished start: the model, the URL and the layout."""
    layout = config.layout
    noun = "GPU" if config.device == "cuda" else "CPU rank"
    ranks = f"{layout.world_size} {noun}{'s' * (layout.world_size > 1)} on {nnodes} node{'s' * (nnodes > 1)}"
    model = (config.served_model_name or (config.model,))[0]
    return f"tpserve ready: {model} on {url}, {ranks}, TP {layout.tp} x PP {layout.pp}, {took_s:.0f} s"
