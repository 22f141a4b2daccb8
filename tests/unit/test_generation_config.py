"""generation_config.json and its two flags: which defaults come of them, and the one line about what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from tpserve.cli.keywords import read_kwargs
from tpserve.cli.server_flags import parse, to_argv
from tpserve.config.generation_config import load, log_line
from tpserve.errors import UserError
from tpserve.types.sampling import SamplingDefaults

QWEN = {
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
    "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.37.0",
}  # fmt: skip


def given(directory: Path, content: Any, *arguments: str, name: str = "generation_config.json") -> tuple[Any, SamplingDefaults]:
    if content is not None:
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return load(parse(["m", *arguments]), str(directory))


def test_what_the_makers_of_a_model_say(tmp_path: Path) -> None:
    eos_ids, defaults = given(tmp_path, QWEN)
    assert eos_ids == (151645, 151643)
    assert defaults.specified() == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert log_line(defaults) == (
        "default sampling parameters from generation_config.json: temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05 "
        "(--generation-config none turns them off)"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, {}),
        ({}, {}),
        ({"max_new_tokens": 2048, "min_p": 0.1, "temperature": None}, {"max_tokens": 2048, "min_p": 0.1}),
        ({"do_sample": False, "max_new_tokens": 2048}, {"temperature": 0.0, "max_tokens": 2048}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0}),
        ({"do_sample": True}, {}),
    ],
)
def test_what_counts_as_said(content: Any, said: dict[str, Any], tmp_path: Path) -> None:
    _, defaults = given(tmp_path, content)
    assert defaults.specified() == said
    assert (log_line(defaults) is None) is not said


def test_what_is_not_supported_is_told(tmp_path: Path) -> None:
    _, defaults = given(tmp_path, {"no_repeat_ngram_size": 3, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": None})
    assert (defaults.specified(), defaults.unsupported) == ({}, ("no_repeat_ngram_size",))
    assert "generation_config.json: none; not supported and ignored: no_repeat_ngram_size (" in str(log_line(defaults))


@pytest.mark.parametrize("off", ["none", "vllm"])
def test_none_turns_the_defaults_off_and_leaves_the_ends(off: str, tmp_path: Path) -> None:
    assert given(tmp_path, QWEN, "--generation-config", off) == ((151645, 151643), SamplingDefaults())


def test_another_directory_stands_for_the_models(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "generation_config.json").write_text('{"top_k": 5, "eos_token_id": 9}')
    eos_ids, defaults = given(tmp_path, QWEN, "--generation-config", str(tmp_path / "other"))
    assert (eos_ids, defaults.specified()) == ((9,), {"top_k": 5})
    assert defaults.source == str(tmp_path / "other" / "generation_config.json")
    for wrong in ("Auto", str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match=f"--generation-config {wrong} is neither auto, nor none, nor a directory with a"):
            given(tmp_path, QWEN, "--generation-config", wrong)


def test_an_operator_overrides(tmp_path: Path) -> None:
    flag = ("--override-generation-config", '{"temperature": 0.5, "max_new_tokens": 7}')
    _, defaults = given(tmp_path, {"temperature": 0.7, "top_p": 0.8, "do_sample": False}, *flag)
    assert defaults.specified() == {"temperature": 0.5, "top_p": 0.8, "max_tokens": 7}
    assert "from generation_config.json and --override-generation-config: " in str(log_line(defaults))
    _, defaults = given(tmp_path, None, *flag, "--generation-config", "none")
    assert (defaults.specified(), defaults.source) == ({"temperature": 0.5, "max_tokens": 7}, "--override-generation-config")


def test_the_override_is_json_everywhere() -> None:
    members = {"temperature": 0.5, "top_k": 3}
    flags = parse(["m", "--override-generation-config", json.dumps(members)])
    assert flags.override_generation_config == members
    assert parse(to_argv(flags)) == flags == read_kwargs({"model": "m", "override_generation_config": members}).flags
    assert parse(["m"], {"override_generation_config": "{}"}).override_generation_config == {}
    for text in ("[]", "{x}", "0.5"):
        with pytest.raises(UserError, match="--override-generation-config must be a JSON object, such as"):
            parse(["m", "--override-generation-config", text])


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ({"eos_token_id": "</s>"}, (), "generation_config.json: field 'eos_token_id' must hold token ids, not '</s>'"),
        ({"eos_token_id": [2, None]}, ("--generation-config", "none"), "generation_config.json: field 'eos_token_id' must hold"),
        ({"eos_token_id": True}, (), "generation_config.json: field 'eos_token_id' must hold token ids, not True"),
        ({"temperature": "hot"}, (), "generation_config.json: field 'temperature': expected `float"),
        ({"top_p": 1.5}, (), "generation_config.json: field 'top_p': expected `float` <= 1.0, not 1.5"),
        ({"max_new_tokens": 0}, (), "generation_config.json: field 'max_new_tokens': expected `int` >= 1, not 0"),
        ("{", (), "generation_config.json is not valid JSON"),
        ("[]", (), "generation_config.json must hold a JSON object, not list"),
        ({}, ("--override-generation-config", '{"top_k": -2}'), "--override-generation-config: field 'top_k': expected `int`"),
        ({}, ("--override-generation-config", '{"seed": 1}'), "--override-generation-config has 'seed': known are temperature, "),
    ],
)
def test_what_is_wrong_is_named(content: Any, arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        given(tmp_path, content, *arguments)
    assert said in str(refused.value)
