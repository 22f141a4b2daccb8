"""A batch of prompts on two ranks, without a server: torchrun starts this script once for each rank.

    torchrun --nproc-per-node 2 docs/examples/offline_two_ranks.py [MODEL]

All scripts make the same calls. The prompts of rank 0 count, and every script gets the same outputs. Without torchrun,
`LLM(MODEL, tensor_parallel_size=2)` starts the two ranks itself (docs/offline.md).
"""

import os
import sys

from tpserve import LLM, SamplingParams

PROMPTS = ["Once upon a time", "In the harbour of Tidewick", "Mina the beekeeper"]

with LLM(sys.argv[1] if len(sys.argv) > 1 else None, tensor_parallel_size=2) as llm:
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=40, temperature=0.8, seed=1))
if os.environ.get("RANK", "0") == "0":
    for output in outputs:
        print(f"{output.prompt} ... {output.outputs[0].text.strip()}\n")
