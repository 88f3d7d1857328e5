"""The EAGLE-3 head: a decoder layer that goes on from a model's own hidden rows, for one rank.

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test", 2025. The row
of a token is made of three of the target's layers; with the embedding of the token behind it, the head guesses the one
behind that, and a row that stands for the target's.
"""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from tpserve.compile.eagle import EagleHeadConfig
from tpserve.compile.layers import MLP, Attention, GraphContext, Linear
from tpserve.compile.operators import BatchInputs, GemmInput, all_gather
from tpserve.proto.manifest import ParamSource, ParamSpec

TARGET_EMBEDDING = "model.embed_tokens.weight"


class Eagle3Head(nn.Module):
    """Hidden rows and token ids to draft logits over paged KV, for one rank.

    A pair is the row of a token and the token behind it; it has the position of the former.
    """

    def __init__(self, context: GraphContext, head: EagleHeadConfig, max_model_len: int) -> None:
        config, sharding = context.config, context.sharding
        hidden = config.hidden_size
        self._context = context
        self._norm_before_residual = head.norm_before_residual
        own = "embed_tokens.weight"
        shape = (head.target_vocab_size, hidden)
        self.embed_tokens = context.parameter(
            ParamSpec(own, shape, context.weight_dtype, "plain", (ParamSource(own),))
            if head.has_embedding
            else ParamSpec(TARGET_EMBEDDING, shape, context.weight_dtype, "shared")
        )
        self.rope = context.parameter(ParamSpec("rope", (max_model_len, config.head_dim), "float32", "rope_table"))
        self.fc = Linear(
            context,
            "fc",
            (ParamSource("fc.weight", 0, "hidden"),),
            rows=sharding.splits["hidden"].block,
            columns=head.num_row_values,
            quantized=False,
        )
        self.input_norm = context.vector(f"{head.layer_name}.input_layernorm.weight", hidden)
        self.hidden_norm = context.vector(f"{head.layer_name}.hidden_norm.weight", hidden)
        self.attention = Attention(context, f"{head.layer_name}.self_attn", columns=2 * hidden)
        self.post_attention_norm = context.vector(f"{head.layer_name}.post_attention_layernorm.weight", hidden)
        self.mlp = MLP(context, f"{head.layer_name}.mlp")
        self.norm = context.vector("norm.weight", hidden)
        self.lm_head = Linear(
            context,
            "lm_head",
            (ParamSource("lm_head.weight", 0, "vocab"),),
            rows=sharding.vocab_size,
            columns=hidden,
            out_dtype="float32",
            quantized=False,
        )

    def project(self, rows: Tensor) -> Tensor:
        """(T, 3 * target's hidden size) of the target's layers, side by side -> (T, hidden size), on every rank."""
        out = self.fc(GemmInput(rows))
        tp_size, hidden = self._context.sharding.tp_size, self._context.config.hidden_size
        if tp_size > 1:
            out = all_gather(out, tp_size)
        # Where ranks do not divide the hidden size, the last ones have rows of zeros behind it.
        return out if out.shape[1] == hidden else op.split(out, [hidden], axis=-1)[0]

    def append(
        self,
        token_ids: Tensor,
        positions: Tensor,
        token_slots: Tensor,
        page_table: Tensor,
        hidden: Tensor,
        kv: list[Tensor],
    ) -> Tensor:
        """Write K and V of pairs to the pages, and compute nothing else; each argument as in `step`.

        Returns
        -------
        (T, query heads, head size) float32
            The rotated queries, which nobody needs.
        """
        nothing = positions  # there is no attention, which would take a plan and a workspace
        batch = BatchInputs(positions, token_slots, page_table, self.rope, nothing, nothing)
        both, _ = self._normed(token_ids, hidden)
        return self.attention.append(GemmInput(both), batch, kv[0])

    def step(
        self,
        token_ids: Tensor,
        positions: Tensor,
        token_slots: Tensor,
        page_table: Tensor,
        sample_rows: Tensor,
        plan: Tensor,
        workspace: Tensor,
        hidden: Tensor,
        kv: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Run one step over a ragged batch of pairs.

        Parameters
        ----------
        token_ids : (T,) int32
            The target's ids of the tokens behind.
        positions, token_slots : (T,) int32
            Of the tokens that the rows are of. All K and V of the step are written before any is read.
        page_table, sample_rows, plan, workspace
            As in `LlamaForCausalLM.step`.
        hidden : (T, hidden size), in the type of activations
            Rows by `project`, or what an earlier step returned.
        kv : list of (num_pages, num_kv_heads, 2, head_dim * page_size)
            One layer's pages; written in place.

        Returns
        -------
        logits : (R, padded draft vocabulary) float32
            Of the tokens behind those, by the head's own ids. The same on every rank.
        rows : (R, hidden size), in the type of activations
            The residual stream, before the norm: in place of the target's rows of `token_ids`.
        """
        operators = self._context.operators
        tp_size = self._context.sharding.tp_size
        batch = BatchInputs(positions, token_slots, page_table, self.rope, plan, workspace)
        both, normed = self._normed(token_ids, hidden)
        residual = normed if self._norm_before_residual else hidden
        residual, x = self.attention(GemmInput(both), batch, kv[0], residual, self.post_attention_norm)
        residual, x = self.mlp(x, residual, self.norm, quantize=False)
        logits = self.lm_head(GemmInput(operators.take_rows(x.values, sample_rows)))
        if tp_size > 1:
            logits = all_gather(logits, tp_size)
        return logits, operators.take_rows(operators.whole_rows(residual, tp_size), sample_rows)

    def _normed(self, token_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's input, (T, 2 * hidden size), and its half that is of the rows."""
        eps, operators = self._context.config.rms_norm_eps, self._context.operators
        embedding = operators.embed(token_ids, self.embed_tokens)
        normed = operators.rms_norm(hidden, self.hidden_norm, eps).values
        return operators.concat([operators.rms_norm(embedding, self.input_norm, eps).values, normed]), normed
