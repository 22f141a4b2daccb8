"""The properties of the job and its node that the layout depends on."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Machine:
    """The job and this node. `num_gpus`: GPUs that are visible here and that the installed torch can use.

    `launcher`: how the ranks are started, for the command lines in errors. "script": an `LLM` under torchrun; "LLM": without.
    """

    world_size: int
    local_world_size: int
    nnodes: int
    num_gpus: int
    cores: int
    launcher: Literal["torchrun", "serve", "script", "LLM"]
