#!/usr/bin/env python3
"""What a full node spends on a request that it refuses, by the length of the prompt.

    python3 benches/load/refusal.py target/release/outrigger

The node has one place, which a stream holds. Each row refuses the same prompt many times, in turn without and with an idempotency
key: without, a request is refused before its prompt is tokenized; with one, it may belong to a stream that exists, and is refused
with its token count. Prints the medians and their ratio.
"""

import http.client
import json
import socket
import statistics
import subprocess
import sys
import time

PORT = 8391
KIBIBYTES = (1, 8, 20)
REQUESTS = 200
ROUNDS = 10
WORDS = "The sea is wide. "


def wait_until_ready():
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit("the node is not ready after a minute")


def occupy():
    """A stream whose client reads nothing."""
    body = json.dumps({"prompt": [5], "max_tokens": 8000, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: node\r\ncontent-length: {len(body)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", PORT))
    client.sendall((head + body).encode())
    time.sleep(1)
    return client


def refuse(connection, prompt, is_keyed):
    """Milliseconds per refusal."""
    body = json.dumps({"prompt": prompt, "max_tokens": 5})
    start = time.monotonic()
    for number in range(REQUESTS):
        headers = {"idempotency-key": f"{start}-{number}"} if is_keyed else {}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status != 429:
            sys.exit(f"status {answer.status} instead of 429: the place was free, or the prompt does not fit")
    return (time.monotonic() - start) / REQUESTS * 1e3


def main():
    flags = ["--port", str(PORT), "--max-num-seqs", "1", "--max-num-queued-requests", "0"]
    node = subprocess.Popen([sys.argv[1], *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready()
        print("KiB  before tokenizing  after  ratio")
        for kibibytes in KIBIBYTES:
            prompt = WORDS * (kibibytes * 1024 // len(WORDS))
            client = occupy()
            connection = http.client.HTTPConnection("127.0.0.1", PORT)
            rounds = [[refuse(connection, prompt, is_keyed) for is_keyed in (False, True)] for _ in range(ROUNDS)]
            client.close()
            before, after = (statistics.median(times) for times in zip(*rounds))
            print(f"{kibibytes:3}  {before:14.2f} ms  {after:5.2f} ms  {before / after:.2f}")
            time.sleep(1)
    finally:
        node.terminate()
        node.wait()


if __name__ == "__main__":
    main()
