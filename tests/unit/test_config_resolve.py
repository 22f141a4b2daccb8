"""Flags, model and machine to a configuration: what auto becomes, and what is refused before anything starts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.specs import EXPERTS, small
from tpserve.cli.server_flags import parse
from tpserve.config.engine_config import EngineConfig
from tpserve.config.resolve import num_all_ranks, num_local_ranks, resolve
from tpserve.errors import UserError
from tpserve.parallel.split import split_heads
from tpserve.types.layout import even_layers
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import CacheGroup, ModelSpec

SPEC = small(num_layers=5, bos_id=1, eos_ids=(2,))


def machine(world: int, nodes: int = 1, gpus: int = 0, serve: bool = False) -> Machine:
    return Machine(world, world // nodes, nodes, gpus, 2, "serve" if serve else "torchrun")


def resolved(line: str, on: Machine, spec: ModelSpec = SPEC) -> EngineConfig:
    flags = parse(line.split())
    return resolve(flags, ModelFiles(str(flags.model), str(flags.model)), spec, on)


@settings(max_examples=100, deadline=None)
@given(tp=st.integers(1, 8), pp=st.integers(1, 5), say_tp=st.booleans())
def test_any_size_that_leaves_no_rank_empty(tp: int, pp: int, say_tp: bool) -> None:
    layout = resolved(f"m -pp {pp}" + (f" -tp {tp}" if say_tp else ""), machine(tp * pp)).layout
    assert (layout.tp, layout.pp, layout.layers) == (tp, pp, even_layers(5, pp))
    split_heads(SPEC.num_heads, SPEC.num_kv_heads, layout.tp)


@pytest.mark.parametrize(
    ("line", "on", "said"),
    [
        (
            "m -tp 8",
            machine(16, nodes=2, gpus=8),
            "2 nodes x 8 ranks = 16 ranks were started but --tensor-parallel-size 8 x --pipeline-parallel-size 1 = 8: "
            "run `torchrun --nnodes 2 --node_rank I --nproc_per_node 8 --master_addr HEAD -m tpserve m -tp 8 -pp 2`",
        ),
        (
            "m -tp 8",
            machine(16, nodes=2, serve=True),
            "run `tpserve serve m -tp 8 -pp 2 --nnodes 2 --node-rank I --master-addr HEAD`",
        ),
        ("m -tp 4", machine(2), "start 4 ranks, `torchrun --nproc-per-node 4 -m tpserve m -tp 4 -pp 1`"),
        ("m -tp 4", machine(2, gpus=2), "run `torchrun --nproc-per-node 2 -m tpserve m -tp 2 -pp 1`"),
        (
            "m",
            Machine(3, 1, 2, 0, 2, "serve"),
            "the 2 nodes start 3 ranks together and this one 1: pass the same --nproc-per-node",
        ),
        ("m --num-gpu-blocks-override 127", machine(1), "too few for one sequence of 2,048: pass at least 128"),
        ("m -pp 3", machine(8), "run `torchrun --nproc-per-node 8 -m tpserve m -tp 8 -pp 1`"),
        ("m -tp 9", machine(9), "--tensor-parallel-size 9, but the model has 8 attention heads"),
        ("m -pp 6", machine(6), "--pipeline-parallel-size 6, but the model has 5 layers"),
        ("m -pp 2 --pipeline-layer-map 3,3", machine(2), "3,3 is 2 stages and 6 layers together, but there are 2 stages and 5"),
        ("m -pp 2 --pipeline-layer-map 2,2,1", machine(2), "pass 2 numbers that add up to 5, such as 3,2"),
        ("m", machine(3, gpus=2), "3 ranks on this node but 2 visible GPUs: start at most 2 a node"),
        ("m --device cuda", machine(1), "--device cuda, but no GPU is visible"),
        ("m --all-reduce nccl", machine(2), "--all-reduce nccl is for GPUs, and the ranks run on the CPU: leave it out"),
        ("m --all-reduce shm", machine(2, gpus=2), "--all-reduce shm is for the CPU, and the ranks run on GPUs"),
        ("m --all-reduce nccl --device cuda", machine(2, gpus=1), "needs a GPU for each rank, but 2 ranks share 1"),
        ("m -q int8", machine(1, gpus=1), "--quantization int8 is for the CPU, and the ranks run on GPUs: leave it out, or pass"),
        ("m -q int8-head --dtype float16", machine(1), "the model's are float16: pass --dtype bfloat16 too"),
        ("m --kv-cache-dtype int8", machine(1, gpus=1), "--kv-cache-dtype int8 is for the CPU, and the ranks run on GPUs"),
        (
            "m --kv-cache-dtype int8 --dtype float16",
            machine(1),
            "int8 is not for a model in float16: leave it out, or pass --dtype",
        ),
        ("m --enable-expert-parallel", machine(2), "--enable-expert-parallel, but the model has no experts: leave it out"),
        ("m --max-model-len 2049", machine(1), "--max-model-len 2049 is beyond the model's 2048 positions"),
    ],
)
def test_refusals(line: str, on: Machine, said: str) -> None:
    with pytest.raises(UserError) as error:
        resolved(line, on)
    assert said in str(error.value)


def test_whole_experts_on_each_rank() -> None:
    mixture = replace(SPEC, experts=EXPERTS)
    assert not resolved("m", machine(5), mixture).layout.expert_parallel
    assert resolved("m --enable-expert-parallel", machine(5), mixture).layout.expert_parallel
    with pytest.raises(UserError, match="but 6 ranks would share 5 experts, so that a rank would hold none: leave it out, or"):
        resolved("m --enable-expert-parallel", machine(6), mixture)


@settings(max_examples=150, deadline=None)
@given(tp=st.integers(1, 12), pp=st.integers(1, 8), nodes=st.integers(1, 3), per_node=st.integers(1, 8))
def test_the_command_line_of_a_mismatch_works(tp: int, pp: int, nodes: int, per_node: int) -> None:
    line = f"m -tp {tp} -pp {pp}"
    try:
        resolved(line, machine(nodes * per_node, nodes))
    except UserError as error:
        if "were started" not in str(error):
            return
        words = str(error).split("`")[1].split()
        started = int(words[words.index("--nproc-per-node" if nodes == 1 else "--nproc_per_node") + 1]) * nodes
        fits = any(t * p == started for t in range(1, 9) for p in range(1, 6))
        if fits and started == nodes * per_node:
            resolved(" ".join(words[words.index("tpserve") + 1 :]), machine(started, nodes))
    else:
        assert tp * pp == nodes * per_node


@pytest.mark.parametrize(
    ("checkpoint", "gpus", "said", "dtype"),
    [
        ("float32", 0, "auto", "float32"),
        ("float32", 1, "auto", "bfloat16"),
        ("float16", 1, "auto", "float16"),
        ("bfloat16", 0, "auto", "bfloat16"),
        ("bfloat16", 1, "float32", "float32"),
    ],
)
def test_dtype(checkpoint: str, gpus: int, said: str, dtype: str) -> None:
    assert resolved(f"m --dtype {said}", machine(1, gpus=gpus), replace(SPEC, dtype=checkpoint)).dtype == dtype


@pytest.mark.parametrize(("world", "tp", "pp"), [(8, 8, 1), (16, 8, 2), (12, 6, 2), (24, 8, 3), (20, 5, 4)])
def test_ranks_beyond_the_heads_become_stages(world: int, tp: int, pp: int) -> None:
    layout = resolved("m", machine(world)).layout
    assert (layout.tp, layout.pp) == (tp, pp)


def test_nodes_of_unequal_size() -> None:
    assert resolved("m", Machine(3, 1, 2, 0, 2, "torchrun")).layout.tp == 3
    assert resolved("m -tp 3", Machine(3, 1, 2, 0, 2, "serve")).layout.tp == 3


@pytest.mark.parametrize(
    ("line", "here", "together"),
    [
        ("m", 2, 4),
        ("m -tp 4", 2, 4),
        ("m -tp 3", 1, 3),
        ("m -tp 3", 2, 3),
        ("m -tp 1 -pp 3", 2, 3),
        ("m -tp 8", 8, 16),  # the other node would have none: what is wrong is the layout
    ],
)
def test_how_many_ranks_two_nodes_start(line: str, here: int, together: int) -> None:
    assert num_all_ranks(parse([*line.split(), "--nnodes", "2"]), here) == together


def test_kv_cache_dtype() -> None:
    assert resolved("m --dtype float32", machine(1)).kv_cache_dtype == "float32"
    assert resolved("m --dtype bfloat16 --kv-cache-dtype int8", machine(1)).kv_cache_dtype == "int8"


def test_defaults_by_device() -> None:
    cpu, gpu = resolved("m", machine(1)), resolved("m", machine(1, gpus=1))
    assert (cpu.device, cpu.max_num_batched_tokens, cpu.max_model_len, cpu.served_model_name) == ("cpu", 2048, 2048, ("m",))
    assert (gpu.device, gpu.max_num_batched_tokens) == ("cuda", 8192)
    assert resolved("m --device cpu", machine(3, gpus=1)).device == "cpu"
    assert resolved("m --device cuda", machine(2, gpus=1)).device == "cuda"


@pytest.mark.parametrize(
    ("line", "gpus", "chosen"),
    [
        ("m", 0, "auto"), ("m", 2, "nccl"), ("m --device cuda", 1, "gloo"), ("m --all-reduce gloo", 2, "gloo"),
        ("m --all-reduce shm", 0, "shm"), ("m --all-reduce gloo", 0, "gloo"),
    ],
)  # fmt: skip
def test_what_carries_the_sums(line: str, gpus: int, chosen: str) -> None:
    assert resolved(line, machine(2, gpus=gpus)).all_reduce == chosen


def test_what_must_be_equal_on_all_ranks_holds_no_paths_and_no_secret() -> None:
    one = resolved("/here/m --api-key a --port 1 --step-trace /x", machine(1))
    other = resolved("/there/m --api-key b --port 2", machine(1))
    assert one.shared() == other.shared()
    assert one.shared() != resolved("/here/m --block-size 32", machine(1)).shared()


@pytest.mark.parametrize(
    ("line", "gpus", "ranks"),
    [
        ("m", 8, 8), ("m", 0, 1), ("m -tp 2", 8, 2), ("m -tp 2", 0, 2), ("m -tp 2 -pp 2", 0, 4), ("m -pp 3", 0, 3),
        ("m -pp 2", 8, 8),
        ("m -tp 8", 4, 8), ("m -tp 8 --nnodes 2", 8, 8), ("m -tp 4 --nnodes 2", 0, 2), ("m --nproc-per-node 3 -tp 9", 8, 3),
        ("m --device cpu", 8, 1), ("m --pipeline-layer-map 3,2", 0, 2),
    ],
)  # fmt: skip
def test_how_many_ranks_serve_starts(line: str, gpus: int, ranks: int) -> None:
    assert num_local_ranks(parse(line.split()), gpus) == ranks


def test_ranks_that_cannot_be_dealt_to_nodes() -> None:
    with pytest.raises(UserError, match="3 ranks .* cannot be divided among 2 nodes"):
        num_local_ranks(parse(["m", "-tp", "3", "--nnodes", "2"]), 0)


def test_blocks_that_are_given_must_hold_a_window_of_the_longest_sequence() -> None:
    windowed = replace(SPEC, cache=(CacheGroup((0, 2)), CacheGroup((1, 3), window=100)))
    assert resolved("m --num-gpu-blocks-override 136", machine(1), windowed).num_gpu_blocks_override == 128 + 8
    with pytest.raises(UserError, match="for one sequence of 2,048: pass at least 136, or --max-model-len 2032"):
        resolved("m --num-gpu-blocks-override 135", machine(1), windowed)


@pytest.mark.parametrize("said", ["HTTPS://a.example/ http://b:81", '["https://a.example", "http://b:81"]'])
def test_origins_are_names_or_vllms_list(said: str) -> None:
    config = resolved(f"m --allowed-origins {said} --allowed-headers *", machine(1))
    assert config.allowed_origins == ("https://a.example", "http://b:81") and config.allowed_headers == ("*",)
    assert resolved("m", machine(1)).allowed_origins == ()


@pytest.mark.parametrize("said", ["a.example", "https://a.example/x", "[1]", "[", "://a", "https://"])
def test_what_is_no_origin_is_refused(said: str) -> None:
    with pytest.raises(UserError, match="--allowed-origins") as info:
        resolved(f"m --allowed-origins {said}", machine(1))
    assert info.value.param == "allowed_origins"
