// The server's API as this page uses it.

function headers(apiKey) {
  return { "content-type": "application/json", ...(apiKey ? { authorization: `Bearer ${apiKey}` } : {}) };
}

async function failure(reply) {
  try {
    return new Error((await reply.json()).error.message);
  } catch {
    return new Error(`The server answered ${reply.status} ${reply.statusText}`);
  }
}

export async function models(apiKey) {
  const reply = await fetch("v1/models", { headers: headers(apiKey) });
  if (!reply.ok) throw await failure(reply);
  return (await reply.json()).data.map((model) => model.id);
}

export async function health() {
  return (await (await fetch("health")).json()).status;
}

/** Stream a chat; yields each chunk's object. `signal` ends it, on the server too. */
export async function* chat(request, apiKey, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const reply = await fetch("v1/chat/completions", { method: "POST", headers: headers(apiKey), body, signal });
  if (!reply.ok) throw await failure(reply);
  let open = "";
  for await (const text of read(reply.body.pipeThrough(new TextDecoderStream()))) {
    const events = (open + text).split("\n\n");
    open = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data) continue;
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
  throw new Error("The connection ended before the answer did");
}

async function* read(stream) {
  const reader = stream.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
