"""One rank of the parity run: every layout, each over its own groups, every model. Writes logits as safetensors.

    python rank.py RANK WORLD_SIZE DIRECTORY

DIRECTORY holds models.json: {"layouts": [[tp, pp], ...], "models": {name: {"sequences": [...], "prompts": [...],
"thorough": [[tp, pp], ...]}}, "shared": {"layouts": [...], "models": [name, ...]}, "experts" and "int8": like shared,
"scored": {"models": [name, ...], "sequences": [...]}, "resumed": {way: [name, ...]}}. The layouts run over gloo, those of
"shared" through shared memory as well, those of "experts" with expert parallelism too, those of "int8" in int8 (three ranks
through shared memory); the thorough ones in bfloat16 and with each sequence in one chunk as well. Requests are resumed on two
ranks, over gloo (way "") and through shared memory ("-shm").
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from msgspec.structs import replace
from runner import Runner, Scorer, load_decoder, mixed, serve, whole
from safetensors.torch import save_file

from tpserve.config.flags import Quantization
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.parallel.shm import ShmAllReduce, create_shm_group, exchange_locations
from tpserve.scheduling.scheduler_config import SchedulerConfig
from tpserve.types.messages import Delta
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.worker import logits_chunking

SIZES = (17, 100, 5, 1, 33)


def main(rank: int, world_size: int, directory: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=300))
    work = json.loads((directory / "models.json").read_text())
    pipelines = []  # a send is lost when its pipeline goes before it is delivered
    over_gloo = [(tp, pp, list(work["models"]), "") for tp, pp in work["layouts"]]
    shared = [(tp, pp, work["shared"]["models"], "-shm") for tp, pp in work["shared"]["layouts"]]
    experts = [(tp, pp, work["experts"]["models"], "-ep") for tp, pp in work["experts"]["layouts"]]
    in_int8 = [(tp, pp, work["int8"]["models"], "-int8") for tp, pp in work["int8"]["layouts"]]
    places = exchange_locations(store, rank, world_size, 60.0)
    for tp, pp, names, way in over_gloo + shared + experts + in_int8:
        stages = [dist.new_group([stage * tp + i for i in range(tp)]) for stage in range(pp)]
        if rank >= tp * pp:
            continue
        stage = rank // tp
        shm = None
        if way == "-shm" or (way == "-int8" and tp == 3):
            keys = dist.PrefixStore(f"tp{tp}pp{pp}{way}", store)  # a page's keys are good for one
            shm = create_shm_group(keys, places, range(stage * tp, (stage + 1) * tp), rank, 2, 60.0)
            assert isinstance(shm, ShmAllReduce), shm
        group = Group(stages[stage] if tp > 1 else None, shm)
        pipeline = Pipeline(rank - tp if stage > 0 else None, rank + tp if stage < pp - 1 else None)
        pipeline.connect(torch.device("cpu"))
        pipelines.append(pipeline)
        results = {}
        for name in names:
            model = work["models"][name]
            sequences = model["sequences"]
            lengths = [len(tokens) for tokens in sequences]
            thorough = way in ("-ep", "-int8") or [tp, pp] in model["thorough"]
            for dtype in (torch.float32, torch.bfloat16)[: 2 if thorough else 1]:
                quantization: Quantization | None = "int8-head" if way == "-int8" else None
                runner = Runner.load(directory / name, tp, pp, rank, group, pipeline, dtype, way == "-ep", quantization)
                runs = {"mixed": mixed(lengths, model["prompts"], SIZES)} | ({"whole": whole(lengths)} if thorough else {})
                for kind, steps in runs.items():
                    for i, logits in enumerate(runner.run(sequences, steps)):
                        results[f"{name}.{kind}.{i}.{dtype}"] = logits
        if not way:
            for name in work["scored"]["models"]:
                decoder, layout = load_decoder(directory / name, tp, pp, rank, group, torch.float32)
                mesh = Mesh(rank, layout, group, Group(), pipeline, torch.device("cpu"))
                scored = score(decoder, mesh, work["scored"]["sequences"])
                results |= {f"{name}.{key}": x for key, x in scored.items()}
        if way in ("", "-shm") and [tp, pp] == [2, 1]:
            results |= resume_all(directory, work["resumed"][way], rank, group)
        if rank == tp * (pp - 1):
            save_file(results, directory / f"tp{tp}pp{pp}{way}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def score(decoder: Decoder, mesh: Mesh, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    """Each sequence's own and most likely tokens, scored alone, and then together in chunks with few rows at the head at once."""
    lengths = [len(tokens) for tokens in sequences]
    most, few = logits_chunking.HEAD_BYTES, 10 * logits_chunking.PLAIN_BYTES * len(decoder.vocab_shards[0])
    runs = {"whole": (whole(lengths), most), "mixed": (mixed(lengths, lengths, SIZES), few)}
    results = {}
    for kind, (steps, head_bytes) in runs.items():
        logits_chunking.HEAD_BYTES = head_bytes
        scorer = Scorer(decoder, mesh, len(sequences), max(lengths))
        for i, scores in enumerate(scorer.run(sequences, steps, [3] * len(sequences))):
            results |= {f"scored.{kind}.{i}.{what}": x for what, x in zip(("chosen", "ids", "top"), scores, strict=True)}
    logits_chunking.HEAD_BYTES = most
    return results


def resume_all(directory: Path, names: list[str], rank: int, tp: Group) -> dict[str, torch.Tensor]:
    """`resume` on two ranks in both types."""
    results = {}
    for name in names:
        for dtype in (torch.float32, torch.bfloat16):
            decoder, layout = load_decoder(directory / name, 2, 1, rank, tp, dtype)
            results[f"{name}.resumed.{dtype}"] = resume(decoder, Mesh(rank, layout, tp, Group(), Pipeline(), decoder.device))
    return results


def resume(decoder: Decoder, mesh: Mesh) -> torch.Tensor:
    """Requests interrupted after 20 tokens and resumed: tokens drawn again, those that differ, and new tokens that differ."""
    asked = [
        EngineSamplingParams(temperature=0.0, logprobs=2),
        EngineSamplingParams(temperature=0.9, top_p=0.8),
        EngineSamplingParams(temperature=0.7, frequency_penalty=0.3, repetition_penalty=1.2, bad_words=((7,), (8, 9))),
        EngineSamplingParams(temperature=1.2, min_p=0.05, logprobs=0),
        EngineSamplingParams(),
    ]
    fresh = [
        Request(i, pack(range(i, 5 + 13 * i)), replace(params, max_tokens=26), seed=i, choice=i) for i, params in enumerate(asked)
    ]
    limits = SchedulerConfig(
        max_num_seqs=5, max_num_batched_tokens=64, max_model_len=300, num_blocks=100, block_size=16, depth=2,
        sync_sampling=False, eos_ids=(), windows=decoder.spec.windows,
    )  # fmt: skip
    whole, rest = [list[int]() for _ in fresh], [list[int]() for _ in fresh]
    for output in serve(decoder, mesh, fresh, limits).outputs:
        if isinstance(output, Delta):
            whole[output.id].extend(output.tokens)
    served = serve(decoder, mesh, [replace(r, output=pack(whole[r.id][:20])) for r in fresh], limits)
    for output in served.outputs:
        if isinstance(output, Delta):
            rest[output.id].extend(output.tokens)
    new = sum(a != b for tokens, more in zip(whole, rest, strict=True) for a, b in zip(tokens[20:], more, strict=True))
    return torch.tensor([sum(sum(step.redraw) for step in served.plans), served.scheduler.stats().resume_mismatches, new])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
