"""The pictures of docs/ are what their script draws, well-formed, without anything from elsewhere."""

from xml.etree import ElementTree

import pytest

from tests.pictures import DOCS, pictures

PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_a_committed_picture_is_current(name: str) -> None:
    drawn = PICTURES[name]
    assert (DOCS / name).read_text() == drawn, "run `python -m tests.pictures`"
    ElementTree.fromstring(drawn)
    assert "prefers-color-scheme: dark" in drawn and "href" not in drawn and len(drawn) < 20_000


def test_no_picture_is_left_over() -> None:
    pages = (DOCS.parent / "README.md").read_text() + "".join(page.read_text() for page in DOCS.glob("*.md"))
    assert {path.name for path in DOCS.glob("*.svg")} == set(PICTURES)
    assert [name for name in PICTURES if f"{name})" not in pages] == []
