"""Sizes on real ranks: the context that fits, the KV cache that was asked for, and models that do not fit."""

import json
from pathlib import Path

import pytest

from tests.cluster import tiny_model
from tests.server import free_port, running, serve

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def test_auto_takes_what_fits_on_every_stage(tmp_path: Path) -> None:
    port = free_port()
    command = serve("-pp", "2", "--device", "cpu", "--max-model-len", "auto", "--num-gpu-blocks-override", "80", port=port)
    with running([command], port, tmp_path / "log", env=ONE_THREAD) as server:
        assert "max_model_len auto: 1,280 of the model's 2,048 tokens fit the KV cache" in server.log
        assert "memory of rank 0 (stage 0): " in server.log and "memory of rank 1 (stage 1): " in server.log
        assert server.get("/v1/models")[1]["data"][0]["max_model_len"] == 1280
        choice = server.complete([5] * 1270, max_tokens=10, ignore_eos=True)
        assert choice["finish_reason"] == "length", "the last position has a rope table, a slot and a block"
        assert server.post("/v1/completions", {"prompt": [5] * 1270, "max_tokens": 11})[0] == 400
        assert server.stop() == [0]


def test_a_cache_that_was_asked_for_and_cannot_hold_a_sequence(tmp_path: Path) -> None:
    port = free_port()
    command = serve("-tp", "2", "--device", "cpu", "--kv-cache-memory", "0.001", port=port)
    with running([command], port, tmp_path / "log", ready=False, env=ONE_THREAD) as server:
        assert server.wait() == [2]
        lines = server.log.splitlines()
    assert lines[-1] == (
        "tpserve: error: one sequence of 2,048 tokens (--max-model-len) needs 2.0 MiB of KV cache a rank, and --kv-cache-memory "
        f"0.001 is enough for 1,040: pass --max-model-len 1040, or --kv-cache-memory 0.01 ({lines[-1].partition('0.01 (')[2]}"
    )
    assert [line for line in lines if "ERROR memory of rank " in line and line.endswith(", KV cache 1.0 MiB")]
    assert [line for line in lines if " GiB are free of the " in line], "what is free, and what limits it"


@pytest.mark.parametrize("layout", [("-tp", "2"), ("-pp", "2")])
def test_weights_larger_than_the_machine(layout: tuple[str, str], tmp_path: Path) -> None:
    """Without the check the kernel would kill a rank half way through."""
    model = tiny_model.save(tmp_path)
    config = json.loads((model / "config.json").read_text())
    large = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 32, "num_attention_heads": 128}
    (model / "config.json").write_text(json.dumps(config | large | {"num_key_value_heads": 8}))
    port = free_port()
    command = serve(str(model), *layout, "--device", "cpu", "--load-format", "dummy", port=port)
    with running([command], port, tmp_path / "log", ready=False, env=ONE_THREAD) as server:
        assert server.wait() == [2]
        last = server.log.splitlines()[-1]
    assert last.startswith("tpserve: error: the weights of rank 0 take ") and " are free for it: pass -tp " in last, last
    assert " ranks on " in last and last.endswith(" each), or free the memory")
