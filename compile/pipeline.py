"""From a model and a compile configuration to an executable: the graph, then the passes as one list."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax
from tvm.relax.frontend.nn import spec

from tpserve.compile.config import CompileConfig, ModelConfig
from tpserve.compile.layers import GraphContext
from tpserve.compile.models.llama import LlamaForCausalLM
from tpserve.compile.operators import Operators, PortableOperators, TunedOperators
from tpserve.compile.sharding import Sharding, shard
from tpserve.proto.manifest import ParamSpec

WEIGHT_DTYPES = {"q0f32": "float32", "q0bf16": "bfloat16", "fp8": "bfloat16"}
"""Of what is not quantised."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A model as relax functions, with what fills its parameters."""

    module: tvm.IRModule
    params: tuple[ParamSpec, ...]
    """In the order `step` takes them."""
    sharding: Sharding
    externs: tuple[str, ...]
    """Global names that `step` calls."""


def build_graph(config: ModelConfig, compile_config: CompileConfig) -> Graph:
    """Write the model in relax: one function `step` (see `LlamaForCausalLM.step`)."""
    sharding = shard(config, compile_config.tp_size)
    on_gpu = compile_config.target == "cuda"
    dtype = compile_config.activation_dtype
    quantized = compile_config.quantization == "fp8"
    operators: Operators = PortableOperators(dtype, quantize=quantized)
    if compile_config.kernels == "tuned":
        operators = TunedOperators("cuda" if on_gpu else "cpu", dtype, quantize=quantized)
    context = GraphContext(
        config,
        sharding,
        operators,
        WEIGHT_DTYPES[compile_config.quantization],
        compile_config.page_size,
        "wgmma64x256g132" if on_gpu else "panel16",
        quantized,
        compile_config.kv_cache_dtype == "fp8",
    )
    model = LlamaForCausalLM(context, compile_config.max_model_len)
    page_values = config.head_dim * compile_config.page_size
    page = spec.Tensor(["num_pages", sharding.num_kv_heads, 2, page_values], compile_config.page_dtype)
    step_spec = {
        "token_ids": spec.Tensor(["num_tokens"], "int32"),
        "positions": spec.Tensor(["num_tokens"], "int32"),
        "token_slots": spec.Tensor(["num_tokens"], "int32"),
        "page_table": spec.Tensor(["num_slots", "max_pages"], "int32"),
        "sample_rows": spec.Tensor(["num_rows"], "int32"),
        "plan": spec.Tensor(["plan_words"], "int32"),
        "workspace": spec.Tensor(["workspace_floats"], "float32"),
        "kv": [page] * config.num_layers,
        "$": {"param_mode": "packed", "effect_mode": "none"},
    }
    module, params = model.export_tvm({"step": step_spec})
    bounds = {"num_tokens": compile_config.max_num_batched_tokens, "num_rows": compile_config.max_num_rows}
    module["step"] = (
        module["step"].with_attr("tir_var_upper_bound", bounds).with_attr("relax.memory_plan_dynamic_func_output", True)
    )
    specs = tuple(context.specs[id(parameter)] for _, parameter in params)
    return Graph(module, specs, sharding, _externs(module["step"]))


def lower(module: tvm.IRModule, target: tvm.target.Target) -> tuple[relax.VMExecutable, int]:
    """Run the passes and generate code.

    Returns
    -------
    The executable, and the bytes of temporary storage that memory planning gives one step at the upper bounds.
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
        workspace_bytes = _planned_bytes(module["step"])
        module = tvm.transform.Sequential(to_vm)(module)
        return tvm.compile(module, target=target, relax_pipeline=None), workspace_bytes


def _externs(function: relax.Function) -> tuple[str, ...]:
    """List the global functions that a graph calls by name."""
    names: set[str] = set()

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, relax.ExternFunc):
            names.add(str(expr.global_symbol))

    relax.analysis.post_order_visit(function, visit)
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
