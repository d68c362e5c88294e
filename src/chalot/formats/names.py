"""chalot's tensor names to Hugging Face's: one table. {i} stands for the layer, {e} for the expert.

Gemma 2's post_attention_layernorm is another norm than everybody else's: so it has another name
here, and the norm before the feed-forward has two.
"""

HUGGING_FACE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.query": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.key": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.value": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.query_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.key_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.attention_inner_norm": "model.layers.{i}.self_attn.attn_sub_norm.weight",
    "layers.{i}.output": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.attention_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.ffn_pre_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.up": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.ffn_inner_norm": "model.layers.{i}.mlp.ffn_sub_norm.weight",
    "layers.{i}.ffn_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
    "layers.{i}.down": "model.layers.{i}.mlp.down_proj.weight",
    "layers.{i}.router": "model.layers.{i}.mlp.gate.weight",
    "layers.{i}.experts.{e}.gate": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    "layers.{i}.experts.{e}.up": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    "layers.{i}.experts.{e}.down": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
    "layers.{i}.shared.gate": "model.layers.{i}.mlp.shared_expert.gate_proj.weight",
    "layers.{i}.shared.up": "model.layers.{i}.mlp.shared_expert.up_proj.weight",
    "layers.{i}.shared.down": "model.layers.{i}.mlp.shared_expert.down_proj.weight",
    "layers.{i}.shared_router": "model.layers.{i}.mlp.shared_expert_gate.weight",
}


def hugging_face(name: str) -> str:
    """The checkpoint's name of a tensor: "layers.3.query.bias" -> "...layers.3...q_proj.bias"."""
    stem, _, bias = name.partition(".bias") if name.endswith(".bias") else (name, "", None)
    parts = stem.split(".")
    if parts[0] == "layers":
        rest, expert = parts[2:], ""
        if rest[0] == "experts" and len(rest) == 3:
            expert, rest[1] = rest[1], "{e}"
        found = HUGGING_FACE[f"layers.{{i}}.{'.'.join(rest)}"].format(i=parts[1], e=expert)
    else:
        found = HUGGING_FACE[stem]
    return found if bias is None else found.removesuffix("weight") + "bias"
