"""`LLM`: a model in a script or a notebook, without a server.

    from tpserve import LLM, SamplingParams
    llm = LLM("facebook/opt-13b", tensor_parallel_size=4)
    print(llm.generate("San Francisco is a")[0].outputs[0].text)

Owns the path of a call from arguments to outputs. The calling process is never a rank. A plain script plays the frontend's part
(`Session`) and starts the same agent as `tpserve serve`. Under `torchrun script.py` every script starts one rank: the script of
rank 0 plays the frontend, and the others (`RpcClient`) return what it returns. A script needs no `if __name__ == "__main__"` and
no free event loop. No signal handler is installed.
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
from tpserve.structured_output.checker import GrammarChecker
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer

logger = logging.getLogger("tpserve")
_llm_ids = itertools.count()
"""Numbers the LLMs of this process. The scripts of one torchrun job make them in the same order, so the numbers agree."""


class LLM:
    """A loaded model.

    Methods raise UserError for mistakes of the caller, and EngineFailure when a rank or a connection failed; every later call
    raises it too. `close`, the end of a `with` block and the end of the script leave no process and no file behind.
    """

    def __init__(self, model: "str | os.PathLike[str] | None" = None, **flags: Any) -> None:
        """Load `model` (a directory or a repository id; None: the small built-in model) and wait until it is ready.

        `flags` are the flags of the command line in snake_case (docs/flags.md). Raises UserError, in one line, for flags that
        are wrong or do not fit the machine, and EngineFailure when the ranks do not start.
        """
        server_flags, note = keywords.read_kwargs({"model": model, **flags})
        if note:
            logger.info("%s", note)
        rank_env = env.rank_env() if env.under_torchrun() else None
        self._call_ids = itertools.count(1)
        self._num_requests = 0
        self._session: Session | None = None
        self._rpc_client: RpcClient | None = None
        if rank_env is None:
            self._start_session(launch.LocalLauncher(server_flags))
            return
        launcher = launch.TorchrunLauncher(rank_env, f"llm{next(_llm_ids)}-{rank_env.restart_count}", server_flags)
        if rank_env.rank == 0:
            self._start_session(launcher)
        else:
            self._start_rpc_client(rank_env, launcher)

    def _start_session(self, launcher: "launch.LocalLauncher | launch.TorchrunLauncher") -> None:
        """A plain script, or the script of rank 0."""
        config = launcher.config()
        self._defaults = config.sampling_defaults
        self._window = 2 * config.max_num_seqs
        self._tokenizer = Tokenizer.load(config.tokenizer)
        self._grammars = GrammarChecker(self._tokenizer)
        vocabulary = self._grammars.prepare()  # while the ranks start
        self._load_template = partial(ChatTemplate.load, config.tokenizer, self._tokenizer.special_tokens)
        self._template = self._load_template(config.chat_template)
        session = Session(
            config,
            launcher.runtime_dir,
            launcher.start,
            remote=launcher.remote,
            num_followers=launcher.num_followers,
            restarts=launcher.restarts,
        )
        self._session = session
        self._finalizer = weakref.finalize(self, session.close)
        try:
            session.start()
            launcher.publish(session.wait_bound())
            session.wait_ready()
            vocabulary.result()
        except BaseException as error:
            session.send_to_followers(rpc_error(0, error))
            self.close()
            raise
        session.send_to_followers(RpcReply(0, []))

    def _start_rpc_client(self, rank_env: RankEnv, launcher: "launch.TorchrunLauncher") -> None:
        """The script of a rank other than 0."""
        self._rpc_client = RpcClient(rank_env.rank, *launcher.find(), launcher.start)
        self._defaults = launcher.config().sampling_defaults
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
        """Continue each prompt; the outputs are in the order of the prompts. None for `sampling_params`: the model's defaults."""
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
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation (a list of messages), or each of a list of conversations.

        `tools`: functions that the model may call, as in OpenAI's API; the outputs hold its calls as the text that it wrote.
        `chat_template` replaces the model's default template: a file, the Jinja text itself, or the name of one of the model's.
        """
        arguments = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": list(tools or ()),
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        return self._call(lambda: chats(messages, self._params(sampling_params), priority, arguments), use_tqdm, chat_template)

    def get_default_sampling_params(self) -> SamplingParams:
        """A new `SamplingParams` with the defaults of generation_config.json and --override-generation-config."""
        return SamplingParams(**self._defaults.specified())

    def _params(self, params: "SamplingParams | Sequence[SamplingParams] | None") -> "SamplingParams | Sequence[SamplingParams]":
        return self.get_default_sampling_params() if params is None else params

    def _call(
        self, make_jobs: Callable[[], list[PromptJob]], show_progress: bool, chat_template: str | None = None
    ) -> list[RequestOutput]:
        """One numbered call. The other scripts of a torchrun job get its outputs, or its exception, under the same number."""
        call = next(self._call_ids)
        if self._rpc_client is not None:
            return self._rpc_client.wait(call)
        assert self._session is not None
        try:
            outputs = self._generate(self._session, make_jobs(), show_progress, chat_template)
        except BaseException as error:
            self._session.send_to_followers(rpc_error(call, error))
            raise
        self._session.send_to_followers(RpcReply(call, outputs))
        return outputs

    def _generate(
        self, session: Session, prompt_jobs: Sequence[PromptJob], show_progress: bool, chat_template: str | None
    ) -> list[RequestOutput]:
        if not prompt_jobs:
            return []
        template = self._template if chat_template is None else self._load_template(read_template(chat_template))
        first_id, progress = self._num_requests, CallProgress()
        self._num_requests += len(prompt_jobs)

        def work(engine_client: EngineClient) -> Coroutine[Any, Any, list[RequestOutput]]:
            return GenerateCall(
                engine_client, self._tokenizer, template, prompt_jobs, first_id, self._window, progress, self._grammars
            ).run()

        with PromptProgress(len(prompt_jobs), show_progress) as bar:
            outputs = session.run(work, lambda: bar.update(progress.done, progress.tokens))
            bar.update(progress.done, progress.tokens)
        return outputs

    def close(self) -> None:
        """End the ranks and wait until they have ended. Under torchrun the ranks of all scripts end, after their open calls."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
