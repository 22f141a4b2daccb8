"""Repository ids without a network: which names are which, how far a download is, what the ranks of a node tell one another."""

import os
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

from tpserve.cli.server_flags import parse
from tpserve.cluster.local_leader import LocalLeader, ask_local_leader
from tpserve.config import env
from tpserve.errors import EngineFailure, UserError
from tpserve.hub.cache import FileSet, cached_commit, cached_files, write_ref
from tpserve.hub.download import check_disk_space
from tpserve.hub.locate import INDICES, locate
from tpserve.hub.names import check_revision, is_repository
from tpserve.text.chat import ChatTemplate
from tpserve.types.model_files import ModelFiles, Snapshot

COMMIT = "c" * 40


def test_directories_and_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert not is_repository("org/here", "model") and not is_repository(str(tmp_path), "model")
    assert is_repository("org/there", "model") and is_repository("Org-1/A.b_c-7B", "model")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/where", "no model directory /no/where: give the path of a directory"),
        ("./model", "no model directory ./model: "),
        ("~/model", "no model directory ~/model: "),
        ("models/llama/7b", "no model directory models/llama/7b: "),
        ("llama", "no model directory llama: give the path of a directory with config.json and safetensors files, or a repo"),
        ("org/", "no model directory org/: "),
        ("https://host/org/name", "no model directory https://host/org/name: "),
        ("org/na me", "'org/na me' is neither a directory here nor a repository id: an id is ORG/NAME of letters"),
        ("org/a..b", "is neither a directory here nor a repository id"),
        ("org--x/a", "is neither a directory here nor a repository id"),
        ("org/" + "x" * 96, "is neither a directory here nor a repository id"),
        ("m.gguf", "m.gguf is a GGUF file: tpserve does not read GGUF; give the original model"),
    ],
)  # fmt: skip
def test_names_that_are_neither(name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").touch()
    with pytest.raises(UserError) as refused:
        is_repository(name, "model")
    assert said in str(refused.value) and refused.value.param == "model"


def test_revisions() -> None:
    for revision in ("main", "v1.0", "refs/pr/7", COMMIT):
        check_revision(revision, "revision")
    for revision in ("../main", "/main", "a b", "a//b", "-x"):
        with pytest.raises(UserError, match="is no branch, tag or commit"):
            check_revision(revision, "revision")


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    assert locate(parse([str(tmp_path)]), head=True) == ModelFiles(str(tmp_path), str(tmp_path))
    with pytest.raises(UserError, match="--revision v1, but .* is a directory: leave it out"):
        locate(parse([str(tmp_path), "--revision", "v1"]), head=True)


def test_a_template_is_a_file_or_itself(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("from a file{{ x }}")

    def template(given: str) -> str | None:
        return locate(parse([str(tmp_path), f"--chat-template={given}"]), head=True).chat_template

    assert template(str(tmp_path / "a.jinja")) == "from a file{{ x }}"
    for text in ("{{ messages }}", "{# " + "long " * 2000 + "#}", "a\nb"):
        assert template(text) == text
    with pytest.raises(UserError, match=r"--chat-template b\.jinja cannot be read .* give a file, the template's text"):
        template("b.jinja")
    assert ChatTemplate.load(tmp_path, {}, "{{ messages[0].content }}!").render([{"role": "user", "content": "Hi"}]) == "Hi!"
    with pytest.raises(UserError, match="--chat-template is no valid Jinja template"):
        ChatTemplate.load(tmp_path, {}, "{{ nothing")


def wanted(cache: Path, **sizes: int) -> FileSet:
    return FileSet("org/tiny", COMMIT, cache, sizes)


def test_how_far_a_download_is(tmp_path: Path) -> None:
    """Whole files and what is being written count; what an earlier process left behind does not."""
    files = wanted(tmp_path, a=100_000, b=500_000)
    assert (files.missing(), files.cached_bytes(), files.total_bytes) == (["a", "b"], 0, 600_000)
    blobs = tmp_path / "models--org--tiny" / "blobs"
    for folder in (blobs, files.directory, files.lock.parent):
        folder.mkdir(parents=True)
    (blobs / "old.incomplete").write_bytes(b"x" * 300_000)
    os.utime(blobs / "old.incomplete", (0, 0))
    files.lock.touch()
    (files.directory / "a").write_bytes(b"x" * 100_000)
    assert (files.missing(), files.cached_bytes()) == (["b"], 100_000)
    with (blobs / "new.incomplete").open("wb") as part:
        part.write(b"x" * 200_000)
        part.flush()
        os.fsync(part.fileno())
    assert 300_000 <= files.cached_bytes() < 310_000
    with (blobs / "new.incomplete").open("r+b") as part:
        part.truncate(400_000)  # reserved, and not written
    assert files.cached_bytes() < 310_000
    (files.directory / "b").write_bytes(b"")
    assert (files.missing(), files.cached_bytes()) == ([], 600_000)


def test_no_room_is_told_in_bytes(tmp_path: Path) -> None:
    check_disk_space(wanted(tmp_path, a=1))
    with pytest.raises(
        UserError, match=r"org/tiny needs 1,000,000,000,000,001 more bytes in .*, where [\d,]+ are free: make room"
    ):
        check_disk_space(wanted(tmp_path, a=10**15, b=1))


def test_what_a_revision_was(tmp_path: Path) -> None:
    assert cached_commit(tmp_path, "org/tiny", "refs/pr/1") is None and cached_commit(tmp_path, "org/tiny", COMMIT) is None
    for commit in ("d" * 40, COMMIT):
        write_ref(tmp_path, "org/tiny", "refs/pr/1", commit)
        assert cached_commit(tmp_path, "org/tiny", "refs/pr/1") == commit
    files = wanted(tmp_path)
    files.directory.mkdir(parents=True)
    (files.directory / "config.json").write_text("{}")
    assert cached_commit(tmp_path, "org/tiny", COMMIT) == COMMIT
    assert cached_files(tmp_path, "org/tiny", COMMIT).sizes == {"config.json": 2}


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"w": "../../key.safetensors"}}'])
def test_an_index_that_is_none_or_leads_elsewhere(index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = wanted(tmp_path)
    files.directory.mkdir(parents=True)
    (files.directory / "config.json").write_text("{}")
    (files.directory / INDICES[0]).write_text(index)
    with pytest.raises(UserError, match="is not an index of weight files|no file of this repository"):
        locate(parse(["org/tiny", "--revision", COMMIT, "--download-dir", str(tmp_path)]), head=False)


# The ranks of a node


def rank(local_rank: int, size: int = 3) -> env.RankEnv:
    text = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    found = env.rank_env({name: str(value) for name, value in text.items()})
    return replace(found, run_id=f"test{os.getpid()}")


FOUND = ModelFiles("/cache/c", "/cache/c", None, Snapshot("org/tiny", COMMIT, "/cache", (("a", 1),)))


def asking(model: str, *local_ranks: int) -> tuple[list[Thread], list[object]]:
    said: list[object] = []

    def one(local_rank: int) -> None:
        try:
            said.append(ask_local_leader(rank(local_rank), model, 5.0))
        except (UserError, EngineFailure) as error:
            said.append(error)

    threads = [Thread(target=one, args=(local_rank,)) for local_rank in local_ranks]
    for thread in threads:
        thread.start()
    return threads, said


def test_the_first_rank_tells_the_others_whenever_they_come() -> None:
    early, said = asking("org/tiny", 1)
    time.sleep(0.1)
    local_leader = LocalLeader(rank(0), "org/tiny")
    time.sleep(0.1)
    assert said == []
    local_leader.publish(FOUND)
    late, more = asking("org/tiny", 2)
    for thread in early + late:
        thread.join(5)
    assert said == more == [FOUND]
    again, once_more = asking("org/tiny", 1, 2, 1)
    for thread in again:
        thread.join(5)
    assert once_more == [FOUND] * 3, "ranks that were started again"
    with pytest.raises(EngineFailure, match="did not start"):
        ask_local_leader(rank(1), "org/other", 0.1)


def test_the_first_rank_tells_why_not() -> None:
    local_leader = LocalLeader(rank(0), "org/gated")
    threads, said = asking("org/gated", 1)
    time.sleep(0.1)
    local_leader.publish_error("org/gated is gated")
    for thread in threads:
        thread.join(5)
    assert [type(error) for error in said] == [UserError] and str(said[0]) == "org/gated is gated"


def test_a_first_rank_that_ends_without_a_word() -> None:
    local_leader = LocalLeader(rank(0), "org/slow")
    threads, said = asking("org/slow", 1, 2)
    time.sleep(0.1)
    local_leader._listener.close()
    for thread in threads:
        thread.join(5)
    assert [type(error) for error in said] == [EngineFailure] * 2
    with pytest.raises(EngineFailure, match=r"did not start within 0\.1 s"):
        ask_local_leader(rank(1), "org/slow", 0.1)
