"""Packaging of tpserve: packages, dependencies, the `tpserve` command, and the library of CPU kernels where a compiler is."""

import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command import bdist_wheel, build_py, editable_wheel

ROOT = Path(__file__).resolve().parent
SOURCE = "https://github.com/tpserve/tpserve"
version: dict[str, str] = {}
exec((ROOT / "tpserve" / "version.py").read_text(), version)


sys.path.insert(0, str(ROOT / "kernels"))
import build_cpu  # noqa: E402

LIBRARY = Path("tpserve_kernels") / build_cpu.LIBRARY.name


class BuildPy(build_py.build_py):
    """Also builds the library of CPU kernels: into the package, for an editable installation beside its sources."""

    def run(self) -> None:
        super().run()
        if missing := build_cpu.build_optional(build_cpu.LIBRARY if self.editable_mode else Path(self.build_lib) / LIBRARY):
            self.warn(missing)


class BdistWheel(bdist_wheel.bdist_wheel):
    """A wheel with the library is for its platform, and for every Python: ctypes loads the library."""

    def get_tag(self) -> tuple[str, str, str]:
        library = Path(self.get_finalized_command("build_py").build_lib) / LIBRARY
        if not library.exists():
            return super().get_tag()
        self.root_is_pure = False
        machine = sysconfig.get_platform().removeprefix("linux-")
        return "py3", "none", f"manylinux_2_{max(17, build_cpu.glibc(library))}_{machine}"


class EditableWheel(editable_wheel.editable_wheel):
    """An editable installation adds two directories to `sys.path`.

    By default setuptools installs an import hook, which Python consults last. In the parent directory of a clone named tpserve,
    Python would then import the clone itself as an empty namespace package. A package on `sys.path` takes precedence.
    """

    def _select_strategy(self, name: str, tag: str, build_lib: Any) -> Any:
        return editable_wheel._StaticPth(self.distribution, name, [ROOT, ROOT / "kernels"])


setup(
    name="tpserve",
    version=version["__version__"],
    description="Serve large language models over tensor and pipeline parallel ranks, with nothing but torchrun",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=SOURCE,
    project_urls={
        "Source": SOURCE,
        "Documentation": f"{SOURCE}/tree/main/docs",
        "Changelog": f"{SOURCE}/blob/main/CHANGELOG.md",
        "Issues": f"{SOURCE}/issues",
    },
    # `make matrix` tests these versions; docs/install.md lists the results.
    python_requires=">=3.11,<3.14",
    # `kernels/` is only a folder: an installed package named `kernels` would shadow Hugging Face's.
    packages=[*find_packages(include=["tpserve", "tpserve.*"]), "tpserve_kernels", "tpserve_kernels.cpu"],
    package_dir={"tpserve_kernels": "kernels/tpserve_kernels"},
    package_data={
        "tpserve.builtin": ["model/*"],
        "tpserve": ["py.typed"],
        "tpserve.frontend.page": ["*.html", "*.css", "*.js"],
        "tpserve_kernels": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6; platform_system == 'Linux'",
        "safetensors>=0.5",
        "huggingface_hub>=1.31",
        "aiohttp>=3.14",
        "msgspec>=0.19",
        "pyzmq>=26",
        # docs/design.md, "Dependencies", gives a reason for each.
        "tokenizers>=0.21",
        "jinja2>=3.1",
        "llguidance>=1.9,<2",
        "regex>=2024.4.28",
        "uvloop>=0.20",
        "prometheus-client>=0.21",
        "pyyaml>=6",
        "rich>=13",
    ],
    extras_require={
        "otel": ["opentelemetry-sdk>=1.27", "opentelemetry-exporter-otlp-proto-http>=1.27"],  # for --otlp-traces-endpoint
        "test": [
            "pytest>=8",
            "setuptools>=77",  # builds the wheel in tests/bare; torch 2.11 wants it below 82
            "hypothesis>=6.100",
            "numpy<2.3",  # Triton 3.6's interpreter needs it below 2.3
            "transformers>=5.0",
            "openai>=1.60",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-regex",
            "jsonschema>=4.20",  # whether an answer of structured output is valid
            "kubernetes-validate>=1.36",  # the schemas of Kubernetes' resources, for launch/kubernetes
        ],
    },
    cmdclass={"bdist_wheel": BdistWheel, "build_py": BuildPy, "editable_wheel": EditableWheel},
    entry_points={"console_scripts": ["tpserve = tpserve.__main__:main"]},
)
