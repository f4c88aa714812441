"""Why an attention call stayed dense: stable codes, each with its meaning and what to do.

Reports, logs, tests and docs use these codes; a code never changes its meaning.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    "cross_attention": "Keys are other tokens than the queries (text, image). Nothing to do.",
    "not_video": "Self-attention over tokens that are not from the patch embedding, such as text. "
    "Nothing to do.",
    "policy_dense": "The policy says dense here. Nothing to do.",
    "no_rule": "No rule of the policy matches this module. Correct the globs, or add one for it.",
    "step_dense": "The policy keeps this denoising step dense. Nothing to do.",
    "layer_dense": "The policy keeps this layer dense. Nothing to do.",
    "layer_unknown": "The policy has dense layers, or windows or chunks by layer, and this graph "
    "does not show which layer it is. Give the policy to cs.attach(model, policy).",
    "layers_mismatch": "The table of windows is for another number of layers. Give it one row, or "
    "one per video attention layer.",
    "nested_graph": "A value that changes from call to call cannot be handed into the control flow "
    "around this call. Use a config without a schedule here.",
    "no_gain": "Automatic mode predicts no speed-up on this grid. Name a mechanism to force it.",
    "too_short": "Automatic mode leaves short sequences dense. Name a mechanism to force it.",
    "layout_unknown": "The token grid is not proven. Pass cs.metadata(grid_thw=(T, H, W)).",
    "gate_missing": "The policy names a learned gate that the module does not have. Add it with "
    "cs.attach(model, policy).",
    "gate_unplaced": "The hidden state of the module's learned gate is not proven: it must be what "
    "queries, keys and values are projected from. Compute the gate in the module and call "
    "cs.attention(gate=...).",
    "gate_unused": "The module has a learned gate, and the policy says ungated. Use gate=None, or "
    "remove the gate.",
    "projection_unfit": "The module's learned projection has another name or size than the policy "
    "needs. Attach again with the policy, or correct its proj=.",
    "partial_grid": "Attention along some grid axes only, spatial or temporal. Already small.",
    "several_grids": "More than one video in one sequence. Not supported.",
    "layout_dynamic": "Dynamic shapes inside activation checkpointing, or two text lengths that "
    "both vary. Compile with dynamic=False.",
    "axes_mismatch": "The config is for another number of grid axes. Pass matching windows.",
    "heads_mismatch": "One window per head was given, for another number of heads.",
    "heads_divided": "The heads of the call are on several processes, and what a head attends to "
    'depends on the others (VMoBA with "overall" or "block"), or is not known not to. Choose '
    "another moba_threshold_type; a foreign config says so with has_separate_heads.",
    "keys_gathered": "The keys of other processes are brought to this one's queries (ring, or all "
    "keys gathered). Divide heads instead: Ulysses.",
    "ring_unsupported": "Keys go round a ring of processes, and the mechanism cannot be computed "
    "for a part of them, or the parts cut its tiles. Divide heads instead (Ulysses).",
    "mask_unsupported": "The attention mask is not provably a key-padding mask.",
    "dropout": "Dropout inside attention. Set the attention dropout to 0.",
    "causal": "Causal attention. The mechanism is not causal token by token.",
    "forward_only": "The mechanism has no backward. Use torch.no_grad(), or name another one.",
    "dtype_unsupported": "The dtype has no kernel. Use float32, bfloat16, float16 or float64.",
    "head_dim_unsupported": "The head size has no kernel.",
    "device_unsupported": "No kernel for this device, or automatic mode on a GPU, where kernels "
    "are not verified yet. Name a mechanism.",
    "rank_unsupported": "Attention tensors are not [batch, heads, length, head_dim].",
    "broadcast_unsupported": "Keys or values are broadcast over the batch or over query heads. "
    "Expand them, or repeat the heads.",
    "other_attention": "Not scaled_dot_product_attention (flex_attention, "
    "multi_head_attention_forward, the kernels of ring attention). Left alone.",
}

EXPECTED_DENSE = frozenset(
    {
        "cross_attention",
        "not_video",
        "policy_dense",
        "no_rule",
        "step_dense",
        "layer_dense",
        "other_attention",
    }
)
"""Reasons that are no disappointment: a named mechanism was not meant for such calls."""
