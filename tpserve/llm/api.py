"""`LLM`: a model in a script or a notebook, without a server.

    from tpserve import LLM, SamplingParams
    llm = LLM("facebook/opt-13b", tensor_parallel_size=4)
    print(llm.generate("San Francisco is a")[0].outputs[0].text)

Owns a call's way from arguments to outputs. The caller is never a rank. Alone it plays the frontend's part (`Session`) and starts
the same agent as `tpserve serve`; under `torchrun script.py` every script starts one rank, rank 0's plays the frontend, and the
others (`RpcClient`) return what it returns. Needs no `if __name__ == "__main__"` and no free event loop, takes no signals.
"""

import itertools
import logging
import os
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from tpserve.cli import keywords
from tpserve.config import env
from tpserve.config.env import RankEnv
from tpserve.engine_client.engine_client import EngineClient
from tpserve.hub.locate import read_template
from tpserve.llm import launch
from tpserve.llm.generate import CallProgress, GenerateCall
from tpserve.llm.outputs import RequestOutput
from tpserve.llm.params import SamplingParams
from tpserve.llm.prompts import Priority, PromptInput, PromptJob, chats, jobs
from tpserve.llm.rpc_client import RpcClient
from tpserve.llm.rpc_server import RpcReply, rpc_error
from tpserve.llm.session import Session
from tpserve.observe.progress import PromptProgress
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer

logger = logging.getLogger("tpserve")
_numbers = itertools.count()
"""Of the LLMs of this process: scripts of one torchrun job make them in the same order."""


class LLM:
    """A loaded model. Methods raise UserError for what the caller can mend and EngineFailure when a rank or a link failed; after
    that every call raises. `close`, the end of a `with` block and the end of the script leave no process and no file."""

    def __init__(self, model: "str | os.PathLike[str] | None" = None, **flags: Any) -> None:
        """Load `model` (a directory or a repository id; None: the small built-in one) and wait until it is ready. `flags`: those
        of the command line in snake_case, docs/flags.md. UserError, in one line, for what cannot be."""
        said, notice = keywords.read_kwargs({"model": model, **flags})
        if notice:
            logger.info("%s", notice)
        me = env.rank_env() if env.under_torchrun() else None
        self._calls = itertools.count(1)
        self._num_requests = 0
        self._session: Session | None = None
        self._rpc_client: RpcClient | None = None
        job = f"llm{next(_numbers)}-{me.restart_count}" if me else ""
        if me is not None and me.rank > 0:
            self._follow(me, launch.TorchrunLauncher(me, job, said))
        else:
            self._lead(launch.LocalLauncher(said) if me is None else launch.TorchrunLauncher(me, job, said))

    def _lead(self, way: "launch.LocalLauncher | launch.TorchrunLauncher") -> None:
        config = way.config()
        self._defaults = config.sampling_defaults
        self._window = 2 * config.max_num_seqs
        self._tokenizer = Tokenizer.load(config.tokenizer)
        self._load_template = partial(ChatTemplate.load, config.tokenizer, self._tokenizer.special_tokens)
        self._template = self._load_template(config.chat_template)
        session = Session(config, way.where, way.start, remote=way.remote, followers=way.num_followers)
        self._session = session
        self._finalizer = weakref.finalize(self, session.close)
        try:
            session.begin()
            way.publish(session.wait_bound())
            session.wait_ready()
        except BaseException as error:
            session.tell_followers(rpc_error(0, error))
            self.close()
            raise
        session.tell_followers(RpcReply(0, []))

    def _follow(self, me: RankEnv, way: "launch.TorchrunLauncher") -> None:
        self._rpc_client = RpcClient(me.rank, *way.find(), way.start)
        self._defaults = way.config().sampling_defaults
        self._finalizer = weakref.finalize(self, self._rpc_client.close)
        try:
            self._rpc_client.wait(0)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: "PromptInput | Sequence[PromptInput]",
        sampling_params: "SamplingParams | Sequence[SamplingParams] | None" = None,
        use_tqdm: bool = True,
        *,
        priority: Priority = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs come in the order of the prompts. No `sampling_params`: the model's defaults."""
        return self._call(lambda: jobs(prompts, self._params(sampling_params), priority), use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: "SamplingParams | Sequence[SamplingParams] | None" = None,
        use_tqdm: bool = True,
        *,
        priority: Priority = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation (a list of messages), or each of several, through the model's chat template or another one: a
        file, the Jinja text itself, or the name of one of the model's."""
        arguments = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        return self._call(lambda: chats(messages, self._params(sampling_params), priority, arguments), use_tqdm, chat_template)

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json and --override-generation-config make of `SamplingParams()`, to be changed at will."""
        return SamplingParams(**self._defaults.specified())

    def _params(self, given: "SamplingParams | Sequence[SamplingParams] | None") -> "SamplingParams | Sequence[SamplingParams]":
        return self.get_default_sampling_params() if given is None else given

    def _call(self, ask: Callable[[], list[PromptJob]], visible: bool, template: str | None = None) -> list[RequestOutput]:
        """One numbered call: whatever happens here, the other scripts of a torchrun job hear of it under its number."""
        call = next(self._calls)
        if self._rpc_client is not None:
            return self._rpc_client.wait(call)
        assert self._session is not None
        try:
            outputs = self._answer(self._session, ask(), visible, template)
        except BaseException as error:
            self._session.tell_followers(rpc_error(call, error))
            raise
        self._session.tell_followers(RpcReply(call, outputs))
        return outputs

    def _answer(self, session: Session, asked: Sequence[PromptJob], visible: bool, given: str | None) -> list[RequestOutput]:
        if not asked:
            return []
        template = self._template if given is None else self._load_template(read_template(given))
        first_id, count = self._num_requests, CallProgress()
        self._num_requests += len(asked)

        def work(engine_client: EngineClient) -> Coroutine[Any, Any, list[RequestOutput]]:
            return GenerateCall(engine_client, self._tokenizer, template, asked, first_id, self._window, count).run()

        with PromptProgress(len(asked), visible) as progress:
            outputs = session.run(work, lambda: progress.update(count.done, count.tokens))
            progress.update(count.done, count.tokens)
        return outputs

    def close(self) -> None:
        """End the ranks and wait for it. Under torchrun all scripts' ranks end, when their open calls have."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
