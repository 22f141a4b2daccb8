"""Command lines: what they mean, and what is said about wrong ones."""

from pathlib import Path

import pytest

from tpserve.config import reference, vllm
from tpserve.config.cli import parse, to_argv
from tpserve.config.command import HelpWanted
from tpserve.config.option import OPTIONS
from tpserve.config.schema import LAUNCH
from tpserve.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_flag_list_is_frozen() -> None:
    """A new flag is a decision: it changes flags.txt, and docs/flags.md through the schema."""
    rows = [" ".join(filter(None, [*o.spellings, o.value_name(), o.default_text()])) for o in OPTIONS.values()]
    assert rows == (Path(__file__).parent / "flags.txt").read_text().splitlines()


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "flags.md").read_text()
    assert page == reference.markdown(), "run `python -m tpserve.config.reference > docs/flags.md`"


def test_the_page_for_who_comes_from_vllm_is_current() -> None:
    page = (ROOT / "docs" / "from-vllm.md").read_text()
    assert page == vllm.markdown(), "run `python -m tpserve.config.vllm > docs/from-vllm.md`"


@pytest.mark.parametrize("flag", [*vllm.ALWAYS, *vllm.INSTEAD, *vllm.PLANNED])
def test_what_is_vllms_alone_is_refused_with_what_to_do(flag: str) -> None:
    assert flag not in {spelling for option in OPTIONS.values() for spelling in option.spellings}
    for spelling in (flag, flag.replace("-", "_").replace("__", "--", 1), f"{flag}=1"):
        with pytest.raises(UserError, match=f"^{flag} is refused: .*(leave it out|use )") as refused:
            parse(["m", spelling, "1"])
        assert refused.value.param == flag
    for other in (text for text in (vllm.INSTEAD.get(flag, ""),) if text.startswith("--")):
        named = other.split()[0].rstrip(",")
        assert any(named in option.spellings for option in OPTIONS.values()), "what it points to is there"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *vllm.SHORT.items(), ("-O3", "--optimization-level"), ("-O.level", "--optimization-level"),
        ("--no-enable-chunked-prefill", "--enable-chunked-prefill"), ("--speculative-config.method", "--speculative-config"),
    ],
)  # fmt: skip
def test_other_forms_of_vllms_flags_are_refused_in_the_same_words(given: str, meant: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(["m", given, "1"])
    assert str(refused.value) == f"{given} is refused: {vllm.why_refused(meant)}"


def test_vllms_short_forms_that_are_ours() -> None:
    flags = parse(["m", "-n", "2", "-r", "1", "-ep", "-tp", "2"])
    assert (flags.nnodes, flags.node_rank, flags.enable_expert_parallel) == (2, 1, True)


def test_vllms_variables_are_told_of() -> None:
    said = vllm.means_nothing(["VLLM_HOST_IP", "VLLM_USE_V1", "VLLM_NO_USAGE_STATS"])
    assert said[0] == "VLLM_HOST_IP is set and means nothing here: use --interface, with the address"
    assert said[1].endswith(": there is one engine") and said[2].endswith(": `tpserve serve --help` lists all flags")


@pytest.mark.parametrize(
    "line",
    [
        "m --tensor-parallel-size 2 --pipeline-parallel-size 3",
        "m --tensor_parallel_size=2 --pipeline_parallel_size=3",
        "-tp 2 -pp=3 --model m",
        "m -tp 2 -pp 3 --model m",
    ],
)
def test_spellings_that_mean_the_same(line: str) -> None:
    flags = parse(line.split())
    assert (flags.model, flags.tensor_parallel_size, flags.pipeline_parallel_size) == ("m", 2, 3)


def test_a_value_keeps_its_underscores() -> None:
    assert parse(["--model=my_model", "--api_key=a_b"]).api_key == "a_b"
    assert parse(["my_model"]).model == "my_model"


def test_the_environment_is_weaker_than_the_command_line() -> None:
    overrides = {"port": "9", "model": "other", "max_num_seqs": "7", "headless": "1", "pipeline_layer_map": "3,2"}
    flags = parse(["m", "--port", "8"], overrides)
    assert (flags.model, flags.port, flags.max_num_seqs, flags.headless, flags.pipeline_layer_map) == ("m", 8, 7, True, (3, 2))


def test_a_switch_has_two_ends() -> None:
    assert parse(["m"]).enable_prefix_caching and not parse(["m", "--no_enable_prefix_caching"]).enable_prefix_caching
    assert parse(["m", "--no-enable-prefix-caching", "--enable-prefix-caching"]).enable_prefix_caching
    assert not parse(["m"], {"enable_prefix_caching": "0"}).enable_prefix_caching
    assert not parse(to_argv(parse(["m", "--no-enable-prefix-caching"]))).enable_prefix_caching
    with pytest.raises(UserError, match="did you mean --no-enable-prefix-caching"):
        parse(["m", "--no-enable-prefix-cache"])


def test_a_rank_reads_back_what_was_said() -> None:
    line = "m --served-model-name a b --pipeline-layer-map 3,2 --api-key secret --nnodes 2 --nproc-per-node 4 --port 9 --host=-x"
    argv = to_argv(parse(line.split()))
    assert "secret" not in argv and "--nnodes" not in argv
    assert argv[argv.index("--port") + 1] == "9"
    flags = parse(argv, launch=False)
    assert (flags.model, flags.served_model_name, flags.pipeline_layer_map, flags.port) == ("m", ("a", "b"), (3, 2), 9)
    assert flags.host == "-x"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("m --tensor_paralel-size 4", "unknown flag --tensor-paralel-size: did you mean --tensor-parallel-size?"),
        ("m -p 8000", "unknown flag -p"),
        ("m --frobnicate", "unknown flag --frobnicate: `tpserve serve --help` lists all flags"),
        ("m n", "unexpected argument 'n': the model is 'm' already"),
        ("m --model n", "two models given, 'm' and --model 'n'"),
        ("m --port x", "--port must be a whole number, not 'x'"),
        ("m --port", "--port: expected one argument"),
        ("m --port 65536", "--port must be at most 65535"),
        ("m -tp 0", "--tensor-parallel-size must be at least 1, not '0'"),
        ("m --gpu-memory-utilization nan", "--gpu-memory-utilization must be above 0"),
        ("m --dtype int8", "--dtype must be one of auto, bfloat16, float16, float32, not 'int8'"),
        ("m --pipeline-layer-map 3,-2", "--pipeline-layer-map must be positive numbers joined by commas"),
        ("m --model=", "--model is empty"),
        ("m --data-parallel-size 2", "--data-parallel-size 2 is not supported: start 2 servers"),
        ("m --worker-use-ray -tp 2", "run `tpserve serve m -tp 2`"),
        ("--num-gpus 2 m", "run `tpserve serve m --nproc-per-node 2`"),
        ("m --ray_address=auto -tp 8", "run `tpserve serve m -tp 8`"),
        ("m -tp 4 --distributed-executor-backend ray", "run `tpserve serve m -tp 4`"),
    ],
)
def test_wrong_lines_name_the_thing_and_the_way_out(line: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(line.split())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["mp", "auto", "external_launcher"])
def test_other_backends_are_accepted(backend: str) -> None:
    assert parse(["m", "--distributed-executor-backend", backend]).distributed_executor_backend == backend


@pytest.mark.parametrize("name", [o.name for o in OPTIONS.values() if o.about.group == LAUNCH])
def test_launch_flags_are_refused_under_torchrun(name: str) -> None:
    option = OPTIONS[name]
    with pytest.raises(UserError, match=f"{option.flag} is for `tpserve serve`"):
        parse(["m", option.flag] if option.kind is bool else ["m", option.flag, "1"], launch=False)


def test_wrong_environment_variables() -> None:
    with pytest.raises(UserError, match="TPSERVE_ARG_PORT must be a whole number, not 'x'"):
        parse(["m"], {"port": "x"})
    with pytest.raises(UserError, match="TPSERVE_ARG_PRT names no flag: did you mean --port?"):
        parse(["m"], {"prt": "1"})


def test_help_names_every_flag() -> None:
    with pytest.raises(HelpWanted) as wanted:
        parse(["--help"])
    assert all(f"  {option.spellings[0]}" in str(wanted.value) for option in OPTIONS.values())


def test_code_of_a_repository_is_refused_by_name() -> None:
    for line in ("m --trust-remote-code", "m --trust_remote_code=true"):
        with pytest.raises(UserError, match="--trust-remote-code is refused: no code of a repository is ever run"):
            parse(line.split())
