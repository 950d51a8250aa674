"""Which parameters are matrices that Muon moves, and into which chunks each is cut: the one place that says so."""

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
_BLOCK = "blocks."  # before the names of a block's parameters; `t_block` is the model's


def chunks_of(name: str) -> int | None:
    """Returns into how many chunks Muon cuts a parameter, by its published name; None where it is AdamW's."""
    ending = name.split(".", 2)[-1] if name.startswith(_BLOCK) else name
    return CHUNKS.get(ending)
