"""Tools in the prompt of a model whose chat template knows none: written into the messages, in the hermes format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_INTRODUCTION = """You can call functions. Each line between the tags describes one as JSON:
<tools>
{tools}
</tools>
To call a function, answer with its name and its arguments as a JSON object between these tags:
<tool_call>
{{"name": "function name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def write_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as plain chat: tools in the system message, calls and their results as text.

    Parameters
    ----------
    messages, tools
        As templates get them, arguments of calls as objects.
    """
    out = [_as_text(message) for message in messages]
    if tools:
        text = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if out and out[0]["role"] == "system":
            out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{text}"}
        else:
            out.insert(0, {"role": "system", "content": text})
    return out


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return {"role": message["role"], "content": "\n".join(filter(None, parts))}
