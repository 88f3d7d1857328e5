// What the browser keeps: conversations, settings, theme. Without storage (private windows) all works but the keeping.

const PREFIX = "tpserve.";
const MAX_CHATS = 200;

function read(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

function write(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const settings = read("settings", {});
export const saveSettings = () => write("settings", settings);

/** Newest first: {id, title, messages: [{role, content, stats?, error?, stopped?}]}. */
export const chats = read("chats", []);

export function saveChats() {
  chats.splice(MAX_CHATS);
  // A full storage costs the oldest conversations, not the one at hand.
  while (!write("chats", chats) && chats.length > 1) chats.pop();
}

export const currentId = () => read("current", null);
export const saveCurrentId = (id) => write("current", id);
