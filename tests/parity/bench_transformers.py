"""What transformers takes for the workload of `tpserve bench latency`, on the shape of a config.json with random weights.

    python -m tests.parity.bench_transformers DIRECTORY --batch-size 1 --input-len 512 --output-len 64

Greedy, sdpa attention, a static batch of equal lengths, in the checkpoint's dtype; as many threads as cores. Run it in turn with
`tpserve bench latency DIRECTORY --load-format dummy ...` to have both on the same machine in the same minutes.
"""

import argparse
import time
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tpserve.host.resources import available_cores


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-iters", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    config = AutoConfig.from_pretrained(options.directory)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    shape = (options.batch_size, options.input_len)

    def batch_s(num_tokens: int) -> float:
        ids = torch.randint(5, config.vocab_size - 5, shape)
        begin = time.perf_counter()
        model.generate(ids, min_new_tokens=num_tokens, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - begin

    batch_s(options.output_len)
    pairs = [(batch_s(1), batch_s(options.output_len)) for _ in range(options.num_iters)]
    prefill_s, whole_s = (median(times) for times in zip(*pairs, strict=True))
    ms_per_token = (whole_s - prefill_s) / (options.output_len - 1) * 1e3
    prefill, out = options.batch_size * options.input_len / prefill_s, options.batch_size / ms_per_token * 1e3
    print(f"prefill {prefill:.0f} tok/s, {ms_per_token:.2f} ms a step, {out:.1f} tok/s")


if __name__ == "__main__":
    main()
