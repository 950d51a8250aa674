"""What kind of parameter is which, by its published name: the matrices that Muon moves, the rule for the width, groups.

The rule for the width is µP for diffusion transformers (Zheng et al. 2025, "Scaling Diffusion Transformers Efficiently
via µP", arXiv 2505.15270; Yang et al. 2022, "Tensor Programs V", table 8): a rate that was tuned at the width R is
right at a width D, of the same depth and width of a head, after it is multiplied by R/D to the power in `RATE`. The
initial standard deviation is that at R, of hidden matrices times √(R/D), of the output 0.

Adam moves every element by about the rate, whatever the gradient's size. A matrix of n columns then moves its output n
times as far, where all moves agree; so where n grows with the width, the rate falls with it.

An orthogonalised matrix has the spectral norm 1 and moves the elements of its output, [m, n], by up to √(n/m) of those
of its input (Yang et al. 2023, "A Spectral Condition for Feature Learning", arXiv 2310.17813). All matrices that Muon
moves keep m/n over the widths, so with "spectral", √max(1, m/n), the rate stays; "rms", 0.2·√max(m, n), grows as √D,
and the rate has to make up for it.

µP multiplies the model's output by R/D. Here the rate of the final layer is multiplied by it instead, which gives the
same outputs at every step of AdamW, as the final layer is zero at first. So the forward pass is the same at all widths,
and published weights load as they are.
"""

from typing import Literal

Role = Literal["input", "hidden", "output"]
Mover = Literal["adamw", "rms", "spectral"]  # AdamW, or Muon with this scale of its updates

# Exponent of R/D that the learning rate is multiplied by.
RATE: dict[tuple[Role, Mover], float] = {
    ("input", "adamw"): 0.0,  # from pixels, sinusoids and text features; tables, tokens, biases, norms
    ("hidden", "adamw"): 1.0,  # matrices from a hidden vector to hidden vectors
    ("hidden", "rms"): 0.5,
    ("hidden", "spectral"): 0.0,
    ("output", "adamw"): 1.0,  # the final layer's matrix
}

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
_HIDDEN_EMBEDDERS = ("t_embedder.mlp.2.weight", "fps_embedder.mlp.2.weight", "y_embedder.y_proj.fc2.weight")


def chunks_of(name: str) -> int | None:
    """Returns into how many chunks Muon cuts a parameter, by its published name; None where it is AdamW's."""
    ending = name.split(".", 2)[-1] if name.startswith(_BLOCK) else name
    return CHUNKS.get(ending)


def role_of(name: str) -> Role:
    """Returns the role of a parameter in the rule for the width, by its published name."""
    if name == "final_layer.linear.weight":
        return "output"
    return "hidden" if chunks_of(name) is not None or name in _HIDDEN_EMBEDDERS else "input"


def rate_multiplier(name: str, mover: Mover, width: int, reference: int) -> float:
    """Returns what a parameter's learning rate, tuned at the width `reference`, is multiplied by at `width`.

    Args:
        name: published. mover: what moves it.
    """
    return (reference / width) ** RATE[role_of(name), mover]


def initial_multiplier(name: str, width: int, reference: int, columns: int) -> float:
    """Returns what a parameter that `models.dit.init_weights` draws at `width` is multiplied by to follow the rule.

    The blocks' matrices are drawn with 1/√width, as the rule has it; so are the tables. The patch embedding is drawn
    with √(2/(columns + width)), and the other embedders with the same standard deviation at every width.

    Args:
        name: published. reference: R. columns: inputs of the parameter.
    """
    if name.endswith("scale_shift_table"):
        return (width / reference) ** 0.5
    if name == "x_embedder.proj.weight":
        return ((columns + width) / (columns + reference)) ** 0.5
    if role_of(name) == "hidden" and not name.startswith(_BLOCK):
        return (reference / width) ** 0.5
    return 1.0


def kind_of(name: str) -> str:
    """Returns which of `KINDS` a parameter is of, by its published name."""
    part = name.split(".")[2 if name.startswith(_BLOCK) else 0]
    return _KIND_OF_PART.get(part, "embedders")
