"""All messages between processes.

    frontend -> engine    Add, Abort, Truncate, Pause, Resume, ResetPrefixCache
    engine -> frontend    PromptLogprobsChunk, Delta, Done, Stats
    rank -> coordinator   Hello, Ready, Heartbeat, ExpertLoad, LogLines, Fault, Drain
    coordinator -> rank   Start, Run, Drain, Leave, Reconfigure, Stop

Each direction is one tagged union; a frame on the wire is a msgpack list of messages of one direction.

Invariants: the engine answers every Add with exactly one Done. The Deltas of a request cover consecutive positions, and so do the
PromptLogprobsChunks, which all come before the first Delta.
"""

from typing import Literal

from msgspec import Struct

from tpserve.types.plan import PromptLogprobs, TokenLogprobs
from tpserve.types.request import Request

KERNELS = "CPU kernels"
"""The fact about the library of CPU kernels."""
WEIGHTS = "weights "
"""Prefix of the keys about weight files in `Hello.fingerprint`; the file's name follows."""


class Message(Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: immutable, encoded as an array whose first element is the type's name."""


# frontend -> engine


class Add(Message, frozen=True):
    """Start generating."""

    request: Request


class Abort(Message, frozen=True):
    """The client has disconnected: stop and answer Done(finish="abort"). Unknown and finished ids are ignored."""

    id: int


class Truncate(Message, frozen=True):
    """A stop string ended the request after `length` output tokens, and the client has its answer: answer Done(finish="stop")."""

    id: int
    length: int


PauseMode = Literal["keep", "wait"]
"""What becomes of the sequences that have begun: kept as they are, or waited for."""


class Pause(Message, frozen=True):
    """Begin no sequence any more. `keep`: compute nothing, and keep those that have begun; `wait`: finish those."""

    mode: PauseMode


class Resume(Message, frozen=True):
    """End a pause."""


class ResetPrefixCache(Message, frozen=True):
    """Find nothing any more of what has been computed so far. Sequences that run go on."""


EngineControlMessage = Pause | Resume | ResetPrefixCache
EngineInput = Add | Abort | Truncate | EngineControlMessage

# engine -> frontend


class Delta(Message, frozen=True):
    """New tokens of a request. `start`: number of output tokens before these. `logprobs`: one entry per token, or empty.

    Set only in a request's first Delta: `cached_tokens`, the prompt's tokens found in the prefix cache when the request was first
    scheduled, and `queue_s`, the seconds it waited before that.
    """

    id: int
    start: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    queue_s: float = 0.0


class PromptLogprobsChunk(Message, frozen=True):
    """Log probabilities of consecutive prompt tokens. `start`: position of the first one. Position 0 has none."""

    id: int
    start: int
    logprobs: PromptLogprobs


class PhaseTimes(Struct, frozen=True, array_like=True):
    """Seconds that a request spent in the queue, from there to its first token, and from the first token to the last."""

    queue_s: float
    prefill_s: float
    decode_s: float


FinishReason = Literal["stop", "length", "abort", "error"]


class Done(Message, frozen=True):
    """The last message of a request. `stop_id`: the stop token that ended it; None for an EOS id or another reason.

    `by_grammar`: the last token ends the request's grammar and belongs to its text, which that of an EOS does not.
    """

    id: int
    finish: FinishReason
    num_tokens: int
    stop_id: int | None = None
    times: PhaseTimes = PhaseTimes(0.0, 0.0, 0.0)
    error: str = ""
    by_grammar: bool = False


class Stats(Message, frozen=True):
    """Gauges and counters, sent after a step that changed them. Counters start at 0 in each epoch."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens found in the prefix cache."""
    epoch: int = 0
    resumed: int = 0
    """Requests that came with the output of an earlier epoch."""
    resume_mismatches: int = 0
    """Tokens of such output that were drawn again and differ."""
    controls: int = 0
    """The `EngineControlMessage`s that have been carried out."""
    paused: bool = False
    """Whether a pause has been reached: no step runs, and none begins before Resume."""


RequestOutput = PromptLogprobsChunk | Delta | Done
EngineOutput = RequestOutput | Stats

# rank -> coordinator


class NodeInfo(Struct, frozen=True, array_like=True):
    """A rank's node. `address`: the address that other nodes use. `machine`: equal for processes in one network namespace.
    `settings`: the user's NCCL_* and GLOO_* variables. `gpus`: number of visible GPUs."""

    node: int
    address: str
    machine: str
    settings: dict[str, str]
    gpus: int = 0


UNKNOWN_NODE = NodeInfo(0, "", "", {})


class MemoryLedger(Struct, frozen=True, array_like=True):
    """A rank's memory in bytes, as measured, and the KV blocks that fill the rest.

    `total`: the GPU's memory; on the CPU the rank's share of the free memory. `others`: GPU memory of other programs.
    """

    total: int
    others: int
    weights: int
    activations: int
    head: int
    """The rows that pass the LM head together: logits, and the buffers of sampling, filters and log probabilities."""
    slots: int
    """Token ids of the sequences in slots."""
    kv_cache: int
    num_blocks: int
    block_size: int
    max_model_len: int
    """The longest sequence: the configured length, or under `--max-model-len auto` the length that fits."""
    graphs: int = 0
    """The graphs of decode steps, with the buffers that they keep."""
    communication: int = 0
    """NCCL's buffers, and activations on their way to the next stage."""


class Hello(Message, frozen=True):
    """A rank registers with the coordinator.

    `identity`: a random number for this process, or for this attempt to join; the last Hello of a rank to arrive is its newest.
    `endpoints`: on rank 0 the addresses that it hosts for this identity: "store" (host:port of a fresh TCPStore), "plan" and
    "result" (ZeroMQ endpoints); empty on other ranks.
    `fingerprint`: facts that must be equal on all ranks. `processor`: facts that must be equal on the ranks of one `stage`, which
    compute the same rows. `traits`: facts that may differ; the log shows differences. `ledger`: of a rank that was ready in an
    earlier epoch and still has its weights. `last_exit`: how the process before this one ended, such as "SIGSEGV" or "exit code
    1"; empty for a first process and for a survivor. `configuration`: the number of the last Reconfigure that this node knows, 0
    without one. `refused`: why the rank cannot start with it, and has come with the configuration before. `answers`: a digest of
    what decides answers, besides processors: model, files, numerical flags, versions.
    """

    rank: int
    identity: int
    pid: int
    host: str
    endpoints: dict[str, str]
    fingerprint: dict[str, str]
    node: NodeInfo = UNKNOWN_NODE
    traits: dict[str, str] = {}
    stage: int = 0
    processor: dict[str, str] = {}
    ledger: MemoryLedger | None = None
    last_exit: str = ""
    configuration: int = 0
    refused: str = ""
    answers: str = ""


class Numerics(Struct, frozen=True, array_like=True):
    """The result of a rank's self-test: whether a row of a matrix product has the same bits whatever the other rows are.

    Both fields empty: every product has passed.
    """

    broken: tuple[str, ...] = ()
    """Products that failed the test."""
    untested: tuple[str, ...] = ()
    """Products that were not tested for lack of time."""
    kernels: str = ""
    """The instruction set and the version of the library of CPU kernels; empty where torch's operators serve."""


class Ready(Message, frozen=True):
    """The rank has joined the mesh, has loaded its shard and can run plans of `epoch`."""

    rank: int
    epoch: int
    ledger: MemoryLedger
    facts: dict[str, int]
    """Facts known once the model is loaded: max_model_len, vocab_size, and the rank's heads as first_head, end_head,
    first_kv_head and end_kv_head (ends exclusive)."""
    numerics: Numerics | None = None
    """None on CUDA, where there is no such guarantee."""


class Heartbeat(Message, frozen=True):
    """Sent every 0.5 s. `phase` and `percent`: progress of the start, shown by /readyz. `step`: the last finished step.

    `busy`: long work inside a step that is not a hang, such as compiling a kernel; empty for none.
    """

    rank: int
    epoch: int
    phase: str
    percent: int
    step: int
    busy: str = ""


class ExpertLoad(Message, frozen=True):
    """Tokens routed to each expert of `layers` in this epoch. The first rank of a stage sends it when it has changed.

    `tokens`: int64 bytes of shape [layers, experts].
    """

    rank: int
    epoch: int
    layers: tuple[int, ...]
    tokens: bytes


class LogLines(Message, frozen=True):
    """Lines of the rank's log, for /server_info. `start`: the first line's number. `last_error`: the last error among them."""

    rank: int
    start: int
    lines: tuple[str, ...]
    last_error: str = ""


class Fault(Message, frozen=True):
    """The rank reports a problem. `kind`:

    user      the user can fix it (exit code 2)
    engine    a failure of this rank
    peer      a collective failed: the cause is another rank, and this one is sound
    sibling   another rank of the node has ended, and its reason explains more
    overdue   a step takes too long; repeated with each heartbeat, and no failure while a rank is `busy`
    """

    rank: int
    epoch: int
    kind: Literal["user", "engine", "peer", "sibling", "overdue"]
    text: str


class Drain(Message, frozen=True):
    """Stop taking requests and finish the open ones. From a rank: it received SIGTERM. To ranks: the server drains."""

    rank: int = -1


RankMessage = Hello | Ready | Heartbeat | ExpertLoad | LogLines | Fault | Drain

# coordinator -> rank


class Start(Message, frozen=True):
    """Form the mesh of `epoch`. `endpoints`: from rank 0's Hello. `ledger`: this rank's memory as an earlier epoch agreed on it;
    None: the ranks measure and agree now."""

    epoch: int
    endpoints: dict[str, str]
    ledger: MemoryLedger | None = None


class Run(Message, frozen=True):
    """Every rank is ready: rank 0 may send plans of `epoch`."""

    epoch: int


class Leave(Message, frozen=True):
    """The epoch is over: leave its mesh, keep the weights and say Hello as a new incarnation. `reason`: for the log."""

    epoch: int
    reason: str


RESTART_CODE = 75
"""The exit code with which a rank asks to be started again (EX_TEMPFAIL)."""


class Reconfigure(Message, frozen=True):
    """Exit with `RESTART_CODE`, and start again with other flags. `number`: grows with each configuration. `changes`: the flags
    that differ from those of the start, a JSON object by field name. `fallback`: those for a process that cannot start with
    these; None: it ends. `reason`: for the log."""

    number: int
    changes: bytes
    fallback: bytes | None
    reason: str


class Stop(Message, frozen=True):
    """Exit with `code`. `reason`: for the log; empty after a drain."""

    code: int
    reason: str


CoordinatorMessage = Start | Run | Drain | Leave | Reconfigure | Stop
