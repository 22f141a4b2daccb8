"""Start-up log lines about a checkpoint: the dtype of dequantised weights, and the tensors that no rank uses.

One rank calls it, with the sources of the complete model.
"""

from collections import defaultdict
from collections.abc import Iterable

from tpserve.errors import UserError
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.quant_schemes import PLAIN
from tpserve.weights.source import Source

MOST_GROUPS = 8
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def checkpoint_notes(sources: Iterable[Source], checkpoint: Checkpoint, num_layers: int, dtype: str) -> list[str]:
    """Log lines; none for a plain checkpoint whose tensors are all used. UserError as `unused_tensors`."""
    sources = list(sources)
    titles = dict.fromkeys(
        scheme.title for scheme in (checkpoint.stored(source).scheme for source in sources) if scheme is not PLAIN
    )
    quantized = [f"{title} weights are dequantised to {dtype}: {BYTES[dtype]} bytes a weight" for title in titles]
    left = unused_tensors(sources, checkpoint, num_layers)
    return [*quantized, left] if left else quantized


def unused_tensors(sources: Iterable[Source], checkpoint: Checkpoint, num_layers: int) -> str:
    """One line that counts the unused tensors by module; empty when there are none.

    UserError when an unused tensor shares its module with a used weight (a bias or a scale that would be ignored), and when
    config.json ties the LM head to the embedding but the checkpoint has a different head, which transformers would use.
    """
    names, head = checkpoint.names, f"{checkpoint.names.head}.weight"
    silent = (*names.unused, f".{head}")
    wanted = {tensor for source in sources for tensor in checkpoint.stored(source).tensors}
    left = {name: tensor for name, tensor in checkpoint.tensors().items() if tensor not in wanted}
    if head in left and not checkpoint.equal(head, f"{names.embedding}.weight"):
        raise UserError(
            f"{checkpoint.directory} holds {left[head]} with other numbers than the embedding, which config.json ties to it: set "
            "its tie_word_embeddings to false, or leave the tensor out"
        )
    left = {name: tensor for name, tensor in left.items() if not f".{name}".endswith(silent)}
    modules = {tensor.rpartition(".")[0] for tensor in wanted}
    for name, tensor in left.items():
        layer = names.layer_of(name)
        if (layer is None or layer < num_layers) and tensor.rpartition(".")[0] in modules:
            raise UserError(
                f"{checkpoint.directory} holds tensor {tensor}, which a model with this config.json does not have: "
                "they do not belong together, or the model needs more than tpserve supports"
            )
    return _summary(set(left.values()), wanted)


def _summary(left: set[str], wanted: set[str]) -> str:
    if not left:
        return ""
    modules = {prefix for name in wanted for prefix in _prefixes(name)}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(left):
        groups[next(prefix for prefix in _prefixes(name) if prefix not in modules)].append(name)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))[:MOST_GROUPS]
    parts = [f"{module}.* ({len(names)})" if len(names) > 1 else names[0] for module, names in largest]
    more = [f"and {len(groups) - MOST_GROUPS} more groups"] if len(groups) > MOST_GROUPS else []
    count = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
    return f"not used of the checkpoint: {count}: {', '.join(parts + more)}"


def _prefixes(name: str) -> list[str]:
    """The modules that contain a tensor, from the outermost to the tensor itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
