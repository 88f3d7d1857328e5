// Markdown to DOM nodes. Never touches innerHTML: whatever a model writes is text, and links may only be http(s).

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE =
  /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|__(?=\S)(.+?)__|~~(?=\S)(.+?)~~|\*(?=\S)([^*]+?)\*|(?<!\w)_(?=\S)([^_]+?)_(?!\w)|\[([^\]]+)\]\((\S+?)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])|\\([\\`*_{}[\]()#+\-.!~|])/s;

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Return the nodes of a text. An open code block at the end of a stream is a block already. */
export function render(text) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"));
}

function blocks(lines) {
  const out = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(FENCE);
    const heading = line.match(HEADING);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const end = lines.findIndex((other, index) => index > at && other.trim().startsWith(fence[1]) && !other.trim().slice(fence[1].length).replaceAll(fence[1][0], "").trim());
      const stop = end < 0 ? lines.length : end;
      out.push(codeBlock(lines.slice(at + 1, stop).join("\n"), fence[2]));
      at = stop + 1;
    } else if (heading) {
      out.push(element(`h${Math.min(heading[1].length, 4)}`, {}, ...inline(heading[2])));
      at += 1;
    } else if (RULE.test(line)) {
      out.push(element("hr"));
      at += 1;
    } else if (/^ {0,3}>/.test(line)) {
      const stop = endOf(lines, at, (other) => /^ {0,3}>/.test(other));
      out.push(element("blockquote", {}, ...blocks(lines.slice(at, stop).map((other) => other.replace(/^ {0,3}> ?/, "")))));
      at = stop;
    } else if (ITEM.test(line)) {
      const [list, stop] = listFrom(lines, at);
      out.push(list);
      at = stop;
    } else if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1])) {
      const stop = endOf(lines, at + 2, (other) => other.includes("|"));
      out.push(table(lines.slice(at, stop)));
      at = stop;
    } else {
      const stop = endOf(lines, at + 1, (other) => other.trim() && !FENCE.test(other) && !HEADING.test(other) && !ITEM.test(other) && !/^ {0,3}>/.test(other));
      out.push(element("p", {}, ...withBreaks(lines.slice(at, stop))));
      at = stop;
    }
  }
  return out;
}

function endOf(lines, from, belongs) {
  let at = from;
  while (at < lines.length && belongs(lines[at])) at += 1;
  return at;
}

/** A list from its first item on: deeper lines belong to the item, also after empty ones. */
function listFrom(lines, from) {
  const [, indent, marker] = lines[from].match(ITEM);
  const ordered = /\d/.test(marker);
  const list = element(ordered ? "ol" : "ul", ordered && parseInt(marker, 10) !== 1 ? { start: parseInt(marker, 10) } : {});
  let at = from;
  while (at < lines.length) {
    const item = lines[at].match(ITEM);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== ordered) break;
    const width = item[1].length + item[2].length + 1;
    const inner = [item[3]];
    at += 1;
    while (at < lines.length) {
      const depth = lines[at].match(/^\s*/)[0].length;
      if (lines[at].trim() ? depth <= indent.length && ITEM.test(lines[at]) : false) break;
      if (!lines[at].trim()) {
        const next = lines.slice(at).find((other) => other.trim());
        if (next === undefined || (next.match(/^\s*/)[0].length <= indent.length && !(ITEM.test(next) && next.match(ITEM)[1].length === indent.length))) break;
        if (next.match(/^\s*/)[0].length <= indent.length) { at += 1; break; }
      } else if (depth <= indent.length && !inner.at(-1).trim()) break;
      inner.push(lines[at].slice(Math.min(depth, width)));
      at += 1;
    }
    const content = blocks(inner);
    const single = content[0]?.tagName === "P";
    list.append(element("li", {}, ...(single ? [...content[0].childNodes, ...content.slice(1)] : content)));
  }
  return [list, at];
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, tag) => element("tr", {}, ...cells(line).map((cell) => element(tag, {}, ...inline(cell))));
  return element("table", {}, element("thead", {}, row(lines[0], "th")), element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td"))));
}

function codeBlock(code, language) {
  const button = element("button", { type: "button", onclick: async () => {
    await navigator.clipboard.writeText(code);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } }, "Copy");
  return element("div", { class: "code-block" }, element("div", { class: "bar" }, element("span", {}, language || "code"), button), element("pre", {}, element("code", {}, code)));
}

function withBreaks(lines) {
  return lines.flatMap((line, index) => {
    const hard = / {2,}$|\\$/.test(line) && index < lines.length - 1;
    const text = inline(line.replace(/ {2,}$|\\$/, "").trimStart());
    if (index === lines.length - 1) return text;
    return hard ? [...text, element("br")] : [...text, "\n"];
  });
}

function inline(text) {
  const out = [];
  let rest = text;
  for (let match = rest.match(INLINE); match; match = rest.match(INLINE)) {
    const [whole, , code, strong, strong2, gone, em, em2, label, target, url, escaped] = match;
    if (match.index) out.push(rest.slice(0, match.index));
    if (code !== undefined) out.push(element("code", {}, code.replace(/^ (.*) $/s, "$1")));
    else if (strong ?? strong2) out.push(element("strong", {}, ...inline(strong ?? strong2)));
    else if (gone) out.push(element("del", {}, ...inline(gone)));
    else if (em ?? em2) out.push(element("em", {}, ...inline(em ?? em2)));
    else if (label) out.push(/^https?:\/\//.test(target) ? link(target, inline(label)) : whole);
    else if (url) out.push(link(url, [url]));
    else out.push(escaped);
    rest = rest.slice(match.index + whole.length);
  }
  if (rest) out.push(rest);
  return out;
}

function link(target, children) {
  return element("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
