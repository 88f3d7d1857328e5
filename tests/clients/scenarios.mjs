// Scenarios of the official npm package: `node scenarios.mjs BASE_URL MODEL` prints one JSON object.

import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, messages, temperature: 0, max_tokens: 24 };

async function refused(promise) {
  try {
    await promise;
  } catch (error) {
    return { kind: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
  throw new Error("it was not refused");
}

async function streamed(options) {
  let text = "", finish = null, usage = null;
  for await (const chunk of await client.chat.completions.create({ ...greedy, ...options, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    finish = chunk.choices[0]?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
  }
  return { text, finish, tokens: usage.completion_tokens };
}

async function aborted() {
  const stream = await client.chat.completions.create({ ...greedy, max_tokens: 1500, ignore_eos: true, stream: true });
  let chunks = 0;
  for await (const _ of stream) if (++chunks === 5) break; // leaving the loop ends the request
  return chunks;
}

async function responses() {
  const events = [];
  let text = "";
  for await (const event of await client.responses.create({ model, input: "What is the capital of France?", temperature: 0, max_output_tokens: 24, stream: true })) {
    events.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  return { text, first: events[0], last: events.at(-1) };
}

const whole = await client.chat.completions.create(greedy);
console.log(JSON.stringify({
  models: (await client.models.list()).data.map(({ id }) => id),
  whole: whole.choices[0].message.content,
  streamed: await streamed({}),
  stopped: await streamed({ stop: ["Paris"] }),
  choices: (await client.chat.completions.create({ ...greedy, n: 2, seed: 1, temperature: 1 })).choices.map(({ message }) => message.content),
  completion: (await client.completions.create({ model, prompt: "Once upon a time", temperature: 0, max_tokens: 8 })).choices[0].text,
  responses: await responses(),
  badValue: await refused(client.chat.completions.create({ ...greedy, temperature: 9 })),
  badModel: await refused(client.chat.completions.create({ ...greedy, model: "other" })),
  aborted: await aborted(),
}));
