"""The planner against a server: what it says before is what the ranks of a real start measure. And what it asks of a hub."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import tiny_model
from tests.cluster.fake_hub import FakeHub, directory
from tests.server import BIN, free_port, running, serve
from tpserve_kernels.cpu.library import load

EXPERTS = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip
LATENTS = {
    "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.5, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
SIZES = ("--device", "cpu", "--max-num-seqs", "5", "--max-num-batched-tokens", "48", "--block-size", "8")
CONTEXT = 96
WHY_NOT = load()[1]


def planned(*arguments: str, **environ: str) -> dict[str, Any]:
    command = [str(BIN / "tpserve"), "plan", *arguments, "--gpu-memory", "80GB", "--memory-bandwidth", "20GB/s", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ})
    assert done.returncode == 0, done.stderr
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


@pytest.mark.parametrize(
    ("tp", "pp", "fields", "flags"),
    [
        (2, 2, {}, ("--dtype", "float32")),
        (2, 1, EXPERTS, ("--dtype", "bfloat16", "--enable-expert-parallel")),
        (1, 2, LATENTS, ("--dtype", "float32")),
        pytest.param(
            *(2, 1, {}, ("--dtype", "bfloat16", "-q", "int8-head", "--kv-cache-dtype", "int8")),
            marks=pytest.mark.skipif(WHY_NOT != "", reason=f"no library of CPU kernels: {WHY_NOT}"),
        ),
    ],
    ids=["TP 2 x PP 2", "TP 2 with whole experts", "PP 2 with latents", "TP 2 in int8"],
)
def test_the_plan_is_what_a_start_measures(
    tp: int, pp: int, fields: dict[str, Any], flags: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny_model.save(tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5} | fields))
    without = {} if WHY_NOT == "" else {"TPSERVE_ISA": "off"}  # the planner cannot know that there is none
    plan = planned(str(model), *SIZES, *flags, "--gpus", str(tp * pp), "--context", str(CONTEXT), **without)
    (layout,) = (each for each in plan["layouts"] if (each["tp"], each["pp"]) == (tp, pp))
    port = free_port()
    command = serve(
        str(model), "-tp", str(tp), "-pp", str(pp), "--load-format", "dummy", "--max-model-len", str(CONTEXT), *SIZES, *flags,
        port=port,
    )  # fmt: skip
    with running([command], port, tmp_path / "log", env={"OMP_NUM_THREADS": "1", **without}) as server:
        ranks = [rank["memory"] for rank in server.get("/server_info")[1]["ranks"]]
        assert server.stop() == [0]
    assert len(ranks) == len(layout["ranks"]) == tp * pp
    for expected, found in zip(layout["ranks"], ranks, strict=True):
        for name in ("weights", "head", "slots", "block_size", "max_model_len"):
            assert found[name] == expected[name], name
        assert found["kv_cache"] / found["num_blocks"] == expected["kv_cache"] / expected["num_blocks"]
        assert expected["activations"] == found["activations"] == 0, "not set aside on the CPU"


def test_a_repository_is_planned_without_its_weights(tmp_path: Path) -> None:
    model = tiny_model.save(tmp_path)
    tiny_model.add_weights(model)
    files = directory(model)
    with FakeHub() as hub:
        hub.add("org/tiny", files)
        hub.sizes = {name: 3 << 50 for name in files if name.endswith(".safetensors")}  # no disk has room for them
        plan = planned("org/tiny", "--gpus", "2", "--disk-rate", "1GB/s", **hub.environ(tmp_path / "home"))
        asked = {name for _, name in hub.gets}
    assert asked == {"config.json", "model.safetensors.index.json"}
    assert plan["checkpoint"]["num_bytes"] == 6 << 50
    assert plan["layouts"][0]["load_floor_s"] == pytest.approx((6 << 50) / 1e9)
    assert "org/tiny" in plan["layouts"][0]["commands"][0]["serve"]
