"""A call's work on the session's loop: prompts checked and tokenized as over HTTP, opened in the request table, put together.

Owns the order of a call and how much of it is open at once. Everything is checked before anything is opened. Whatever ends a
call, its handles are closed on the way out.
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
from tpserve.frontend.openai.body import parse
from tpserve.frontend.openai.prompts import Prompt, chat_prompt, completion_prompts, max_new_tokens
from tpserve.frontend.openai.schema import ChatCompletionRequest, CompletionRequest
from tpserve.frontend.openai.sequences import params_of, requests_of
from tpserve.frontend.openai.service import ModelLimits, OpenAIServing
from tpserve.llm.outputs import OutputBuilder, RequestOutput, RequestStateStats
from tpserve.llm.prompts import PromptJob
from tpserve.text.chat import ChatTemplate
from tpserve.text.logprobs import likeliest
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.sampling import EngineSamplingParams, SamplingDefaults

COUNT_S = 0.1
"""How often tokens are counted for the progress bar."""
YIELD_EVERY_S = 0.05
"""After this long without news the loop looks after the ranks, while many prompts are tokenized."""


@dataclass
class CallProgress:
    """How far a call has come; written by the session's thread, read by the caller's."""

    done: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt that can be served. `text` is None for one given as ids."""

    prompt: Prompt
    text: str | None
    call: CompletionRequest
    params: EngineSamplingParams
    detokenize: bool


class GenerateCall:
    """One call. `window`: prompts that are open at once; more of them would only wait in the scheduler."""

    def __init__(
        self,
        engine_client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        jobs: Sequence[PromptJob],
        first_id: int,
        window: int,
        count: CallProgress,
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
            defaults=SamplingDefaults(),  # every job says all of it
        )
        self._arrival_time, self._arrived_s = time.time(), time.monotonic()
        self._jobs = jobs
        self._first_id = first_id
        self._window = window
        self._progress = count
        self._open: set[RequestHandle] = set()
        self._ended_tokens = 0

    async def run(self) -> list[RequestOutput]:
        """The outputs in the order of the prompts. UserError names what cannot be served; EngineFailure: the ranks have ended."""
        try:
            limits = self._service.limits()
            waiting = enumerate(await self._check(limits))
            outputs: list[RequestOutput | None] = [None] * len(self._jobs)
            tasks = [asyncio.create_task(self._count())]
            workers = [asyncio.create_task(self._work(waiting, outputs)) for _ in range(min(self._window, len(self._jobs)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in (*tasks, *workers):
                    task.cancel()
        except UserError as error:
            if error.status >= 500:  # the request table's way of saying that it is not the request's fault
                raise EngineFailure(str(error)) from None
            raise
        self._progress.tokens = self._ended_tokens
        return [output for output in outputs if output is not None]

    async def _check(self, limits: ModelLimits) -> list[CheckedPrompt]:
        checked, breath_s = list[CheckedPrompt](), time.monotonic()
        for index, job in enumerate(self._jobs):
            try:
                one = await self._checked(job, limits)
            except UserError as error:
                if len(self._jobs) == 1:
                    raise
                raise UserError(f"prompts[{index}]: {error}", param=error.param, code=error.code, status=error.status) from None
            checked.append(one)
            if time.monotonic() - breath_s > YIELD_EVERY_S:
                await asyncio.sleep(0)
                breath_s = time.monotonic()
        return checked

    async def _checked(self, job: PromptJob, limits: ModelLimits) -> CheckedPrompt:
        call = job.params.call(**job.fields)
        if job.chat is not None:
            chat, _ = parse(dict(job.chat), ChatCompletionRequest, set())
            prompt = await chat_prompt(self._service, chat, limits)
        else:
            given = job.text if job.ids is None else [job.ids]
            (prompt,) = await completion_prompts(self._service, replace(call, prompt=given), limits)
        size = max_new_tokens(prompt, None, job.params.max_tokens, limits, "prompt")
        (params,) = params_of(self._service, call, [prompt], [size], limits)
        return CheckedPrompt(prompt, prompt.text if job.ids is None else job.text, call, params, job.params.detokenize)

    async def _work(self, waiting: Iterator[tuple[int, CheckedPrompt]], outputs: list[RequestOutput | None]) -> None:
        """Answer one prompt after another, until none waits."""
        for index, one in waiting:
            requests = requests_of(self._service, one.call, [one.prompt], [one.params])
            handle = self._service.open(requests, streaming=False)
            self._open.add(handle)
            try:
                while not handle.ended:
                    await handle.wait()
                outputs[index] = self._output(index, one, handle)
            finally:
                self._open.discard(handle)
                self._service.request_table.abort(handle)
            self._ended_tokens += _num_tokens(handle)
            self._progress.done += 1

    def _output(self, index: int, one: CheckedPrompt, handle: RequestHandle) -> RequestOutput:
        call, builder = one.call, OutputBuilder(self._service.tokenizer, one.detokenize)
        pieces = [delta for _, delta in handle.take()]
        scores = handle.sequences[0].assembler.scores
        if call.n < call.num_drawn:
            pieces = likeliest(pieces, call.n)
        return RequestOutput(
            request_id=str(self._first_id + index),
            prompt=one.text,
            prompt_token_ids=list(one.prompt.ids),
            prompt_logprobs=None if scores is None else builder.prompt(scores, call.prompt_logprobs or 0),
            outputs=[builder.completion(number, delta, call.logprobs) for number, delta in enumerate(pieces)],
            metrics=RequestStateStats.of(handle.sequences, self._arrival_time, self._arrived_s),
            num_cached_tokens=handle.sequences[0].cached_tokens,
        )

    async def _count(self) -> None:
        while True:
            self._progress.tokens = self._ended_tokens + sum(map(_num_tokens, self._open))
            await asyncio.sleep(COUNT_S)


def _num_tokens(handle: RequestHandle) -> int:
    return sum(sequence.assembler.num_tokens for sequence in handle.sequences)
