"""What fits, and what would: numbers of ranks that were never started."""

import dataclasses
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from tests.specs import EXPERTS, LATENTS, small
from tests.unit.test_weights import Seat
from tpserve.cli.server_flags import parse
from tpserve.config.engine_config import EngineConfig
from tpserve.config.resolve import resolve
from tpserve.errors import UserError
from tpserve.models.decoder import Decoder
from tpserve.models.param_count import count_params, largest_count
from tpserve.models.weight_bytes import HeldFormat, weight_bytes
from tpserve.parallel.group import Group
from tpserve.parallel.mesh import Mesh
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout, even_layers
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import CacheGroup, ModelSpec
from tpserve.worker.memory import allocate
from tpserve.worker.sizing import (
    AUTO_LEAST,
    GIB,
    MemoryProfile,
    fit_kv_cache,
    ledger_of,
    position_bytes,
    refusal,
    report,
    slot_bytes,
)
from tpserve_kernels.cpu.library import library

EIGHT_EXPERTS = replace(EXPERTS, count=8, shared_size=0, shared_gate=False, layers=(0, 1, 2, 3))
MIB = 1 << 20
SPEC = small(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    max_position=131_072, dtype="bfloat16",
)  # fmt: skip
"""Llama 3.1 8B: 15.0 GiB of weights, 128 KiB of cache a token."""


def config(line: str, ranks: int = 1, nnodes: int = 1) -> EngineConfig:
    machine = Machine(ranks, ranks // nnodes, nnodes, 8, 2, "torchrun")
    return resolve(parse(["m", "--device", "cuda", "--max-num-seqs", "8", *line.split()]), ModelFiles("m", "m"), SPEC, machine)


def rank(total_gib: float, share: float = 0.9, tp: int = 1, spec: ModelSpec = SPEC) -> MemoryProfile:
    """A card on which this model was loaded, with one GiB for activations and LM head, half another for others."""
    total, weights = int(total_gib * GIB), 2 * largest_count(spec, ParallelLayout(tp, 1, (32,))).weights
    block = 16 * 2 * largest_count(spec, ParallelLayout(tp, 1, (32,))).cached
    others, rest = GIB // 2, weights + GIB
    mine = int(total * share) - others
    return MemoryProfile(total, others, mine, weights, GIB // 2, GIB // 2, mine - rest, total - others - rest, block)


def said(ranks: list[MemoryProfile], settings: EngineConfig, per_node: int = 8, spec: ModelSpec = SPEC) -> str:
    refused = refusal(fit_kv_cache(ranks, spec, settings), ranks, spec, settings, per_node)
    return "" if refused is None else str(refused)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2), (3, 2), (1, 3), (8, 1)])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tie_embeddings": True, "qk_norm": "head"},
        {"family": "olmo2", "qk_norm": "all"},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"family": "gpt2", "norm": "layer", "rope": None, "gated": False, "mlp_bias": True, "tie_embeddings": True},
        {"family": "opt", "norm": "layer", "rope": None, "final_norm": False, "embedding_size": 48},
        {"family": "opt", "norm": "layer", "norm_affine": False, "embedding_size": 48, "tie_embeddings": True},
        {"cache": (CacheGroup((0, 1, 3), window=100), CacheGroup((2,)))},
        {"cache": (CacheGroup((0, 2)), CacheGroup((1, 3), window=100))},
        {"family": "qwen2_moe", "experts": EXPERTS},
        {"family": "mixtral", "experts": EIGHT_EXPERTS, "split": "experts"},
        {"family": "gemma3", "norm_place": "around", "qk_norm": "head", "tie_embeddings": True},
        {"family": "gpt_oss", "sinks": True, "experts": replace(EIGHT_EXPERTS, bias=True)},
        {"family": "gpt_oss", "sinks": True, "experts": replace(EIGHT_EXPERTS, bias=True), "split": "experts"},
        LATENTS,
        {**LATENTS, "family": "deepseek_v2", "latent": replace(LATENTS["latent"], q_rank=None), "split": "experts"},
    ],
)
def test_what_a_rank_needs_is_what_the_decoder_allocates(tp: int, pp: int, extra: dict[str, Any]) -> None:
    fields = {name: value for name, value in extra.items() if name != "split"}
    spec = small(**{"num_heads": 12, "num_kv_heads": 4, **fields})
    layout = ParallelLayout(tp, pp, even_layers(spec.num_layers, pp), "split" in extra)
    for place in range(layout.world_size):
        stage, seat = layout.stage_of(place), Seat(layout.tp_rank_of(place), tp)
        decoder = Decoder(spec, layout, stage, seat, torch.float32, torch.device("cpu"), 8)
        computed = count_params(spec, layout, place)
        held = [weight_bytes(spec, layout, place, HeldFormat(dtype)) for dtype in ("float32", "bfloat16")]  # type: ignore[arg-type]
        assert held[0] == sum(parameter.tensor.nbytes for parameter in decoder.parameters())
        half = Decoder(spec, layout, stage, seat, torch.bfloat16, torch.device("cpu"), 8)
        assert held[1] == sum(parameter.tensor.nbytes for parameter in half.parameters()), "some numbers are wider"
        assert computed.weights == sum(parameter.tensor.numel() for parameter in decoder.parameters())
        mesh = Mesh(place, layout, Group(), Group(), Pipeline(), torch.device("cpu"))
        caches = allocate(decoder, mesh, 1, 1)
        arrays = {cache.k.data_ptr(): cache for cache in caches}.values()
        assert 4 * computed.cached == sum(cache.k.nbytes + (0 if cache.v_in_k else cache.v.nbytes) for cache in arrays)
        decoder.kv_layout = dataclasses.replace(decoder.kv_layout, int8=True)
        in_int8 = {cache.k.data_ptr(): cache for cache in allocate(decoder, mesh, 1, 1)}.values()
        of_int8 = sum(cache.k.nbytes + (0 if cache.v_in_k else cache.v.nbytes) for cache in in_int8)
        assert of_int8 == position_bytes(computed, config("--device cpu --kv-cache-dtype int8"))
        for group in spec.cache:
            here = [caches[number].k.data_ptr() for number, layer in enumerate(layout.layers_of(stage)) if layer in group.layers]
            assert len(set(here)) == len(here), "layers of a group share no array"


class Equal(Seat):
    """A place among ranks that have the same numbers."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(self.size, *x.shape)

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [list(values)] * self.size


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Packing many small matrices on threads that other processes keep from running takes long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.skipif(library() is None, reason="no library of CPU kernels")
@pytest.mark.parametrize("quantization", [None, "int8", "int8-head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"tie_embeddings": True},
        {"family": "opt", "rope": None, "norm": "layer", "gated": False, "activation": "relu", "embedding_size": 24},
        {"experts": EXPERTS},
        {"family": "gpt_oss", "sinks": True, "experts": replace(EIGHT_EXPERTS, bias=True), "split": "experts"},
        LATENTS,
    ],
    ids=["llama", "tied", "opt", "shared expert", "whole experts", "latents"],
)  # fmt: skip
def test_what_a_rank_needs_is_what_it_holds_when_packed(extra: dict[str, Any], dtype: Any, quantization: Any) -> None:
    """Odd sizes, so that panels and inner channels are filled up."""
    if quantization is not None and dtype == "float16":
        pytest.skip("refused")
    fields = {name: value for name, value in extra.items() if name != "split"}
    spec = small(**{"vocab_size": 517, "hidden_size": 36, "intermediate_size": 70, "num_heads": 4, "num_kv_heads": 2, **fields})
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        layout = ParallelLayout(tp, pp, even_layers(spec.num_layers, pp), "split" in extra)
        for place in range(layout.world_size):
            seat = Equal(layout.tp_rank_of(place), tp)
            decoder = Decoder(spec, layout, layout.stage_of(place), seat, getattr(torch, dtype), torch.device("cpu"), 8)
            for parameter in decoder.parameters():
                parameter.tensor.zero_()
            expected = weight_bytes(spec, layout, place, HeldFormat(dtype, packed=True, quantization=quantization))
            assert decoder.prepack(quantization) == expected


def test_auto_takes_what_fits_on_the_smallest_rank() -> None:
    settings = config("--max-model-len auto", ranks=2)
    ranks = [rank(40, tp=2), rank(13, tp=2)]
    found = fit_kv_cache(ranks, SPEC, settings)
    assert found.rank == 1 and AUTO_LEAST < found.max_model_len < 131_072 and found.max_model_len % 16 == 0
    assert found.num_blocks * 16 >= found.max_model_len
    took = found.num_blocks * ranks[1].block + slot_bytes(settings, found.max_model_len)
    assert ranks[1].room - ranks[1].block < took <= ranks[1].room
    lines = report([ledger_of(each, found, settings) for each in ranks], found, SPEC, settings)
    assert lines[0].startswith("memory of rank 1 (stage 0): 13.0 GiB on the device, 512.0 MiB not ours, weights 7.5 GiB")
    assert lines[2] == f"max_model_len auto: {found.max_model_len:,} of the model's 131,072 tokens fit the KV cache"
    assert lines[3] == f"Maximum concurrency for {found.max_model_len:,} tokens per request: 1.00x"


def test_auto_takes_all_when_all_fits() -> None:
    settings = config("--max-model-len auto")
    found = fit_kv_cache([rank(80)], SPEC, settings)
    assert found.max_model_len == 131_072
    assert "all of the model's 131,072 tokens" in report([ledger_of(rank(80), found, settings)], found, SPEC, settings)[2]


@pytest.mark.parametrize("auto", [False, True])
def test_random_ranks_never_get_more_than_their_room(auto: bool) -> None:
    dice = random.Random(7)
    for _ in range(300):
        settings = config("--max-model-len auto" if auto else "--max-model-len 5000", ranks=2)
        ranks = [rank(dice.uniform(15, 60), dice.uniform(0.5, 1)) for _ in range(2)]
        found = fit_kv_cache(ranks, SPEC, settings)
        for each in ranks:
            assert found.num_blocks * each.block <= max(0, each.room - slot_bytes(settings, found.max_model_len))
        assert not auto or found.max_model_len <= found.num_blocks * 16
        if not said(ranks, settings):
            assert found.num_blocks * 16 >= found.max_model_len >= (AUTO_LEAST if auto else 5000)


def test_a_size_that_is_given_wins() -> None:
    settings = config("--kv-cache-memory 2.5 --max-model-len 4096")
    assert fit_kv_cache([rank(40)], SPEC, settings).num_blocks == 2.5 * GIB // rank(40).block
    assert said([rank(40)], settings) == ""
    assert said([rank(18)], settings) == (
        "--kv-cache-memory 2.5 does not fit: beside weights, activations and LM head rank 0 has 1.5 GiB free: "
        "pass at most 1.54, or leave it out"
    )
    assert "pass at most 789" in said([rank(18)], config("--num-gpu-blocks-override 800 --max-model-len 4096"))
    both = "m --kv-cache-memory 1 --num-gpu-blocks-override 300 --device cpu"
    with pytest.raises(UserError, match="both size the KV cache"):
        resolve(parse(both.split()), ModelFiles("m", "m"), SPEC, Machine(1, 1, 1, 0, 2, "serve"))


def test_what_would_help_is_computed() -> None:
    text = said([rank(24)], config(""))
    assert text == (
        "one sequence of 131,072 tokens (--max-model-len) needs 16.0 GiB of KV cache a rank, and rank 0 has 5.1 GiB left for it, "
        "enough for 42,112: pass --max-model-len 42112, or -tp 2 -pp 1 (2 ranks, about 16.5 GiB each)"
    )
    assert "or --kv-cache-memory 16 (" in said([rank(33)], config("")), "nothing but the share of the card keeps it from fitting"
    assert "-tp 4 -pp 1 (4 ranks, about 8.7 GiB each)" in said([rank(18)], config("")), "two ranks would not do"
    auto = said([rank(18.3)], config("--max-model-len auto"))
    assert (
        auto.startswith("one sequence of 1,024 tokens (auto takes no less) needs 128.0 MiB")
        and "--kv-cache-memory 0.13 (" in auto
    )
    assert "--num-gpu-blocks-override 64" in said([rank(40)], config("--max-model-len auto --num-gpu-blocks-override 40"))


@pytest.mark.parametrize("text_gib", [19, 20, 22, 24, 28])
def test_the_remedies_are_true(text_gib: float) -> None:
    """Who does what the error says is not refused again."""
    text = said([rank(text_gib)], config(""))
    shorter = re.search(r"--max-model-len \d+", text)
    assert shorter is not None and said([rank(text_gib)], config(shorter[0])) == ""
    layout = re.search(r"-tp (\d+) -pp 1", text)
    assert layout is not None
    assert said([rank(text_gib, tp=int(layout[1]))] * int(layout[1]), config(layout[0], ranks=int(layout[1]))) == ""


def test_a_stage_stays_inside_a_node_where_it_can() -> None:
    """On the CPU more ranks on the machine would share what it has: they need machines of their own."""
    assert "-tp 1 -pp 2 (2 ranks on 2 nodes, about" in said([rank(24)], config(""), per_node=1)
    assert "-tp 2 -pp 1 (2 ranks, about" in said([rank(24)], config(""), per_node=2)


GEMMA = replace(SPEC, cache=tuple(CacheGroup(tuple(range(i, 32, 4)), None if i == 3 else 1024) for i in range(4)))
"""Three layers with a window to one without: four groups of eight layers, and a quarter of the bytes a block."""


def test_windows_make_the_same_memory_hold_more() -> None:
    settings = config("--max-model-len auto")
    ranks = [rank(24, spec=GEMMA)]
    found = fit_kv_cache(ranks, GEMMA, settings)
    assert fit_kv_cache([rank(24)], SPEC, settings).max_model_len == 42_112 and found.max_model_len == 131_072
    each = 131_072 // 16 + 3 * 65
    lines = report([ledger_of(ranks[0], found, settings)], found, GEMMA, settings)
    assert lines[1] == (
        f"GPU KV cache size: {found.num_blocks * 131_072 // each:,} tokens ({found.num_blocks:,} blocks of 16, "
        f"{each:,} for a sequence of 131,072 tokens)"
    )
    assert lines[3] == f"Maximum concurrency for 131,072 tokens per request: {found.num_blocks / each:.2f}x"


@pytest.mark.parametrize("total_gib", [18.5, 19, 20])
def test_the_remedies_are_true_with_windows_too(total_gib: float) -> None:
    text = said([rank(total_gib, spec=GEMMA)], config(""), spec=GEMMA)
    shorter, layout = re.search(r"--max-model-len (\d+)", text), re.search(r"-tp (\d+) -pp 1", text)
    assert shorter is not None and layout is not None, text
    assert said([rank(total_gib, spec=GEMMA)], config(shorter[0]), spec=GEMMA) == ""
    longer = config(f"--max-model-len {int(shorter[1]) + 16}")
    assert said([rank(total_gib, spec=GEMMA)], longer, spec=GEMMA) != "", "it names the most"
    tp = int(layout[1])
    assert said([rank(total_gib, tp=tp, spec=GEMMA)] * tp, config(layout[0], ranks=tp), spec=GEMMA) == ""
