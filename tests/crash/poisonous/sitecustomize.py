"""Loaded by every Python process of a server under test: ranks fail when a prompt begins with the words of POISON.

POISON is "how:text:after": how the rank fails (raise, exit, segv), the prompt's text, and after how many tokens of output.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

TARGET = "tpserve.worker.model_runner"
HOW, TEXT, AFTER = (os.environ.get("POISON") or "::0").split(":")


def fail() -> None:
    if HOW == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if HOW == "exit":
        os._exit(1)
    raise RuntimeError("illegal memory access")


def patch(module: ModuleType) -> None:
    """Watch the plans: which slot holds the prompt, and how far it is."""
    from tpserve.text.tokenizer import Tokenizer
    from tpserve.types.packed import unpack

    tokens = Tokenizer.load(os.environ["POISON_TOKENIZER"]).encode(TEXT)
    launch, slots = module.ModelRunner.launch, dict[int, int]()

    def watched(self: Any, plan: Any) -> Any:
        for new in plan.new_sequences:
            slots.pop(new.slot, None)
            if list(unpack(new.tokens))[: len(tokens)] == list(tokens):
                slots[new.slot] = new.prompt_len
        rows = zip(unpack(plan.slots), unpack(plan.starts), unpack(plan.counts), strict=True)
        if any(slot in slots and start + count >= slots[slot] + int(AFTER) for slot, start, count in rows):
            fail()
        return launch(self, plan)

    module.ModelRunner.launch = watched


class Finder(importlib.abc.MetaPathFinder):
    """Patches the target once it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if HOW:
    sys.meta_path.insert(0, Finder())
