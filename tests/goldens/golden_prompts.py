"""Prompts of the demo model's goldens: raw text, or chat messages."""

from __future__ import annotations

Message = dict[str, str]


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _report() -> str:
    """A long, regular text."""
    crops = ("wheat", "barley", "oats", "beans", "maize", "rye")
    winds = ("north", "east", "south", "west")
    lines = [
        f"Day {day}: the {winds[day % 4]} wind blew, {day * 7 % 23 + 2} sacks of {crops[day * 5 % 6]} went to the mill "
        f"and {day * 11 % 17 + 1} came back as flour."
        for day in range(1, 21)
    ]
    return "\n".join(["Farm report", *lines, "Summary: in these days the farm"])


PROMPTS: dict[str, str | list[Message]] = {
    "capital": _user("What is the capital of France?"),
    "story": _user("Write a short story about a lighthouse keeper and a whale."),
    "explain": _user("Explain to a child why the sky is blue."),
    "photosynthesis": "Photosynthesis is the process by which",
    "one_word": "The",
    "python": "def fibonacci(n: int) -> int:\n    ",
    "code_chat": _user("Write a Python function that reverses a linked list, with a docstring."),
    "c_source": "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "emoji": _user("Describe this: 🐳🌊👩🏽‍🚀🇫🇷 and say what 🤖+❤️ means."),
    "cjk": _user("Translate to English: 今日は天気がいいですね。 / 我们明天去公园。 / 안녕하세요"),
    "arabic": "مرحبا بالعالم. هذا نص قصير عن البحر",
    "combining": "Cafe\u0301 nai\u0308ve, Zu\u0308rich, A\u030angstro\u0308m: these words have accents because",
    "cyrillic": "Москва — столица",
    "multi_turn": [
        {"role": "system", "content": "You are a terse assistant. Answer in one sentence."},
        {"role": "user", "content": "My name is Ada and I build bridges."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name, and what should I check before opening a bridge?"},
    ],
    "table": "| year | ships | tons |\n|---|---|---|\n| 1901 | 12 | 4,310 |\n| 1902 | 15 | 5,127 |\n| 1903 |",
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233,",
    "json": '{"name": "tea kettle", "price": 24.5, "tags": ["kitchen", "steel"],',
    "long": _report(),
}

# No digits outside ASCII: transformers takes GPT-2's splitter for every GGUF tokenizer, where SmolLM2's own parts all
# digits from their neighbours. ASCII digits come out the same, since no token holds more than one.
UNICODE_STRINGS = (
    "Hello, world!",
    "  two spaces,\ttab\r\nand lines\n\n\n",
    "don't we'll I'M",
    "x = 3.14159 * 10**12  # 1,234,567",
    "naïve Zürich Cafe\u0301",
    "日本語のテキスト 中文 한국어",
    "مرحبا بالعالم",
    "👩🏽‍🚀🇫🇷 ❤️",
    "Москва — столица",
    "a\u200bb\u00a0c\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522",
)
