#!/usr/bin/env python3
"""The server on a GPU, end to end over HTTP: end_to_end.py --server OUTRIGGER --shapes FOLDER [--ceilings FILE] [--out FILE.md]

Dummy weights in the shapes of real models, prompts of random token ids, answers without streaming, so that the client costs
nothing. Each figure stands beside its limit by the ceilings of the same run. First of all it checks the invariant: seeded
requests alone, and again in the midst of a load, must give the same ids and the same log-probabilities. Ends with 1 when that
fails. Python's standard library alone; `--tiny` is the rehearsal on the emulator.
"""
import argparse
import concurrent.futures
import http.client
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time

START_SECONDS = 120
# The packed tokenizer has so many; prompts keep to them, whatever the model's vocabulary.
PROMPT_IDS = 320
LIMITS = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}


class Shape:
    """A model's configuration, and what follows from it."""

    def __init__(self, folder):
        self.folder = folder
        c = self.config = json.load(open(os.path.join(folder, "config.json")))
        hidden, layers, vocab = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        head_dim = c.get("head_dim", hidden // heads)
        attention = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
        layer = attention + 3 * hidden * c["intermediate_size"]
        # What a token is multiplied with: the layers and the head; the embedding is only looked up.
        self.multiplied = layers * layer + hidden * vocab
        self.parameters = self.multiplied + (0 if c["tie_word_embeddings"] else hidden * vocab)
        self.weight_bytes = 2 * self.parameters
        self.kv_bytes_per_token = 2 * 2 * layers * kv_heads * head_dim


class Server:
    def __init__(self, arguments, shape, **keys):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        keys = {"port": self.port, "device": arguments.device, "load_format": "dummy", "shutdown_timeout": "1s", **keys}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]
        self.log = open(os.path.join(os.path.dirname(os.path.abspath(arguments.out)), "server.log"), "ab")
        self.process = subprocess.Popen([arguments.server, "serve", shape.folder, *flags], stderr=self.log, stdout=self.log)

    def __enter__(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}; see {self.log.name}")
            try:
                if self.get("/readyz")[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"the server was not ready after {START_SECONDS} s; see {self.log.name}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def device_busy(self):
        """Seconds; 0 where processors compute."""
        found = re.search(r"^outrigger_device_busy_seconds_total (\S+)", self.get("/metrics")[1], re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def complete(self, prompt, max_tokens, **more):
        """Seconds, and the one choice."""
        body = {"model": "default", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body.update({"return_token_ids": True}, **more)
        started = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        seconds = time.monotonic() - started
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {text[:300]}")
        choice = json.loads(text)["choices"][0]
        if len(choice["token_ids"]) != max_tokens:
            raise RuntimeError(f"{len(choice['token_ids'])} tokens instead of {max_tokens}")
        return seconds, choice

    def together(self, requests):
        """Runs (prompt, max_tokens, options) all at once; seconds for all, and the choices in order."""
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            started = time.monotonic()
            futures = [pool.submit(self.complete, prompt, n, **more) for prompt, n, more in requests]
            choices = [future.result()[1] for future in futures]
            return time.monotonic() - started, choices


def prompt(length):
    return [random.randrange(3, PROMPT_IDS) for _ in range(length)]


def of_limit(value, limit):
    return "–" if limit is None else f"{limit:,.0f} | {value / limit * 100:.0f} %"


class Table:
    def __init__(self):
        self.lines = ["| end to end | figure | limit | share |", "|---|---|---|---|"]

    def row(self, what, figure, limit="– | –"):
        self.lines.append(f"| {what} | {figure} | {limit if '|' in limit else limit + ' | –'} |")
        print(self.lines[-1], flush=True)


def check_invariant(server, shape, sizes, table):
    """Alone, then among others that come and go: ids and log-probabilities are compared as they were printed."""
    def request(seed, length):
        return prompt(length), sizes["new"], {"seed": seed, "temperature": 0.9, "top_p": 0.95, "logprobs": 2}

    subjects = [request(seed, length) for seed, length in enumerate(sizes["lengths"])]
    alone = [server.complete(ids, n, **more)[1] for ids, n, more in subjects]
    others = [request(1000 + i, random.choice(sizes["lengths"])) for i in range(sizes["others"])]
    _, mixed = server.together(subjects + others)
    wrong = 0
    for index, (expected, got) in enumerate(zip(alone, mixed)):
        same = expected["token_ids"] == got["token_ids"] and expected["logprobs"] == got["logprobs"]
        wrong += not same
        if not same:
            first = next((i for i, (a, b) in enumerate(zip(expected["token_ids"], got["token_ids"])) if a != b), None)
            print(f"NOT INVARIANT: a prompt of {len(subjects[index][0])} ids; first other id at {first}", flush=True)
    table.row(f"streams that differ alone and among {sizes['others']} others", f"{wrong} of {len(subjects)}")
    return wrong == 0


def one_stream(server, shape, name, sizes, copy, table):
    """Decoding alone: what the first token takes is measured apart and taken off. The device idles when the host is late with
    the next step; what lies between the kernels of a step is the device's time."""
    def rate():
        first = server.complete(prompt(sizes["in"]), 1)[0]
        busy = server.device_busy()
        whole = server.complete(prompt(sizes["in"]), sizes["out"])[0]
        idle.append(1 - (server.device_busy() - busy) / whole)
        return (sizes["out"] - 1) / max(whole - first, 1e-6)

    idle = []
    server.complete(prompt(sizes["in"]), 8)
    rates = [rate() for _ in range(3)]
    value = statistics.median(rates)
    limit = copy / shape.weight_bytes if copy else None
    step = 1e3 / value
    table.row(f"{name}, one stream, {sizes['in']} in / {sizes['out']} out", f"{value:.1f} tok/s ({step:.2f} ms a step)", of_limit(value, limit))
    if server.device_busy():
        table.row(f"{name}, one stream, the device waits for the host", f"{statistics.median(idle) * 100:.1f} % of the time", "10 %")


def many_streams(server, shape, name, sizes, ceilings, table):
    requests = [(prompt(sizes["in"]), sizes["out"], {}) for _ in range(sizes["streams"])]
    seconds, _ = server.together(requests)
    value = sizes["streams"] * sizes["out"] / seconds
    limit = None
    if "copy_bytes" in ceilings and "bf16_flops" in ceilings:
        # One after the other: all prompts at the rate of products, then every step at that of copies.
        prefill = 2 * shape.multiplied * sizes["streams"] * sizes["in"] / ceilings["bf16_flops"]
        context = sizes["in"] + sizes["out"] / 2
        step = (shape.weight_bytes + sizes["streams"] * context * shape.kv_bytes_per_token) / ceilings["copy_bytes"]
        limit = sizes["streams"] * sizes["out"] / (prefill + sizes["out"] * step)
    what = f"{name}, {sizes['streams']} streams, {sizes['in']} in / {sizes['out']} out"
    table.row(what, f"{value:,.0f} output tok/s", of_limit(value, limit))


def prefill(server, shape, name, sizes, ceilings, table):
    """The best of three: prompts that arrive at once are scheduled as they come."""
    def rate():
        seconds, _ = server.together([(prompt(sizes["length"]), 1, {}) for _ in range(sizes["count"])])
        return sizes["count"] * sizes["length"] / seconds

    value = max(rate() for _ in range(3))
    limit = ceilings["bf16_flops"] / (2 * shape.multiplied) if "bf16_flops" in ceilings else None
    table.row(f"{name}, prefill {sizes['count']} × {sizes['length']}", f"{value:,.0f} tok/s", of_limit(value, limit))


def prefix_hit(server, shape, name, length, table):
    cold, hit = [], []
    for _ in range(3):
        ids = prompt(length)
        cold.append(server.complete(ids, 1)[0])
        hit.append(server.complete(ids, 1)[0])
    cold, hit = statistics.median(cold), statistics.median(hit)
    table.row(f"{name}, first token of a {length} token prompt, cold / prefix hit", f"{cold * 1e3:.1f} / {hit * 1e3:.1f} ms", f"{cold / hit:.1f} times | –")


def kv_waste(server, sizes, table):
    """From the geometry: a sequence leaves half a block unused, on average over its life."""
    found = re.search(r'block_size="(\d+)"', server.get("/metrics")[1])
    if found:
        block, mean = int(found.group(1)), sizes["in"] + sizes["out"] / 2
        table.row(f"KV slots unused, blocks of {block}, {sizes['in']} in / {sizes['out']} out", f"{(block - 1) / 2 / mean * 100:.1f} %", "4 % | –")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ceilings")
    parser.add_argument("--out", default="end_to_end.md")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    ceilings = json.load(open(arguments.ceilings)) if arguments.ceilings else {}
    copy = ceilings.get("copy_bytes")
    models = ["tiny"] if arguments.tiny else ["llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b"]
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory": "4MiB"} if arguments.tiny else LIMITS
    single = {"in": 4, "out": 6} if arguments.tiny else {"in": 128, "out": 512}
    many = {"streams": 3, "in": 5, "out": 4} if arguments.tiny else {"streams": 256, "in": 512, "out": 256}
    invariance = {"lengths": [1, 9, 20], "new": 4, "others": 3} if arguments.tiny else {"lengths": [1, 7, 63, 64, 65, 300, 1025, 3000], "new": 48, "others": 96}
    table, passed = Table(), True
    for name in models:
        shape = Shape(os.path.join(arguments.shapes, name))
        try:
            started = time.monotonic()
            with Server(arguments, shape, **limits) as server:
                table.row(f"{name}, from start to ready, {shape.weight_bytes / 1e9:.1f} GB of dummy weights", f"{time.monotonic() - started:.1f} s")
                passed &= check_invariant(server, shape, invariance, table)
                one_stream(server, shape, name, single, copy, table)
                if name == models[0]:
                    many_streams(server, shape, name, many, ceilings, table)
                    prefill(server, shape, name, {"count": 2, "length": 30} if arguments.tiny else {"count": 8, "length": 2048}, ceilings, table)
                    prefix_hit(server, shape, name, 60 if arguments.tiny else 4096, table)
                    kv_waste(server, many, table)
        except (RuntimeError, OSError, KeyError, ValueError) as problem:
            print(f"FAILED {name}: {problem}", flush=True)
            table.row(f"{name}", "failed")
            passed = False
    with open(arguments.out, "w") as file:
        file.write("\n" + "\n".join(table.lines) + "\n")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
