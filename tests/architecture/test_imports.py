"""The table of allowed imports. A room may import the rooms named here, itself, and the packages of `EXTERNAL`; nothing else.

Also here: what a torch-free process must never load, who may read the environment, that nobody says `global`, and that
every folder of tests is run.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import run

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tpserve"

FLOOR_0 = {"types", "errors", "version"}
ALLOWED: dict[str, set[str]] = {
    # named on demand (PEP 562)
    "__init__": {"errors", "llm"},
    # floor 0
    "version": set(),
    "errors": set(),
    "types": set(),
    "builtin": set(),
    # floor 1
    "config": FLOOR_0,
    "host": {*FLOOR_0, "config"},
    "cli": {*FLOOR_0, "config"},
    "text": FLOOR_0,
    "scheduling": FLOOR_0,
    "wire": {*FLOOR_0, "config", "host"},
    "process": {*FLOOR_0, "wire"},
    "cluster": {*FLOOR_0, "config", "host", "wire"},
    "observe": FLOOR_0,
    "hub": {*FLOOR_0, "config"},
    "journal": FLOOR_0,
    # floor 2
    "structured_output": {*FLOOR_0, "text"},
    "response_template": {*FLOOR_0, "structured_output", "text"},
    "parallel": {*FLOOR_0, "config", "host", "kernels", "observe"},
    "quant": {*FLOOR_0, "kernels"},
    "coordinator": {*FLOOR_0, "observe", "process", "wire"},
    "engine_client": {*FLOOR_0, "cluster", "config", "coordinator", "observe", "process", "text", "wire"},
    "frontend": {
        *FLOOR_0,
        "config",
        "host",
        "text",
        "cluster",
        "process",
        "coordinator",
        "engine_client",
        "journal",
        "observe",
        "structured_output",
        "response_template",
    },
    # floor 3
    "attention": {*FLOOR_0, "kernels"},
    "sampler": {*FLOOR_0, "parallel", "kernels"},
    "layers": {*FLOOR_0, "parallel", "quant", "attention", "kernels"},
    "weights": {*FLOOR_0, "parallel", "quant", "observe", "config"},
    # floor 4
    "models": {*FLOOR_0, "builtin", "config", "parallel", "quant", "attention", "layers", "sampler", "weights", "kernels"},
    # floor 5
    "worker": {
        *FLOOR_0,
        "kernels",
        "config",
        "host",
        "wire",
        "process",
        "observe",
        "parallel",
        "quant",
        "attention",
        "sampler",
        "models",
        "weights",
        "structured_output",
    },
    # floor 6
    "engine": {
        *FLOOR_0,
        "kernels",
        "config",
        "host",
        "hub",
        "wire",
        "cluster",
        "process",
        "observe",
        "parallel",
        "quant",
        "scheduling",
        "models",
        "weights",
        "worker",
        "structured_output",
        "text",
    },
    # floor 7
    "bench": {
        *FLOOR_0,
        "kernels",
        "config",
        "host",
        "cli",
        "cluster",
        "hub",
        "text",
        "wire",
        "process",
        "parallel",
        "quant",
        "scheduling",
        "models",
        "weights",
        "worker",
        "llm",
    },
    "planner": {*FLOOR_0, "config", "cli", "hub", "parallel", "models", "worker"},
    "chat": {*FLOOR_0, "config", "host", "cli", "observe"},
    "completion_command": {*FLOOR_0, "cli", "config", "bench", "planner", "doctor", "admin", "chat", "template_command"},
    "admin": {*FLOOR_0, "config", "host", "cli", "observe"},
    "doctor": {
        *FLOOR_0,
        "config",
        "host",
        "cli",
        "hub",
        "coordinator",
        "observe",
        "parallel",
        "models",
        "worker",
        "engine",
        "agent",
    },
    "forkserver": {*FLOOR_0, "config", "process"},
    "agent": {*FLOOR_0, "config", "host", "cluster", "process", "observe", "forkserver"},
    "supervisor": {*FLOOR_0, "config", "host", "cli", "wire", "cluster", "process", "observe", "agent"},
    "llm": {
        *FLOOR_0,
        "config",
        "host",
        "cli",
        "hub",
        "text",
        "wire",
        "cluster",
        "coordinator",
        "engine_client",
        "frontend",
        "observe",
        "parallel",
        "models",
        "agent",
        "structured_output",
        "response_template",
    },
    "template_command": {*FLOOR_0, "builtin", "cli", "config", "hub", "response_template", "text"},
    "rank_main": {*FLOOR_0, "cli", "host", "config", "hub", "wire", "cluster", "process", "observe", "models", "engine"},
    "__main__": {
        *FLOOR_0,
        "cli",
        "host",
        "config",
        "hub",
        "wire",
        "process",
        "observe",
        "models",
        "supervisor",
        "rank_main",
        "bench",
        "planner",
        "doctor",
        "admin",
        "chat",
        "completion_command",
        "template_command",
    },
}
TORCH_FREE = [
    "frontend",
    "frontend.process",
    "coordinator.coordinator",
    "engine_client.engine_client",
    "frontend.app",
    "scheduling.scheduler",
    "models",
    "wire.channels",
    "cli.server_flags",
    "host.resources",
    "hub.locate",
    "journal.journal",
    "supervisor",
    "agent.__main__",
    "forkserver",
    "bench.command",
    "bench.serve",
    "bench.offline",
    "bench.frontend",
    "bench.floor_server",
    "bench.roofline_work",
    "planner.command",
    "doctor.command",
    "admin.status",
    "admin.report",
    "template_command",
    "chat.command",
    "completion_command",
    "rank_main",
    "__main__",
    "llm.api",
]
ENVIRONMENT_READER = PACKAGE / "config" / "env.py"
KERNELS = ROOT / "kernels" / "tpserve_kernels"
KERNELS_READER = KERNELS / "cpu" / "library.py"
"""Programs without a server need its variables, too; `ENVIRONMENT_READER` lists them."""


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            names = [f"tpserve.{alias.name}" for alias in node.names] if module == "tpserve" else [module]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "tpserve" and rest and not rest.startswith("__version__"):
                yield node.lineno, rest.split(".")[0]
            elif first == "tpserve_kernels":
                yield node.lineno, "kernels"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    tree = ast.parse(path.read_text())
    allowed = ALLOWED[room] | {room, "version"}
    breaches = [f"{path.name}:{line} {room} -> {target}" for line, target in imported_rooms(tree) if target not in allowed]
    assert not breaches, breaches


@pytest.mark.parametrize("path", [*sources(), *sorted(KERNELS.rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_global_and_one_reader_of_the_environment(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno} says global"
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}:
            assert path in (ENVIRONMENT_READER, KERNELS_READER), f"{path}:{node.lineno} touches the environment"


def test_the_list_of_variables_has_those_of_the_kernels() -> None:
    variables = set(re.findall(r"\bTPSERVE_[A-Z_]+", KERNELS_READER.read_text()))
    assert variables == {"TPSERVE_ISA", "TPSERVE_CPU_LIBRARY"}
    listed = ENVIRONMENT_READER.read_text().partition("import os")[0]
    assert all(f"\n{name} " in listed for name in variables)


def test_no_pickle_anywhere() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module if isinstance(node, ast.ImportFrom) else None
            attribute = node.attr if isinstance(node, ast.Attribute) else ""
            assert "pickle" not in [*names, module] and "broadcast_object" not in attribute, f"{path} unpickles"


def test_nothing_is_used_that_setup_does_not_require() -> None:
    """The environment of the tests has more than an installation: NumPy, transformers. tests/bare runs without them."""
    required = {
        "torch", "triton", "safetensors", "huggingface_hub", "aiohttp", "msgspec", "zmq", "tokenizers", "jinja2", "uvloop",
        "llguidance", "regex",
        "prometheus_client", "rich", "yaml", "opentelemetry",
    }  # fmt: skip
    for path in [*sources(), *(ROOT / "kernels").rglob("*.py")]:
        if path == PACKAGE / "builtin" / "train.py":  # `make model`, in the environment of the tests
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.partition(".")[0] for name in names}
            unknown = tops - required - sys.stdlib_module_names - {"tpserve", "tpserve_kernels"}
            assert not unknown, f"{path} imports {unknown}"
            attribute = node.attr if isinstance(node, ast.Attribute) else ""
            assert attribute not in {"numpy", "from_numpy", "__array__"}, f"{path}:{getattr(node, 'lineno', 0)} needs NumPy"


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, tpserve; print(*(m for m in sys.modules if m.startswith('tpserve.') or m in ('torch', 'msgspec')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["tpserve.version"]


def test_one_room_asks_the_hub() -> None:
    importers = {
        room_of(path)
        for path in sources()
        if "import huggingface_hub" in (text := path.read_text()) or "from huggingface_hub" in text
    }
    assert importers == {"hub"}
    code = "import sys, tpserve.__main__; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "a start from a directory needs no huggingface_hub"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_free(module: str) -> None:
    code = f"import sys, tpserve.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, f"import tpserve.{module} loads torch"


def test_kernels_know_only_torch_and_triton() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        rooms = {target for _, target in imported_rooms(ast.parse(path.read_text()))}
        assert rooms <= {"kernels"}, f"{path} imports the server"


def test_test_modules_have_names_of_their_own() -> None:
    """pytest imports them by their bare names when it runs them all at once."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_folder_of_tests_has_a_share_of_25_minutes() -> None:
    tests = ROOT / "tests"
    folders = {path.relative_to(tests).parts[0] for path in tests.rglob("test_*.py")}
    shares = [folder for _, folders in run.SHARES.values() for folder in folders]
    assert sorted([*shares, "gpu", "clients", "browser"]) == sorted(folders)
    computing = sum(run.SHARES[name][0] for name in run.COMPUTING)
    others = sum(budget_s for name, (budget_s, _) in run.SHARES.items() if name not in run.COMPUTING)
    assert run.INSTALL_S + max(computing, others) <= 25 * 60 + 150


def test_every_test_for_a_card_has_a_share() -> None:
    """And the mark by which it is chosen there, so that none is skipped on every machine."""
    shares = [ROOT / path for paths in run.GPU.values() for path in paths]
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        if path != Path(__file__) and ("cuda.is_available" in text or "mark.gpu" in text):
            assert "mark.gpu" in text, f"{path} needs a card and has no mark"
            assert any(share in (path, *path.parents) for share in shares), f"{path} is in no share of run.GPU"
    held = set((ROOT / "tests" / "gpu").glob("test_*.py"))
    assert held <= set(shares), held - set(shares)


def test_the_shares_of_a_card_are_collected_without_one() -> None:
    """Types and signatures of these modules are mypy's work (pyproject.toml)."""
    paths = [path for share in run.GPU.values() for path in share]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert {path for path in paths if path.endswith(".py")} <= collected, done.stdout


def test_types_are_checked_of_what_needs_a_card() -> None:
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert {"tests/gpu", "tests/kernels"} <= set(checked)
