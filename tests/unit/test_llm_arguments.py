"""Arguments of `LLM` and `SamplingParams`: what they mean, and the one line about wrong ones."""

import dataclasses
from typing import Any

import pytest

from tests.unit.test_config_resolve import SPEC
from tpserve import SamplingParams, UserError
from tpserve.cli import keywords
from tpserve.config.flags import Flags
from tpserve.config.resolve import resolve
from tpserve.frontend.openai.schema import CompletionRequest
from tpserve.llm.prompts import jobs
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles


def read(kwargs: dict[str, Any]) -> Flags:
    return keywords.read_kwargs(kwargs).flags


def test_keywords_are_the_flags_in_snake_case() -> None:
    flags = read(
        {"model": "m", "tensor_parallel_size": 2, "pipeline_layer_map": [3, 2], "enable_prefix_caching": False,
         "gpu_memory_utilization": 0.5, "max_model_len": None}
    )  # fmt: skip
    assert (flags.model, flags.tensor_parallel_size, flags.pipeline_layer_map) == ("m", 2, (3, 2))
    assert (flags.enable_prefix_caching, flags.gpu_memory_utilization, flags.max_model_len) == (False, 0.5, None)


def test_what_is_said_to_be_off_is_off() -> None:
    said = {
        "trust_remote_code": False,
        "quantization": None,
        "enable_lora": False,
        "kv_cache_dtype": None,
        "enforce_eager": False,
        "headless": False,
    }
    assert keywords.read_kwargs({"model": "m", **said}) == keywords.read_kwargs({"model": "m"})


def test_what_asks_for_what_holds_is_accepted_and_told_of() -> None:
    said = {"use_v2_block_manager": True, "swap_space": 0, "trust_remote_code": True, "async_scheduling": True,
            "distributed_executor_backend": "mp", "limit_mm_per_prompt": {"image": 0}}  # fmt: skip
    flags, notice = keywords.read_kwargs({"model": "m", **said})
    assert flags == read({"model": "m"})
    assert notice.startswith("these flags change nothing here: use_v2_block_manager (there is one")
    assert all(name in notice for name in said)
    assert read({"model": "m", "disable_log_stats": True, "disable_log_requests": True}) == flags


def test_keywords_by_another_name() -> None:
    flags = read({"model": "m", "tp_size": 2, "kv_cache_memory_bytes": 1 << 31, "max_model_len": "4k",
                             "disable_radix_cache": True})  # fmt: skip
    assert not flags.enable_prefix_caching
    assert (flags.tensor_parallel_size, flags.kv_cache_memory, flags.max_model_len) == (2, 2.0, 4000)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill is refused: prompts are always computed in chunks"),
        ({"tensor_paralel_size": 2}, "unknown keyword tensor_paralel_size: did you mean tensor_parallel_size?"),
        ({"lora_dtype": "x", "port": 1, "use_v2_block_manager": True}, "lora_dtype is refused: it is planned"),
        (
            {"lora_dtype": "x", "swap_space": 4},
            "lora_dtype is refused: it is planned and not supported yet: leave it out; swap_space is refused: ",
        ),
        ({"context_length": 4096}, "unknown keyword context_length: did you mean max_model_len?"),
        ({"config": "x.yaml"}, "config is only for `tpserve serve`"),
        ({"zzz": None}, "unknown keyword zzz: docs/flags.md lists them all"),
        ({"port": 8000}, "port is only for `tpserve serve`, not for LLM: leave it out"),
        ({"nnodes": 2}, "nnodes is only for `tpserve serve`"),
        ({"max_queued_requests": 9}, "max_queued_requests is only for `tpserve serve`"),
        ({"quantization": "awq"}, "quantization must be one of int8, int8-head, not 'awq'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, not '0'"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size must be no switch, not True"),
        ({"max_num_seqs": 2.5}, "max_num_seqs must be a whole number, not '2.5'"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False, not 1"),
        ({"dtype": "float64"}, "dtype must be one of auto, bfloat16, float16, float32, not 'float64'"),
        ({"data_parallel_size": 2}, "data_parallel_size=2 is not supported: start one script per replica"),
        ({"distributed_executor_backend": "ray"}, "distributed_executor_backend='ray': tpserve needs no Ray cluster"),
    ],
)
def test_wrong_keywords(said: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        read(said)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("launcher", "nodes", "line"),
    [
        ("LLM", 1, "run `LLM('m', tensor_parallel_size=2, pipeline_parallel_size=2)`"),
        ("script", 1, "run `torchrun --nproc-per-node 4 SCRIPT` with `LLM('m', tensor_parallel_size=2, "),
        ("script", 2, "run `torchrun --nnodes 2 --node_rank I --nproc_per_node 2 --master_addr HEAD SCRIPT` with `LLM("),
    ],
)
def test_a_layout_that_does_not_fit_is_told_in_python(launcher: Any, nodes: int, line: str) -> None:
    flags = read({"model": "m", "tensor_parallel_size": 2, "pipeline_parallel_size": 1})
    with pytest.raises(UserError) as error:
        resolve(flags, ModelFiles("m", "m"), SPEC, Machine(4, 4 // nodes, nodes, 0, 2, launcher))
    assert line in str(error.value)


def test_sampling_params_have_vllms_defaults() -> None:
    call = SamplingParams().call()
    assert (call.max_tokens, call.temperature, call.top_p, call.n, call.num_logprobs) == (16, 1.0, 1.0, 1, None)
    assert SamplingParams(top_k=-1, stop="x", logit_bias={3: 1.5}).call().logit_bias == {3: 1.5}


ONLY_OVER_HTTP = {"model", "prompt", "suffix", "echo", "add_special_tokens", "return_token_ids", "priority", "cache_salt",
                  "stream", "stream_options", "background", "request_id",
                  "response_format", "guided_json", "guided_regex", "guided_choice",
                  "guided_grammar", "return_tokens_as_token_ids", "truncate_prompt_tokens", "truncation_side"}  # fmt: skip


def test_sampling_params_are_the_fields_of_a_request() -> None:
    """One list in two spellings: a field that one learns the other must know, with the same default."""
    ours = {field.name for field in dataclasses.fields(SamplingParams)} - {"detokenize", "spaces_between_special_tokens"}
    assert ours == set(CompletionRequest.__struct_fields__) - ONLY_OVER_HTTP
    assert SamplingParams(max_tokens=None).call() == CompletionRequest(prompt="")


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"temprature": 1}, "unknown sampling parameter temprature: did you mean temperature?"),
        ({"use_beam_search": True}, "use_beam_search is not supported by tpserve"),
        ({"temperature": -1}, "temperature: expected `float` >= 0.0, got -1"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"n": 3, "best_of": 2}, "best_of is 2, and n 3"),
        ({"stop": ["a"], "detokenize": False}, "stop strings need detokenize=True"),
        ({"seed": 1 << 64}, "seed must fit 64 bits"),
        ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens is not supported"),
    ],
)
def test_wrong_sampling_params(said: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**said)
    assert str(error.value).startswith(line)


def test_what_a_prompt_asks_beside_its_params() -> None:
    def asked(prompts: Any, priority: Any) -> list[tuple[int, str | None]]:
        calls = [job.params.call(**job.fields) for job in jobs(prompts, SamplingParams(), priority)]
        return [(call.priority, call.cache_salt) for call in calls]

    assert asked(["a", {"prompt": "b", "cache_salt": "mine"}], [1, -2]) == [(1, None), (-2, "mine")]
    assert asked("a", 7) == [(7, None)] and asked([3, 4], None) == [(0, None)]
    with pytest.raises(UserError, match="priority must be one number or a list of 2"):
        asked(["a", "b"], [1])


def test_a_parameter_set_later_is_checked_too() -> None:
    params = SamplingParams()
    params.top_p = 2.0
    with pytest.raises(UserError, match="top_p"):
        params.call()
