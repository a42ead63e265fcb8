// Drives a server through the official OpenAI client for Node.
//
//     node openai_client.mjs OPENAI_PACKAGE BASE_URL CHECK...
//
// OPENAI_PACKAGE is the folder of the installed package. The first check that fails ends the run with its stack.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [package_, baseUrl, ...wanted] = process.argv.slice(2);
const { default: OpenAI } = createRequire(import.meta.url)(package_);

const QUESTION = [{ role: "user", content: "What is the capital of France?" }];
const GOLDEN = "The capital of France is Paris.";
// Goes on for as long as it is let.
const LONG = { model: "default", prompt: "The sea is", temperature: 0, ignore_eos: true };

const client = new OpenAI({ baseURL: `${baseUrl}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });

// The sum of a metric's series.
async function metric(name) {
    const lines = (await (await fetch(`${baseUrl}/metrics`)).text()).split("\n");
    const series = lines.filter((line) => line.startsWith(`${name}{`) || line.startsWith(`${name} `));
    return series.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0);
}

// Polls until it is so.
async function until(what, holds) {
    const giveUp = Date.now() + 60_000;
    while (!(await holds())) {
        assert(Date.now() < giveUp, `not ${what} after 60 s`);
        await new Promise((resolve) => setTimeout(resolve, 20));
    }
}

async function collect(stream) {
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    return chunks;
}

const checks = {
    async models() {
        const ids = [];
        for await (const model of client.models.list()) ids.push(model.id);
        assert.deepEqual(ids, ["smollm2-135m-instruct"]);
        assert.equal((await client.models.retrieve(ids[0])).id, ids[0]);
    },

    async chat() {
        const body = { model: "default", messages: QUESTION, temperature: 0, max_tokens: 32, return_token_ids: true };
        const answer = await client.chat.completions.create(body);
        const [choice] = answer.choices;
        assert(choice.message.content.startsWith(GOLDEN), choice.message.content);
        assert.equal(choice.finish_reason, "stop");
        assert.equal(answer.usage.prompt_tokens, 37);
        assert.deepEqual(choice.token_ids.slice(0, 7), [504, 3575, 282, 4649, 314, 7042, 30]);
        assert.equal(choice.token_ids.length, answer.usage.completion_tokens);
    },

    async chatStream() {
        const stream = await client.chat.completions.create({
            model: "default", messages: QUESTION, temperature: 0, max_tokens: 32,
            stream: true, stream_options: { include_usage: true },
        });
        const chunks = await collect(stream);
        const text = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
        assert(text.startsWith(GOLDEN), text);
        assert.equal(chunks.at(-2).choices[0].finish_reason, "stop");
        assert.deepEqual(chunks.at(-1).choices, []);
        assert(chunks.at(-1).usage.completion_tokens >= 7);
    },

    // The client's own accumulation of a stream understands ours.
    async streamHelper() {
        const body = { model: "default", messages: QUESTION, temperature: 0, max_tokens: 32 };
        const whole = await client.chat.completions.create(body);
        const streamed = await client.chat.completions.stream(body).finalChatCompletion();
        assert.equal(streamed.choices[0].message.content, whole.choices[0].message.content);
        assert.equal(streamed.choices[0].finish_reason, whole.choices[0].finish_reason);
    },

    async choices() {
        const ask = async (seed) => {
            const body = { model: "default", messages: QUESTION, n: 2, seed, temperature: 1.3, max_tokens: 24 };
            return (await client.chat.completions.create(body)).choices.map((choice) => choice.message.content);
        };
        const first = await ask(11);
        assert.notEqual(first[0], first[1]);
        assert.deepEqual(await ask(11), first);
        assert.notDeepEqual(await ask(12), first);
    },

    async stopAndLogprobs() {
        const answer = await client.chat.completions.create({
            model: "default", messages: QUESTION, temperature: 0, max_tokens: 32, stop: "of Fra",
            logprobs: true, top_logprobs: 2,
        });
        const [choice] = answer.choices;
        assert.equal(choice.message.content, "The capital ");
        assert.equal(choice.finish_reason, "stop");
        for (const token of choice.logprobs.content) {
            assert.equal(token.top_logprobs.length, 2);
            assert.equal(token.top_logprobs[0].logprob, token.logprob);
            assert(token.logprob <= 0);
        }
    },

    async completions() {
        const body = { model: "default", prompt: "The capital of France is", temperature: 0, max_tokens: 8 };
        const whole = await client.completions.create({ ...body, return_token_ids: true });
        const { text, prompt_token_ids } = whole.choices[0];
        assert(text.trim().length > 0);
        const ofIds = await client.completions.create({ ...body, prompt: prompt_token_ids });
        assert.equal(ofIds.choices[0].text, text);
        const chunks = await collect(await client.completions.create({ ...body, stream: true }));
        assert.equal(chunks.map((chunk) => chunk.choices[0]?.text ?? "").join(""), text);
    },

    async errors() {
        const ask = (more) => client.chat.completions.create({ model: "default", messages: QUESTION, max_tokens: 1, ...more });
        await assert.rejects(ask({ model: "gpt-9" }), (error) => {
            assert(error instanceof OpenAI.NotFoundError);
            assert.equal(error.code, "model_not_found");
            return true;
        });
        await assert.rejects(ask({ top_p: 2 }), (error) => {
            assert(error instanceof OpenAI.BadRequestError);
            assert.equal(error.param, "top_p");
            return true;
        });
        const long = { model: "default", prompt: Array(10_000).fill(100), max_tokens: 1 };
        await assert.rejects(client.completions.create(long), (error) => {
            assert(error instanceof OpenAI.BadRequestError);
            assert.deepEqual([error.param, error.code], ["prompt", "context_length_exceeded"]);
            return true;
        });
    },

    // A client's timeout and an aborted stream free the server at once. Needs a server of its own.
    async leaving() {
        const idle = async () => (await metric("vllm:num_requests_running")) === 0;
        const slow = client.completions.create({ ...LONG, max_tokens: 5000 }, { timeout: 1000 });
        await assert.rejects(slow, OpenAI.APIConnectionTimeoutError);
        await until("idle", idle);
        const stream = await client.completions.create({ ...LONG, max_tokens: 5000, stream: true });
        for await (const _ of stream) {
            await until("running", async () => (await metric("vllm:num_requests_running")) === 1);
            break;
        }
        await until("idle", idle);
        assert((await metric("outrigger_engine_step_seconds_count")) < 5000);
    },

    // A full queue is a RateLimitError with Retry-After. Needs a server with one place and no queue.
    async overload() {
        const occupant = await client.completions.create({ ...LONG, max_tokens: 5000, stream: true });
        await occupant[Symbol.asyncIterator]().next();
        await assert.rejects(client.completions.create({ ...LONG, max_tokens: 1 }), (error) => {
            assert(error instanceof OpenAI.RateLimitError);
            const seconds = Number(error.headers.get("retry-after"));
            assert(seconds >= 1 && seconds <= 60, error.headers);
            return true;
        });
        occupant.controller.abort();
        await until("idle", async () => (await metric("vllm:num_requests_running")) === 0);
        const answer = await client.completions.create({ ...LONG, max_tokens: 2 });
        assert.equal(answer.usage.completion_tokens, 2);
    },
};

assert(wanted.length > 0, "no checks are named");
for (const name of wanted) {
    console.log(name);
    await checks[name]();
}
