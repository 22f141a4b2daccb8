"""Keys of a file: read again when it changes, kept when it is gone."""

import logging
from pathlib import Path

import pytest

from tpserve.errors import UserError
from tpserve.frontend.api_keys import ApiKeys


def test_keys_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    path = tmp_path / "keys"
    path.write_text("# of two teams\nfirst-key  team a\n\n  second-key\n")
    keys = ApiKeys("own", str(path), lambda: now_s)
    assert keys.required and all(keys.has(key) for key in ("own", "first-key", "second-key"))
    assert not any(keys.has(key) for key in ("", "team", "#", "first-ke", "first-key ", "\udcff"))
    path.write_text("third\n")
    assert not keys.has("third"), "it was looked at just now"
    now_s = 2.0
    assert keys.has("third") and not keys.has("first-key") and keys.has("own")
    for broken in ("", "# nobody\n", None):
        path.unlink() if broken is None else path.write_text(broken)
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                now_s += 2.0
                assert keys.has("third")
    assert len(caplog.records) == 1 and "the keys of before stay" in caplog.text
    path.write_text("fourth")
    now_s += 2.0
    assert keys.has("fourth") and not keys.has("third")


def test_none() -> None:
    assert not ApiKeys(None, None).required and ApiKeys("k", None).required


def test_files_that_do_not_serve(tmp_path: Path) -> None:
    (empty := tmp_path / "empty").write_text("\n# nothing\n")
    (binary := tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, says in ((empty, "has no key"), (binary, "it is no text"), (tmp_path / "none", "No such file")):
        with pytest.raises(UserError, match=says):
            ApiKeys(None, str(path))
