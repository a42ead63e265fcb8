#!/usr/bin/env python3
"""What this GPU reaches through the vendor's libraries, in this run: ceilings.py OUT.json

A large device-to-device copy, counting bytes read and written, and bf16 products on random data: one large and square, which is
the ceiling, and those of Llama-3.1-8B, and its attention, by the kernels that the library picks for each shape. A row's result
depends on the number of rows there, so these say what our invariant costs. Needs torch.
"""
import json
import sys

import torch

# Names and shapes as the table of kernels has them: (k, n) of the products, and (sequences, new tokens, all tokens) of attention.
PRODUCTS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate and up": (4096, 28672), "down": (14336, 4096), "head": (4096, 128256)}
ROWS = [1, 8, 64, 256, 2048]
ATTENTION = {"decode": [(1, 1, 8192), (32, 1, 8192), (256, 1, 640)], "prefill": [(8, 2048, 2048)]}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# More than the cache holds.
ROTATED_BYTES = 256 << 20


def median_seconds(run, rotations=1, repeats=7):
    """Of one run, many of which are recorded into a graph, so that they follow one another without the host."""
    runs = max(10, rotations)
    for turn in range(rotations):
        run(turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(runs):
            run(turn % rotations)
    times = []
    for _ in range(repeats + 1):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e-3 / runs)
    # The first replay warms up.
    return sorted(times[1:])[repeats // 2]


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def product_seconds(m, k, n):
    x, weights = normal(m, k), [normal(n, k) * 0.05 for _ in range(max(1, min(16, ROTATED_BYTES // (2 * k * n))))]
    return median_seconds(lambda turn: torch.nn.functional.linear(x, weights[turn]), len(weights))


def attention_seconds(sequences, new, total):
    """With keys and values side by side, not in pages."""
    queries = normal(sequences, HEADS, new, HEAD_DIM)
    keys, values = normal(sequences, KV_HEADS, total, HEAD_DIM), normal(sequences, KV_HEADS, total, HEAD_DIM)
    attend = torch.nn.functional.scaled_dot_product_attention
    return median_seconds(lambda _: attend(queries, keys, values, is_causal=new > 1, enable_gqa=True))


def main():
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median_seconds(lambda _: target.copy_(source))
    del source, target
    bf16 = 2 * 8192**3 / product_seconds(8192, 8192, 8192)
    library = {}
    for name, (k, n) in PRODUCTS.items():
        library[f"dense product, bf16, {name}"] = {f"{m} × {k} × {n}": product_seconds(m, k, n) for m in ROWS}
    for phase, shapes in ATTENTION.items():
        of_phase = library[f"attention, {phase}, bf16 cache"] = {}
        for sequences, new, total in shapes:
            try:
                of_phase[f"{sequences} × {new} new at {total}"] = attention_seconds(sequences, new, total)
            except (TypeError, RuntimeError) as problem:  # an older torch has no groups of heads; the rest is worth having
                print(f"attention is not measured: {problem}")
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes": copy,
        "bf16_flops": bf16,
        "library_seconds": library,
    }
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)
    print(f"{result['device']}: copy {copy * 1e-12:.2f} TB/s, bf16 product {bf16 * 1e-12:.0f} TFLOP/s (torch {torch.__version__})")


if __name__ == "__main__":
    main()
