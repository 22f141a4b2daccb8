"""One class name, one meaning: no class of the package shares its name with another one, private ones included."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_class_name_is_defined_twice() -> None:
    places = defaultdict(list)
    for root in ("tpserve", "kernels", "launch"):
        for path in sorted((ROOT / root).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert places
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not twice, twice
