"""`tpserve plan` on models of well-known dimensions: what fits, what is recommended and why, and what is refused."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import save_file

from tpserve.__main__ import main
from tpserve.cli.command import HelpWanted
from tpserve.cli.server_flags import parse
from tpserve.config.flags import WrongValue
from tpserve.config.resolve import resolve
from tpserve.models import model_spec
from tpserve.planner import quantities
from tpserve.planner.command import COMMAND
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]
LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": LLAMA_70B | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama-70b": LLAMA_70B,
    "llama-405b": LLAMA_70B | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    },
    "llama-13b": LLAMA_70B | {
        "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 40, "max_position_embeddings": 4096,
    },
    "mixtral-8x7b": LLAMA_70B | {
        "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768, "num_local_experts": 8,
        "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gemma-27b": LLAMA_70B | {
        "architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000, "hidden_size": 4608, "intermediate_size": 36864,
        "num_hidden_layers": 46, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "sliding_window": 4096,
        "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 144, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "bert": {"architectures": ["BertForMaskedLM"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (where / name).mkdir()
        (where / name / "config.json").write_text(json.dumps(config))
    return where


@pytest.fixture
def plan(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line in the folder of the models: exit code, and what was printed."""
    monkeypatch.chdir(models)

    def run(line: str) -> tuple[int, str]:
        code = main(["plan", *line.split()])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def layouts(plan: Any, line: str) -> dict[str, Any]:
    """The whole plan as JSON, with its layouts by name."""
    found: dict[str, Any] = json.loads(plan(f"{line} --json")[1])
    found["by_name"] = {f"{x['tp']}x{x['pp']}" + "e" * x["expert_parallel"]: x for x in found["layouts"]}
    return found


def best(found: dict[str, Any]) -> tuple[int, int]:
    layout = found["layouts"][found["recommended"]]
    return layout["tp"], layout["pp"]


def test_70b_does_not_fit_one_card(plan: Any) -> None:
    code, text = plan("llama-70b --gpus 1 --gpu-memory 80GB")
    assert code == 1
    assert "TP 1 x PP 1 does not fit: rank 0 needs 137.0 GiB (weights 131.4 GiB) for one sequence of 8,192 tokens" in text
    assert "and may take 71.0 GiB: 66.0 GiB too much" in text
    assert "No layout fits 1 GPU. 2 such GPUs would do: TP 2 x PP 1" in text


def test_70b_on_two_cards_fits_and_is_short_of_cache(plan: Any) -> None:
    code, text = plan("llama-70b --gpus 2 --gpu-memory 80GB --concurrency 64")
    assert code == 0 and "TP 2 x PP 1, to paste:" in text
    assert "Warning: KV cache for 2.3 sequences of 8,192 tokens of the 64 wanted" in text
    assert "Warning: KV cache for 2.3 sequences of 8,192 tokens at once" in plan("llama-70b --gpus 2 --gpu-memory 80GB")[1]
    found = layouts(plan, "llama-70b --gpus 2 --gpu-memory 80GB --concurrency 64")
    rank = found["by_name"]["2x1"]["ranks"][0]
    assert rank["weights"] == found["parameters"] + 2 * (80 * 2 + 1) * 8192 // 2, "norms are held twice"
    assert rank["kv_cache"] == found["by_name"]["2x1"]["kv_tokens"] * 80 * 2 * 4 * 128 * 2
    assert found["parameters"] == 70_553_706_496


def test_eight_l40s_without_nvlink_are_eight_stages(plan: Any) -> None:
    line = "llama-70b --gpus 8 --gpu-memory 48GB --memory-bandwidth 864GB/s --interconnect"
    code, text = plan(f"{line} pcie")
    assert code == 0 and "TP 1 x PP 8, to paste:" in text and "PP 8 over PCIe" in text
    assert "torchrun --nproc-per-node 8 -m tpserve llama-70b -tp 1 -pp 8 --max-model-len 8192" in text
    assert best(layouts(plan, f"{line} nvlink")) == (8, 1)
    found = layouts(plan, f"{line} pcie --gpus-per-node 4")
    assert best(found) == (1, 8) and [text.partition(":")[0] for text in found["why"][:2]] == [
        "PP 8 over PCIe",
        "PP 8 across nodes",
    ]


def test_405b_is_tp_inside_nodes_and_pp_across(plan: Any) -> None:
    line = "llama-405b --gpus 16 --gpus-per-node 8 --gpu-memory 80GB --context 8192 --concurrency 64"
    code, text = plan(line)
    assert code == 0 and "TP 8 inside a node" in text and "PP 2 across nodes" in text and "Warning" not in text
    assert re.search(r"TP 16 x PP 1 .* TP across nodes\n", text) and "largest stage holds 32 of 126 layers" in text
    found = layouts(plan, line)
    assert best(found) == (8, 2) and found["by_name"]["8x2"]["max_concurrency"] > 64
    assert not found["by_name"]["1x1"]["fits"] and found["by_name"]["16x1"]["crosses_nodes"]
    floors = [found["by_name"][name]["token_floor_s"] for name in ("8x2", "4x4", "1x16")]
    assert floors == pytest.approx([floors[0], 2 * floors[0], 8 * floors[0]], rel=1e-3), "stages add up"
    whole = 2 * (found["parameters"] - 128256 * 16384)
    cache = 8192 * 126 * 2 * 8 * 128 * 2
    assert floors[2] == pytest.approx((whole + cache) / 3.35e12, rel=1e-3), "all but the embedding is read once"


def test_the_lines_to_paste_start_that_layout(plan: Any) -> None:
    asked = "llama-405b --gpus 16 --gpu-memory 80GB --dtype float16 --max-num-seqs 32 --master-addr 10.0.0.1 --concurrency 2"
    found = layouts(plan, asked)
    lines = found["layouts"][found["recommended"]]["commands"]
    for node, line in enumerate(lines):
        serve, torchrun = (shlex.split(line[kind]) for kind in ("serve", "torchrun"))
        flags = parse(serve[2:])
        assert (flags.node_rank, flags.nnodes, flags.master_addr, flags.headless) == (node, 2, "10.0.0.1", node > 0)
        assert torchrun[:8] == shlex.split(f"torchrun --nnodes 2 --node_rank {node} --nproc_per_node 8 --master_addr")[:8]
        assert parse(torchrun[torchrun.index("tpserve") + 1 :], launch=False) == replace(
            flags, node_rank=0, nnodes=1, master_addr=None, headless=False
        )
        spec = model_spec(MODELS["llama-405b"], "config.json")
        config = resolve(flags, ModelFiles("m", "m"), spec, Machine(16, 8, 2, 8, 2, "serve"))
        assert (config.layout.tp, config.layout.pp, config.dtype, config.max_num_seqs) == (8, 2, "float16", 32)
        assert config.max_model_len == 8192


def test_the_longest_context_that_fits(plan: Any) -> None:
    """The lines to paste hold what was found, and hardly more would fit."""
    line = "llama-8b --gpus 2 --gpus-per-node 2 --gpu-memory 16GB"
    found = layouts(plan, f"{line} --context auto --concurrency 16")
    one = found["by_name"]["2x1"]
    length = one["ranks"][0]["max_model_len"]
    assert 2_000 < length < 131_072 and one["max_concurrency"] >= 16
    assert f"--max-model-len {length}" in one["commands"][0]["serve"]
    longer = layouts(plan, f"{line} --context {length + 256} --concurrency 16")["by_name"]["2x1"]
    assert longer["max_concurrency"] < 16
    assert best(found) == (2, 1), "TP 1 x PP 2 would hold less"
    alone = layouts(plan, "llama-70b --gpus 2 --gpu-memory 80GB --context auto")
    assert best(alone) == (2, 1) and "--max-model-len auto" in alone["by_name"]["2x1"]["commands"][0]["serve"]


def test_a_model_that_fits_one_card(plan: Any) -> None:
    code, text = plan("llama-8b --gpus 8 --gpu-memory 80GB --concurrency 16")
    assert code == 0 and "No parallelism needed: one GPU holds the model (15.0 GiB of weights in 80.0 GiB)" in text
    assert "start a server on each" in text and "torchrun --nproc-per-node 1 -m tpserve llama-8b -tp 1 -pp 1" in text
    crowded = layouts(plan, "llama-8b --gpus 8 --gpu-memory 80GB --concurrency 200")
    assert best(crowded) == (8, 1) and "One GPU holds the model, but" in crowded["why"][0]
    assert any(text.startswith("4 GPUs would hold 200 sequences") for text in crowded["why"])


def test_heads_that_do_not_divide_are_named(plan: Any) -> None:
    found = layouts(plan, "llama-13b --gpus 12 --gpus-per-node 12 --gpu-memory 8GB --context 2048")
    assert best(found) == (12, 1) and any("slowest rank holds 4 of 40 attention heads" in text for text in found["why"])
    many = layouts(plan, "llama-70b --gpus 72 --gpu-memory 80GB")["by_name"]
    assert "but the model has 64 attention heads, so that a rank would hold none" in many["72x1"]["why_not"]
    assert many["24x3"]["uneven"] == ["slowest rank holds 3 of 64 attention heads", "largest stage holds 27 of 80 layers"]


def test_experts(plan: Any) -> None:
    line = "mixtral-8x7b --gpus 2 --gpu-memory 80GB"
    found = layouts(plan, line)
    assert list(found["by_name"]) == ["1x1", "2x1", "2x1e", "1x2"] and best(found) == (2, 1)
    assert not found["layouts"][found["recommended"]]["expert_parallel"], "whole experts are no faster by themselves"
    floor_s = found["by_name"]["2x1"]["token_floor_s"]
    active = 2 * 12.7e9 / 2 / 3.35e12  # the well-known 12.9 billion active parameters, without the embedding
    assert floor_s == pytest.approx(active, rel=0.05)
    only = layouts(plan, f"{line} --enable-expert-parallel")
    assert list(only["by_name"]) == ["1x1e", "2x1e", "1x2e"]
    assert "--enable-expert-parallel" in only["by_name"]["2x1e"]["commands"][0]["serve"]
    assert "--enable-expert-parallel" not in found["by_name"]["2x1"]["commands"][0]["serve"]


def test_ranks_on_the_cpu(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights, in int8 if asked, and a cache of int8; the arithmetic of a start on the CPU."""
    line = "llama-8b --device cpu --ranks 2 --rank-memory 24GB --memory-bandwidth 40GB/s"
    code, text = plan(line)
    assert code == 0 and "2 ranks, 24.0 GiB and 40 GB/s each, shared memory" in text and "GPU" not in text
    assert "No parallelism needed: one rank holds the model (15.0 GiB of weights in 24.0 GiB)" in text
    plain, int8 = (layouts(plan, line + more)["by_name"]["1x1"] for more in ("", " -q int8-head --kv-cache-dtype int8"))
    rank = plain["ranks"][0]
    assert rank["kv_cache"] == pytest.approx(0.4 * (rank["total"] - rank["weights"] - rank["head"]), rel=0.01)
    matrices = 32 * (4096 * (4096 + 2048 + 4096) + 3 * 4096 * 14336) + 128256 * 4096
    scales = 8 * (32 * (6144 + 4096 + 2 * 14336 + 4096) + 128256)
    rest = 2 * (128256 * 4096 + 65 * 4096)
    assert int8["ranks"][0]["weights"] == matrices + scales + rest + 64 * (4 * 32 + 1)
    assert int8["ranks"][0]["kv_cache"] == int8["kv_tokens"] * 32 * 2 * 8 * (128 + 4)
    assert int8["token_floor_s"] < 0.6 * plain["token_floor_s"]
    assert " -q" not in plain["commands"][0]["serve"] and "--device cpu" in plain["commands"][0]["serve"]
    assert "--quantization int8-head" in int8["commands"][0]["serve"]
    monkeypatch.setenv("TPSERVE_ISA", "off")
    without = layouts(plan, line)["by_name"]["1x1"]["ranks"][0]
    assert without["weights"] == 2 * 8_030_261_248 < rank["weights"], "a head for each matrix"
    code, text = plan("llama-70b --device cpu --ranks 1 --rank-memory 64GB --memory-bandwidth 40GB/s")
    assert code == 1 and "the weights of rank 0 take 131.4 GiB (TP 1 x PP 1, bfloat16), and 64.0 GiB are free" in text


def test_windows_are_neither_kept_nor_read_whole(plan: Any) -> None:
    line = "gemma-27b --gpus 1 --gpu-memory 80GB --context"
    short, long = layouts(plan, f"{line} 4096"), layouts(plan, f"{line} 8192")
    assert long["parameters"] == pytest.approx(27.2e9, rel=0.01)
    cached = 2 * 16 * 128 * 2
    more_s = long["by_name"]["1x1"]["token_floor_s"] - short["by_name"]["1x1"]["token_floor_s"]
    assert more_s == pytest.approx(23 * 4096 * cached / 3.35e12, abs=2e-6), "every second layer sees 4,096 positions"
    rank, room = long["by_name"]["1x1"]["ranks"][0], long["by_name"]["1x1"]["max_concurrency"]
    assert room == pytest.approx(rank["kv_cache"] / (23 * (8192 + 4096 + 16) * cached), rel=0.01)


def test_time_to_load(plan: Any) -> None:
    line = "llama-405b --gpus 16 --gpu-memory 80GB --disk-rate 2GB/s"
    found = layouts(plan, line)
    assert found["by_name"]["8x2"]["load_floor_s"] == pytest.approx(found["parameters"] * 2 / 2 / 2e9, rel=0.01), "half a node"
    assert not found["warnings"]
    code, text = plan(f"{line} --max-start-time 120s")
    assert code == 0 and "--max-start-time 120s cannot be met: reading the weights alone takes 203 s at 2 GB/s a node" in text
    assert "that takes 3.38 GB/s" in text
    assert "cannot be met" not in plan(f"{line} --max-start-time 4min")[1]


def test_headers_say_what_the_files_hold(models: Path, plan: Any) -> None:
    tensors = {"a": np.zeros((64, 5), np.float16), "b": np.zeros(3, np.float32)}
    save_file(tensors, models / "llama-8b" / "model.safetensors")
    try:
        code, text = plan("llama-8b --gpus 1 --gpu-memory 80GB")
        assert code == 0 and "weight files: 1, 0.00 GB, F16 and F32" in text
        assert "Warning: the weight files hold 0.00 billion numbers, and config.json describes 8.03" in text
        (models / "llama-8b" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
        code, text = plan("llama-8b --gpus 1 --gpu-memory 80GB")
        assert (code, text.count("\n")) == (2, 1) and "model.safetensors has no safetensors header" in text
    finally:
        (models / "llama-8b" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("llama-8b --gpus 0 --gpu-memory 80GB", "--gpus must be at least 1, not '0'"),
        ("llama-8b --gpu-memory 80GB", "--gpus is missing: `tpserve plan MODEL --gpus 16 --gpu-memory 80GB`"),
        ("llama-8b --gpus 2", "--gpu-memory is missing"),
        ("llama-8b --gpus 2 --gpu-memory 80", "--gpu-memory must be a size with its unit, such as 80GB or 46068MiB, not '80'"),
        ("llama-8b --gpus 2 --gpu-memory 80parsecs", "not '80parsecs'"),
        ("llama-8b --gpus 2 --gpu-memory 0GB", "not '0GB'"),
        ("llama-8b --gpus 2 --gpu-memory 80GB --memory-bandwidth 3350GB", "a rate with its unit, such as 3350GB/s"),
        ("llama-8b --gpus 12 --gpu-memory 80GB", "--gpus 12 is no multiple of 8 GPUs a node"),
        ("llama-8b --gpus 8 --gpus-per-node 3 --gpu-memory 80GB", "--gpus 8 is no multiple of 3 GPUs a node"),
        ("llama-8b --gpus 2 --gpu-memory 80GB --context 200000", "--context 200000 is beyond the model's 131,072 tokens"),
        ("llama-8b --gpus 2 --gpu-memory 80GB -tp 2", "--tensor-parallel-size is a result of `tpserve plan`: leave it out"),
        (
            "llama-8b --gpus 2 --gpu-memory 80GB --max-model-len 9",
            "--max-model-len is a result of `tpserve plan`: give --con",
        ),
        ("llama-8b --gpus 2 --gpu-memory 80GB --max-start-time 9s", "--max-start-time needs the speed of the disk: give --disk"),
        ("llama-8b --gpus 2 --gpu-memory 80GB --max-start-time soon --disk-rate 2GB/s", "a time, such as 120s or 2min"),
        ("llama-8b --gpus 2 --gpu-memory 80GB --enable-expert-parallel", "but the model has no experts: leave it out"),
        (
            "llama-8b --gpus 2 --gpu-memory 80GB --device cpu",
            "--device cpu needs the bandwidth that a rank has: give --memory-band",
        ),
        (
            "llama-8b --gpus 2 --gpu-memory 80GB -q int8",
            "--quantization int8 is for the CPU, and the ranks run on GPUs: leave it",
        ),
        ("llama-8b --gpus 2 --gpu-memory 80GB --interconnect wifi", "--interconnect must be one of nvlink, pcie"),
        ("llama-8b --gpus 2 --gpu-memory 80GB --frobnicate", "unknown flag --frobnicate"),
        ("bert --gpus 2 --gpu-memory 80GB", "architecture 'BertForMaskedLM' is not supported"),
        ("nowhere --gpus 2 --gpu-memory 80GB", "no model directory nowhere"),
    ],
)
def test_nonsense_is_one_line(line: str, said: str, plan: Any) -> None:
    code, text = plan(line)
    assert (code, text.count("\n")) == (2, 1) and text.startswith("tpserve: error: ") and said in text


def test_units() -> None:
    assert [quantities.memory(text) for text in ("80GB", "80 gib", "80G", "0.5TB", "46068MiB")] == [
        80 * GIB, 80 * GIB, 80 * GIB, 512 * GIB, 46068 << 20
    ]  # fmt: skip
    assert [quantities.rate(text) for text in ("3350GB/s", "3.35TB/s", "500MB/s")] == [3350 * 10**9, 3350 * 10**9, 5 * 10**8]
    assert [quantities.duration(text) for text in ("120s", "2MIN", "120")] == [120, 120, 120]
    with pytest.raises(WrongValue):
        quantities.memory("80gb/s")


def test_graphs_and_links_are_entries_of_their_own(plan: Any) -> None:
    line = "llama-70b --gpus 4 --gpu-memory 80GB"
    by_name = layouts(plan, line)["by_name"]
    eager = layouts(plan, f"{line} --enforce-eager")["by_name"]["2x2"]["ranks"][0]
    first, *_, last = by_name["2x2"]["ranks"]
    assert eager["graphs"] == 0 < first["graphs"] < last["graphs"], "the last stage keeps logits"
    assert eager["kv_cache"] - first["kv_cache"] == pytest.approx(last["graphs"], rel=0.01), "the fullest rank decides"
    buffers, sent = 128 << 20, 8192 * 8192 * 2
    assert by_name["4x1"]["ranks"][0]["communication"] == buffers
    assert (first["communication"], last["communication"]) == (3 * buffers + 3 * sent, 3 * buffers), "world, stage, neighbour"
    assert by_name["1x4"]["ranks"][1]["communication"] == 3 * buffers + 5 * sent, "two neighbours"
    gloo = layouts(plan, f"{line} --all-reduce gloo")["by_name"]["2x2"]["ranks"][0]
    assert gloo["communication"] == gloo["graphs"] == 0


def test_predictions_add_up(plan: Any) -> None:
    """Floors count the same bytes in another way: weights and cache, of which activations are a small part at batch 1."""
    line = "llama-70b --gpus 4 --gpu-memory 80GB"
    found = layouts(plan, line)
    one, some, many = found["predictions"]
    assert [step["batch"] for step in found["predictions"]] == [1, 32, 256]

    def work(step: Any, *names: str) -> tuple[int, int]:
        kernels = [kernel for kernel in step["kernels"] if not names or kernel["name"] in names]
        return sum(kernel["num_bytes"] for kernel in kernels), sum(kernel["flops"] for kernel in kernels)

    floor = found["by_name"]["4x1"]["token_floor_s"] * 3.35e12
    assert floor < work(one)[0] < 1.002 * floor
    matrices = found["parameters"] - 128256 * 8192
    assert work(one, "products", "LM head")[1] == pytest.approx(2 * matrices / 4, rel=1e-3)
    assert work(many)[1] == 8 * work(some)[1] == 256 * work(one)[1]
    cached = 2 * 80 * 2 * 128 * 2 * 8192
    assert work(many, "attention")[0] - work(some, "attention")[0] == pytest.approx(224 * cached, rel=0.01)
    text = plan(line)[1]
    assert "Predictions, counted and not measured: a decode step of rank 0 at 1, 32, 256 sequences of 8,192 tokens" in text
    eight = layouts(plan, "mixtral-8x7b --gpus 2 --gpu-memory 80GB")["predictions"]
    experts = 32 * 8 * 3 * 4096 * 14336 // 2 * 2
    assert work(eight[0], "experts")[0] == pytest.approx(experts / 4, rel=1e-3), "two of eight"
    assert experts < work(eight[2], "experts")[0] < 1.05 * experts, "all of them"
    assert not layouts(plan, "llama-8b --device cpu --ranks 2 --rank-memory 24GB --memory-bandwidth 40GB/s")["predictions"]


def test_the_line_of_the_tour(plan: Any) -> None:
    (line,) = re.findall(r"^tpserve plan (.*)$", (ROOT / "docs" / "tour.md").read_text(), re.M)
    assert plan(line.replace("MODEL", "llama-70b"))[0] == 0


def test_the_documented_example(plan: Any) -> None:
    page = (ROOT / "docs" / "planner.md").read_text()
    line, shown = re.findall(r"`tpserve plan (llama-405b [^`]*)`[^\n]*\n\n((?:    [^\n]*\n|\n)+)", page)[0]
    assert [text.rstrip() for text in plan(line)[1].splitlines()] == [text[4:] for text in shown.rstrip().splitlines()]


def test_help() -> None:
    with pytest.raises(HelpWanted) as wanted:
        COMMAND.parse(["--help"])
    for flag in ("--gpus N", "--gpu-memory SIZE", "--interconnect {nvlink,pcie}", "--max-start-time TIME", "--json"):
        assert f"  {flag}\n" in str(wanted.value)
