"""Command lines: what they mean, and what is said about wrong ones."""

import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from tpserve.cli import flags_page, vllm, vllm_page
from tpserve.cli.command import HelpWanted
from tpserve.cli.option import OPTIONS
from tpserve.cli.other_servers import EQUIVALENT_FLAGS
from tpserve.cli.server_flags import parse, read_line, to_argv
from tpserve.config.flags import LAUNCH
from tpserve.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_flag_list_is_frozen() -> None:
    """A new flag is a decision: it changes flags.txt, and docs/flags.md through the schema."""
    rows = [" ".join(filter(None, [*o.spellings, o.value_name(), o.default_text()])) for o in OPTIONS.values()]
    assert rows == (Path(__file__).parent / "flags.txt").read_text().splitlines()


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "flags.md").read_text()
    assert page == flags_page.markdown(), "run `python -m tpserve.cli.flags_page > docs/flags.md`"


def test_the_page_for_who_comes_from_vllm_is_current() -> None:
    page = (ROOT / "docs" / "from-vllm.md").read_text()
    assert page == vllm_page.markdown(), "run `python -m tpserve.cli.vllm_page > docs/from-vllm.md`"
    assert len(vllm_page.USUAL) == 10
    assert {*vllm_page.USUAL} <= {option.flag for option in OPTIONS.values() if option.about.named_by == "vLLM"}


def sample(held: str) -> str:
    """A value that a row's `holds` means."""
    return {vllm.ANY: "7", vllm.ZEROS: '{"image": 0, "video": 0}'}.get(held, held)


def spelt(flag: str, held: str) -> list[list[str]]:
    """How `held` is given on a command line."""
    if held == vllm.ON:
        return [[flag], [flag.replace("-", "_").replace("__", "--", 1)], [f"{flag}=true"]]
    if held == vllm.OFF:
        return [[f"--no-{flag[2:]}"], [f"{flag}=false"]]
    return [[flag, held], [f"{flag}={held}"]] if held else [[flag]]


@pytest.mark.parametrize("flag", vllm.VLLM_FLAGS)
def test_each_flag_of_vllms_alone_is_accepted_for_what_holds_and_else_refused(flag: str) -> None:
    known = vllm.VLLM_FLAGS[flag]
    assert flag not in {name for option in OPTIONS.values() for name in (*option.names, *option.off_names)}
    plain = parse(["m", "-tp", "2"])
    for given in (args for held in known.accepts for args in spelt(flag, sample(held))):
        line = read_line(["m", *given, "-tp", "2"])
        assert line.flags == plain and flag[2:] in line.notice.replace("_", "-") and known.why in line.notice
    wrong = {vllm.ON, vllm.OFF} - {*known.accepts} if known.kind == "switch" else {"surely-not-that"} - {*known.accepts}
    for given in (args for value in wrong if vllm.ANY not in known.accepts for args in spelt(flag, value)):
        with pytest.raises(UserError, match=r"^--\S+ is refused: .*(leave it out|use )") as refused:
            parse(["m", *given, "-tp", "2"])
        assert refused.value.param == flag


def test_what_is_pointed_to_is_there() -> None:
    names = {name for option in OPTIONS.values() for name in (option.flag, option.off)}
    texts = [known.why for known in vllm.VLLM_FLAGS.values() if known.title == "Use instead"]
    pointed = [text.split()[0].rstrip(",:") for text in (*texts, *EQUIVALENT_FLAGS.values()) if text.startswith("--")]
    assert {*pointed, *vllm.MAPPED.values()} <= names
    assert not {*EQUIVALENT_FLAGS} & {name for option in OPTIONS.values() for name in (*option.names, *option.off_names)}


def test_a_line_of_vllms_that_asks_for_what_holds_is_told_of_once() -> None:
    line = (
        "m --use-v2-block-manager --enable-chunked-prefill --disable-log-requests --no-enable-log-requests --swap-space 0 "
        "--trust-remote-code --generation-config auto --dtype auto --distributed-executor-backend mp --api-server-count 1 -tp 2"
    )
    read = read_line(line.split())
    assert read.flags == parse(["m", "-tp", "2"])
    assert read.notice.startswith("these flags change nothing here: --use-v2-block-manager (") and "\n" not in read.notice
    assert "--swap-space 0 (" in read.notice and "--distributed-executor-backend mp (" in read.notice
    assert read_line(["m", "-tp", "2"]).notice == ""


def test_all_that_cannot_be_honoured_is_in_one_message() -> None:
    line = (
        "m --lora-dtype x --use-v2-block-manager --port x --ctx-size 4096 --enable-lora --nod-rank 1 --swap-space 4 --dtype int8"
    )
    with pytest.raises(UserError) as refused:
        parse(line.split(), {"prt": "1"})
    for said in ("--lora-dtype is refused", "--port must be", "--ctx-size: use --max-model-len", "--enable-lora is refused",
                 "--nod-rank: did you mean --node-rank", "--swap-space is refused", "--dtype must be",
                 "TPSERVE_ARG_PRT"):  # fmt: skip
        assert said in str(refused.value)
    assert "--use-v2-block-manager" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *((short, flag) for short, flag in vllm.SHORT.items() if short != "-O"), ("-O3", "--optimization-level"),
        ("-O.level", "--optimization-level"), ("--no-enable-chunked-prefill", "--enable-chunked-prefill"),
        ("--speculative-config.method", "--speculative-config"), ("--compilation-config.level", "--compilation-config"),
    ],
)  # fmt: skip
def test_other_forms_of_vllms_flags_are_refused_in_the_same_words(given: str, meant: str) -> None:
    switch = given.startswith("--no-") or vllm.VLLM_FLAGS[meant].kind == "switch"
    with pytest.raises(UserError) as refused:
        parse(["m", given, *([] if switch else ["9"])])
    assert str(refused.value).startswith(f"{given} is refused: {vllm.VLLM_FLAGS[meant].refusal()}")


@pytest.mark.parametrize(("line", "held"), [("-O0", "-O0 ("), ("-O 0", "-O 0 ("), ("-asc 1", "-asc 1 ("), ("-dpl=1", "-dpl 1 (")])
def test_short_forms_that_ask_for_what_holds(line: str, held: str) -> None:
    assert held in read_line(["m", *line.split()]).notice


def test_vllms_short_forms_that_are_ours() -> None:
    flags = parse(["m", "-n", "2", "-r", "1", "-ep", "-tp", "2"])
    assert (flags.nnodes, flags.node_rank, flags.enable_expert_parallel) == (2, 1, True)


def test_vllms_variables_are_told_of() -> None:
    said = vllm.ignored_variables(["VLLM_HOST_IP", "VLLM_USE_V1", "VLLM_NO_USAGE_STATS"])
    assert said[0] == "VLLM_HOST_IP is set and has no effect: use --interface, with the address"
    assert said[1].endswith(": there is one engine") and said[2].endswith(": `tpserve serve --help` lists all flags")


@pytest.mark.parametrize(
    "line",
    [
        "m --tensor-parallel-size 2 --pipeline-parallel-size 3",
        "m --tensor_parallel_size=2 --pipeline_parallel_size=3",
        "-tp 2 -pp=3 --model m",
        "--tp 2 --pp-size 3 m",
        "--tp-size=2 m --pp=3",
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


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500), ("1m", 10**6), ("1M", 1 << 20), ("25.6k", 25_600)],
)
def test_numbers_as_vllm_takes_them(text: str, number: int) -> None:
    flags = parse(["m", "--max-model-len", text, "--max-num-batched-tokens", text])
    assert (flags.max_model_len, flags.max_num_batched_tokens) == (number, number)
    assert parse(to_argv(flags)) == flags


@pytest.mark.parametrize(
    ("text", "said"),
    [("1.5K", "a whole number before K, which counts by 1,024 (k counts by 1,000) or auto"), ("0.0001k", "a whole number"),
     ("32kb", "a whole number"), ("k", "a whole number")],
)  # fmt: skip
def test_numbers_that_are_none(text: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"--max-model-len must be {re.escape(said)}"):
        parse(["m", "--max-model-len", text])


def test_flags_of_vllm_by_another_name() -> None:
    line = "m --shutdown-timeout 3 --max-num-queued-reqs 5 --no-numa-bind --kv-cache-memory-bytes 4G --ep -tp 2"
    flags = parse([*line.split(), "--disable-radix-cache"])
    assert (flags.drain_timeout, flags.max_queued_requests, flags.binding) == (3.0, 5, False)
    assert (flags.kv_cache_memory, flags.enable_expert_parallel, flags.enable_prefix_caching) == (4.0, True, False)
    with pytest.raises(UserError, match="--kv-cache-memory-bytes must be a whole number"):
        parse(["m", "--kv-cache-memory-bytes", "much"])


@pytest.mark.parametrize(
    ("given", "use"),
    [
        ("--ctx-size 4096", "--max-model-len"), ("-np 4", "--max-num-seqs"), ("--mem-fraction-static 0.8", "--gpu-memory-utiliz"),
        ("--n-gpu-layers 99", "--device: every layer is on the GPU"), ("--gpus 2", "--tensor-parallel-size or --nproc-per-node"),
        ("--tensor-split 1,1", "--tensor-parallel-size"), ("--context-length=9", "--max-model-len"),
        ("--model-path m", "--model"),
        ("--model-id m", "--model"), ("--num-shard 2", "--tensor-parallel-size"),
    ],
)  # fmt: skip
def test_flags_of_other_servers_name_what_does_the_same(given: str, use: str) -> None:
    flag = given.partition(" ")[0].partition("=")[0]
    with pytest.raises(UserError, match=f"^unknown flag {flag}: use {re.escape(use)}"):
        parse([*given.split(), "m"])


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


FILE = """
model: from-file
port: 1
max_model_len: 32k
served-model-name: [a, b]
enable-prefix-caching: false
pipeline-layer-map: [3, 2]
override-generation-config: {temperature: 0.5}
use-v2-block-manager: true
download-dir: null
"""


def test_the_order_of_strength(tmp_path: Path) -> None:
    """Command line before environment before file before default."""
    path = tmp_path / "serve.yaml"
    path.write_text(FILE)
    line = read_line(["--config", str(path)])
    flags = line.flags
    assert (flags.model, flags.port, flags.max_model_len, flags.served_model_name) == ("from-file", 1, 32_000, ("a", "b"))
    assert (flags.enable_prefix_caching, flags.pipeline_layer_map) == (False, (3, 2))
    assert flags.override_generation_config == {"temperature": 0.5} and flags.download_dir is None
    assert "--use-v2-block-manager (" in line.notice
    environ = {"port": "2", "max_model_len": "16", "model": "from-environment"}
    flags = parse(["--config", str(path), "--port", "3"], environ)
    assert (flags.port, flags.max_model_len, flags.model, flags.block_size) == (3, 16, "from-environment", 16)
    assert parse(["m", "--max-model-len", "8"], {"config": str(path)}).max_model_len == 8
    assert parse(["m", "--config", str(path)]).model == "m"
    assert parse(to_argv(flags)) == replace(flags, config=None), "a rank needs no file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "it is no YAML: "), ("- a", "it must hold names and values"), ("prot: 1", "unknown flag --prot: did you mean"),
        ("port: x\nlora-dtype: x", "--port must be a whole number, not 'x'"), ("config: other", "it names another file"),
        ("port: true", "--port: expected one argument"), ("lora-dtype: x\nport: x", "--lora-dtype is refused"),
    ],
)  # fmt: skip
def test_files_that_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(["m", "--config", str(path)])
    assert f"--config {path}: {said}" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="none.yaml: it cannot be read: No such file or directory"):
        parse(["m", "--config", str(tmp_path / "none.yaml")])
