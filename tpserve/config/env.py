"""The environment. This file is the only one that reads or writes it, so this screen lists every variable.

set by torchrun                       read into
RANK WORLD_SIZE                       RankEnv.rank, .world_size; RANK's presence means "started by torchrun"
LOCAL_RANK LOCAL_WORLD_SIZE           RankEnv.local_rank, .local_world_size
GROUP_RANK GROUP_WORLD_SIZE           RankEnv.node_rank, .nnodes
MASTER_ADDR MASTER_PORT               RankEnv.master_addr, .master_port
TORCHELASTIC_RUN_ID                   RankEnv.run_id
TORCHELASTIC_RESTART_COUNT            RankEnv.restart_count
TORCHELASTIC_USE_AGENT_STORE          RankEnv.use_agent_store
TORCHELASTIC_ERROR_FILE               RankEnv.error_file

set by SLURM
SLURM_PROCID                          under_slurm(): only for the sentence that says how it is done there

set by the user
TPSERVE_API_KEY                       --api-key, when that is not given
TPSERVE_ADMIN_API_KEY                 --admin-api-key, when that is not given
TPSERVE_METRICS_KEY                   --metrics-key, when that is not given
TPSERVE_ARG_<FLAG>                    --<flag>, when that is not given; the prefix keeps clear of what Kubernetes
                                      injects for a service named tpserve (TPSERVE_PORT)
CUDA_VISIBLE_DEVICES                  machine.visible_gpus
NO_COLOR FORCE_COLOR TERM             color(): whether log lines have colors; NO_COLOR wins

set by the user, read by huggingface_hub and by nothing of ours
HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE   where repositories are cached, and whether the network is used
HF_ENDPOINT HF_TOKEN                  whom to ask for them, and as whom

set by the user or the system
XDG_CACHE_HOME HOME                   cache_dir(): what a start remembers of the processor

set by the user, read by torch's libraries, part of what must agree
ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA MKL_ENABLE_INSTRUCTIONS MKL_CBWR
                                      instruction_limits: they keep products from instructions

set by the user, looked for by `tpserve report` so that it can take them out
*_KEY *_TOKEN *_SECRET *_PASSWORD     values

set by the user, read by NCCL and gloo, shown by us
NCCL_* GLOO_*                         network_variables; what is set wins over --interface

set by the user for vLLM, which means nothing here and is said to
VLLM_*                                vllm_variables

set by `tpserve serve` for its ranks
TPSERVE_RUNTIME_DIR                   RankEnv.runtime_dir
TORCH_CPP_LOG_LEVEL                   ERROR, unless set already or --log-level debug

set by an `LLM` for its ranks, besides those
TPSERVE_JOB                           RankEnv.job: which LLM of a script under torchrun this rank belongs to
TPSERVE_AGENT_PID                     RankEnv.agent_pid: the script; `tpserve serve`'s agent sets it too

set by every rank for itself, before torch is loaded
GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME the cluster's interface, unless set already
GOMP_SPINCOUNT                        1000, unless set already or OMP_WAIT_POLICY is

set by a rank of `tpserve doctor` for itself
NCCL_DEBUG NCCL_DEBUG_FILE            INFO, and a file to read; unless the user has set them
"""

import os
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tpserve.errors import UserError

_OVERRIDE = "TPSERVE_ARG_"
_KEYS = {"TPSERVE_API_KEY": "api_key", "TPSERVE_ADMIN_API_KEY": "admin_api_key", "TPSERVE_METRICS_KEY": "metrics_key"}
_INSTRUCTION_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


@dataclass(frozen=True)
class RankEnv:
    """What torchrun tells a rank. `runtime_dir` is None unless `tpserve serve` or an `LLM` chose one.

    `agent_pid`: the parent, with which this rank dies. `job` is empty unless a script under torchrun started this rank in its own
    place: it then names the script's LLM, whose addresses must not be taken for those of another one.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    nnodes: int
    master_addr: str
    master_port: int
    run_id: str
    use_agent_store: bool
    agent_pid: int
    runtime_dir: str | None
    error_file: str | None
    restart_count: int = 0
    job: str = ""


def under_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank."""
    return "RANK" in environ


def under_slurm(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process."""
    return "SLURM_PROCID" in environ


def rank_env(environ: Mapping[str, str] = os.environ) -> RankEnv:
    """Read what torchrun set. Raises UserError when something started us that sets RANK and not the rest."""

    def number(name: str, default: int | None = None) -> int:
        text = environ.get(name)
        if text is None and default is not None:
            return default
        if text is None or not text.isdecimal():
            raise UserError(f"RANK is set in the environment but {name} is {text!r}: start ranks with torchrun, or unset RANK")
        return int(text)

    world_size, local_world_size = number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE")
    return RankEnv(
        rank=number("RANK"),
        world_size=world_size,
        local_rank=number("LOCAL_RANK"),
        local_world_size=local_world_size,
        node_rank=number("GROUP_RANK", number("RANK") // local_world_size),
        nnodes=number("GROUP_WORLD_SIZE", world_size // local_world_size),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=number("MASTER_PORT", 0),
        run_id=environ.get("TORCHELASTIC_RUN_ID", "none"),
        use_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        agent_pid=number("TPSERVE_AGENT_PID", os.getppid()),
        runtime_dir=environ.get("TPSERVE_RUNTIME_DIR"),
        error_file=environ.get("TORCHELASTIC_ERROR_FILE") or None,
        restart_count=number("TORCHELASTIC_RESTART_COUNT", 0),
        job=environ.get("TPSERVE_JOB", ""),
    )


def overrides(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Flags given as environment variables: name to text."""
    found = {name.removeprefix(_OVERRIDE).lower(): text for name, text in sorted(environ.items()) if name.startswith(_OVERRIDE)}
    return found | {flag: environ[name] for name, flag in _KEYS.items() if environ.get(name)}


def values(chosen: Callable[[str], bool], environ: Mapping[str, str] = os.environ) -> list[str]:
    """What the variables with such names are set to."""
    return [text for name, text in environ.items() if chosen(name) and text]


def color(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to write colors to `stream`: on a terminal that knows some, unless NO_COLOR forbids or FORCE_COLOR demands them."""
    if environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or (stream.isatty() and environ.get("TERM", "dumb") != "dumb")


def cuda_visible_devices(environ: Mapping[str, str] = os.environ) -> str | None:
    """The user's choice of GPUs; None for all."""
    return environ.get("CUDA_VISIBLE_DEVICES")


def set_omp_spin(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's idle threads spin for some microseconds, then sleep. For before torch is loaded.

    Where a core is shared, with the frontend or a neighbour, a thread that spins for long keeps the core from the one it
    waits for: measured 10 to 20 times slower. One that sleeps at once is woken on the core of its waker and shares that,
    while the other stands idle: two threads were as slow as one.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")


def network_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the user told NCCL and gloo."""
    return {name: text for name, text in sorted(environ.items()) if name.startswith(("NCCL_", "GLOO_"))}


def instruction_limits(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the user told torch's libraries of the instructions that they may use."""
    return {name: environ[name] for name in _INSTRUCTION_LIMITS if environ.get(name)}


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where this user's programs keep what they can find again (XDG); None for a user without a home."""
    if (chosen := environ.get("XDG_CACHE_HOME", "")).startswith("/"):
        return Path(chosen) / "tpserve"
    home = environ.get("HOME", "")
    return Path(home) / ".cache" / "tpserve" if home.startswith("/") else None


def vllm_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of what is set for vLLM."""
    return sorted(name for name in environ if name.startswith("VLLM_"))


def user_set_interface(settings: Mapping[str, str], all_reduce: str) -> bool:
    """Whether, by `network_variables`, the user has told what carries the sums which interface to use."""
    return ("NCCL" if all_reduce == "nccl" else "GLOO") + "_SOCKET_IFNAME" in settings


def use_interface(name: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell gloo and NCCL which interface to use, unless the user has. For before torch is loaded. An empty name tells nothing."""
    if name:
        environ.setdefault("GLOO_SOCKET_IFNAME", name)
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=", every interface whose name begins so


def trace_nccl(path: str, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Have NCCL write to the file `path` what carries its traffic; False when the user has told it otherwise. For before NCCL."""
    if any(environ.get(name) for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS")):
        return False
    environ["NCCL_DEBUG"], environ["NCCL_DEBUG_FILE"] = "INFO", path
    return True


def announce_agent() -> None:
    """For the agent: tell the ranks it will start who their parent is."""
    os.environ["TPSERVE_AGENT_PID"] = str(os.getpid())


def for_ranks(runtime_dir: str, quiet: bool, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the agent and its ranks. `quiet`: no chatter of torch's C++ side."""
    chatter = {"TORCH_CPP_LOG_LEVEL": "ERROR"} if quiet and "TORCH_CPP_LOG_LEVEL" not in environ else {}
    # All flags are on the ranks' command line, launch flags and the keys are not for them.
    inherited = {name: text for name, text in environ.items() if name not in _KEYS and not name.startswith(_OVERRIDE)}
    return {**inherited, **chatter, "TPSERVE_RUNTIME_DIR": runtime_dir}


def for_rank(runtime_dir: str, job: str, quiet: bool, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the rank that a script under torchrun starts in its own place: what torchrun told the script, but that
    the script is the parent, that torchrun's store is hosted already, and that the error file is the script's."""
    inherited = for_ranks(runtime_dir, quiet, {name: text for name, text in environ.items() if name != "TORCHELASTIC_ERROR_FILE"})
    return {**inherited, "TPSERVE_AGENT_PID": str(os.getpid()), "TPSERVE_JOB": job, "TORCHELASTIC_USE_AGENT_STORE": "True"}
