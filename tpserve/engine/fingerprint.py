"""The facts that a rank sends in Hello: those that must agree on all ranks or within a stage, and those that may differ.

Reads versions, the configuration and samples of the weight files. Compares nothing: `coordinator/config_check.py` does.
"""

import hashlib
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

import msgspec
import torch

from tpserve.config.engine_config import EngineConfig
from tpserve.config.env import instruction_limits
from tpserve.config.flags import Flags
from tpserve.quant.processor import facts
from tpserve.types.messages import WEIGHTS
from tpserve.types.model_spec import ModelSpec
from tpserve.version import __version__
from tpserve.weights.checkpoint import weight_files
from tpserve.weights.content import samples

DRIVER = Path("/proc/driver/nvidia/version")


def fingerprint(config: EngineConfig, spec: ModelSpec) -> dict[str, str]:
    """Facts that must agree on all ranks: a difference would give wrong tokens or a hang."""
    agree = {
        "tpserve": __version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "llguidance": _version("llguidance"),
        "CUDA": str(torch.version.cuda),
        "model config": _digest(spec),
        **{_display_name(name): _text(value) for name, value in config.shared().items()},
    }
    if config.device == "cuda":
        agree["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if config.snapshot is not None:
        agree["--revision"] = config.snapshot.commit
    elif config.load_format != "dummy":
        directory = Path(config.model)
        found = weight_files(directory, only_safetensors=config.load_format == "safetensors")
        agree |= {f"{WEIGHTS}{name}": sample for name, sample in samples(directory, found).items()}
    return agree


def processor(device: torch.device, dtype: str, spec: ModelSpec) -> tuple[dict[str, str], dict[str, str]]:
    """Facts about the device for a model in `dtype`: those that must agree within a stage, and traits, which may differ.

    The ranks of a stage compute the same rows, and each samples and routes experts by itself.
    """
    if device.type == "cpu":
        return facts(instruction_limits(), getattr(torch, dtype), experts=spec.experts is not None)
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return {"GPU capability": capability}, {"GPU": torch.cuda.get_device_name(device), "driver": driver()}


def driver() -> str:
    """The NVIDIA driver's version; "none" without a driver, "unknown" when /proc names no version."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text())
    except OSError:
        return "none"
    return found[0] if found else "unknown"


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _display_name(field: str) -> str:
    """A flag as the user writes it; other fields as words."""
    return "--" + field.replace("_", "-") if field in Flags.__struct_fields__ else field.replace("_", " ")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
