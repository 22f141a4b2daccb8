"""What the mask of a grammar costs a token, by vocabulary and kind of grammar, and of several rows in a step.

    python -m tests.bench_masks                          vocabularies of 2,048 (the built-in model's), 32,000 and 128,000
    python -m tests.bench_masks --vocabularies 2048
    python -m tests.bench_masks --steps              the share of masks in whole steps of a Llama of 100 million, 32,000 tokens

Larger vocabularies are byte-level BPE trained here on the sources of Python's library and of the packages beside it. Each grammar
is followed along answers that it allows, as a model that knows what it does would write them; a mask is timed before each token.
`serial` makes the masks of several rows one after the other, `executor` in llguidance's threads. Times of one mask are of the
processor, those of rows of the clock, each the best of five and of these the median over twenty steps.
"""

import argparse
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.parity.runner import serve
from tests.schemas import TOKENIZER
from tests.specs import small
from tpserve.frontend.openai.body import parse
from tpserve.frontend.openai.grammar import grammar_of
from tpserve.frontend.openai.schema import CompletionRequest
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.structured_output.compiler import compile_grammar, vocabulary
from tpserve.text.tokenizer import Tokenizer
from tpserve.types.layout import ParallelLayout
from tpserve.types.packed import pack
from tpserve.types.plan import StepPlan
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy
from tpserve.worker.grammars import CompiledGrammars, SlotGrammar
from tpserve.worker.model_runner import ModelRunner, PendingStep

TEXT_BYTES = 60_000_000
ROWS = (1, 8, 32)
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "summary": {"type": "string", "maxLength": 400},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["news", "science", "sports", "arts"]}, "maxItems": 5},
        "author": {"type": "object", "properties": {"name": {"type": "string"}, "born": {"type": "string", "format": "date"}},
                   "required": ["name"], "additionalProperties": False},
    },
    "required": ["title", "summary", "year", "author"],
    "additionalProperties": False,
}  # fmt: skip
TEXT = "the report of a small town by the river says that every boat was counted twice before winter came and nobody slept"
REGEX = r"[A-Z][a-z]{2,12} [A-Z][a-z]{2,15}, [0-9]{1,2} (Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep) [12][0-9]{3}(; [a-z ]{5,200})?"
CHOICES = [f"{a} {b}" for a in ("very", "rather", "hardly", "not") for b in ("likely", "good", "useful", "clear", "new", "old")]
TAG = {"structures": [{"begin": "<call>", "schema": SCHEMA, "end": "</call>"}], "triggers": ["<call>"]}


def prose(dice: random.Random, count: int) -> str:
    return " ".join(dice.choice(TEXT.split(" ")) for _ in range(count))


def instance(dice: random.Random) -> str:
    author = {"name": prose(dice, 2).title(), "born": f"19{dice.randrange(10, 99)}-0{dice.randrange(1, 9)}-1{dice.randrange(9)}"}
    value = {"title": prose(dice, 5), "summary": prose(dice, 40), "year": dice.randrange(1900, 2050), "score": dice.random(),
             "tags": ["news", "arts"], "author": author}  # fmt: skip
    return json.dumps(value, indent=dice.choice((None, 2)))


KINDS: dict[str, tuple[dict[str, Any], Callable[[random.Random], str]]] = {
    "JSON schema": ({"json": SCHEMA}, instance),
    "regex": ({"regex": REGEX}, lambda dice: f"Anna Miller, {dice.randrange(1, 28)} Mar 1987; {prose(dice, 20)}"),
    "choice of 24": ({"choice": CHOICES}, lambda dice: dice.choice(CHOICES)),
    "text with a call": (
        {"structural_tag": TAG},
        lambda dice: f"{prose(dice, 30)} <call>{instance(dice)}</call> {prose(dice, 9)}",
    ),
}


def trained(size: int) -> Tokenizer:
    """A byte-level BPE of so many tokens."""

    def texts() -> Any:
        left = TEXT_BYTES
        for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            for path in sorted(Path(root).rglob("*.py")):
                text = path.read_text(errors="ignore")
                if (left := left - len(text)) < 0:
                    return
                yield text

    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return Tokenizer(rust, {})


def compiled(words: LLTokenizer, fields: dict[str, Any]) -> LLMatcher:
    call, _ = parse({"prompt": "", "structured_outputs": fields}, CompletionRequest, set())
    return compile_grammar(words, grammar_of(call))


def us(times_ns: Sequence[int]) -> str:
    ordered = sorted(times_ns)
    p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
    return f"p50 {p50 / 1e3:7.1f}  p99 {p99 / 1e3:8.1f}  max {ordered[-1] / 1e3:8.1f}"


def masks(matcher: LLMatcher, tokenizer: Tokenizer, text_of: Callable[[random.Random], str], row_W: torch.Tensor) -> list[int]:
    """The times of the masks before each token of some answers, in ns."""
    dice, times = random.Random(1), []
    while len(times) < 1500:
        walker = matcher.deep_copy()
        for token in tokenizer.encode(text_of(dice), add_special_tokens=False):
            begin = time.thread_time_ns()
            walker.unsafe_compute_mask_ptr(row_W.data_ptr(), row_W.numel() * 4)
            times.append(time.thread_time_ns() - begin)
            assert walker.consume_token(token), walker.get_error()
    return times


def at_places(
    matcher: LLMatcher, tokenizer: Tokenizer, text_of: Callable[[random.Random], str], count: int, seed: int
) -> list[LLMatcher]:
    """Followers of a grammar, each somewhere in an answer of its own."""
    dice, found = random.Random(seed), []
    for _ in range(count):
        ids = tokenizer.encode(text_of(dice), add_special_tokens=False)
        found.append(matcher.deep_copy())
        assert found[-1].consume_tokens(ids[: dice.randrange(len(ids))])
    return found


def best_us(followers: Sequence[LLMatcher], bits_GW: torch.Tensor, executor: LLExecutor | None) -> float:
    """The time of the masks of all rows, made together: the best of five."""
    times, row_bytes = [], bits_GW.shape[1] * 4
    for _ in range(5):
        begin = time.perf_counter_ns()
        if executor is None:
            for index, follower in enumerate(followers):
                follower.unsafe_compute_mask_ptr(bits_GW[index].data_ptr(), row_bytes)
        else:
            pairs = [(follower, index) for index, follower in enumerate(followers)]
            executor.unsafe_compute_mask_ptr(pairs, bits_GW.data_ptr(), row_bytes, len(pairs))
        times.append(time.perf_counter_ns() - begin)
    return min(times) / 1e3


def whole_steps(tokenizer: Tokenizer) -> None:
    """The processor's time of decode steps with a JSON schema in every row, on one thread, and of masks and matchers in them."""
    torch.set_num_threads(1)
    size = tokenizer.vocab_size
    heads = {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}
    spec = small(num_layers=12, hidden_size=768, intermediate_size=2048, vocab_size=size, tie_embeddings=True, **heads)
    layout = ParallelLayout(1, 1, (spec.num_layers,))
    decoder = Decoder(spec, layout, 0, Group(), torch.bfloat16, torch.device("cpu"), 512)
    dummy(decoder.parameters(), seed=3)
    decoder.prepack()
    call, _ = parse({"prompt": "", "structured_outputs": {"json": SCHEMA}}, CompletionRequest, set())
    params = EngineSamplingParams(temperature=1.0, max_tokens=80, grammar=grammar_of(call), ignore_eos=True)
    spent, found = [0.0], list[tuple[int, float, float]]()
    for name in ("write_mask", "follow"):
        setattr(SlotGrammar, name, timed(getattr(SlotGrammar, name), spent))
    launch = ModelRunner.launch

    def timed_launch(runner: ModelRunner, plan: StepPlan) -> PendingStep:
        begin = time.process_time()
        pending = launch(runner, plan)
        took, masks, spent[0] = time.process_time() - begin, spent[0], 0.0
        chunks = list(plan.chunks())
        if chunks and all(chunk.count == 1 for chunk in chunks):
            found.append((len(chunks), took, masks))
        return pending

    ModelRunner.launch = timed_launch
    compiled = CompiledGrammars(lambda: vocabulary(tokenizer, size, ()))
    mesh = Mesh(0, layout, Group(), Group(), Pipeline(), torch.device("cpu"))
    for rows in ROWS:
        found.clear()
        requests = [Request(index, pack(range(5, 25)), params, seed=index) for index in range(rows)]
        serve(decoder, mesh, requests, SchedulerConfig(rows, 512, 512, 2000, 16, 2, False, ()), compiled)
        whole = [(took, masks) for count, took, masks in found if count == rows]
        step, mask = (statistics.median(times) * 1e3 for times in zip(*whole, strict=True))
        share = f"{mask / rows * 1e3:5.0f} us a token, {mask / step:.1%} of the step"
        print(f"{rows:2} rows: a step {step:6.1f} ms, masks and matchers {mask:6.2f} ms, {share}; {len(whole)} steps", flush=True)


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The method, which adds its time to `spent`; of one that calls another only once."""

    def run(*arguments: Any) -> Any:
        before, begin = spent[0], time.process_time()
        try:
            return method(*arguments)
        finally:
            spent[0] = before + time.process_time() - begin

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", default="2048,32000,128000")
    parser.add_argument("--steps", action="store_true")
    if parser.parse_args().steps:
        whole_steps(trained(32_000))
        return
    executor = LLExecutor(2)
    for size in map(int, parser.parse_args().vocabularies.split(",")):
        tokenizer = TOKENIZER if size == TOKENIZER.vocab_size else trained(size)
        begin = time.perf_counter()
        words = vocabulary(tokenizer, tokenizer.vocab_size, ())
        print(f"\nvocabulary of {tokenizer.vocab_size}, built in {time.perf_counter() - begin:.2f} s", flush=True)
        for name, (fields, text_of) in KINDS.items():
            begin = time.perf_counter()
            matcher = compiled(words, fields)
            compile_ms = (time.perf_counter() - begin) * 1e3
            bits_GW = torch.empty(max(ROWS), -(-words.vocab_size // 32), dtype=torch.int32)
            first = masks(matcher, tokenizer, text_of, bits_GW[0])
            again = masks(matcher, tokenizer, text_of, bits_GW[0])
            print(f"{name:17} compiled in {compile_ms:6.1f} ms; a mask, us: {us(first)};  again {us(again)}")
            for count in ROWS:
                steps = [at_places(matcher, tokenizer, text_of, count, seed) for seed in range(20)]
                serial, parallel = (statistics.median(best_us(step, bits_GW, way) for step in steps) for way in (None, executor))
                print(f"{'':17} {count:2} rows, us: serial {serial:8.1f}, executor {parallel:8.1f}", flush=True)


if __name__ == "__main__":
    main()
