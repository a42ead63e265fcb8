#!/usr/bin/env python3
"""Peers on the same GPU in the same run, at the shapes of end_to_end.py: peers.py --shapes FOLDER [--out FILE.md]

transformers' continuous batching, and vLLM where it is installed; both with random weights. A peer that is missing or fails is
named in the table with its reason. Ends with 77, a declared skip, when there was none.
"""
import argparse
import json
import os
import random
import sys
import time

STREAMS, PROMPT, NEW = 256, 512, 256


def prompts(vocab):
    return [[random.randrange(3, vocab) for _ in range(PROMPT)] for _ in range(STREAMS)]


def transformers_rate(folder):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    failures = []
    for attention in ["paged|flash_attention_2", "paged|sdpa", "sdpa_paged"]:
        try:
            with torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).eval()
            generation = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
            model.generate_batch(inputs=prompts(config.vocab_size)[:4], generation_config=generation, progress_bar=False)
            torch.cuda.synchronize()
            started = time.monotonic()
            outputs = model.generate_batch(inputs=prompts(config.vocab_size), generation_config=generation, progress_bar=False)
            seconds = time.monotonic() - started
            tokens = sum(len(output.generated_tokens) for output in outputs.values())
            if tokens:
                return tokens / seconds, attention
            failures.append(f"{attention}: no tokens")
        except Exception as problem:  # whatever a peer does wrong is its own, and the next way is tried
            failures.append(f"{attention}: {type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}")
        finally:
            model = None
            torch.cuda.empty_cache()
    raise RuntimeError("; ".join(failures))


def vllm_rate(folder):
    from vllm import LLM, SamplingParams

    config = json.load(open(os.path.join(folder, "config.json")))
    engine = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=STREAMS, max_model_len=2048, gpu_memory_utilization=0.85)
    sampling = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": ids} for ids in prompts(config["vocab_size"])]
    engine.generate(requests[:4], sampling)
    started = time.monotonic()
    outputs = engine.generate(requests, sampling)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.monotonic() - started), "defaults"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--out", default="peers.md")
    arguments = parser.parse_args()
    folder = os.path.join(arguments.shapes, "llama-3.1-8b")
    lines = ["", f"| peer, {STREAMS} streams, {PROMPT} in / {NEW} out | output tok/s | how |", "|---|---|---|"]
    measured = 0
    for name, rate in [("transformers", transformers_rate), ("vllm", vllm_rate)]:
        try:
            version = __import__(name).__version__
        except ImportError:
            lines.append(f"| {name} | not installed | |")
            continue
        try:
            value, how = rate(folder)
            lines.append(f"| {name} {version} | {value:,.0f} | {how} |")
            measured += 1
        except Exception as problem:  # as above
            lines.append(f"| {name} {version} | failed | {problem} |")
    print("\n".join(lines), flush=True)
    with open(arguments.out, "w") as file:
        file.write("\n".join(lines) + "\n")
    sys.exit(0 if measured else 77)


if __name__ == "__main__":
    main()
