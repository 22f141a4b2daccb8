"""The requests of `tpserve bench serve` and their send times. Pure: the same workload gives the same requests and times.

Prompts are random and share nothing but the requested prefix, so that a prefix cache helps only there. A second run against the
same server needs another seed, or its prompts are cached.
"""

import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import msgspec

from tpserve.errors import UserError

Api = Literal["completions", "chat"]
PromptKind = Literal["ids", "words", "dataset"]

IDS = range(256, 1000)
"""Token ids that every vocabulary has, after the bytes and special tokens with which many begin."""
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family",
    "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system", "work", "number", "night",
    "point", "home", "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book",
    "eye", "job", "word", "issue", "side", "kind", "head", "house", "friend", "father", "power", "hour", "game", "line", "end",
)  # fmt: skip
"""Short and common words, so that most tokenizers have one token for each."""


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A load, resolved; part of the report. None: no limit, or, for lengths with a `dataset`, those of the file.

    `prompts`: token ids where the server takes them, words elsewhere. `request_rate` is per second. `burstiness` is the shape of
    the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, more is more even. Lengths are tokens, uniform
    within `range_ratio` of `input_len` and `output_len`; the shared prefix of `prefix_len` tokens comes before them.
    """

    endpoint: Api
    prompts: PromptKind
    num_prompts: int
    num_warmups: int
    request_rate: float | None
    burstiness: float
    max_concurrency: int | None
    input_len: int | None
    output_len: int | None
    range_ratio: float
    prefix_len: int
    dataset: str | None
    ignore_eos: bool
    temperature: float
    seed: int


class BenchRequest(msgspec.Struct, frozen=True):
    """One request. `input_len` is the intended number of tokens; the server's tokenizer decides the actual one."""

    prompt: str | list[int]
    input_len: int
    output_len: int


class DatasetLine(msgspec.Struct, frozen=True):
    """One line of a dataset."""

    prompt: str
    output_len: int | None = None


def build_requests(workload: Workload, dataset: Sequence[BenchRequest] = ()) -> tuple[list[BenchRequest], list[BenchRequest]]:
    """The warmup requests and the measured ones. The warmups of a dataset are random words of the same number."""
    if workload.prompts == "dataset":
        prompts = RandomPrompts("words", 0, workload.seed)
        warmups = [prompts.next(request.input_len, request.output_len) for request in dataset[: workload.num_warmups]]
        return warmups, list(dataset[: workload.num_prompts])
    assert workload.input_len is not None and workload.output_len is not None
    prompts = RandomPrompts(workload.prompts, workload.prefix_len, workload.seed)
    made = [
        prompts.next(workload.input_len, workload.output_len, workload.range_ratio)
        for _ in range(workload.num_prompts + workload.num_warmups)
    ]
    return made[workload.num_prompts :], made[: workload.num_prompts]


class RandomPrompts:
    """Generates random prompts that share a prefix of `prefix_len` tokens."""

    def __init__(self, kind: PromptKind, prefix_len: int, seed: int) -> None:
        self._kind = kind
        self._rng = random.Random(f"prompts {seed}")
        self._prefix = self._rng.choices(IDS, k=prefix_len)

    def next(self, input_len: int, output_len: int, range_ratio: float = 0.0) -> BenchRequest:
        """The next request, with lengths in tokens within `range_ratio` of the given ones."""
        input_len, output_len = self._vary(input_len, range_ratio), self._vary(output_len, range_ratio)
        ids = self._prefix + self._rng.choices(IDS, k=input_len)
        prompt = ids if self._kind == "ids" else " ".join(WORDS[id % len(WORDS)] for id in ids)
        return BenchRequest(prompt, len(ids), output_len)

    def _vary(self, length: int, ratio: float) -> int:
        return max(1, self._rng.randint(int(length * (1 - ratio)), int(length * (1 + ratio)))) if ratio else length


def arrivals_s(workload: Workload) -> list[float]:
    """The send time of each request in seconds after the first one; all 0 without a request rate."""
    if workload.request_rate is None:
        return [0.0] * workload.num_prompts
    rng = random.Random(f"arrivals {workload.seed}")
    scale_s = 1 / (workload.request_rate * workload.burstiness)
    gaps_s = [rng.gammavariate(workload.burstiness, scale_s) for _ in range(workload.num_prompts - 1)]
    return list(accumulate(gaps_s, initial=0.0))


def read_dataset(path: Path, output_len: int | None) -> list[BenchRequest]:
    """Read a file with one JSON object a line, ignoring other fields. `output_len` is for lines without one.

    The lengths of the prompts are counted in words. Raises UserError that names the wrong line.
    """
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"--dataset {path}: {error.strerror}") from error
    found = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=DatasetLine)
        except msgspec.DecodeError as error:
            wanted = '{"prompt": "...", "output_len": 128}'
            raise UserError(f"--dataset {path}, line {number}: {error}; a line is {wanted}") from error
        length = output_len if line.output_len is None else line.output_len
        if length is None or length < 1:
            raise UserError(f"--dataset {path}, line {number}: output_len is {length}; --output-len is for lines without one")
        found.append(BenchRequest(line.prompt, len(line.prompt.split()), length))
    return found


def endpoint(text: str) -> Api:
    """The API of an --endpoint: `completions`, `chat`, or their paths, which vLLM's flag takes."""
    known: dict[str, Api] = {name: name for name in get_args(Api)}
    return (known | {"/v1/completions": "completions", "/v1/chat/completions": "chat"})[text]
