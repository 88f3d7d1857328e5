// The page: conversations, settings, and one answer at a time.

import * as api from "./api.js";
import { element, render } from "./markdown.js";
import { chats, currentId, saveChats, saveCurrentId, saveSettings, settings } from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed", "frequency_penalty", "presence_penalty"];
const TEXTS = ["system", "stop", "api_key"];
const HEALTH_EVERY_MS = 10_000;
const SAVE_EVERY_MS = 1_000;

let chat = chats.find((other) => other.id === currentId()) ?? null;
let running = null; // {controller, chat, message} of the answer that comes in
let following = true; // whether the view stays at the end

// ---- conversations

function openChat(other) {
  chat = other;
  saveCurrentId(chat?.id ?? null);
  document.body.classList.remove("sidebar-open");
  following = true;
  drawChats();
  drawMessages();
  $("prompt").focus();
}

function removeChat(other) {
  if (running?.chat === other) running.controller.abort();
  chats.splice(chats.indexOf(other), 1);
  saveChats();
  openChat(chat === other ? null : chat);
}

function drawChats() {
  $("chats").replaceChildren(...chats.map((other) => element("div", { class: other === chat ? "chat-row current" : "chat-row" },
    element("button", { class: "open", title: other.title, "aria-current": other === chat && "true", onclick: () => openChat(other) }, other.title),
    element("button", { class: "remove", "aria-label": `Remove ${other.title}`, onclick: () => removeChat(other) }, "✕"))));
}

// ---- messages

function drawMessages() {
  const messages = chat?.messages ?? [];
  if (messages.length) {
    $("messages").replaceChildren(...messages.map(messageNode));
    scrollToEnd();
  } else {
    $("messages").replaceChildren(element("div", { class: "welcome" }, element("img", { src: "page/icon.svg", alt: "" }), element("h1", {}, "What can I do for you?"), element("p", {}, "Answers stream from this server; nothing leaves it.")));
  }
  drawComposer();
}

function messageNode(message) {
  const node = element("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Assistant" });
  fill(node, message);
  return node;
}

function fill(node, message) {
  const isRunning = running?.message === message;
  node.classList.toggle("streaming", isRunning);
  const parts = [];
  if (message.content || isRunning) parts.push(element("div", { class: "body" }, ...(message.role === "user" ? [message.content] : render(message.content))));
  if (message.error) parts.push(element("div", { class: "error", role: "alert" }, message.error));
  if (message.role === "assistant") parts.push(toolsOf(message, isRunning));
  node.replaceChildren(...parts);
}

function toolsOf(message, isRunning) {
  const tools = element("div", { class: "tools" });
  if (!isRunning) {
    if (message.content) {
      const copy = element("button", { type: "button", onclick: async () => { await navigator.clipboard.writeText(message.content); copy.textContent = "Copied"; } }, "Copy");
      tools.append(copy);
    }
    if (message === chat.messages.at(-1)) tools.append(element("button", { type: "button", class: "regenerate", title: "Alt+R", onclick: regenerate }, "Regenerate"));
  }
  tools.append(element("span", { class: "speed" }, speed(message)));
  return tools;
}

function speed({ stats, stopped }) {
  if (!stats) return stopped ? "stopped" : "";
  const parts = [`TTFT ${Math.round(stats.ttftMs)} ms`];
  if (stats.tokensPerS) parts.push(`${stats.tokensPerS.toFixed(1)} tok/s`);
  if (stats.numTokens) parts.push(`${stats.numTokens} tokens`);
  return (stopped ? [...parts, "stopped"] : parts).join(" · ");
}

function scrollToEnd() {
  if (following) $("messages").scrollTop = $("messages").scrollHeight;
}

// ---- asking

function requestOf(messages) {
  const request = { messages: messages.filter((message) => message.content).map(({ role, content }) => ({ role, content })) };
  if (settings.system?.trim()) request.messages.unshift({ role: "system", content: settings.system });
  if ($("model").value) request.model = $("model").value;
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) request[name] = settings[name];
  const stops = (settings.stop ?? "").split(",").filter(Boolean);
  if (stops.length) request.stop = stops;
  return request;
}

function send(text) {
  if (!chat) {
    chat = { id: crypto.randomUUID?.() ?? `${Date.now()}`, title: text.trim().slice(0, 60), messages: [] };
    chats.unshift(chat);
    saveCurrentId(chat.id);
  }
  chat.messages.push({ role: "user", content: text });
  answer();
}

function regenerate() {
  if (running || chat?.messages.at(-1)?.role !== "assistant") return;
  chat.messages.pop();
  answer();
}

/** Ask for what follows the messages; the answer is stored as it comes, so that a reload loses little. */
async function answer() {
  const mine = chat;
  const request = requestOf(mine.messages);
  const message = { role: "assistant", content: "" };
  mine.messages.push(message);
  const controller = new AbortController();
  running = { controller, chat: mine, message };
  following = true;
  saveChats();
  drawChats();
  drawMessages();
  const begin = performance.now();
  let first = 0, last = 0, saved = begin, numTokens = 0, drawing = false;
  const draw = () => {
    drawing = false;
    if (chat !== mine) return;
    fill($("messages").lastElementChild, message);
    scrollToEnd();
  };
  try {
    for await (const chunk of api.chat(request, settings.api_key, controller.signal)) {
      const delta = chunk.choices[0]?.delta;
      if (chunk.choices.length) last = performance.now();
      if (delta?.content) {
        first ||= performance.now();
        numTokens += 1;
        message.content += delta.content;
      }
      if (chunk.usage) numTokens = chunk.usage.completion_tokens;
      if (first) message.stats = { ttftMs: first - begin, numTokens, tokensPerS: last > first && numTokens > 1 ? ((numTokens - 1) * 1000) / (last - first) : 0 };
      if (performance.now() - saved > SAVE_EVERY_MS) { saved = performance.now(); saveChats(); }
      if (!drawing) { drawing = true; requestAnimationFrame(draw); }
    }
  } catch (error) {
    if (controller.signal.aborted) message.stopped = true;
    else message.error = error.message || String(error);
  } finally {
    running = null;
    saveChats();
    if (chat === mine) draw();
    drawComposer();
    checkHealth();
  }
}

function drawComposer() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  $("send").hidden = running !== null;
  $("halt").hidden = running === null;
  $("send").disabled = !prompt.value.trim();
}

// ---- settings, model, theme, health

function readSettings() {
  for (const name of NUMBERS) settings[name] = $(name).value === "" ? null : Number($(name).value);
  for (const name of TEXTS) settings[name] = $(name).value;
  settings.model = $("model").value;
  saveSettings();
}

function showSettings(shown) {
  $("settings").hidden = !shown;
  $("toggle-settings").setAttribute("aria-expanded", String(shown));
  if (shown) $("system").focus();
}

async function loadModels() {
  try {
    const names = await api.models(settings.api_key);
    $("model").replaceChildren(...names.map((name) => element("option", { value: name, selected: name === settings.model }, name)));
  } catch (error) {
    $("model").replaceChildren(element("option", { value: "" }, error.message));
  }
}

async function checkHealth() {
  let status = "unreachable";
  try {
    status = await api.health();
  } catch { /* shown as unreachable */ }
  $("health").textContent = status;
  $("health").classList.toggle("ready", status === "ready");
}

function applyTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
}

// ---- events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || running) return;
  $("prompt").value = "";
  send(text);
});
$("prompt").addEventListener("input", drawComposer);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("halt").addEventListener("click", () => running?.controller.abort());
$("new-chat").addEventListener("click", () => openChat(null));
$("toggle-sidebar").addEventListener("click", () => document.body.classList.toggle(matchMedia("(max-width: 720px)").matches ? "sidebar-open" : "sidebar-closed"));
$("toggle-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("input", readSettings);
$("api_key").addEventListener("change", loadModels);
$("model").addEventListener("change", readSettings);
$("theme").addEventListener("click", () => {
  const dark = settings.theme ? settings.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  settings.theme = dark ? "light" : "dark";
  applyTheme();
  saveSettings();
});
$("messages").addEventListener("scroll", () => {
  const view = $("messages");
  following = view.scrollHeight - view.scrollTop - view.clientHeight < 60;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (running) running.controller.abort();
    else if (!$("settings").hidden) showSettings(false);
    document.body.classList.remove("sidebar-open");
    $("prompt").focus();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    openChat(null);
  } else if (event.altKey && event.code === "KeyS") {
    event.preventDefault();
    showSettings($("settings").hidden);
  } else if (event.altKey && event.code === "KeyR") {
    event.preventDefault();
    regenerate();
  }
});
window.addEventListener("pagehide", saveChats);

applyTheme();
for (const name of [...NUMBERS, ...TEXTS]) $(name).value = settings[name] ?? "";
drawChats();
drawMessages();
loadModels();
checkHealth();
setInterval(checkHealth, HEALTH_EVERY_MS);
