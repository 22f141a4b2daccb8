"""One call of `LLM.generate` or `LLM.chat` on the session's event loop.

Checks and tokenizes the prompts as over HTTP, opens requests in the request table and builds the outputs. Owns the order of a
call and the number of requests that are open at once. Invariants: all prompts are checked before the first request is opened;
however a call ends, its requests are closed.
"""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tpserve.engine_client.engine_client import EngineClient
from tpserve.engine_client.requests import RequestHandle
from tpserve.errors import EngineFailure, UserError
from tpserve.frontend.key_usage import KeyUsage
from tpserve.frontend.open_requests import OpenRequests
from tpserve.frontend.openai.body import parse
from tpserve.frontend.openai.grammar import grammar_of
from tpserve.frontend.openai.prompts import Prompt, chat_prompt, completion_prompts, max_new_tokens
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest
from tpserve.frontend.openai.sequences import params_of, requests_of
from tpserve.frontend.openai.service import ModelLimits, OpenAIServing
from tpserve.llm.outputs import OutputBuilder, RequestOutput, RequestStateStats
from tpserve.llm.prompts import PromptJob
from tpserve.structured_output.checker import GrammarChecker
from tpserve.text.chat import ChatTemplate
from tpserve.text.logprobs import likeliest
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.sampling import EngineSamplingParams, SamplingDefaults

PROGRESS_S = 0.1
"""Interval at which tokens are counted for the progress bar."""
YIELD_S = 0.05
"""While many prompts are tokenized, the event loop gets a turn for the ranks' messages at this interval."""


@dataclass
class CallProgress:
    """Progress of a call: `done` prompts and generated `tokens`. The session's thread writes it, the caller's thread reads it."""

    done: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt that passed all checks. `text` is None for a prompt of token ids."""

    prompt: Prompt
    text: str | None
    call: CompletionRequest
    params: EngineSamplingParams
    detokenize: bool


class GenerateCall:
    """One call. `window`: the number of prompts that are open at once; more would only wait in the scheduler."""

    def __init__(
        self,
        engine_client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        jobs: Sequence[PromptJob],
        first_id: int,
        window: int,
        progress: CallProgress,
        grammars: GrammarChecker,
    ) -> None:
        self._service = OpenAIServing(
            names=("",),
            root="",
            created_s=0,
            max_open=sys.maxsize,
            request_table=engine_client.request_table,
            status=engine_client.status,
            tokenizer=tokenizer,
            chat_template=template,
            grammars=grammars,
            open_requests=OpenRequests(engine_client.request_table, KeyUsage("")),
            defaults=SamplingDefaults(),  # every job's params hold every field
        )
        self._arrival_time, self._arrived_s = time.time(), time.monotonic()
        self._jobs = jobs
        self._first_id = first_id
        self._window = window
        self._progress = progress
        self._open: set[RequestHandle] = set()
        self._ended_tokens = 0

    async def run(self) -> list[RequestOutput]:
        """Returns the outputs in the order of the prompts. Raises UserError for a prompt that cannot be served, and EngineFailure
        when the ranks have ended."""
        try:
            limits = self._service.limits()
            waiting = enumerate(await self._check(limits))
            outputs: list[RequestOutput | None] = [None] * len(self._jobs)
            progress_task = asyncio.create_task(self._update_progress())
            workers = [asyncio.create_task(self._work(waiting, outputs)) for _ in range(min(self._window, len(self._jobs)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in (progress_task, *workers):
                    task.cancel()
        except UserError as error:
            if error.status >= 500:  # the request table reports a failure of the engine in this way
                raise EngineFailure(str(error)) from None
            raise
        self._progress.tokens = self._ended_tokens
        return [output for output in outputs if output is not None]

    async def _check(self, limits: ModelLimits) -> list[CheckedPrompt]:
        checked, yielded_s = list[CheckedPrompt](), time.monotonic()
        for index, job in enumerate(self._jobs):
            try:
                prompt = await self._check_prompt(job, limits)
            except UserError as error:
                if len(self._jobs) == 1:
                    raise
                raise UserError(f"prompts[{index}]: {error}", param=error.param, code=error.code, status=error.status) from None
            checked.append(prompt)
            if time.monotonic() - yielded_s > YIELD_S:
                await asyncio.sleep(0)
                yielded_s = time.monotonic()
        return checked

    async def _check_prompt(self, job: PromptJob, limits: ModelLimits) -> CheckedPrompt:
        call = job.params.call(**job.fields)
        if job.chat is not None:
            chat, _ = parse(dict(job.chat), ChatCompletionRequest, set())
            prompt = await chat_prompt(self._service, chat, limits)
        else:
            text_or_ids = job.text if job.ids is None else [job.ids]
            (prompt,) = await completion_prompts(self._service, replace(call, prompt=text_or_ids), limits)
        size = max_new_tokens(prompt, None, job.params.max_tokens, limits, "prompt")
        (params,) = await params_of(self._service, call, [prompt], [size], limits, grammar_of(call))
        return CheckedPrompt(prompt, prompt.text if job.ids is None else job.text, call, params, job.params.detokenize)

    async def _work(self, waiting: Iterator[tuple[int, CheckedPrompt]], outputs: list[RequestOutput | None]) -> None:
        """Answer one prompt after another, until none is waiting."""
        for index, checked in waiting:
            requests = requests_of(self._service, checked.call, [checked.prompt], [checked.params])
            handle = self._service.open(requests, streaming=False)
            self._open.add(handle)
            try:
                while not handle.ended:
                    await handle.wait()
                outputs[index] = self._output(index, checked, handle)
            finally:
                self._open.discard(handle)
                self._service.request_table.abort(handle)
            self._ended_tokens += _num_tokens(handle)
            self._progress.done += 1

    def _output(self, index: int, checked: CheckedPrompt, handle: RequestHandle) -> RequestOutput:
        call, builder = checked.call, OutputBuilder(self._service.tokenizer, checked.detokenize)
        deltas = [delta for _, delta in handle.take()]
        scores = handle.sequences[0].assembler.scores
        if call.n < call.num_drawn:
            deltas = likeliest(deltas, call.n)
        return RequestOutput(
            request_id=str(self._first_id + index),
            prompt=checked.text,
            prompt_token_ids=list(checked.prompt.ids),
            prompt_logprobs=None if scores is None else builder.prompt(scores, call.prompt_logprobs or 0),
            outputs=[builder.completion(choice, delta, call.logprobs) for choice, delta in enumerate(deltas)],
            metrics=RequestStateStats.of(handle.sequences, self._arrival_time, self._arrived_s),
            num_cached_tokens=handle.sequences[0].cached_tokens,
        )

    async def _update_progress(self) -> None:
        while True:
            self._progress.tokens = self._ended_tokens + sum(map(_num_tokens, self._open))
            await asyncio.sleep(PROGRESS_S)


def _num_tokens(handle: RequestHandle) -> int:
    return sum(sequence.assembler.num_tokens for sequence in handle.sequences)
