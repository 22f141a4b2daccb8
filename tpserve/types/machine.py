"""Where the ranks run, as far as the layout depends on it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Machine:
    """The node of this process in its job. `num_gpus`: visible on this node and usable by the installed torch.

    `launcher`: how ranks are started, for the command lines in errors (script: an LLM under torchrun; LLM: one alone).
    """

    world_size: int
    local_world_size: int
    nnodes: int
    num_gpus: int
    cores: int
    launcher: Literal["torchrun", "serve", "script", "LLM"]
