"""From a model and a compile configuration to an executable: the graph, then the passes as one list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import spec

from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.eagle import EagleHeadConfig
from tpserve.compile.layers import GraphContext
from tpserve.compile.models.eagle3 import Eagle3Head
from tpserve.compile.models.llama import LlamaForCausalLM
from tpserve.compile.operators import Operators
from tpserve.compile.portable_operators import PortableOperators
from tpserve.compile.sharding import Sharding, shard, shard_head
from tpserve.compile.tuned_operators import TunedOperators
from tpserve.proto.manifest import ParamSpec

WEIGHT_DTYPES = {"q0f32": "float32", "q0bf16": "bfloat16", "fp8": "bfloat16"}
"""Of what is not quantised."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A model as relax functions, with what fills its parameters."""

    module: tvm.IRModule
    params: tuple[ParamSpec, ...]
    """In the order its functions take them."""
    sharding: Sharding
    externs: tuple[str, ...]
    """Global names that its functions call."""


def build_graph(config: ModelConfig, compile_config: CompileConfig) -> Graph:
    """Write the model in relax: one function `step` (see `LlamaForCausalLM.step`)."""
    context = _context(config, shard(config, compile_config.tp_size), compile_config)
    model = LlamaForCausalLM(context, compile_config.max_model_len, compile_config.aux_layers)
    return _export(model, {"step": _batch_spec(context, compile_config)}, context, compile_config)


def build_head_graph(head: EagleHeadConfig, compile_config: CompileConfig) -> Graph:
    """Write an EAGLE-3 head in relax: functions `project`, `append` and `step` (see `Eagle3Head`)."""
    head.check_compile(compile_config)
    context = _context(head.layer, shard_head(head.layer, compile_config.tp_size), compile_config)
    dtype = compile_config.activation_dtype
    step = _batch_spec(context, compile_config)
    kv = step.pop("kv")
    step |= {"hidden": spec.Tensor(["num_tokens", head.layer.hidden_size], dtype), "kv": kv}
    project = {"rows": spec.Tensor(["num_tokens", head.num_row_values], dtype)}
    model = Eagle3Head(context, head, compile_config.max_model_len)
    append = {name: step[name] for name in ("token_ids", "positions", "token_slots", "page_table", "hidden", "kv")}
    return _export(model, {"project": project, "append": append, "step": step}, context, compile_config)


def _context(config: ModelConfig, sharding: Sharding, compile_config: CompileConfig) -> GraphContext:
    """Return what the layers of one graph share."""
    on_gpu = compile_config.target == "cuda"
    dtype = compile_config.activation_dtype
    quantized = compile_config.quantization == "fp8"
    operators: Operators = PortableOperators(dtype, quantize=quantized)
    if compile_config.kernels == "tuned":
        operators = TunedOperators("cuda" if on_gpu else "cpu", dtype, quantize=quantized)
    return GraphContext(
        config,
        sharding,
        operators,
        WEIGHT_DTYPES[compile_config.quantization],
        compile_config.page_size,
        "wgmma64x256g132" if on_gpu else "panel16",
        quantized,
        compile_config.kv_cache_dtype == "fp8",
        logits_by_rank=on_gpu,
    )


def _batch_spec(context: GraphContext, compile_config: CompileConfig) -> dict[str, Any]:
    """Return the arguments of a step over a ragged batch."""
    config = context.config
    page_values = config.head_dim * compile_config.page_size
    page = spec.Tensor(["num_pages", context.sharding.num_kv_heads, 2, page_values], compile_config.page_dtype)
    return {
        "token_ids": spec.Tensor(["num_tokens"], "int32"),
        "positions": spec.Tensor(["num_tokens"], "int32"),
        "token_slots": spec.Tensor(["num_tokens"], "int32"),
        "page_table": spec.Tensor(["num_slots", "max_pages"], "int32"),
        "sample_rows": spec.Tensor(["num_rows"], "int32"),
        "plan": spec.Tensor(["plan_words"], "int32"),
        "workspace": spec.Tensor(["workspace_floats"], "float32"),
        "kv": [page] * config.num_layers,
    }


def _export(
    model: nn.Module, functions: dict[str, dict[str, Any]], context: GraphContext, compile_config: CompileConfig
) -> Graph:
    """Write a module's methods as functions of one graph, given the arguments of each."""
    modes = {"$": {"param_mode": "packed", "effect_mode": "none"}}
    module, params = model.export_tvm({name: arguments | modes for name, arguments in functions.items()})
    bounds = {"num_tokens": compile_config.max_num_batched_tokens, "num_rows": compile_config.max_num_rows}
    for name in functions:
        module[name] = (
            module[name]
            .with_attr("tir_var_upper_bound", bounds)
            .with_attr("relax.memory_plan_dynamic_func_output", True)
        )
    specs = tuple(context.specs[id(parameter)] for _, parameter in params)
    return Graph(module, specs, context.sharding, _externs(module, functions))


def lower(module: tvm.IRModule, target: tvm.target.Target) -> tuple[relax.VMExecutable, int]:
    """Run the passes and generate code.

    Returns
    -------
    The executable, and the bytes of temporary storage that memory planning gives its functions at the upper bounds.
    """
    passes = relax.transform
    plan = [
        # Operators to TIR, elementwise neighbours fused.
        passes.LegalizeOps(),
        passes.AnnotateTIROpPattern(),
        passes.FoldConstant(),
        passes.FuseOps(),
        passes.FuseTIR(),
        passes.DeadCodeElimination(),
        # Calls in destination-passing form, memory planned to the upper bounds.
        passes.RewriteDataflowReshape(),
        passes.ToNonDataflow(),
        passes.RemovePurityChecking(),
        passes.CallTIRRewrite(),
        passes.StaticPlanBlockMemory(),
    ]
    to_vm = [
        passes.LowerAllocTensor(),
        passes.KillAfterLastUse(),
        passes.LowerRuntimeBuiltin(),
        passes.ComputePrimValue(),
        passes.VMShapeLower(),
        passes.AttachGlobalSymbol(),
    ]
    with target:
        module = tvm.transform.Sequential(plan)(module)
        functions = [function for function in module.functions.values() if isinstance(function, relax.Function)]
        workspace_bytes = sum(map(_planned_bytes, functions))
        module = tvm.transform.Sequential(to_vm)(module)
        return tvm.compile(module, target=target, relax_pipeline=None), workspace_bytes


def _externs(module: tvm.IRModule, functions: Iterable[str]) -> tuple[str, ...]:
    """List the global functions that a graph's functions call by name."""
    names: set[str] = set()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.ExternFunc):
            names.add(str(expr.global_symbol))

    for function in functions:
        relax.analysis.post_order_visit(module[function], visit)
    return tuple(sorted(names))


def _planned_bytes(function: relax.Function) -> int:
    """Sum the sizes of the storages that memory planning allocated."""
    total = 0

    def visit(expr: relax.Expr) -> None:
        nonlocal total
        if isinstance(expr, relax.Call) and expr.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            total += int(expr.args[0].values[0])

    relax.analysis.post_order_visit(function, visit)
    return total
