// Scenarios of the official npm package: `node scenarios.mjs BASE_URL MODEL` prints one JSON object.

import OpenAI from "openai";

const [baseURL, model, shapes] = process.argv.slice(2);
const { call, schema, responsesCall } = JSON.parse(shapes);  // fields of requests
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

async function streamedCall() {
  let name = "", args = "", finish = null;
  for await (const chunk of await client.chat.completions.create({ ...greedy, ...call, stream: true })) {
    const [choice] = chunk.choices;
    for (const { function: part } of choice.delta.tool_calls ?? []) {
      name += part.name ?? "";
      args += part.arguments ?? "";
    }
    finish = choice.finish_reason ?? finish;
  }
  return { name, arguments: args, finish };
}

async function wholeCall() {
  const [choice] = (await client.chat.completions.create({ ...greedy, ...call })).choices;
  const [{ function: made }] = choice.message.tool_calls;
  return { name: made.name, arguments: made.arguments, finish: choice.finish_reason };
}

async function wholeSchema() {
  const [choice] = (await client.chat.completions.create({ ...greedy, ...schema })).choices;
  return { text: choice.message.content, finish: choice.finish_reason };
}

async function callOfResponses() {
  const reply = await client.responses.create({ model, input: messages, temperature: 0, ...responsesCall });
  const [{ type, name, arguments: args }] = reply.output;
  return { type, name, arguments: args };
}

const choices = async () =>
  (await client.chat.completions.create({ ...greedy, n: 2, seed: 1, temperature: 1 })).choices.map(({ message }) => message.content);

// All at once, which takes little longer than one alone.
const asked = {
  models: client.models.list().then(({ data }) => data.map(({ id }) => id)),
  whole: client.chat.completions.create(greedy).then((reply) => reply.choices[0].message.content),
  streamed: streamed({}),
  stopped: streamed({ stop: ["Paris"] }),
  choices: choices(),
  completion: client.completions.create({ model, prompt: "Once upon a time", temperature: 0, max_tokens: 8 }).then((reply) => reply.choices[0].text),
  responses: responses(),
  call: wholeCall(),
  streamedCall: streamedCall(),
  schema: wholeSchema(),
  responsesCall: callOfResponses(),
  badValue: refused(client.chat.completions.create({ ...greedy, temperature: 9 })),
  badModel: refused(client.chat.completions.create({ ...greedy, model: "other" })),
  aborted: aborted(),
};
const answers = await Promise.all(Object.values(asked));
console.log(JSON.stringify(Object.fromEntries(Object.keys(asked).map((name, i) => [name, answers[i]]))));
