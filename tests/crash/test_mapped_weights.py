"""A killed rank: its next process maps the weights that the first has packed, and every token is the same."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.server import free_port, running, serve
from tpserve import builtin
from tpserve.weights.shared_memory import only_private_is_huge
from tpserve_kernels.cpu.library import load

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip
BODY = {"prompt": [5, 6, 7], "max_tokens": 48, "temperature": 0, "ignore_eos": True, "logprobs": 1}


@pytest.mark.parametrize("flags", [(), ("--quantization", "int8")], ids=["bfloat16", "int8"])
def test_a_killed_rank_maps_its_weights(flags: tuple[str, ...], tmp_path: Path) -> None:
    if load()[0] is None:
        pytest.skip("no library of CPU kernels")
    if only_private_is_huge():
        pytest.skip("this system gives huge pages to private memory only, where weights are loaded again")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    port, answers = free_port(), []
    command = serve(
        *(str(tmp_path), "--tokenizer", str(builtin.path()), "--load-format", "dummy", "--nproc-per-node", "2"),
        *("--log-level", "debug", *flags),
        port=port,
    )
    with running([command], port, tmp_path / "log") as server:

        def ask() -> Any:
            status, answer = server.post("/v1/completions", BODY)
            assert status == 200, answer
            return answer["choices"]

        expected = ask()
        for number in range(2):  # the successor's successor maps the same memory
            asking = threading.Thread(target=lambda: answers.append(ask()))
            asking.start()
            time.sleep(0.1)
            os.kill(server.rank_pids()[1], signal.SIGKILL)
            asking.join()
            deadline_s = time.monotonic() + 30
            while server.log.count("recovered in ") <= number:  # the answer may have come before the kill
                assert time.monotonic() < deadline_s, server.log
                time.sleep(0.05)
        assert answers == [expected] * 2
        assert server.log.count("rank 1 maps the weights of the process before") == 2
        assert server.log.count("rank 0 maps") == 0
        assert server.stop() == [0]
        server.assert_nothing_left()
