"""Repository ids with real processes against a stand-in for the hub: what is downloaded, by whom, and what failures say."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import tiny_model
from tests.cluster.fake_hub import FakeHub, directory
from tests.server import Server, free_port, rank_of, running, serve, torchrun

REPOSITORY = "org/tiny"
WEIGHTS = ("model-1.safetensors", "model-2.safetensors")
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", *WEIGHTS)
FOREIGN = ("README.md", "consolidated.safetensors", "model.gguf", "onnx/model.onnx", "original/consolidated.00.pth",
           "original/params.json", "pytorch_model.bin", "tokenizer.model")  # fmt: skip
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    tiny_model.add_weights(where)
    return where


@pytest.fixture
def hub(model: Path) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.add(REPOSITORY, directory(model) | dict.fromkeys(FOREIGN, b"not to be read"))
        yield fake


def once(repository: str = REPOSITORY, times: int = 1) -> dict[tuple[str, str], int]:
    return dict.fromkeys([(repository, name) for name in NEEDED], times)


def run(hub: FakeHub, home: Path, *arguments: str, timeout_s: float = 60.0, **environ: str) -> "subprocess.CompletedProcess[str]":
    """`tpserve serve`, for starts that end by themselves."""
    return subprocess.run(
        serve(*arguments, port=free_port()), capture_output=True, text=True, timeout=timeout_s, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **hub.environ(home, **environ)},
    )  # fmt: skip


def located(hub: FakeHub, home: Path, *arguments: str, **environ: str) -> dict[str, object]:
    """What a command line comes to, without starting anything."""
    code = (
        "import sys, msgspec; from tpserve.cli.server_flags import parse; from tpserve.hub.locate import locate; "
        "sys.stdout.buffer.write(msgspec.json.encode(locate(parse(sys.argv[1:]), head=True)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, **hub.environ(home, **environ)},
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(done.stderr)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def environ(hub: FakeHub, home: Path, **more: str) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", **hub.environ(home, **more)}


def the_line(done: "subprocess.CompletedProcess[str]") -> str:
    """The last line; there must be one error, and no traceback."""
    assert "Traceback" not in done.stderr and done.stderr.count("tpserve: error: ") <= 1, done.stderr
    return done.stderr.splitlines()[-1]


def test_each_needed_file_once_and_then_offline(hub: FakeHub, tmp_path: Path) -> None:
    port = free_port()
    command = serve(REPOSITORY, "-tp", "2", port=port)
    with running([command], port, tmp_path / "1.log", env=environ(hub, tmp_path / "home")) as server:
        first = server.complete("The cat", max_tokens=8, temperature=0)
        assert server.get("/v1/models")[1]["data"][0]["id"] == REPOSITORY
        assert server.stop() == [0]
    assert hub.gets == once() and "waiting for another process" not in server.log, "only the first rank downloads"
    with running(
        [command], port, tmp_path / "2.log", env=environ(hub, tmp_path / "home", HF_HUB_OFFLINE="1", HF_ENDPOINT=NOBODY)
    ) as server:
        assert server.complete("The cat", max_tokens=8, temperature=0)["text"] == first["text"]
        assert "WARN" not in server.log
        for rank in (1, 0):  # each is told where the files are, or tells it, once more
            os.kill(next(pid for pid in server.rank_pids() if rank_of(pid) == rank), signal.SIGKILL)
            assert server.complete("The cat", max_tokens=8, temperature=0)["text"] == first["text"]
        assert server.stop() == [0]
    assert hub.gets == once()


@pytest.mark.parametrize("shared", [True, False])
def test_two_nodes_of_torchrun(shared: bool, hub: FakeHub, tmp_path: Path) -> None:
    """Two agents on this machine stand for nodes, with one cache or with one each; four ranks."""
    port, meet = free_port(), str(free_port())
    hub.slow_s = 0.05
    commands = []
    for node in range(2):
        options = ("--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", meet)
        home = tmp_path / ("home" if shared else f"home{node}")
        commands.append(["env", f"HF_HOME={home}", *torchrun(REPOSITORY, "-pp", "2", ranks=2, port=port, options=options)])
    with running(commands, port, tmp_path / "log", env=environ(hub, tmp_path)) as server:
        assert server.complete("The cat", max_tokens=4, ignore_eos=True)["finish_reason"] == "length"
        server.stop()
    assert hub.gets == once(times=1 if shared else 2) and hub.lookups[REPOSITORY] == 2, "the first rank of a node asks for all"
    assert shared or re.search(r"\[n1 r2 s1\] .* downloading org/tiny: .* GB in", server.log)


def test_two_servers_start_at_once_on_an_empty_cache(hub: FakeHub, tmp_path: Path) -> None:
    """One downloads, the other waits; the ports of both are open and tell how far it is."""
    hub.slow_s = 1.0  # until both have been seen
    ports = free_port(), free_port()
    home = environ(hub, tmp_path / "home")
    with (
        running([serve(REPOSITORY, port=ports[0])], ports[0], tmp_path / "0.log", ready=False, env=home) as one,
        running([serve(REPOSITORY, port=ports[1])], ports[1], tmp_path / "1.log", ready=False, env=home) as other,
    ):
        for server in (one, other):
            while (answer := look(server))[1]["phase"] != "waiting for rank 0: downloading org/tiny":
                assert answer[0] == 503, "the download was over before it was seen"
                time.sleep(0.02)
            assert answer[0] == 503 and server.get("/livez")[0] == 200
        hub.slow_s = 0.0
        for server in (one, other):
            server.wait_ready()
            assert server.complete("The cat", max_tokens=2, ignore_eos=True)["finish_reason"] == "length"
        assert one.stop() == other.stop() == [0]
    assert hub.gets == once()
    assert "waiting for another process that downloads org/tiny" in one.log + other.log


def look(server: Server) -> tuple[int, dict[str, str]]:
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        try:
            status, body = server.get("/readyz", 2.0)
        except OSError:
            time.sleep(0.05)
            continue
        return status, body
    raise AssertionError(server.log)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("org/closed",), {}, "org/closed is gated: accept its licence at https://huggingface.co/org/closed and set HF_TOKEN"),
        (("org/closed",), {"HF_TOKEN": "hf_other"}, "org/closed is gated: accept its licence"),
        (("org/tin",), {}, "there is no directory org/tin here and no repository org/tin at http://127.0.0.1:"),
        (("org/tin",), {}, "accept its licence at https://huggingface.co/org/tin and set HF_TOKEN"),
        ((REPOSITORY, "--revision", "v9"), {}, "org/tiny has no branch, tag or commit v9: check --revision"),
        ((REPOSITORY,), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and org/tiny at revision main is not in the cache"),
        ((REPOSITORY,), {"HF_ENDPOINT": NOBODY}, f"{NOBODY} did not give org/tiny (ConnectionRefusedError"),
        (
            ("org/old", "--load-format", "safetensors"),
            {},
            "org/old at COMMIT holds no safetensors files (it has pytorch_model.bin): name a repository that does",
        ),
        (("org/raw",), {}, "org/raw at COMMIT holds no config.json (it has m.gguf): name a repository that does"),
        ((REPOSITORY, "--tokenizer", "org/raw"), {}, "org/raw at COMMIT holds no tokenizer.json"),
        (("org/packed",), {}, "config.json: field 'quantization_config' is 'gptq', which tpserve does not support: it reads"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    arguments: tuple[str, ...], environment: dict[str, str], said: str, hub: FakeHub, model: Path, tmp_path: Path
) -> None:
    hub.add("org/closed", directory(model))
    hub.gated.add("org/closed")
    hub.add("org/old", {"config.json": (model / "config.json").read_bytes(), "pytorch_model.bin": b"x"})
    packed = json.loads((model / "config.json").read_text()) | {"quantization_config": {"bits": 4, "quant_method": "gptq"}}
    hub.add("org/packed", directory(model) | {"config.json": json.dumps(packed).encode()})
    commit = hub.add("org/raw", {"m.gguf": b"x"})
    commits = {"org/raw": commit, "org/old": hub.refs["org/old", "main"]}
    for repository, sha in commits.items():
        said = said.replace("COMMIT", sha) if repository in said else said
    done = run(hub, tmp_path / "home", *arguments, **environment)
    assert done.returncode == 2
    assert the_line(done).startswith("tpserve: error: ") and said in the_line(done) and done.stderr.count("\n") == 1, done.stderr
    assert not any(name.endswith(".safetensors") for _, name in hub.gets)


def test_files_of_torch_where_there_is_nothing_else(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    small = {name: content for name, content in directory(model).items() if "safetensors" not in name}
    parts = {"pytorch_model-1.bin": b"xy", "pytorch_model-2.bin": b"z", "training_args.bin": b"no weights"}
    hub.add("org/parts", small | parts)
    index = json.dumps({"weight_map": {"a": "pytorch_model-2.bin"}}).encode()
    hub.add("org/indexed", small | parts | {"pytorch_model.bin.index.json": index})
    hub.add("org/single", small | parts | {"pytorch_model.bin": b"1234"})
    hub.add("org/both", directory(model) | {"pytorch_model.bin": b"1234"})
    wanted = {
        "org/parts": {"pytorch_model-1.bin", "pytorch_model-2.bin"},
        "org/indexed": {"pytorch_model-2.bin"},
        "org/single": {"pytorch_model.bin"},
        "org/both": set(WEIGHTS),
    }
    for repository, names in wanted.items():
        snapshot = located(hub, tmp_path / "home", repository)["snapshot"]
        assert isinstance(snapshot, dict) and {name for name, _ in snapshot["weights"]} == names


def test_bare_torchrun_says_it_once(hub: FakeHub, tmp_path: Path) -> None:
    command = torchrun("org/tin", "-tp", "2", ranks=2, port=free_port())
    env = {**os.environ, **environ(hub, tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
    lines = [line for line in done.stderr.splitlines() if line.startswith("tpserve: error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "no repository org/tin" in lines[0], done.stderr
    assert hub.lookups["org/tin"] == 1


def test_a_token_opens_a_gated_repository(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated.add(REPOSITORY)
    assert located(hub, tmp_path, REPOSITORY, HF_TOKEN="good")["snapshot"]


def test_a_revision_and_a_cache_of_ones_own(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    old = hub.add(REPOSITORY, directory(model) | {"generation_config.json": b'{"eos_token_id": 7}'}, revision="v1")
    new = hub.refs[REPOSITORY, "main"]
    for given, commit in (("v1", old), (old, old), ("main", new)):
        found = located(hub, tmp_path / "home", REPOSITORY, "--revision", given, "--download-dir", str(tmp_path / "cache"))
        where = tmp_path / "cache" / "models--org--tiny" / "snapshots" / commit
        assert found["directory"] == found["tokenizer"] == str(where)
        assert (where / "generation_config.json").exists() is (commit == old)
    assert hub.gets[REPOSITORY, "config.json"] == 1  # the same content in both commits
    assert not (tmp_path / "home" / "hub").exists()
    rest = ("--revision", "v1", "--download-dir", str(tmp_path / "cache"), "--load-format", "dummy")
    found = located(hub, tmp_path / "home", REPOSITORY, *rest, HF_ENDPOINT=NOBODY)
    assert found["snapshot"]["commit"] == old  # type: ignore[index]


def test_a_branch_that_has_moved(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    before = located(hub, tmp_path, REPOSITORY)["directory"]
    hub.add(REPOSITORY, directory(model) | {"generation_config.json": b"{}"})
    after = located(hub, tmp_path, REPOSITORY)["directory"]
    assert before != after
    assert located(hub, tmp_path, REPOSITORY, "--load-format", "dummy", HF_HUB_OFFLINE="1")["directory"] == after


def test_a_tokenizer_and_a_template_from_elsewhere(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    files = directory(model)
    hub.add("org/words", {name: files[name] for name in ("tokenizer.json", "tokenizer_config.json")})
    hub.add("org/bare", {name: content for name, content in files.items() if not name.startswith("tokenizer")})
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    port = free_port()
    command = serve("org/bare", "--tokenizer", "org/words", "--chat-template", template, port=port)
    with running([command], port, tmp_path / "log", env=environ(hub, tmp_path / "home")) as server:
        status, body = server.post("/tokenize", {"messages": [{"role": "user", "content": "The cat"}]})
        assert status == 200, body
        assert body["tokens"] == server.post("/tokenize", {"prompt": "The cat\n", "add_special_tokens": False})[1]["tokens"]
        assert server.complete("The cat", max_tokens=2, ignore_eos=True)["finish_reason"] == "length"
        assert server.stop() == [0]
    assert ("org/words", "tokenizer.json") in hub.gets and ("org/words", "config.json") not in hub.gets


def test_of_a_tokenizer_only_what_is_read(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    """Of one kind of vocabulary its files, with what the JSON files and the templates add; at a revision of its own."""
    small = {"tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}", "added_tokens.json": b"{}"}
    templates = {"chat_template.jinja": b"a", "additional_chat_templates/rag.jinja": b"b", "additional_chat_templates/x.md": b"c"}
    kinds = {"pieces": {"tokenizer.model": b"1"}, "merges": {"vocab.json": b"2", "merges.txt": b"3", "config.json": b"4"}}
    for kind, files in kinds.items():
        commit = hub.add("org/words", {**files, **small, **templates, "qwen.tiktoken": b"5", "README.md": b"6"}, revision=kind)
        arguments = (REPOSITORY, "--tokenizer", "org/words", "--tokenizer-revision", kind, "--chat-template", "rag")
        hub.gets.clear()
        for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
            found = located(hub, tmp_path, *arguments, "--load-format", "dummy", **environment)
            assert (Path(str(found["tokenizer"])).name, found["chat_template"]) == (commit, "rag")
        read = {name for repository, name in hub.gets if repository == "org/words"}
        where = Path(str(found["tokenizer"]))
        assert {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()} == (
            {*files, *small, *templates} - {"additional_chat_templates/x.md"}
        ) and read <= {*files, *small, *templates}
    own = located(hub, tmp_path, REPOSITORY, "--tokenizer-revision", hub.refs[REPOSITORY, "main"])
    assert own["tokenizer"] == own["directory"]
    hub.add("org/others", {"config.json": b"{}", "qwen.tiktoken": b"5", "vocab.json": b"2"})
    for arguments, said in (
        ((REPOSITORY, "--tokenizer", "org/words", "--tokenizer-revision", "v9"), "commit v9: check --tokenizer-revision"),
        ((str(model), "--tokenizer-revision", "v9"), "is a directory: leave it out, or give a repository id with --tokenizer"),
        (
            (REPOSITORY, "--tokenizer", "org/others"),
            "no vocab.json with merges.txt (it has qwen.tiktoken): make a tokenizer.json",
        ),
    ):
        with pytest.raises(AssertionError, match=re.escape(said)):
            located(hub, tmp_path, *arguments)


def test_a_connection_that_breaks_is_taken_up_again(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    template = b"{# #}" * 5_000_000  # huggingface_hub writes ten million bytes at a time
    hub.add(REPOSITORY, directory(model) | {"chat_template.jinja": template})
    hub.cut["chat_template.jinja"] = 1
    found = located(hub, tmp_path, REPOSITORY)
    assert Path(str(found["directory"]), "chat_template.jinja").read_bytes() == template
    assert hub.ranges == [f"bytes={10 << 20}-"]


def test_a_download_that_never_ends_well_is_one_line_and_keeps_what_is_whole(hub: FakeHub, tmp_path: Path) -> None:
    hub.dead.add(WEIGHTS[1])
    done = run(hub, tmp_path / "home", REPOSITORY, "-tp", "2")
    assert done.returncode == 2 and "did not give model-2.safetensors of org/tiny (" in the_line(done), done.stderr
    assert all(line.startswith(("[", "tpserve: error: ")) for line in done.stderr.splitlines()), "a log that is not ours"
    for gone, said in (({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and"), ({"HF_ENDPOINT": NOBODY}, "did not give")):
        line = the_line(run(hub, tmp_path / "home", REPOSITORY, **gone))
        assert line.startswith("tpserve: error: ") and f"{said} model-2.safetensors of org/tiny" in line
    hub.dead.clear()
    code = (
        "import sys, msgspec; from tpserve.cli.server_flags import parse; from tpserve.hub import download, locate; "
        "found = locate.locate(parse(sys.argv[1:]), head=True); "
        "download.download(locate.weights_of(found.snapshot), 1.0, lambda done, total: None)"
    )
    subprocess.run([sys.executable, "-c", code, REPOSITORY], env={**os.environ, **hub.environ(tmp_path / "home")}, check=True)
    assert hub.gets.pop((REPOSITORY, WEIGHTS[1])) > 1
    assert hub.gets == {(REPOSITORY, name): 1 for name in NEEDED if name != WEIGHTS[1]}


def test_no_room(hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes[WEIGHTS[0]] = 10**15
    line = the_line(run(hub, tmp_path / "home", REPOSITORY))
    assert "org/tiny needs 1,000,000,0" in line and " bytes in " in line and " are free: make room" in line
    assert not any((REPOSITORY, name) in hub.gets for name in WEIGHTS)


def test_a_download_that_does_not_move_is_not_waited_for_for_ever(hub: FakeHub, tmp_path: Path) -> None:
    lock = tmp_path / "hub" / ".locks" / "models--org--tiny" / "tpserve.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = run(hub, tmp_path, REPOSITORY, "--start-timeout", "1")
    assert done.returncode == 1 and "nothing has arrived for 1 s: end it, or raise --start-timeout" in the_line(done)


def test_a_cache_that_cannot_be_written(hub: FakeHub, tmp_path: Path) -> None:
    """Enough when all is there; else one line. (A file in the way stands for rights, which root does not lack.)"""
    (tmp_path / "hub").write_text("")
    line = the_line(run(hub, tmp_path, REPOSITORY))
    assert "which cannot be written" in line and "--download-dir or HF_HOME" in line
    (tmp_path / "hub").unlink()
    located(hub, tmp_path, REPOSITORY)
    shutil.rmtree(tmp_path / "hub" / ".locks")
    (tmp_path / "hub" / ".locks").write_text("")
    assert located(hub, tmp_path, REPOSITORY)["snapshot"]
