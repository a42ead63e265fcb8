"""Drives a server through the official OpenAI client for Python.

    python openai_client.py BASE_URL CHECK...

Each check is a function of this file; the first that fails ends the run with its traceback.
"""

import sys
import threading
import time
import urllib.request

import openai

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GOLDEN = "The capital of France is Paris."
# Goes on for as long as it is let.
LONG = {"model": "default", "prompt": "The sea is", "temperature": 0, "extra_body": {"ignore_eos": True}}


def raised(error, call):
    """What `call` raises, which must be an `error`."""
    try:
        call()
    except error as caught:
        return caught
    raise AssertionError(f"{error.__name__} was not raised")


def metric(base_url, name):
    """The sum of a metric's series."""
    with urllib.request.urlopen(base_url + "/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))


def until(what, holds):
    """Polls until it is so."""
    give_up = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < give_up, f"not {what} after 60 s"
        time.sleep(0.02)


def models(client, _):
    """The served model is listed, and can be asked for by name."""
    listed = client.models.list().data
    assert [model.id for model in listed] == ["smollm2-135m-instruct"], listed
    assert client.models.retrieve(listed[0].id).id == listed[0].id
    raised(openai.NotFoundError, lambda: client.models.retrieve("gpt-9"))


def chat(client, _):
    """A whole answer: the golden text, its usage, its token ids."""
    for model in ["default", "smollm2-135m-instruct"]:
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_completion_tokens=32, extra_body={"return_token_ids": True}
        )
        choice = answer.choices[0]
        assert answer.object == "chat.completion" and answer.model == "smollm2-135m-instruct", answer
        assert choice.message.role == "assistant"
        assert choice.message.content.startswith(GOLDEN), choice.message.content
        assert choice.finish_reason == "stop", choice
        assert answer.usage.prompt_tokens == 37, answer.usage
        assert answer.usage.total_tokens == 37 + answer.usage.completion_tokens
        ids = choice.model_extra["token_ids"]
        assert ids[:7] == [504, 3575, 282, 4649, 314, 7042, 30] and len(ids) == answer.usage.completion_tokens, ids
        assert len(answer.model_extra["prompt_token_ids"]) == 37
        assert answer.system_fingerprint
    assert answer.usage.prompt_tokens_details.cached_tokens > 0, answer.usage


def chat_stream(client, _):
    """The same answer as a stream: one event a token, usage at the end."""
    stream = client.chat.completions.create(
        model="default",
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    chunks = list(stream)
    with_choice = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in with_choice)
    assert text.startswith(GOLDEN), text
    assert with_choice[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in with_choice if choice.finish_reason] == ["stop"]
    ids = [choice.model_extra["token_ids"] for choice in with_choice if choice.model_extra.get("token_ids")]
    assert all(len(of_chunk) == 1 for of_chunk in ids), ids
    usage = chunks[-1].usage
    assert not chunks[-1].choices and usage.completion_tokens == len(ids), usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def choices(client, _):
    """n choices, each its own, the same ones for the same seed, streamed or not."""

    def ask(seed, **more):
        return client.chat.completions.create(
            model="default", messages=QUESTION, n=2, seed=seed, temperature=1.3, max_tokens=24, **more
        )

    def texts(answer):
        assert [choice.index for choice in answer.choices] == [0, 1]
        return [choice.message.content for choice in answer.choices]

    first = texts(ask(11))
    assert first[0] != first[1], first
    assert texts(ask(11)) == first
    assert texts(ask(12)) != first
    streamed = ["", ""]
    for chunk in ask(11, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first, (streamed, first)
    alone = client.chat.completions.create(
        model="default", messages=QUESTION, seed=11, temperature=1.3, max_tokens=24
    )
    assert alone.choices[0].message.content == first[0]


def stop(client, _):
    """A stop string ends the text before it, also when it spans tokens."""
    for stream in [False, True]:
        answer = client.chat.completions.create(
            model="default", messages=QUESTION, temperature=0, max_tokens=32, stop=["of Fra"], stream=stream
        )
        if stream:
            parts = [chunk.choices[0] for chunk in answer if chunk.choices]
            text, reason = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == ("The capital ", "stop"), (text, reason)


def logprobs(client, _):
    """Log-probabilities of the sampled token and of the most likely ones."""
    answer = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        best = token.top_logprobs[0]
        assert (best.token, best.logprob) == (token.token, token.logprob), token
        ranked = [top.logprob for top in token.top_logprobs]
        assert ranked == sorted(ranked, reverse=True) and ranked[0] <= 0, ranked
    again = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert again.choices[0].logprobs == answer.choices[0].logprobs


def completions(client, _):
    """Prompts as text and as ids, whole and streamed."""
    def ask(prompt, **more):
        return client.completions.create(model="default", prompt=prompt, temperature=0, max_tokens=8, **more)

    text = ask("The capital of France is")
    assert text.object == "text_completion" and text.choices[0].text.strip(), text
    assert text.choices[0].finish_reason in ["length", "stop"]
    ids = ask("The capital of France is", extra_body={"return_token_ids": True}).choices[0].model_extra
    of_ids = ask(ids["prompt_token_ids"])
    assert of_ids.choices[0].text == text.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in ask(ids["prompt_token_ids"], stream=True) if chunk.choices)
    assert streamed == text.choices[0].text
    several = ask(["The capital of France is", "One, two,"], logprobs=2)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == text.choices[0].text
    of_first = several.choices[0].logprobs
    assert "".join(of_first.tokens) == text.choices[0].text and len(of_first.token_logprobs) == len(of_first.tokens)
    assert all(len(top) >= 2 for top in of_first.top_logprobs)
    echoed = ask("The capital of France is", echo=True).choices[0].text
    assert echoed == "The capital of France is" + text.choices[0].text


def errors(client, _):
    """The client's own error classes, with field and code."""
    unknown = raised(
        openai.NotFoundError, lambda: client.chat.completions.create(model="gpt-9", messages=QUESTION)
    )
    assert (unknown.param, unknown.code) == ("model", "model_not_found"), unknown
    long = raised(
        openai.BadRequestError, lambda: client.completions.create(model="default", prompt=[100] * 10_000, max_tokens=1)
    )
    assert (long.param, long.code, long.type) == ("prompt", "context_length_exceeded", "invalid_request_error"), long
    hot = raised(
        openai.BadRequestError,
        lambda: client.chat.completions.create(model="default", messages=QUESTION, temperature=3),
    )
    assert hot.param == "temperature" and "2" in hot.message, hot
    deadline = raised(
        openai.APIStatusError,
        lambda: client.chat.completions.create(
            model="default", messages=QUESTION, extra_headers={"x-request-timeout-ms": "never"}
        ),
    )
    assert deadline.status_code == 400, deadline


def leaving(client, base_url):
    """A client's timeout, and a stream that it closes, free the server at once. Needs a server of its own."""
    raised(
        openai.APITimeoutError,
        lambda: client.with_options(timeout=1.0).completions.create(**LONG, max_tokens=5000),
    )
    until("idle", lambda: metric(base_url, "vllm:num_requests_running") == 0)
    stream = client.completions.create(**LONG, max_tokens=5000, stream=True)
    next(iter(stream))
    until("running", lambda: metric(base_url, "vllm:num_requests_running") == 1)
    stream.close()
    until("idle", lambda: metric(base_url, "vllm:num_requests_running") == 0)
    assert metric(base_url, "outrigger_engine_step_seconds_count") < 5000


def overload(client, base_url):
    """A full queue is a RateLimitError with Retry-After, and the client's own retry gets through. Needs a server with one
    place and no queue."""
    occupant = client.completions.create(**LONG, max_tokens=5000, stream=True)
    next(iter(occupant))
    refused = raised(openai.RateLimitError, lambda: client.completions.create(**LONG, max_tokens=1))
    assert refused.status_code == 429, refused
    assert 1 <= int(refused.response.headers["retry-after"]) <= 60, refused.response.headers

    def leave():
        """Once the retrying client has been refused."""
        until("refused", lambda: metric(base_url, "outrigger_admission_rejections_total") >= 2)
        occupant.close()

    leaver = threading.Thread(target=leave)
    leaver.start()
    answer = client.with_options(max_retries=8).completions.create(**LONG, max_tokens=2)
    leaver.join()
    assert answer.usage.completion_tokens == 2


def keys(client, base_url):
    """Without the key nothing, with it everything. Needs a server with the key `open-sesame`."""
    refused = raised(openai.AuthenticationError, client.models.list)
    assert refused.code == "invalid_api_key", refused
    with_key = openai.OpenAI(base_url=base_url + "/v1", api_key="open-sesame", max_retries=0)
    assert with_key.models.list().data
    with_key.chat.completions.create(model="default", messages=QUESTION, max_tokens=1)


def main():
    base_url, *checks = sys.argv[1:]
    assert checks, __doc__
    client = openai.OpenAI(base_url=base_url + "/v1", api_key="none", max_retries=0, timeout=120)
    for check in checks:
        print(check, flush=True)
        globals()[check](client, base_url)


if __name__ == "__main__":
    main()
