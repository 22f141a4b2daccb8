"""Keys of a file: read again when it changes, kept when it is gone."""

import logging
from pathlib import Path

import pytest

from tpserve.errors import UserError
from tpserve.frontend.api_keys import NOBODY, ApiKeys, KeyLimits, KeyOwner


def test_keys_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    path = tmp_path / "keys"
    path.write_text("# of two teams\nfirst-key  team a\n\n  second-key\n")
    keys = ApiKeys("own", str(path), lambda: now_s)
    assert keys.required and all(keys.find(key) for key in ("own", "first-key", "second-key"))
    assert not any(keys.find(key) for key in ("", "team", "#", "first-ke", "first-key ", "\udcff"))
    path.write_text("third\n")
    assert not keys.find("third"), "it was looked at just now"
    now_s = 2.0
    assert keys.find("third") and not keys.find("first-key") and keys.find("own")
    for broken in ("", "# nobody\n", None):
        path.unlink() if broken is None else path.write_text(broken)
        with caplog.at_level(logging.ERROR):
            for _ in range(3):
                now_s += 2.0
                assert keys.find("third")
    assert len(caplog.records) == 1 and "the keys of before stay" in caplog.text
    path.write_text("fourth")
    now_s += 2.0
    assert keys.find("fourth") and not keys.find("third")


def test_names_and_limits(tmp_path: Path) -> None:
    now_s = 0.0
    path = tmp_path / "keys"
    path.write_text(
        "k1 name=team-a max_parallel_requests=8 tokens_per_minute=100000\n"
        "k2#x team b # name=not-this\n"
        "k3== name=c\n"
        "k4 tokens_per_minute=100000 name=team-a max_parallel_requests=8\n"
        "k5 name=d requests_per_minute=3 tokens_per_day=9 # a comment with a=b\n"
    )
    keys = ApiKeys("own", str(path), lambda: now_s)
    limits = KeyLimits(max_parallel_requests=8, tokens_per_minute=100000)
    assert keys.find("k1") == keys.find("k4") == KeyOwner("team-a", limits)
    assert keys.find("k2#x") == keys.find("own") == NOBODY and keys.find("k3==") == KeyOwner("c", KeyLimits())
    assert keys.find("k5") == KeyOwner("d", KeyLimits(requests_per_minute=3, tokens_per_day=9))
    path.write_text("k1 name=team-a max_parallel_requests=2\nown name=me")
    now_s = 2.0
    assert keys.find("k1") == KeyOwner("team-a", KeyLimits(max_parallel_requests=2)) and keys.find("k5") is None
    assert keys.find("own") == KeyOwner("me", KeyLimits()), "the file knows more of it"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("k max_parallel_requests=1", "line 2: a key with limits needs a name"),
        ("k name=a b=s3cret", "line 2: behind the key there is an unknown setting; there are name, max_parallel_requests"),
        ("k name=a tokens_per_day=0", "line 2: tokens_per_day is a whole number above 0"),
        ("k name=a tokens_per_day=1e5", "line 2: tokens_per_day is a whole number"),
        ("k name=a tokens_per_day=1234567890123456", "line 2: tokens_per_day is a whole number"),
        ("k name=", "line 2: a name is"),
        ("k name=ä", "line 2: a name is"),
        ("name=a s3cret", "line 2: the key comes first"),
        ("k name=first tokens_per_day=7", "line 2: the name first has other limits"),
    ],
)
def test_lines_that_mean_nothing(line: str, says: str, tmp_path: Path) -> None:
    (path := tmp_path / "keys").write_text(f"s3cret0 name=first\n{line}\n")
    with pytest.raises(UserError, match=says) as caught:
        ApiKeys(None, str(path))
    assert "s3cret" not in str(caught.value)


def test_none() -> None:
    assert not ApiKeys(None, None).required and ApiKeys("k", None).required


def test_files_that_do_not_serve(tmp_path: Path) -> None:
    (empty := tmp_path / "empty").write_text("\n# nothing\n")
    (binary := tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, says in ((empty, "has no key"), (binary, "it is no text"), (tmp_path / "none", "No such file")):
        with pytest.raises(UserError, match=says):
            ApiKeys(None, str(path))
