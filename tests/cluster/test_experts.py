"""A mixture of experts served by real ranks, whole experts on each: answers, and what each expert had to do in /metrics."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import tiny_model
from tests.server import Server, free_port, running, torchrun

EXPERTS, ACTIVE = 5, 2
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": EXPERTS}
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": EXPERTS, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "q_lora_rank": 12,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip


def save(directory: Path, mixture: dict[str, Any]) -> str:
    """A model with such experts, and in the cache latents where it says so."""
    tiny_model.save(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **mixture, "num_experts_per_tok": ACTIVE}))
    return str(directory)


def tokens_of(server: Server) -> dict[tuple[int, int], float]:
    """By (layer, expert)."""
    status, text = server.get("/metrics")
    assert status == 200
    pattern = r'^tpserve:expert_tokens_total\{expert="(\d+)",layer="(\d+)",.*\} ([\d.e+]+)$'
    return {(int(layer), int(expert)): float(n) for expert, layer, n in re.findall(pattern, text, re.MULTILINE)}


@pytest.mark.parametrize(
    ("mixture", "flags"),
    [(MIXTRAL, ["--enable-expert-parallel"]), (MIXTRAL, ["-pp", "2"]), (DEEPSEEK, ["--enable-expert-parallel"])],
    ids=["2 ranks", "2 stages", "latents"],
)
def test_every_token_is_counted_with_its_experts(mixture: dict[str, Any], flags: list[str], tmp_path: Path) -> None:
    port, model = free_port(), save(tmp_path, mixture)
    command = torchrun(model, "--load-format", "dummy", "--served-model-name", "tiny", *flags, ranks=2, port=port)
    with running([command], port, tmp_path / "log", env={"OMP_NUM_THREADS": "1"}) as server:
        prompt, new = [7, 8, 9, 10, 11], 9
        body = {"model": "tiny", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        status, answer = server.post("/v1/completions", body)
        assert status == 200 and answer["usage"]["completion_tokens"] == new
        computed = len(prompt) + new - 1  # the last token is never fed back
        layers = range(mixture.get("first_k_dense_replace", 0), tiny_model.LAYERS)
        expected = {layer: float(ACTIVE * computed) for layer in layers}
        deadline = time.monotonic() + 10
        sums: dict[int, float] = {}
        while sums != expected and time.monotonic() < deadline:
            time.sleep(0.2)
            counts = tokens_of(server)
            sums = {layer: sum(counts.get((layer, e), 0) for e in range(EXPERTS)) for layer in layers}
        assert sums == expected, "a plan may run past the end, and no warm-up may count"
