"""The decoder of the Llama family. llama, mistral, qwen2 and qwen3 differ only in what `ModelConfig` says."""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor

from tpserve.compile.layers import DecoderLayer, GraphContext, Linear
from tpserve.compile.operators import BatchInputs, GemmInput, all_gather
from tpserve.proto.manifest import ParamSource, ParamSpec


class LlamaForCausalLM(nn.Module):
    """Token ids to logits over paged KV, for one rank.

    Parameters
    ----------
    aux_layers
        Layers before which the residual stream is a further output.
    """

    def __init__(self, context: GraphContext, max_model_len: int, aux_layers: tuple[int, ...] = ()) -> None:
        config, sharding = context.config, context.sharding
        self._context = context
        self._aux_layers = aux_layers
        embedding = "model.embed_tokens.weight"
        self.embed_tokens = context.parameter(
            ParamSpec(
                embedding,
                (config.vocab_size, config.hidden_size),
                context.weight_dtype,
                "plain",
                (ParamSource(embedding),),
            )
        )
        self.rope = context.parameter(ParamSpec("rope", (max_model_len, config.head_dim), "float32", "rope_table"))
        self.layers = nn.ModuleList([DecoderLayer(context, f"model.layers.{i}") for i in range(config.num_layers)])
        self.norm = context.vector("model.norm.weight", config.hidden_size)
        head = embedding if config.tie_word_embeddings else "lm_head.weight"
        self.lm_head = Linear(
            context,
            "lm_head",
            (ParamSource(head, 0, "vocab"),),
            rows=sharding.vocab_size,
            columns=config.hidden_size,
            out_dtype="float32",
            quantized=False,
        )

    def step(
        self,
        token_ids: Tensor,
        positions: Tensor,
        token_slots: Tensor,
        page_table: Tensor,
        sample_rows: Tensor,
        plan: Tensor,
        workspace: Tensor,
        kv: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run one step over a ragged batch.

        Parameters
        ----------
        token_ids, positions, token_slots : (T,) int32
            Each token with its position in its sequence and its slot. All K and V of the step are written before any
            is read, so tokens of one sequence may stand in one step.
        page_table : (S, P) int32
            Page ids by slot.
        sample_rows : (R,) int32
            Tokens whose logits are wanted.
        plan : (words,) int32, workspace : (floats,) float32
            For attention on a GPU; empty on a CPU.
        kv : list of (num_pages, num_kv_heads, 2, head_dim * page_size) float32
            Pages by layer; written in place.

        Returns
        -------
        logits : (R, padded vocabulary) float32
            The same on every rank; columns past the vocabulary mean nothing. On GPUs (R, padded vocabulary / ranks):
            the rank's own columns.
        hidden : (R, hidden size), in the type of activations
            The final norm's rows, from which the logits are computed.
        aux : (T, layers * hidden size), in the type of activations
            With `aux_layers`: the residual stream before each of them, side by side, of every token.
        """
        config, operators = self._context.config, self._context.operators
        batch = BatchInputs(positions, token_slots, page_table, self.rope, plan, workspace)
        residual = operators.embed(token_ids, self.embed_tokens)
        x = operators.rms_norm(residual, self.layers[0].input_norm, config.rms_norm_eps)
        next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        tp_size = self._context.sharding.tp_size
        streams: list[Tensor] = []  # before each of `aux_layers`
        # Of the last layer, a token whose logits are not wanted, as most of a prompt, needs keys and values alone.
        within = operators.takes_rows_within(tp_size)
        for index, (layer, pages, next_norm) in enumerate(zip(self.layers, kv, next_norms, strict=True)):
            if index in self._aux_layers:
                streams.append(operators.whole_rows(residual, tp_size))
            rows = sample_rows if within and next_norm is self.norm else None
            residual, x = layer.attention(x, batch, pages, residual, layer.post_attention_norm, rows)
            residual, x = layer.mlp(x, residual, next_norm, quantize=next_norm is not self.norm)
        hidden = x.values if within else operators.take_rows(x.values, sample_rows)
        logits = self.lm_head(GemmInput(hidden))
        if tp_size > 1 and not self._context.logits_by_rank:
            logits = all_gather(logits, tp_size)
        if not self._aux_layers:
            return logits, hidden
        return logits, hidden, operators.concat(streams)
