"""tpserve: a server for large language models that starts with nothing but `torchrun`.

Importing this package imports nothing else; what it offers to scripts is loaded when it is first named (PEP 562), and even then
without torch, which only ranks need.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpserve.version import __version__

if TYPE_CHECKING:
    from tpserve.errors import EngineFailure, UserError
    from tpserve.llm.api import LLM
    from tpserve.llm.outputs import CompletionOutput, Logprob, RequestOutput
    from tpserve.llm.params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineFailure",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "UserError",
    "__version__",
]
_HOMES = {
    "LLM": "llm.api",
    "CompletionOutput": "llm.outputs",
    "Logprob": "llm.outputs",
    "RequestOutput": "llm.outputs",
    "SamplingParams": "llm.params",
    "EngineFailure": "errors",
    "UserError": "errors",
}
# torch warns while it is imported that NumPy is absent. tpserve needs none, and every process of it imports this first.
warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tpserve' has no attribute {name!r}")
    return getattr(import_module(f"tpserve.{_HOMES[name]}"), name)
