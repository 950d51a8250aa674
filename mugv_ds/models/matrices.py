"""What kind of parameter is which, by its published name: the matrices that Muon moves, in which chunks; groups."""

# Chunks of rows of a matrix, by what its published name ends in (CMuon, arXiv 2608.02502): q, k and v apart, k and v of
# the text, and the six rows of adaLN. Every other parameter is AdamW's: embedders, tables, norms, biases, final layer.
CHUNKS = {
    "attn.qkv.weight": 3,
    "attn.proj.weight": 1,
    "cross_attn.q_linear.weight": 1,
    "cross_attn.kv_linear.weight": 2,
    "cross_attn.proj.weight": 1,
    "mlp.fc1.weight": 1,
    "mlp.fc2.weight": 1,
    "t_block.1.weight": 6,
}
# Groups whose norms are watched, by the part of a block, or of the model, that a name begins with.
KINDS = ("embedders", "modulation", "attention", "cross_attention", "feed_forward", "final_layer")
_KIND_OF_PART = {
    "scale_shift_table": "modulation",
    "attn": "attention",
    "cross_attn": "cross_attention",
    "cross_attn_norm": "cross_attention",
    "mlp": "feed_forward",
    "t_block": "modulation",
    "final_layer": "final_layer",
}
_BLOCK = "blocks."  # before the names of a block's parameters; `t_block` is the model's


def chunks_of(name: str) -> int | None:
    """Returns into how many chunks Muon cuts a parameter, by its published name; None where it is AdamW's."""
    ending = name.split(".", 2)[-1] if name.startswith(_BLOCK) else name
    return CHUNKS.get(ending)


def kind_of(name: str) -> str:
    """Returns which of `KINDS` a parameter is of, by its published name."""
    part = name.split(".")[2 if name.startswith(_BLOCK) else 0]
    return _KIND_OF_PART.get(part, "embedders")
