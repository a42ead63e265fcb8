#!/usr/bin/env python3
"""What this GPU reaches through the vendor's libraries, in this run: ceilings.py OUT.json

A large device-to-device copy, counting bytes read and written, and bf16 products on random data: one large and square, which is
the ceiling, and those of Llama-3.1-8B, which say what the library makes of our shapes. Needs torch.
"""
import json
import sys

import torch

WIDTHS = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096), "head": (4096, 128256)}
ROWS = [1, 8, 64, 256, 2048]


def median_seconds(run, repeats=7, inner=10):
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        for _ in range(inner):
            run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e-3 / inner)
    return sorted(times)[len(times) // 2]


def product_seconds(m, k, n):
    """Weights rotate over more than the cache holds."""
    copies = max(1, min(16, (256 << 20) // (2 * k * n)))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.05 for _ in range(copies)]
    turn = iter(range(1 << 62))
    return median_seconds(lambda: torch.nn.functional.linear(x, weights[next(turn) % copies]), inner=max(10, copies))


def main():
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / median_seconds(lambda: target.copy_(source))
    del source, target
    bf16 = 2 * 8192**3 / product_seconds(8192, 8192, 8192)
    shapes = {}
    for name, (k, n) in WIDTHS.items():
        for m in ROWS:
            shapes[f"{name} {m}"] = product_seconds(m, k, n)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes": copy,
        "bf16_flops": bf16,
        "library_seconds": shapes,
    }
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)
    print(f"{result['device']}: copy {copy * 1e-12:.2f} TB/s, bf16 product {bf16 * 1e-12:.0f} TFLOP/s (torch {torch.__version__})")


if __name__ == "__main__":
    main()
