"""The engine of a Python program ends with the program, however that ends, and says why it cannot start."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from server import environment, processes_of, until
from tpserve import EngineError, MLCEngine

PROGRAM = """
import sys
from tpserve import MLCEngine
engine = MLCEngine(
    sys.argv[1], load_format="dummy", max_num_seqs=4, max_num_batched_tokens=64, enable_debug=True, log_file=sys.argv[2]
)
messages = [{"role": "user", "content": "Hello"}]
answer = engine.chat.completions.create(messages=messages, max_tokens=2)
query = {"messages": messages, "debug_config": {"special_request": "query_engine_metrics"}}
metrics = engine.chat.completions.create(**query).usage.extra  # row 18
assert metrics["tpserve_generation_tokens_total"] == 2, metrics
options = {"stream": True, "stream_options": {"include_usage": True}}
(chunk,) = engine.chat.completions.create(**query, **options)
assert chunk.usage.extra["tpserve_generation_tokens_total"] == 2, chunk
print(answer.usage.completion_tokens, flush=True)
sys.stdin.readline()  # and the program ends without a word to the engine
"""


@pytest.mark.parametrize("how", ["by itself", "killed"])
def test_it_ends_with_the_program(how: str, tiny_folder: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tiny_folder), str(tmp_path / "engine.log")],
        env=environment(mark),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "2\n"
        assert len(processes_of(mark)) > 3
        if how == "killed":
            process.send_signal(signal.SIGKILL)
        else:
            process.communicate("\n", timeout=60)
            assert process.returncode == 0
    until(lambda: not processes_of(mark), within_s=60, what="nothing of the engine is left")
    assert "Traceback" not in (tmp_path / "engine.log").read_text()


def test_it_says_why_it_cannot_start(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with pytest.raises(EngineError, match=r"model '/no/model' does not exist.* \(log: .*engine\.log\)"):
        MLCEngine("/no/model", log_file=log)
    with pytest.raises(EngineError, match=r"--engine-port 70000 is not in 0\.\.65535"):
        MLCEngine("/no/model", engine_port=70000, log_file=log)
