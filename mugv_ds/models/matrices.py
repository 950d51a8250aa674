"""What kind of parameter each is: which Muon moves, in which chunks, and how rates and initial sizes follow the width.

This is the one place that says so.

The rule for the width is µP for diffusion transformers (Zheng et al. 2025, "Scaling Diffusion Transformers Efficiently
via µP", arXiv 2505.15270; Yang et al. 2022, "Tensor Programs V", table 8), for a rate that was tuned at the width R and
a model of width D with heads of the same width:

| parameters | AdamW's rate | Muon's, "rms" | Muon's, "spectral" | initial standard deviation |
|---|---|---|---|---|
| input: from pixels, sinusoids and text; tables, biases, norms, tokens | 1 | – | – | that at R |
| hidden: from a hidden vector to one | R/D | √(R/D) | 1 | that at R · √(R/D) |
| output: the final layer | R/D | – | – | 0 |

Adam moves every element by about the rate, whatever the gradient's size; a matrix of n columns then moves its output by
n times as much, where all moves agree. Muon's update has the spectral norm 0.2·√n with "rms", and 1 with "spectral".
µP's multiplier of the output, R/D, is not in the forward pass: AdamW's steps are the same where it multiplies the rate
instead, and the final layer is zero at first. So published weights load as they are.
"""

from typing import Literal

Kind = Literal["input", "hidden", "output"]

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


_HIDDEN = (*CHUNKS, "t_embedder.mlp.2.weight", "fps_embedder.mlp.2.weight", "y_embedder.y_proj.fc2.weight")
_PATCH = "x_embedder.proj.weight"


def kind_of(name: str) -> Kind:
    """Returns the kind of a parameter, by its published name."""
    if name == "final_layer.linear.weight":
        return "output"
    return "hidden" if name.endswith(_HIDDEN) else "input"


def rate_factor(kind: Kind, ratio: float, muon_scale: str | None = None) -> float:
    """Returns what the learning rate of a kind of parameter is multiplied by.

    Args:
        ratio: R/D. muon_scale: "rms" or "spectral" where Muon moves it, see `engine.muon.scale_of`; None for AdamW.
    """
    if muon_scale is not None:
        return ratio**0.5 if muon_scale == "rms" else 1.0
    return 1.0 if kind == "input" else ratio


def initial_factor(name: str, width: int, reference: int, columns: int) -> float:
    """Returns what the initial standard deviation that `models.dit.init_weights` draws with is multiplied by.

    The blocks' linears are drawn with 1/√D already, as are the tables, which are to have 1/√R; the patch embedding with
    √(2/(columns + D)); and the other embedders with 0.02 at every width.

    Args:
        name: published. width, reference: D and R. columns: inputs of the parameter.
    """
    if name.endswith("scale_shift_table"):
        return (width / reference) ** 0.5
    if name == _PATCH:
        return ((columns + width) / (columns + reference)) ** 0.5
    if kind_of(name) == "hidden" and not name.startswith(_BLOCK):
        return (reference / width) ** 0.5
    return 1.0
