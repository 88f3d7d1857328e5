"""Make the committed reference outputs with transformers, in float32 on the CPU.

    make goldens        (or: python tests/goldens/make_goldens.py --model SmolLM2-135M-Instruct.gguf)

Writes beside itself
- `smollm2.json`: prompts of the demo model with 64 greedy tokens each, by transformers on the folder that our
  converter writes from the GGUF file, whose bfloat16 weights are widened to float32; and what transformers' own GGUF
  reader, which shares nothing with our converter, says of the same file: sampled weights and token ids.
- `tiny_<model>.npz`: logits of the seeded random models of `tests/tiny_models.py`.
- `rope.json`: inverse frequencies of rotary embeddings under each scaling.

The same versions on the same machine give the same files. A prompt on which the two best logits come closer than
`MIN_GAP` is refused: there two right programs may differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "deploy/python")]

from goldens.golden_prompts import PROMPTS, UNICODE_STRINGS  # noqa: E402
from tiny_models import GOLDEN_POSITIONS, MODELS  # noqa: E402
from tpserve.compile.gguf import convert_gguf  # noqa: E402

NUM_TOKENS = 64
MIN_GAP = 1e-3
NUM_VALUES = 24
SAMPLED_LAYERS = (0, 17)


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Return `NUM_TOKENS` tokens and the gap between the two best logits of each; the end token ends nothing."""
    ids, gaps, cache = [], [], None
    step = torch.tensor([prompt])
    for _ in range(NUM_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = torch.topk(out.logits[0, -1], 2)
        ids.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        step = torch.tensor([[ids[-1]]])
    return ids, gaps


def smollm2(folder: Path) -> list[dict[str, Any]]:
    """Run every prompt on the converted folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    prompts = []
    for name, content in PROMPTS.items():
        if isinstance(content, str):
            ids = tokenizer(content).input_ids
        else:
            text = tokenizer.apply_chat_template(content, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        output, gaps = greedy(model, ids)
        smallest = min(gaps)
        print(f"{name}: {len(ids)} tokens, smallest gap {smallest:.4f}: {tokenizer.decode(output)!r}")
        if smallest < MIN_GAP:
            raise SystemExit(f"{name}: the two best logits come as close as {smallest}: choose another prompt")
        prompts.append(
            {
                "name": name,
                "text" if isinstance(content, str) else "messages": content,
                "prompt_token_ids": ids,
                "output_token_ids": output,
                "gaps": [round(gap, 4) for gap in gaps],
            }
        )
    return prompts


def converter(gguf: Path) -> dict[str, Any]:
    """Ask transformers' own GGUF reader for weights and token ids."""
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else None
        if name == "lm_head.weight" or (layer is not None and int(layer) not in SAMPLED_LAYERS):
            continue
        values = tensor.numpy().ravel()
        indices = np.sort(rng.choice(values.size, NUM_VALUES, replace=False))
        tensors[name] = {
            "shape": list(tensor.shape),
            "mean": float(values.mean(dtype=np.float64)),
            "std": float(values.std(dtype=np.float64)),
            "indices": indices.tolist(),
            "values": [round(float(value), 7) for value in values[indices]],
        }
    tokenizer = AutoTokenizer.from_pretrained(**where)
    ids = {text: tokenizer(text, add_special_tokens=False).input_ids for text in UNICODE_STRINGS}
    return {"tensors": tensors, "token_ids": ids}


def tiny(folder: Path) -> None:
    """Write one npz per tiny model."""
    for model in MODELS.values():
        sha256 = model.write(folder / model.name)
        reference = AutoModelForCausalLM.from_pretrained(
            folder / model.name, dtype=torch.float32, attn_implementation="eager"
        )
        logits = reference(torch.tensor([model.prompt()])).logits[0, list(GOLDEN_POSITIONS)].numpy()
        np.savez_compressed(HERE / f"tiny_{model.name}.npz", logits=logits, weights_sha256=np.array(sha256))


def rope() -> list[dict[str, Any]]:
    """Ask transformers for the inverse frequencies of a few configurations."""
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    cases = []
    for head_dim, parameters in (
        (64, {"rope_type": "default", "rope_theta": 100000.0}),
        (128, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        (128, llama3 | {"rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}),
        (64, llama3 | {"rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}),
        (16, llama3 | {"rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}),
    ):
        config = LlamaConfig(
            hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=parameters
        )
        if parameters["rope_type"] == "default":
            from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

            inv_freq, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            inv_freq, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
        cases.append({"head_dim": head_dim, "rope_parameters": parameters, "inv_freq": inv_freq.tolist()})
    return cases


def main() -> None:
    """Write all goldens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("--only", choices=["smollm2", "tiny", "rope"], help="make only these")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        if args.only in (None, "rope"):
            (HERE / "rope.json").write_text(json.dumps(rope()) + "\n")
        if args.only in (None, "tiny"):
            tiny(Path(scratch))
        if args.only in (None, "smollm2"):
            folder = Path(scratch) / "smollm2"
            folder.mkdir()
            convert_gguf(args.model, folder, lambda done, total: None)
            golden = {"converter": converter(args.model), "prompts": smollm2(folder)}
            (HERE / "smollm2.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
