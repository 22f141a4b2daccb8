"""A mixture of experts served by real ranks, whole experts on each: answers, and what each expert had to do in /metrics."""

import json
import re
import time
from pathlib import Path

import pytest

from tests.cluster import tiny_model
from tests.server import Server, free_port, running, torchrun

EXPERTS, ACTIVE = 5, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tiny_model.save(tmp_path_factory.mktemp("mixture"))
    config = json.loads((directory / "config.json").read_text())
    mixture = {"architectures": ["MixtralForCausalLM"], "num_local_experts": EXPERTS, "num_experts_per_tok": ACTIVE}
    (directory / "config.json").write_text(json.dumps({**config, **mixture}))
    return str(directory)


def tokens_of(server: Server) -> dict[tuple[int, int], float]:
    """By (layer, expert)."""
    status, text = server.get("/metrics")
    assert status == 200
    pattern = r'^tpserve:expert_tokens_total\{expert="(\d+)",layer="(\d+)",.*\} ([\d.e+]+)$'
    return {(int(layer), int(expert)): float(n) for expert, layer, n in re.findall(pattern, text, re.MULTILINE)}


@pytest.mark.parametrize(("ranks", "flags"), [(2, ["--enable-expert-parallel"]), (2, ["-pp", "2"])], ids=["2 ranks", "2 stages"])
def test_every_token_is_counted_with_its_experts(model: str, ranks: int, flags: list[str], tmp_path: Path) -> None:
    port = free_port()
    command = torchrun(model, "--load-format", "dummy", "--served-model-name", "tiny", *flags, ranks=ranks, port=port)
    with running([command], port, tmp_path / "log", env={"OMP_NUM_THREADS": "1"}) as server:
        prompt, new = [7, 8, 9, 10, 11], 9
        body = {"model": "tiny", "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
        status, answer = server.post("/v1/completions", body)
        assert status == 200 and answer["usage"]["completion_tokens"] == new
        computed = len(prompt) + new - 1  # the last token is never fed back
        expected = {layer: float(ACTIVE * computed) for layer in range(tiny_model.LAYERS)}
        deadline = time.monotonic() + 10
        sums: dict[int, float] = {}
        while sums != expected and time.monotonic() < deadline:
            time.sleep(0.2)
            counts = tokens_of(server)
            sums = {layer: sum(counts.get((layer, e), 0) for e in range(EXPERTS)) for layer in range(tiny_model.LAYERS)}
        assert sums == expected, "a plan may run past the end, and no warm-up may count"
