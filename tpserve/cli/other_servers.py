"""Flags of other servers -> tpserve's equivalents, for the error about an unknown flag. Only data.

A value begins with tpserve's flag; a test checks that the flag exists. vLLM's flags are in `vllm`.
"""

_LENGTH = "--max-model-len"
_STEP = "--max-num-batched-tokens"
_SEQUENCES = "--max-num-seqs"
_TP = "--tensor-parallel-size"
_NAMES = "--served-model-name"
_SHARE = "--gpu-memory-utilization"
_DEVICE = "--device: every layer is on the GPU where one is visible"

EQUIVALENT_FLAGS = {
    # llama.cpp
    "--ctx-size": _LENGTH,
    "-c": _LENGTH,
    "-m": "--model",
    "--model-file": "--model",
    "-hf": "--model",
    "-hfr": "--model",
    "--hf-repo": "--model",
    "-a": _NAMES,
    "--alias": _NAMES,
    "-np": _SEQUENCES,
    "--parallel": _SEQUENCES,
    "-b": _STEP,
    "--batch-size": _STEP,
    "-ub": _STEP,
    "--ubatch-size": _STEP,
    "-ngl": _DEVICE,
    "--gpu-layers": _DEVICE,
    "--n-gpu-layers": _DEVICE,
    "-ts": f"{_TP}: ranks hold equal shares",
    "--tensor-split": f"{_TP}: ranks hold equal shares",
    "-sm": f"{_TP} or --pipeline-parallel-size",
    "--split-mode": f"{_TP} or --pipeline-parallel-size",
    "--chat-template-file": "--chat-template",
    "--cache-reuse": "--enable-prefix-caching, which is on by default",
    # SGLang
    "--model-path": "--model",
    "--tokenizer-path": "--tokenizer",
    "--context-length": _LENGTH,
    "--max-running-requests": _SEQUENCES,
    "--max-queued-reqs": "--max-queued-requests",
    "--chunked-prefill-size": _STEP,
    "--max-prefill-tokens": _STEP,
    "--mem-fraction-static": _SHARE,
    "--page-size": "--block-size",
    "--max-total-tokens": f"{_LENGTH} for a sequence, --kv-cache-memory for all of them",
    "--random-seed": "--seed",
    "--ep-size": "--enable-expert-parallel: the ranks of a stage share the experts",
    "--expert-parallel-size": "--enable-expert-parallel: the ranks of a stage share the experts",
    "--dist-init-addr": "--master-addr, with --master-port",
    "--dist-timeout": "--start-timeout",
    "--sampling-defaults": "--generation-config",
    "--watchdog-timeout": "--start-timeout for the start; afterwards a silent rank is noticed in seconds",
    # Text Generation Inference
    "--model-id": "--model",
    "--hostname": "--host",
    "--num-shard": _TP,
    "--sharded": _TP,
    "--max-input-tokens": _LENGTH,
    "--max-input-length": _LENGTH,
    "--max-batch-prefill-tokens": _STEP,
    "--max-batch-total-tokens": "--kv-cache-memory",
    "--max-batch-size": _SEQUENCES,
    "--max-concurrent-requests": "--max-queued-requests",
    "--cuda-memory-fraction": _SHARE,
    "--huggingface-hub-cache": "--download-dir",
    # other servers, and likely guesses
    "--gpus": f"{_TP} or --nproc-per-node, and CUDA_VISIBLE_DEVICES to choose among GPUs",
    "--num-gpus-per-node": "--nproc-per-node",
    "--gpu-memory": _SHARE,
    "--max-length": _LENGTH,
    "--max-seq-len": _LENGTH,
    "--context": _LENGTH,
    "--n-ctx": _LENGTH,
    "--num-ctx": _LENGTH,
    "--max-batch": _SEQUENCES,
    "--concurrency": _SEQUENCES,
    "--threads": "--nproc-per-node: the ranks of a node share the cores that `taskset` or a control group leaves them",
    "--bind": "--host",
    "--listen": "--host",
    "--token": "--api-key",
    "--verbose": "--log-level debug",
    "--debug": "--log-level debug",
    "--quiet": "--log-level warning",
    "--cpu": "--device cpu",
    "--precision": "--dtype",
    "--torch-dtype": "--dtype",
    "--cache-dir": "--download-dir",
}
