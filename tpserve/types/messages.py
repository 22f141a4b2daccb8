"""The whole vocabulary between processes.

    frontend -> engine    Add, Abort, Cut, Control
    engine -> frontend    PromptLogprobsChunk, Delta, Done, Stats
    rank -> coordinator   Hello, Ready, Heartbeat, Experts, Said, Fault, Drain
    coordinator -> rank   Start, Run, Drain, Stop

Each direction is one tagged union; a frame on the wire is a msgpack list of messages of its direction.
The engine answers every Add with exactly one Done. Deltas of a request carry consecutive positions, and so do the
PromptLogprobsChunk that come before its first Delta.
"""

from typing import Literal

from msgspec import Struct

from tpserve.types.plan import PromptLogprobs, TokenLogprobs
from tpserve.types.request import Request

WEIGHTS = "weights "
"""How the names of the facts about weight files begin in `Hello.fingerprint`; the file's name follows."""


class Message(Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: immutable, encoded as an array that starts with the type's name."""


# frontend -> engine


class Add(Message, frozen=True):
    """Start generating."""

    request: Request


class Abort(Message, frozen=True):
    """The client is gone: stop and answer Done(finish="abort"). Unknown or finished ids are ignored."""

    id: int


class Truncate(Message, frozen=True):
    """A stop string ended the request at `length` output tokens and its client has its answer: answer Done(finish="stop")."""

    id: int
    length: int


class EngineControl(Message, frozen=True):
    """An order to the engine as a whole. `drain`: admit nothing more, finish what runs."""

    action: Literal["drain"]


EngineInput = Add | Abort | Truncate | EngineControl

# engine -> frontend


class Delta(Message, frozen=True):
    """New tokens of a request. `start`: how many output tokens came before. `logprobs`: one entry a token, or empty.

    In the first one, of the first admission: `cached_tokens` of the prompt were in the prefix cache, after `queue_s` of waiting.
    """

    id: int
    start: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    cached_tokens: int = 0
    queue_s: float = 0.0


class PromptLogprobsChunk(Message, frozen=True):
    """Log probabilities of prompt tokens, chunk by chunk. `start`: position of the first token; the prompt's first has none."""

    id: int
    start: int
    logprobs: PromptLogprobs


class PhaseTimes(Struct, frozen=True, array_like=True):
    """Seconds a request spent waiting, until its first token, and from the first token to the last."""

    queue_s: float
    prefill_s: float
    decode_s: float


FinishReason = Literal["stop", "length", "abort", "error"]


class Done(Message, frozen=True):
    """The one terminal message of a request. `stop_id`: the token that ended it, None at an EOS id or when no token did."""

    id: int
    finish: FinishReason
    num_tokens: int
    stop_id: int | None = None
    times: PhaseTimes = PhaseTimes(0.0, 0.0, 0.0)
    error: str = ""


class Stats(Message, frozen=True):
    """Gauges and running totals, sent after a step that changed them. Counters start at 0 with the epoch."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int = 0
    """Tokens of prompts that were looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Those that were found there."""


EngineOutput = PromptLogprobsChunk | Delta | Done | Stats

# rank -> coordinator


class NodeInfo(Struct, frozen=True, array_like=True):
    """A rank's node. `address`: as other nodes shall use it. `machine`: equal for processes that share a network.
    `settings`: what its user has told NCCL and gloo. `gpus`: how many are visible there."""

    node: int
    address: str
    machine: str
    settings: dict[str, str]
    gpus: int = 0


UNKNOWN_NODE = NodeInfo(0, "", "", {})


class Hello(Message, frozen=True):
    """A rank exists and wants to take part. `identity`: a random number that tells this process, or this attempt of it, from all
    others; which of a rank's is the newest, the coordinator knows by the order in which they come.

    `endpoints`: on rank 0 the addresses of what it hosts for this incarnation: "store" (host:port of a fresh TCPStore),
    "plan" and "result" (ZeroMQ endpoints); empty elsewhere. `fingerprint`: facts that must agree on all ranks.
    `node`: where it runs. `traits`: facts that may differ, and are shown when they do. `processor`: facts that must agree on
    the ranks of a `stage`, which compute the same rows.
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


class MemoryLedger(Struct, frozen=True, array_like=True):
    """Where a rank's memory goes, in bytes, measured, and the KV blocks that were made of the rest.

    `total`: the card's; on the CPU the rank's part of what was free. `others`: of the card's, what is not this server's.
    """

    total: int
    others: int
    weights: int
    activations: int
    head: int
    """Rows at the LM head: their logits, and what the draw, its filters and log probabilities make of them."""
    slots: int
    """Tokens of the sequences in flight"""
    kv_cache: int
    num_blocks: int
    block_size: int
    max_model_len: int
    """The longest sequence: what was asked for, or under `--max-model-len auto` what fits"""


class Numerics(Struct, frozen=True, array_like=True):
    """What a rank's self-test found of its matrix products. Both empty: a row's bits do not depend on the rows beside it."""

    broken: tuple[str, ...] = ()
    """Products in which they do."""
    untested: tuple[str, ...] = ()
    """Products for which there was no time."""


class Ready(Message, frozen=True):
    """The rank has joined the mesh, loaded its shard and can run plans of `epoch`."""

    rank: int
    epoch: int
    ledger: MemoryLedger
    facts: dict[str, int]
    """What only a loaded model knows: max_model_len, vocab_size, and the rank's heads [first_head, end_head) and
    [first_kv_head, end_kv_head)."""
    numerics: Numerics | None = None
    """None where nothing is promised, on CUDA."""


class Heartbeat(Message, frozen=True):
    """Every 0.5 s: the rank lives. `phase` and `percent` feed /readyz while starting; `step` is the last plan finished.

    `busy`: what long work that is no hang its main thread does inside a step, such as compiling a kernel; empty for none.
    """

    rank: int
    epoch: int
    phase: str
    percent: int
    step: int
    busy: str = ""


class ExpertLoad(Message, frozen=True):
    """How many tokens each expert of these layers has had in this epoch, sent by the first rank of a stage when it has changed.

    `tokens`: 64-bit integers, one an expert, layer by layer.
    """

    rank: int
    epoch: int
    layers: tuple[int, ...]
    tokens: bytes


class LogLines(Message, frozen=True):
    """Lines of the rank's log, from number `start` on, for operators. `last_error`: the last error among them, if any."""

    rank: int
    start: int
    lines: tuple[str, ...]
    last_error: str = ""


class Fault(Message, frozen=True):
    """The rank cannot go on. `kind` user: the user can mend it (exit code 2); engine: a failure (exit code 1); sibling: the same,
    since another rank of its node has ended, whose death explains more; overdue: a step does not come back, which is said again
    with each heartbeat and is no failure while a rank compiles."""

    rank: int
    epoch: int
    kind: Literal["user", "engine", "sibling", "overdue"]
    text: str


class Drain(Message, frozen=True):
    """Stop taking requests and finish the open ones. From a rank: it was asked to end. To ranks: note it."""

    rank: int = -1


RankMessage = Hello | Ready | Heartbeat | ExpertLoad | LogLines | Fault | Drain

# coordinator -> rank


class Start(Message, frozen=True):
    """Form the mesh of `epoch`. `endpoints` are those of rank 0's Hello."""

    epoch: int
    endpoints: dict[str, str]


class Run(Message, frozen=True):
    """Every rank is up: plans of `epoch` may flow."""

    epoch: int


class Stop(Message, frozen=True):
    """Leave. `code` is the exit code; `reason` is for the log, empty after a drain."""

    code: int
    reason: str


CoordinatorMessage = Start | Run | Drain | Stop
