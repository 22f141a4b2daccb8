"""The environment. Only this module and the library of CPU kernels read it, so the table below lists every variable.

set by torchrun                       read into
RANK WORLD_SIZE                       RankEnv.rank, .world_size; RANK's presence means "started by torchrun"
LOCAL_RANK LOCAL_WORLD_SIZE           RankEnv.local_rank, .local_world_size
GROUP_RANK GROUP_WORLD_SIZE           RankEnv.node_rank, .nnodes
MASTER_ADDR MASTER_PORT               RankEnv.master_addr, .master_port
TORCHELASTIC_RUN_ID                   RankEnv.run_id
TORCHELASTIC_RESTART_COUNT            RankEnv.restart_count
TORCHELASTIC_MAX_RESTARTS             ranks_restart()
TORCHELASTIC_USE_AGENT_STORE          RankEnv.use_agent_store
TORCHELASTIC_ERROR_FILE               RankEnv.error_file

set by SLURM
SLURM_PROCID                          under_slurm(): only for an error that shows the command for SLURM

set by the user
TPSERVE_API_KEY                       --api-key, when that is not set
TPSERVE_ADMIN_API_KEY                 --admin-api-key, when that is not set
TPSERVE_METRICS_KEY                   --metrics-key, when that is not set
TPSERVE_ARG_<FLAG>                    --<flag>, when that is not set; a prefix other than TPSERVE_, since Kubernetes
                                      injects TPSERVE_PORT for a service named tpserve
CUDA_VISIBLE_DEVICES                  host.resources.visible_gpus()
NO_COLOR FORCE_COLOR TERM             color(): whether log lines have colors; NO_COLOR wins

set by the user, read only by huggingface_hub
HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE   where repositories are cached, and whether the network is used
HF_ENDPOINT HF_TOKEN                  the hub's URL, and the user's token

set by the user or the system
XDG_CACHE_HOME HOME                   cache_dir(): results of the processor tests of earlier starts
XDG_STATE_HOME HOME                   state_dir(): the history of `tpserve chat`

set by the user, read by torch's libraries, compared between ranks
ATEN_CPU_CAPABILITY ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA MKL_ENABLE_INSTRUCTIONS MKL_CBWR
                                      instruction_limits: they exclude processor instructions

set by the user, read by tpserve_kernels/cpu/library.py
TPSERVE_ISA                           the highest instruction set that CPU kernels may use (portable, avx2, avx512, avx512_bf16,
                                      amx), or off; `tpserve plan` looks whether it is off
TPSERVE_CPU_LIBRARY                   the file of the library of CPU kernels, for tests

set by the user, read by `tpserve report` to remove them from its file
*_KEY *_TOKEN *_SECRET *_PASSWORD     values

set by the user, read by NCCL and gloo, shown in the log
NCCL_* GLOO_*                         network_variables; they win over --interface

set by the user for vLLM, without effect here; a warning says so
VLLM_*                                vllm_variables

set by `tpserve serve` for its ranks
TPSERVE_RUNTIME_DIR                   RankEnv.runtime_dir
TORCH_CPP_LOG_LEVEL                   ERROR, unless set already or --log-level debug

set by `tpserve serve`'s agent for ranks that it starts again
TPSERVE_LAST_EXIT                     RankEnv.last_exit
TPSERVE_WEIGHTS_SOCKET                RankEnv.weights_socket: the descriptor of the socket for the rank's packed weights
TPSERVE_CONFIGURATION                 RankEnv.configuration: the descriptor of the memory with the flags of the last reload

set by a forkserver for itself while it imports torch
OPENBLAS_NUM_THREADS                  1: NumPy's library, if there is one, would start a thread for each core

set by an `LLM` for its ranks, besides those
TPSERVE_JOB                           RankEnv.job: which LLM of a script under torchrun this rank belongs to
TPSERVE_AGENT_PID                     RankEnv.agent_pid: the parent; `tpserve serve`'s agent sets it too

set by every rank for itself, before torch is loaded
GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME the cluster's interface, unless set already
GOMP_SPINCOUNT                        1000, unless set already or OMP_WAIT_POLICY is

set by a rank of `tpserve doctor` for itself
NCCL_DEBUG NCCL_DEBUG_FILE            INFO, and a file to read; unless the user has set them
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tpserve.errors import UserError

_OVERRIDE = "TPSERVE_ARG_"
_KEYS = {"TPSERVE_API_KEY": "api_key", "TPSERVE_ADMIN_API_KEY": "admin_api_key", "TPSERVE_METRICS_KEY": "metrics_key"}
_INSTRUCTION_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


@dataclass(frozen=True)
class RankEnv:
    """What torchrun sets for a rank. `runtime_dir` is None unless `tpserve serve` or an `LLM` created one.

    `agent_pid`: the parent process; this rank dies with it. `job`: with an `LLM` in a script under torchrun, a name of that LLM,
    which separates its addresses from those of the script's other LLMs; else empty.
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
    last_exit: str = ""
    """How the process that was this rank before has ended, such as "SIGSEGV" or "exit code 1"; empty for the first one."""
    weights_socket: int = -1
    configuration: int = -1


def under_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank."""
    return "RANK" in environ


def ranks_restart(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody starts dead ranks again: torchrun with --max-restarts, or the agent of `tpserve serve`."""
    return not under_torchrun(environ) or environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")


def under_slurm(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether srun started this process."""
    return "SLURM_PROCID" in environ


def rank_env(environ: Mapping[str, str] = os.environ) -> RankEnv:
    """Read torchrun's variables. Raises UserError when RANK is set but another variable is missing."""

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
        last_exit=environ.get("TPSERVE_LAST_EXIT", ""),
        weights_socket=number("TPSERVE_WEIGHTS_SOCKET", -1),
        configuration=number("TPSERVE_CONFIGURATION", -1),
    )


def overrides(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Flags that are set by environment variables: field name -> text."""
    found = {name.removeprefix(_OVERRIDE).lower(): text for name, text in sorted(environ.items()) if name.startswith(_OVERRIDE)}
    return found | {flag: environ[name] for name, flag in _KEYS.items() if environ.get(name)}


def values(matches: Callable[[str], bool], environ: Mapping[str, str] = os.environ) -> list[str]:
    """The values of all variables whose name `matches`; no empty ones."""
    return [text for name, text in environ.items() if matches(name) and text]


def color(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to write colors to `stream`: on a terminal with colors, or with FORCE_COLOR; never with NO_COLOR."""
    if environ.get("NO_COLOR"):
        return False
    return bool(environ.get("FORCE_COLOR")) or (stream.isatty() and environ.get("TERM", "dumb") != "dumb")


def cuda_visible_devices(environ: Mapping[str, str] = os.environ) -> str | None:
    """The user's choice of GPUs; None for all."""
    return environ.get("CUDA_VISIBLE_DEVICES")


def set_omp_spin(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's idle threads spin for some microseconds, then sleep. Call it before torch is loaded.

    On a shared core a thread that spins long takes the core from the thread that it waits for (measured: 10 to 20 times slower).
    A thread that sleeps at once is woken on the core of its waker, while another core is idle (measured: two threads as slow as
    one).
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")


def network_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The user's variables for NCCL and gloo."""
    return {name: text for name, text in sorted(environ.items()) if name.startswith(("NCCL_", "GLOO_"))}


def instruction_limits(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The user's limits on the processor instructions that torch's libraries use."""
    return {name: environ[name] for name in _INSTRUCTION_LIMITS if environ.get(name)}


def cpu_kernels_allowed(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether TPSERVE_ISA leaves the library of CPU kernels on."""
    return environ.get("TPSERVE_ISA", "").lower() != "off"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path | None:
    """tpserve's cache directory of this user (XDG); None for a user without a home."""
    return _user_dir("XDG_CACHE_HOME", ".cache", environ)


def state_dir(environ: Mapping[str, str] = os.environ) -> Path | None:
    """tpserve's directory of this user for what outlives a process (XDG); None for a user without a home."""
    return _user_dir("XDG_STATE_HOME", ".local/state", environ)


def _user_dir(variable: str, default: str, environ: Mapping[str, str]) -> Path | None:
    if (chosen := environ.get(variable, "")).startswith("/"):
        return Path(chosen) / "tpserve"
    home = environ.get("HOME", "")
    return Path(home) / default / "tpserve" if home.startswith("/") else None


def vllm_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the VLLM_ variables that are set."""
    return sorted(name for name in environ if name.startswith("VLLM_"))


def user_set_interface(settings: Mapping[str, str], all_reduce: str) -> bool:
    """Whether the user has set the interface of the all-reduce backend in `settings` (from `network_variables`)."""
    return ("NCCL" if all_reduce == "nccl" else "GLOO") + "_SOCKET_IFNAME" in settings


def use_interface(name: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the interface of gloo and NCCL unless the user has. Does nothing for an empty name. Call it before torch is loaded."""
    if name:
        environ.setdefault("GLOO_SOCKET_IFNAME", name)
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without "=", NCCL takes it as a prefix


def trace_nccl(path: str, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Make NCCL log its transports to the file `path`; False if the user has set NCCL_DEBUG*. Call it before NCCL starts."""
    if any(environ.get(name) for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS")):
        return False
    environ["NCCL_DEBUG"], environ["NCCL_DEBUG_FILE"] = "INFO", path
    return True


def announce_agent() -> None:
    """Set the agent's pid for the ranks that this process starts."""
    os.environ["TPSERVE_AGENT_PID"] = str(os.getpid())


def for_ranks(runtime_dir: str, quiet: bool, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the agent and its ranks. `quiet`: only errors from torch's C++ code."""
    log_level = {"TORCH_CPP_LOG_LEVEL": "ERROR"} if quiet and "TORCH_CPP_LOG_LEVEL" not in environ else {}
    # The ranks get all flags on their command line; launch flags and keys are not for them.
    inherited = {name: text for name, text in environ.items() if name not in _KEYS and not name.startswith(_OVERRIDE)}
    return {**inherited, **log_level, "TPSERVE_RUNTIME_DIR": runtime_dir}


def for_rank(runtime_dir: str, job: str, quiet: bool, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the rank that a script under torchrun starts on its behalf.

    Differs from the script's own: the script is the parent, torchrun's store exists already, and the rank has no error file.
    """
    inherited = for_ranks(runtime_dir, quiet, {name: text for name, text in environ.items() if name != "TORCHELASTIC_ERROR_FILE"})
    return {**inherited, "TPSERVE_AGENT_PID": str(os.getpid()), "TPSERVE_JOB": job, "TORCHELASTIC_USE_AGENT_STORE": "True"}


@contextlib.contextmanager
def one_thread_on_import(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Inside, an import of torch starts no threads. Otherwise OpenBLAS does, which comes with NumPy where that is installed."""
    before = environ.get("OPENBLAS_NUM_THREADS")
    environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del environ["OPENBLAS_NUM_THREADS"]
        if before is not None:
            environ["OPENBLAS_NUM_THREADS"] = before


def replace_all(variables: Mapping[bytes, bytes], environ: MutableMapping[bytes, bytes] = os.environb) -> None:
    """Make `variables` the whole environment of this process."""
    environ.clear()
    environ.update(variables)


def of_rank(
    torch_variables: Mapping[str, str],
    restarts: int,
    last_exit: str,
    weights_socket: int | None,
    configuration: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """The environment of a rank: the agent's, what torchrun sets, how the process before it ended, where its weights are.

    `weights_socket`, `configuration`: numbers of descriptors in the rank; None without one.
    """
    defaults = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}  # as torchrun
    counted = {"TORCHELASTIC_RESTART_COUNT": str(restarts), "TPSERVE_LAST_EXIT": last_exit}
    descriptors = {"TPSERVE_WEIGHTS_SOCKET": weights_socket, "TPSERVE_CONFIGURATION": configuration}
    where = {name: str(number) for name, number in descriptors.items() if number is not None}
    return {**defaults, **environ, **torch_variables, **counted, **where}


def of_agent(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of this process, for a forkserver of its own."""
    return dict(environ)
