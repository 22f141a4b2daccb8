"""Every family at every layout gives what transformers gives, in float32, and the same bits however a step is made up.

One group of four processes runs all layouts; the sequences are those that transformers continues greedily, so that an
equal most likely token at each position means equal greedy generation.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.parity.dense_models import DENSE
from tests.parity.expert_models import EXPERTS
from tests.parity.gemma_models import GEMMAS
from tests.parity.random_models import randomised
from tpserve_kernels.cpu.library import library

LAYOUTS = [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2)]
SHARED = [(2, 1), (3, 1), (2, 2)]
EXPERT_PARALLEL = [(2, 1), (3, 1), (2, 2)]
IN_INT8 = [(1, 1), (2, 1), (3, 1)]
INT8_EXACT = ("llama-new", "llama-linear", "qwen2", "gpt2", "gemma3")
"""Models whose ranks add up nothing but integers."""
INT8_MODELS = (*INT8_EXACT, "olmo2", "qwen2-moe", "deepseek-v3")
PROMPTS = (3, 37, 170)
NEW_TOKENS = 7
SCORED = (1, 2, 33, 64, 129, 200)
"""Lengths of prompts that are scored."""
SCORED_MODELS = ("llama-old", "qwen2", "qwen2-moe")
RESUMED = {"": ["qwen2"], "-shm": ["llama-old"]}
"""Models whose requests are interrupted and resumed; one has windows."""
SIZES = {"vocab_size": 517, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 8, "max_position_embeddings": 400}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_llama_old(directory: Path) -> PreTrainedModel:
    """Llama 3.1's rope in the old spelling, untied."""
    rope = {"rope_theta": 5000.0, **LLAMA3}
    model = randomised(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, intermediate_size=172, rope_parameters=rope)))
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    (directory / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0, "rope_scaling": LLAMA3}))
    return model


def make_llama_new(directory: Path) -> PreTrainedModel:
    """The new spelling, all biases, one key/value head a query head, tied, several files."""
    rope = {"rope_theta": 5000.0, **LLAMA3}
    more = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_parameters": rope}
    model = randomised(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=8, intermediate_size=320, **more)))
    model.save_pretrained(directory, max_shard_size="150KB")
    assert (directory / "model.safetensors.index.json").exists()
    return model


def make_llama_linear(directory: Path) -> PreTrainedModel:
    """Linear rope scaling, a single key/value head, a head dimension of its own."""
    rope = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    sizes = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 100, "head_dim": 12}
    model = randomised(LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)))
    model.save_pretrained(directory)
    return model


def make_qwen2(directory: Path) -> PreTrainedModel:
    """Biases on query, key and value; fewer key/value heads than ranks at TP 3; tied; windows from the third layer on."""
    windows = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
    config = Qwen2Config(**SIZES, **windows, num_key_value_heads=2, intermediate_size=172, tie_word_embeddings=True)
    model = randomised(Qwen2ForCausalLM(config))
    model.save_pretrained(directory)
    return model


def make_qwen3(directory: Path) -> PreTrainedModel:
    """Norms over the heads of query and key; head dimension larger than hidden / heads; untied; a window in two layers."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    own = {"use_sliding_window": True, "sliding_window": 21, "layer_types": kinds, "head_dim": 16, "tie_word_embeddings": False}
    config = Qwen3Config(**SIZES, **own, num_key_value_heads=4, intermediate_size=172)
    model = randomised(Qwen3ForCausalLM(config))
    model.save_pretrained(directory)
    return model


MODELS = {
    "llama-old": make_llama_old,
    "llama-new": make_llama_new,
    "llama-linear": make_llama_linear,
    "qwen2": make_qwen2,
    "qwen3": make_qwen3,
    **DENSE,
    **GEMMAS,
    **EXPERTS,
}


def thorough(name: str) -> list[tuple[int, int]]:
    """Layouts at which a model runs in both types, whole and in chunks; at the others once, in float32 and in chunks."""
    return [(1, 1), (3, 1)] if name in (*DENSE, *GEMMAS, *EXPERTS) else LAYOUTS


def greedy(model: PreTrainedModel) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Prompts with their greedy continuations, and the logits of every position."""
    generator = torch.Generator().manual_seed(7)
    sequences, logits = [], []
    with torch.inference_mode():
        for length in PROMPTS:
            tokens = torch.randint(517, (1, length), generator=generator)
            for _ in range(NEW_TOKENS):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
            sequences.append(tokens[0].tolist())
            logits.append(model(tokens).logits[0])
    return sequences, logits


def to_score() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(517, (length,), generator=generator).tolist() for length in SCORED]


needs_library = pytest.mark.skipif(library() is None, reason="int8 needs the library of CPU kernels")
Results = dict[str, torch.Tensor]
Runs = Any


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[torch.Tensor]], dict[tuple[int | str, ...], Results]]:
    """The oracle's logits by model, and what the ranks of each layout computed.

    Also through shared memory (tp, pp, "shm"), and with expert parallelism (tp, pp, "ep").
    """
    directory = tmp_path_factory.mktemp("parity")
    torch.set_num_threads(1)
    oracle, work = {}, {}
    for name, make in MODELS.items():
        model = make(directory / name)
        sequences, oracle[name] = greedy(model)
        if name in SCORED_MODELS:
            with torch.inference_mode():
                oracle[f"{name}.scored"] = [model(torch.tensor([tokens])).logits[0] for tokens in to_score()]
        if name in EXPERTS:
            with torch.inference_mode():
                rounded = model.bfloat16().float()
                oracle[f"{name}.rounded"] = [rounded(torch.tensor([tokens])).logits[0] for tokens in sequences]
        work[name] = {"sequences": sequences, "prompts": PROMPTS, "thorough": thorough(name)}
    shared = {"layouts": SHARED, "models": ["llama-old"]}
    scored = {"models": SCORED_MODELS, "sequences": to_score()}
    experts = {"layouts": EXPERT_PARALLEL, "models": list(EXPERTS)}
    int8 = {"layouts": IN_INT8 if library() is not None else [], "models": INT8_MODELS}
    jobs = {"layouts": LAYOUTS, "models": work, "shared": shared, "experts": experts, "int8": int8, "scored": scored}
    jobs["resumed"] = RESUMED
    (directory / "models.json").write_text(json.dumps(jobs))
    world_size = max(tp * pp for tp, pp in LAYOUTS)
    run_ranks(directory, world_size)
    results: dict[tuple[int | str, ...], Results] = {}
    for tp, pp in LAYOUTS:
        results[tp, pp] = load_file(directory / f"tp{tp}pp{pp}.safetensors")
    for tp, pp in SHARED:
        results[tp, pp, "shm"] = load_file(directory / f"tp{tp}pp{pp}-shm.safetensors")
    for tp, pp in EXPERT_PARALLEL:
        results[tp, pp, "ep"] = load_file(directory / f"tp{tp}pp{pp}-ep.safetensors")
    for tp, pp in int8["layouts"]:
        results[tp, pp, "int8"] = load_file(directory / f"tp{tp}pp{pp}-int8.safetensors")
    return oracle, results


def run_ranks(directory: Path, world_size: int) -> None:
    """Start every rank, wait for all, and show what a failed one said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("rank.py"))
    ranks = []
    for rank in range(world_size):
        log = (directory / f"rank{rank}.log").open("w")
        command = [sys.executable, script, str(rank), str(world_size), str(directory)]
        ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [rank.wait(timeout=900) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = "\n".join((directory / f"rank{rank}.log").read_text() for rank in range(world_size))
    assert codes == [0] * world_size, logs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def test_logprobs_and_greedy_tokens(runs: Runs, layout: tuple[int, int], name: str) -> None:
    oracle, results = runs
    for i, expected in enumerate(oracle[name]):
        logits = results[layout][f"{name}.mixed.{i}.torch.float32"]
        torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
        assert torch.equal(logits[PROMPTS[i] - 1 :].argmax(-1), expected[PROMPTS[i] - 1 :].argmax(-1))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in EXPERTS])
def test_bfloat16_stays_close(runs: Runs, name: str) -> None:
    """The distribution of every position, against transformers' in float32."""
    oracle, results = runs
    for i, expected in enumerate(oracle[name]):
        wanted, got = expected.log_softmax(-1), results[1, 1][f"{name}.mixed.{i}.torch.bfloat16"].log_softmax(-1)
        assert float((wanted.exp() * (wanted - got)).sum(-1).mean()) < 1e-2


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def test_chunking_and_company_change_no_bit(runs: Runs, layout: tuple[int, int], dtype: str) -> None:
    """Alone in one chunk, or cut up, decoded and mixed with others."""
    _, results = runs
    for name in (name for name in MODELS if layout in thorough(name)):
        for i in range(len(PROMPTS)):
            alone, mixed = (results[layout][f"{name}.{kind}.{i}.{dtype}"] for kind in ("whole", "mixed"))
            assert torch.isfinite(alone).all()
            assert torch.equal(alone, mixed), f"{name}, sequence {i}"


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("layout", EXPERT_PARALLEL, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def test_expert_parallelism(runs: Runs, layout: tuple[int, int], name: str) -> None:
    """Whole experts on each rank, uneven counts of them: transformers' tokens, and in bfloat16 too a row's own bits."""
    oracle, results = runs
    split = results[*layout, "ep"]
    for i, expected in enumerate(oracle[name]):
        logits = split[f"{name}.mixed.{i}.torch.float32"]
        torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
        assert torch.equal(logits[PROMPTS[i] - 1 :].argmax(-1), expected[PROMPTS[i] - 1 :].argmax(-1))
        assert not torch.equal(logits, results[layout][f"{name}.mixed.{i}.torch.float32"]), (
            "other sums than those of split channels"
        )
        for dtype in ("torch.float32", "torch.bfloat16"):
            assert torch.equal(split[f"{name}.whole.{i}.{dtype}"], split[f"{name}.mixed.{i}.{dtype}"])


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_bfloat16(runs: Runs, name: str) -> None:
    """Close to float32 of the same weights. A flip of the routing at a near tie moves a position far, in int8 more of them."""
    oracle, results = runs
    expected = torch.cat(oracle[f"{name}.rounded"]).log_softmax(-1)
    for layout, result in results.items():
        if f"{name}.mixed.0.torch.bfloat16" in result:
            logits = [result[f"{name}.mixed.{i}.torch.bfloat16"] for i in range(len(PROMPTS))]
            far = (expected.exp() * (expected - torch.cat(logits).log_softmax(-1))).sum(-1)
            assert far.mean() < (3e-2 if "int8" in layout else 1e-2), layout


@pytest.mark.parametrize("name", SCORED_MODELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def test_scored_prompts(runs: Runs, layout: tuple[int, int], name: str) -> None:
    """Executors' prompt log probabilities; in chunks, in company and few rows at a time they keep their bits."""
    oracle, results = runs
    for i, (tokens, logits) in enumerate(zip(to_score(), oracle[f"{name}.scored"], strict=True)):
        expected = logits[:-1].log_softmax(-1)
        chosen, ids, top = whole = [results[layout][f"{name}.scored.whole.{i}.{what}"] for what in ("chosen", "ids", "top")]
        best = expected.topk(3, dim=1)
        torch.testing.assert_close(chosen, expected.gather(1, torch.tensor(tokens)[1:, None]).squeeze(1), atol=1e-4, rtol=0)
        torch.testing.assert_close(top, best.values, atol=1e-4, rtol=0)
        assert torch.equal(ids.long(), best.indices)
        for what, x in zip(("chosen", "ids", "top"), whole, strict=True):
            assert torch.equal(results[layout][f"{name}.scored.mixed.{i}.{what}"], x)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize(("layout", "name"), [((2, 1), "qwen2"), ((2, 1, "shm"), "llama-old")], ids=str)
def test_resumed_requests_draw_their_last_tokens_alike(runs: Runs, layout: tuple[int | str, ...], name: str, dtype: str) -> None:
    _, results = runs
    assert results[layout][f"{name}.resumed.{dtype}"].tolist() == [5 * 16, 0, 0]


@pytest.mark.parametrize("pp", [2, 3])
def test_stages_change_no_bit(runs: Runs, pp: int) -> None:
    _, results = runs
    for key, logits in results[1, pp].items():
        assert torch.equal(logits, results[1, 1][key]), key


@pytest.mark.parametrize("layout", SHARED, ids=lambda layout: f"tp{layout[0]}-pp{layout[1]}")
def test_shared_memory_changes_no_bit(runs: Runs, layout: tuple[int, int]) -> None:
    _, results = runs
    shared = results[*layout, "shm"]
    compared = [key for key in shared if "resumed" not in key]  # not every model is resumed in both
    assert len(compared) == 4 * len(PROMPTS)
    for key in compared:
        assert torch.equal(shared[key], results[layout][key]), key


@needs_library
@pytest.mark.parametrize("layout", [(2, 1), (3, 1)], ids=["tp2", "tp3"])
def test_ranks_change_no_bit_in_int8(runs: Runs, layout: tuple[int, int]) -> None:
    """Ranks that add up integers only compute what one rank does; norms and experts over ranks are sums of floats."""
    _, results = runs
    parted = results[*layout, "int8"]
    for key, logits in results[1, 1, "int8"].items():
        assert torch.isfinite(logits).all()
        if key.split(".")[0] in INT8_EXACT:
            assert torch.equal(parted[key], logits), key


@needs_library
@pytest.mark.parametrize("layout", IN_INT8, ids=lambda layout: f"tp{layout[0]}")
def test_chunking_and_company_change_no_bit_in_int8(runs: Runs, layout: tuple[int, int]) -> None:
    _, results = runs
    own = results[*layout, "int8"]
    kinds = [key for key in own if ".whole." in key]
    assert len(kinds) == len(INT8_MODELS) * len(PROMPTS) * 2
    for key in kinds:
        assert torch.equal(own[key], own[key.replace(".whole.", ".mixed.")]), key


@needs_library
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("name", INT8_MODELS)
def test_int8_stays_close(runs: Runs, name: str, dtype: str) -> None:
    """The distribution of every position, LM head in int8 too, against transformers' in float32."""
    oracle, results = runs
    wanted = torch.cat(oracle[name]).log_softmax(-1)
    for layout in IN_INT8:
        got = torch.cat([results[*layout, "int8"][f"{name}.mixed.{i}.{dtype}"] for i in range(len(PROMPTS))])
        assert 0 < float((wanted.exp() * (wanted - got.log_softmax(-1))).sum(-1).mean()) < 3e-2
