"""What a server says of its checkpoint when it starts: what quantized weights become, and which tensors nobody wants.

For one rank to call, with the sources of the whole model.
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
    """Lines for the log; none about a plain checkpoint that is used whole. UserError as `unused_tensors`."""
    sources = list(sources)
    titles = dict.fromkeys(
        scheme.title for scheme in (checkpoint.stored(source).scheme for source in sources) if scheme is not PLAIN
    )
    quantized = [f"{title} weights are dequantised to {dtype}: {BYTES[dtype]} bytes a weight" for title in titles]
    left = unused_tensors(sources, checkpoint, num_layers)
    return [*quantized, left] if left else quantized


def unused_tensors(sources: Iterable[Source], checkpoint: Checkpoint, num_layers: int) -> str:
    """How many tensors no rank wants, by the modules they are of; empty when there are none.

    UserError when one lies beside a weight that is used: a bias or a scale that nobody would add; and for an LM head of other
    numbers than the embedding that config.json puts in its place, for transformers takes the head then.
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
    told = [f"{module}.* ({len(names)})" if len(names) > 1 else names[0] for module, names in largest]
    more = [f"and {len(groups) - MOST_GROUPS} more groups"] if len(groups) > MOST_GROUPS else []
    count = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
    return f"not used of the checkpoint: {count}: {', '.join(told + more)}"


def _prefixes(name: str) -> list[str]:
    """The modules that a tensor is in, from the outermost to the tensor itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
