"""`tpserve bench roofline`: decode steps and a prefill of a whole model on the CPU, against the floor that this machine allows.

    floor of a step = max(bytes of weights and KV cache / read bandwidth, operations / rate of a product in cache)

Both rates are measured in the same run, before and after the models, and the better ones count. Steps are those of a rank:
tensors from the plan, the layers, the LM head and a greedy draw, in this process, without scheduling, messages and HTTP. Weights
are random (numbers do not change the time), so a model is its config.json: three shapes, or any MODEL.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import torch
from msgspec.structs import replace

from tpserve.bench.report import BenchReport, MachineInfo, check_writable, write
from tpserve.bench.roofline_plot import MeasuredPoint, svg
from tpserve.bench.roofline_rates import best_of, product_rate, read_rate
from tpserve.bench.roofline_work import MachineRates, Span, StepWork, step_work
from tpserve.cli import server_flags
from tpserve.config.engine_config import EngineConfig
from tpserve.config.flags import Flags
from tpserve.config.resolve import resolve
from tpserve.config.sizes import size
from tpserve.errors import UserError
from tpserve.host.resources import available_cores, available_memory
from tpserve.hub.locate import describe
from tpserve.models import model_spec
from tpserve.models.decoder import Decoder
from tpserve.models.load_config import load_model_config
from tpserve.models.weight_bytes import weight_bytes
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.quant.int8 import check_available
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import ModelSpec
from tpserve.types.packed import pack
from tpserve.types.plan import Chunk, NewSequence, StepPlan
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.parameter import Parameter
from tpserve.worker import device as devices
from tpserve.worker import sizing
from tpserve.worker.memory import allocate
from tpserve.worker.model_runner import ModelRunner
from tpserve.worker.request_pool import RequestPool
from tpserve_kernels.cpu.library import load

BUILT_IN = "built-in"
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "head_dim": 64, "rope_theta": 500000.0, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
}  # fmt: skip
SHAPES = {
    "100M": LLAMA | {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
        "intermediate_size": 2048, "vocab_size": 32000,
    },
    "1B": LLAMA | {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 128256,
    },
}  # fmt: skip
"""Llamas by their parameters; the larger one is Llama 3.2 1B's shape."""
WARM_UPS = 2
PREFILLS = 3
PATTERN = 1 << 18
GREEDY = EngineSamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)


class StepShape(msgspec.Struct, frozen=True):
    """A kind of step: `batch` sequences that compute positions [start, start + count) each."""

    name: str
    batch: int
    span: Span


class RooflineCase(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table. `share`: the floor by the median."""

    model: str
    step: str
    rates: str
    work: StepWork
    p50_ms: float
    best_ms: float
    tokens_per_s: float
    floor_ms: float
    bound: str
    share: float


class RooflineFigures(msgspec.Struct, frozen=True):
    """`rates`: by the type of a product's numbers. `kernels`: the instruction set and the version of the library, or why not."""

    threads: int
    kernels: str
    rates: dict[str, MachineRates]
    cases: list[RooflineCase]


class TimedStep(msgspec.Struct, frozen=True):
    """What was measured of a kind of step."""

    model: str
    shape: StepShape
    rates: str
    work: StepWork
    seconds: list[float]

    def against(self, rates: MachineRates) -> RooflineCase:
        """The row of the table."""
        p50_s, floor_s = median(self.seconds), self.work.floor_s(rates)
        return RooflineCase(
            model=self.model,
            step=self.shape.name,
            rates=self.rates,
            work=self.work,
            p50_ms=round(p50_s * 1e3, 4),
            best_ms=round(min(self.seconds) * 1e3, 4),
            tokens_per_s=round(self.shape.batch * self.shape.span[1] / p50_s, 2),
            floor_ms=round(floor_s * 1e3, 4),
            bound=self.work.bound(rates),
            share=round(floor_s / p50_s, 4),
        )


def run(
    engine_argv: Sequence[str],
    *,
    shapes: tuple[str, ...],
    batch: tuple[int, ...],
    prefill: int,
    context: int,
    steps: int,
    output: Path | None,
    plot: Path | None,
) -> int:
    """Measure, print the table, write report and picture; returns the exit code. `engine_argv`: MODEL and the server's flags."""
    flags, note = server_flags.read_line(engine_argv)
    if note:
        sys.stderr.write(f"tpserve bench roofline: {note}\n")
    if flags.device == "cuda":
        raise UserError(
            "`tpserve bench roofline` is for the CPU: `python kernels/bench_roofline.py --output FILE` measures a GPU's kernels",
            param="device",
        )
    if shapes and flags.model is not None:
        raise UserError(f"--shapes are measured without MODEL, and {flags.model} is given: leave one of them out", param="shapes")
    models = _models(replace(flags, device="cpu"), shapes or (BUILT_IN, *SHAPES))
    decode = [StepShape(f"decode {count}", count, (context, 1)) for count in batch]
    steps_of = [*decode, StepShape(f"prefill {prefill}", 1, (0, prefill))]
    longest = max(prefill, context + WARM_UPS + steps)
    for name, spec, _ in models:
        if longest >= spec.max_position:
            raise UserError(
                f"{name} has {spec.max_position:,} positions, and {longest + 1:,} are needed: lower --context or --prefill"
            )
    check_writable(output, plot)
    devices.choose("cpu", 0, 1)
    kernels, why_not = load()
    if flags.quantization is not None:
        check_available()
    machine = MachineInfo.here()
    kinds = sorted({_rates_of(config) for _, _, config in models})
    sys.stdout.write(f"roofline on {machine}, {torch.get_num_threads()} threads\n")
    if kernels is None:
        sys.stdout.write(f"without the library of CPU kernels, by torch's operators: {why_not}\n")
    rates = {kind: _measure_rates(kind) for kind in kinds}
    timed: list[TimedStep] = []
    for name, spec, config in models:
        timed += _measure(name, RandomModel(spec, config, max(batch), longest + 1), steps_of, steps)
    rates = {kind: best_of(rates[kind], _measure_rates(kind)) for kind in kinds}
    cases = [each.against(rates[each.rates]) for each in timed]
    sys.stdout.write("\n".join(_table(rates, cases)) + "\n")
    if output is not None:
        version = why_not if kernels is None else kernels.numerics
        workload = {
            "shapes": [name for name, _, _ in models], "batch": batch, "prefill": prefill, "context": context, "steps": steps,
            "engine": list(engine_argv),
        }  # fmt: skip
        figures = RooflineFigures(torch.get_num_threads(), version, rates, cases)
        BenchReport.of("roofline", machine, ("torch",), workload, figures).write(output)
    if plot is not None:
        points = [MeasuredPoint(case.model, case.step, case.work, case.p50_ms / 1e3) for case in cases]
        write("--plot", plot, svg(f"roofline on {machine}", rates, points).encode())
    return 0


def _models(flags: Flags, shapes: Sequence[str]) -> list[tuple[str, ModelSpec, EngineConfig]]:
    """The models to measure: MODEL alone, or the shapes. Raises UserError."""
    machine = Machine(1, 1, 1, 0, available_cores(), "serve")
    models = []
    for name in shapes if flags.model is None else (flags.model,):
        if name in SHAPES:
            spec, files = model_spec(SHAPES[name], name), ModelFiles(name, name)
            resolved = replace(flags, model=name)
        elif flags.model is None and name != BUILT_IN:
            raise UserError(f"--shapes takes {', '.join((BUILT_IN, *SHAPES))}, not {name!r}", param="shapes")
        else:
            resolved, files, spec = load_model_config(flags, describe)
        models.append((name, spec, resolve(resolved, files, spec, machine)))
    return models


def _rates_of(config: EngineConfig) -> str:
    """The numbers of the model's products."""
    return "int8" if config.quantization is not None else config.dtype


def _measure_rates(kind: str) -> MachineRates:
    sys.stderr.write(f"measuring bandwidth and products of {kind}\n")
    dtype = torch.bfloat16 if kind == "int8" else getattr(torch, kind)
    return MachineRates(round(read_rate()), round(product_rate(dtype, int8=kind == "int8")))


def _measure(name: str, model: "RandomModel", shapes: Sequence[StepShape], steps: int) -> list[TimedStep]:
    """Every kind of step with one model; a line and nothing when memory is short."""
    if model.num_bytes > (free := available_memory().free):
        sys.stderr.write(f"{name} is left out: it needs {size(model.num_bytes)} of memory, and {size(free)} are free\n")
        return []
    sys.stderr.write(f"measuring {name}\n")
    model.load()
    return [TimedStep(name, shape, _rates_of(model.config), model.work(shape), model.measure(shape, steps)) for shape in shapes]


class RandomModel:
    """A model of one rank with random weights, and slots for `batch` sequences of at most `max_len` tokens."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, batch: int, max_len: int) -> None:
        """Allocates nothing yet. `num_bytes`: what `load` takes."""
        self.config, self._spec, self._max_len, self._num_slots = config, spec, max_len, batch
        self._blocks = -(-max_len // config.block_size)
        self._library = load()[0] is not None
        weights = weight_bytes(spec, config.layout, 0, sizing.held_format(config, library=self._library))
        self.num_bytes = weights + batch * sizing.kv_bytes_read(spec, config, 0, max_len, max_len)

    def load(self) -> None:
        """Make weights and caches. All pages are written, so that a step reads memory and not the kernel's page of zeros."""
        spec, config = self._spec, self.config
        mesh = Mesh(0, config.layout, Group(), Group(), Pipeline(), torch.device("cpu"))
        dtype: torch.dtype = getattr(torch, config.dtype)
        kv_int8 = config.kv_cache_dtype == "int8"
        decoder = Decoder(spec, config.layout, 0, mesh.tp, dtype, mesh.device, self._max_len, kv_int8)
        with torch.inference_mode():
            decoder.prepack(config.quantization, _fill)
        caches = allocate(decoder, mesh, self._num_slots * self._blocks * len(spec.windows), config.block_size)
        for cache in caches:
            cache.k.zero_()
            cache.v.zero_()
        request_pool = RequestPool(
            self._num_slots, self._max_len, config.block_size, spec.windows, mesh.device, eos_ids=(), vocab_size=spec.vocab_size
        )
        self._model_runner = ModelRunner(mesh, decoder, request_pool, caches)

    def work(self, shape: StepShape) -> StepWork:
        """What such a step must read and compute."""
        return step_work(self._spec, self.config, [shape.span] * shape.batch, library=self._library)

    def measure(self, shape: StepShape, steps: int) -> list[float]:
        """Seconds of `steps` decode steps, each one position further, or of some prefills."""
        start, count = shape.span
        repeats = steps if start else min(steps, PREFILLS)
        seconds = []
        for number in range(WARM_UPS + repeats):
            at = start + number if start else 0
            chunks = [Chunk(slot, at, count, sample=True) for slot in range(shape.batch)]
            new = [self._admission(slot, at + count) for slot in range(shape.batch)] if number == 0 or not start else ()
            plan = StepPlan.of(0, number, chunks, new)
            begin_s = time.perf_counter()
            self._model_runner.launch(plan).wait()
            seconds.append(time.perf_counter() - begin_s)
        return seconds[WARM_UPS:]

    def _admission(self, slot: int, length: int) -> NewSequence:
        """A sequence whose blocks, in each cache group, are its own."""
        tokens = pack((7 * slot + position) % self._spec.vocab_size for position in range(length))
        firsts = [(slot * len(self._spec.windows) + group) * self._blocks for group in range(len(self._spec.windows))]
        tables = tuple(pack(range(first, first + self._blocks)) for first in firsts)
        return NewSequence(slot, tokens, length, GREEDY, 0, 0, tables)


def _fill(parameter: Parameter) -> None:
    """Random numbers for a matrix, ones for a vector."""
    flat = parameter.tensor.view(-1)
    if parameter.tensor.dim() < 2:
        flat.fill_(1)
        return
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)) * parameter.tensor.shape[-1] ** -0.5
    for first in range(0, len(flat), PATTERN):
        flat[first : first + PATTERN] = pattern[: len(flat) - first]


def _table(rates: dict[str, MachineRates], cases: Sequence[RooflineCase]) -> list[str]:
    lines = [
        f"read bandwidth {each.bytes_per_s / 1e9:,.1f} GB/s, products of {kind} in cache {each.flops_per_s / 1e9:,.0f} GFLOP/s"
        for kind, each in rates.items()
    ]
    lines.append(
        f"{'model':<12}{'step':<14}{'p50 ms':>10}{'best ms':>10}{'tok/s':>11}{'GB':>8}{'GFLOP':>9}{'floor ms':>10}   of floor"
    )
    for case in cases:
        work = case.work
        lines.append(
            f"{Path(case.model).name:<12}{case.step:<14}{case.p50_ms:>10.3f}{case.best_ms:>10.3f}{case.tokens_per_s:>11,.1f}"
            f"{work.num_bytes / 1e9:>8.3f}{work.flops / 1e9:>9.2f}{case.floor_ms:>10.3f}   {case.share:.0%} ({case.bound})"
        )
    return lines
