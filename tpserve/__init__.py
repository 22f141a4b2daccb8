"""tpserve: a server for large language models that starts with nothing but `torchrun`.

Importing the package is cheap: the public names below are loaded on first use (PEP 562), and never import torch, which only
ranks need.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tpserve.version import __version__

if TYPE_CHECKING:
    from tpserve.errors import EngineFailure, UserError
    from tpserve.llm.api import LLM
    from tpserve.llm.outputs import CompletionOutput, Logprob, RequestOutput
    from tpserve.llm.params import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineFailure",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UserError",
    "__version__",
]
_HOMES = {
    "LLM": "llm.api",
    "CompletionOutput": "llm.outputs",
    "Logprob": "llm.outputs",
    "RequestOutput": "llm.outputs",
    "SamplingParams": "llm.params",
    "StructuredOutputsParams": "llm.params",
    "EngineFailure": "errors",
    "UserError": "errors",
}
# torch warns on import when NumPy is missing. tpserve does not need NumPy, and every process imports this module first.
warnings.filterwarnings("ignore", "Failed to initialize NumPy: No module named 'numpy'", UserWarning)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tpserve' has no attribute {name!r}")
    return getattr(import_module(f"tpserve.{_HOMES[name]}"), name)
