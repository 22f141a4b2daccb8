"""What the environment and the machine say."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from tpserve.config import env
from tpserve.errors import UserError
from tpserve.host import resources
from tpserve.host.resources import Memory

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": "/tmp/e",
}  # fmt: skip


def test_calm_threads_leaves_the_users_choice() -> None:
    for given, then in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        environ: dict[str, str] = dict(given)
        env.set_omp_spin(environ)
        assert environ.get("GOMP_SPINCOUNT") == then


def test_a_rank_of_torchrun() -> None:
    rank = env.rank_env(TORCHRUN)
    assert (rank.rank, rank.world_size, rank.local_rank, rank.node_rank, rank.nnodes) == (5, 8, 1, 1, 2)
    assert (rank.master_addr, rank.master_port, rank.run_id, rank.use_agent_store) == ("10.0.0.1", 29500, "job", True)
    assert rank.runtime_dir is None and rank.error_file == "/tmp/e"


def test_nodes_are_counted_when_torchrun_does_not_say() -> None:
    rank = env.rank_env({k: v for k, v in TORCHRUN.items() if not k.startswith("GROUP")})
    assert (rank.node_rank, rank.nnodes) == (1, 2)


def test_a_rank_variable_that_is_not_torchruns() -> None:
    assert env.under_torchrun({"RANK": "0"}) and not env.under_torchrun({})
    with pytest.raises(UserError, match=r"WORLD_SIZE is None: start ranks with torchrun, or unset RANK"):
        env.rank_env({"RANK": "0"})


def test_overrides_keep_clear_of_kubernetes() -> None:
    found = env.overrides({"TPSERVE_PORT": "tcp://10.0.0.1:80", "TPSERVE_ARG_PORT": "9", "TPSERVE_API_KEY": "k"})
    assert found == {"port": "9", "api_key": "k"}


def test_ranks_of_serve_inherit_neither_flags_nor_the_key() -> None:
    given = {"TPSERVE_ARG_PORT": "9", "TPSERVE_API_KEY": "k", "PATH": "/bin"}
    assert env.for_ranks("/run/x", quiet=False, environ=given) == {"PATH": "/bin", "TPSERVE_RUNTIME_DIR": "/run/x"}
    assert env.for_ranks("/run/x", quiet=True, environ={})["TORCH_CPP_LOG_LEVEL"] == "ERROR"


@pytest.mark.parametrize(
    ("chosen", "count"), [(None, 4), ("", 0), ("0,2", 2), ("1,9,2", 1), ("-1,2", 0), ("GPU-1b2,GPU-3c4", 2), ("0,", 1)]
)
def test_visible_gpus(chosen: str | None, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    devices = [tmp_path / f"0000:0{i}:00.0" for i in range(4)]
    monkeypatch.setattr(resources, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(resources.env, "cuda_visible_devices", lambda: chosen)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(devices))
    assert resources.visible_gpus() == count


def test_no_gpus_for_a_torch_that_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_torch_has_cuda", lambda: False)
    assert resources.visible_gpus() == 0


@pytest.mark.parametrize("files", [("cpu.max", "50000 100000"), ("cpu/cpu.cfs_quota_us", "50000")])
def test_a_control_group_grants_less(files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, text = files
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    (tmp_path / name).with_name("cpu.cfs_period_us").write_text("100000")
    (tmp_path / "memory.max").write_text(str(3 << 20))
    (tmp_path / "memory.current").write_text(str(2 << 20))
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1024\n")
    monkeypatch.setattr(resources, "_CGROUP", tmp_path)
    assert resources.available_cores() == 1
    assert resources.available_memory() == Memory((1 << 20) + 1024, 3 << 20, f"the control group ({tmp_path})")


def test_probing_imports_no_torch() -> None:
    code = "import sys, tpserve.host.resources as m; m.visible_gpus(); m.available_memory(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "on_terminal", "in_pipe"),
    [
        ({"TERM": "xterm"}, True, False), ({"TERM": "dumb"}, False, False), ({}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, False), ({"TERM": "xterm", "NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)  # fmt: skip
def test_who_gets_colors(variables: dict[str, str], on_terminal: bool, in_pipe: bool) -> None:
    assert (env.color(Terminal(), variables), env.color(io.StringIO(), variables)) == (on_terminal, in_pipe)
