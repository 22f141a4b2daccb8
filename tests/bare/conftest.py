"""One wheel and one installation for all tests of this folder."""

from pathlib import Path

import pytest

from tests.bare.installation import Installation, build_wheel, install, old_compiler


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the library of CPU kernels, where the tests have a compiler: one too old for AVX-512 and for processors' names."""
    directory = tmp_path_factory.mktemp("wheel")
    return build_wheel(directory, old_compiler(directory, "avx512", "mtune"))


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return install(wheel, tmp_path_factory.mktemp("bare"))
