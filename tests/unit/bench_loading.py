"""How long loading takes beside reading the same bytes: `python -m tests.unit.bench_loading [DIRECTORY]`.

Makes a checkpoint of 1.2 GB (bfloat16, and the same in block FP8), reads its file as fast as a buffer takes it, writes as much
memory as the model needs for the first time, then loads it with one rank and with two, each a process of one thread, which begin
together; everything is in the page cache. Of the slowest rank, seconds on the clock and on the processor: the second also mean
something on a machine that does other work.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.quantized import fp8_checkpoint
from tests.specs import small
from tests.unit.weights_case import Seat
from tpserve.models import names_of
from tpserve.models.decoder import Decoder
from tpserve.types.layout import ParallelLayout
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.load import load

SPEC = small(
    num_layers=12, hidden_size=2048, intermediate_size=5632, num_heads=16, num_kv_heads=4, head_dim=128, vocab_size=16384
)
FILE = "model.safetensors"
REPEATS = 5


def decoder(rank: int, tp: int) -> Decoder:
    return Decoder(SPEC, ParallelLayout(tp, 1, (SPEC.num_layers,)), 0, Seat(rank, tp), torch.bfloat16, torch.device("cpu"), 16)


Seconds = tuple[float, float]
"""On the clock, and on the processor."""


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(begin: Seconds) -> Seconds:
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def rank(directory: Path, number: int, tp: int) -> None:
    """One rank: each line on stdin is a load, whose seconds it prints."""
    torch.set_num_threads(1)
    print(flush=True)
    for _ in sys.stdin:
        model, begin = decoder(number, tp), now()
        load(model.parameters(), Checkpoint.open(directory, names_of(SPEC)))
        print(*since(begin), flush=True)


def loads(directory: Path, tp: int) -> list[Seconds]:
    """The slowest rank's, of each repeat."""
    command = [sys.executable, "-m", "tests.unit.bench_loading", str(directory)]
    pipe = subprocess.PIPE
    ranks = [subprocess.Popen([*command, str(i), str(tp)], stdin=pipe, stdout=pipe, text=True) for i in range(tp)]
    streams = [(process.stdin, process.stdout) for process in ranks]
    seconds = []
    for _, out in streams:
        assert out is not None and out.readline()
    for _ in range(REPEATS):
        for given, _ in streams:
            assert given is not None
            given.write("\n")
            given.flush()
        took = [out.readline().split() for _, out in streams if out is not None]
        seconds.append((max(float(clock) for clock, _ in took), max(float(processor) for _, processor in took)))
    for process in ranks:
        process.communicate()
    return seconds


def reads(path: Path) -> list[Seconds]:
    """To read the file into a buffer, over and over."""
    buffer, seconds = bytearray(1 << 20), []
    for _ in range(REPEATS):
        begin = now()
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
        seconds.append(since(begin))
    return seconds


def writes(num_bytes: int) -> list[Seconds]:
    """To write memory that was not used before."""
    seconds = []
    for _ in range(REPEATS):
        memory, begin = torch.empty(num_bytes, dtype=torch.uint8), now()
        memory.zero_()
        seconds.append(since(begin))
    return seconds


def main(directory: Path) -> None:
    model = decoder(0, 1)
    for parameter in model.parameters():
        parameter.tensor.normal_(std=0.02)
    plain = {source.name: place for parameter in model.parameters() for source, place in parameter.parts()}
    for title, tensors in (("bfloat16", plain), ("block FP8", fp8_checkpoint(plain)[0])):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FILE)
        size = (directory / FILE).stat().st_size / 1e9
        file, memory = directory / FILE, sum(tensor.nbytes for tensor in plain.values())
        cases = {"read": reads(file), "write": writes(memory), "one rank": loads(directory, 1), "two ranks": loads(directory, 2)}
        for what, seconds in cases.items():
            clock, processor = (sorted(values)[REPEATS // 2] for values in zip(*seconds, strict=True))
            best = min(clock for clock, _ in seconds)
            print(f"{title}, {size:.2f} GB, {what}: {clock:.2f} s, best {best:.2f}, processor {processor:.2f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    else:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as made:
            main(Path(made))
