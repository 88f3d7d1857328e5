"""The talk's example programs, run as they are but for addresses and the import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from integration.doors.conftest import ALIAS
from server import Server, environment, processes_of, until
from tpserve.coordinator.serve import default_names

CURL = """\
curl -X POST \\
  -H "Content-Type: application/json" \\
  -d '{
        "model": "gpt-4",
        "messages": [
            {"role": "user", "content": "Hello! Our project is MLC LLM. What is the name of our project?"}
        ]
  }' \\
  http://127.0.0.1:8000/v1/chat/completions
"""
SYNC = """\
from tpserve import MLCEngine

model = "{model}"
engine = MLCEngine(model)

for response in engine.chat.completions.create(
    messages=[{{"role": "user", "content": "What is the meaning of life?"}}],
    model=model,
    stream=True,
):
    for choice in response.choices:
        print(choice.delta.content, end="", flush=True)
print("\\n")

engine.terminate()
"""
ASYNC = """\
import asyncio
from typing import Dict

from tpserve import AsyncMLCEngine

model = "{model}"
prompts = ["Write a three-day travel plan to Pittsburgh.", "What is the meaning of life?"]


async def test_completion():
    async_engine = AsyncMLCEngine(model=model)
    num_requests = len(prompts)
    output_texts: Dict[str, str] = {{}}

    async def generate_task(prompt: str):
        async for response in await async_engine.chat.completions.create(
            messages=[{{"role": "user", "content": prompt}}], model=model, stream=True, max_tokens=16
        ):
            if response.id not in output_texts:
                output_texts[response.id] = ""
            output_texts[response.id] += response.choices[0].delta.content or ""

    tasks = [asyncio.create_task(generate_task(prompts[i])) for i in range(num_requests)]
    await asyncio.gather(*tasks)
    for output in output_texts.values():
        print(f"Output: {{output!r}}")
    async_engine.terminate()


asyncio.run(test_completion())
"""


def test_row_19_the_slides_curl(server: Server) -> None:
    # Sampled as the slide has it, an answer goes on to the end of the context now and then.
    line = CURL.replace("http://127.0.0.1:8000", server.url).replace('"messages"', '"seed": 7, "messages"')
    assert "seed" in line
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=240, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_row_19_a_hubs_model_answers_to_its_address() -> None:
    assert default_names("HF://mlc-ai/Llama-3-8B") == ["Llama-3-8B", "HF://mlc-ai/Llama-3-8B"]
    assert default_names("/models/x.gguf") == ["x"]


def test_row_20_the_openai_package_with_the_model_of_another_server(client: openai.OpenAI) -> None:
    text = ""
    for chunk in client.chat.completions.create(
        model=ALIAS, messages=[{"role": "user", "content": "Say this is a test"}], stream=True, max_tokens=8
    ):
        text += chunk.choices[0].delta.content or ""
    assert text


@pytest.fixture
def short_model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A model with room for few tokens: the slide's program sets no limit, and at times its answer fills it."""
    folder = tmp_path / "short"
    shutil.copytree(tiny_checkpoint, folder, symlinks=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    return folder


@pytest.mark.parametrize("program", [pytest.param(SYNC, id="row_21"), pytest.param(ASYNC, id="row_22")])
def test_rows_21_and_22_the_slides_programs(program: str, short_model: Path, tmp_path: Path) -> None:
    """Each starts an engine and leaves nothing."""
    file = tmp_path / "program.py"
    file.write_text(program.format(model=short_model))
    mark = f"program-{tmp_path.name}"
    done = subprocess.run(
        [sys.executable, str(file)], env=environment(mark), cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert len(done.stdout) > 20
    if program is ASYNC:
        assert done.stdout.count("Output: ") == 2
    until(lambda: not processes_of(mark), within_s=5, what="nothing of the engine is left")
