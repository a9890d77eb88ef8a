"""Where in a model's layers numbers are looked at: names of points, what they belong to, and what they are called."""

from __future__ import annotations

GROUPS = {
    "embed": "residual",
    "resid_in": "residual",
    "norm_in": "residual",
    "attn_in": "matmul",
    "q": "matmul",
    "k": "matmul",
    "v": "matmul",
    "q_normed": "matmul",
    "k_normed": "matmul",
    "attn_scores": "scores",
    "attn_ctx": "matmul",
    "attn_out": "matmul",
    "attn_normed": "norm",
    "resid_mid": "residual",
    "mlp_in": "matmul",
    "mlp_gate": "matmul",
    "mlp_up": "matmul",
    "mlp_act": "matmul",
    "mlp_out": "matmul",
    "mlp_normed": "norm",
    "resid_add": "residual",
    "resid_out": "residual",
    "final_norm": "matmul",
    "logits": "matmul",
}
"""Point -> whether it belongs to the residual stream, to the norms after sublayers, or goes into or comes out of a product.
Under dtype=fp16 only the last are in fp16. Scores are a bound, |query| times the longest key, and no measurement."""

WORDS = {
    "embed": "the embedding",
    "resid_in": "the input",
    "norm_in": "the input, as it arrived on the layer's device,",
    "attn_in": "the norm before attention",
    "q": "the queries",
    "k": "the keys",
    "v": "the values",
    "q_normed": "the norm of the queries",
    "k_normed": "the norm of the keys",
    "attn_scores": "the attention scores",
    "attn_ctx": "attention",
    "attn_out": "the output projection of attention",
    "attn_normed": "the norm after attention",
    "resid_mid": "the residual add after attention",
    "mlp_in": "the norm before the MLP",
    "mlp_gate": "the gate of the MLP",
    "mlp_up": "the up-projection of the MLP",
    "mlp_act": "the activations inside the MLP",
    "mlp_out": "the output of the MLP",
    "mlp_normed": "the norm after the MLP",
    "resid_add": "the residual add after the MLP",
    "resid_out": "the residual add after the MLP",
    "final_norm": "the final norm",
    "logits": "the logits",
}
"""Point -> in words; of a layer, but for those outside."""

OUTSIDE = ("embed", "final_norm", "logits")
"""Points of no layer."""


def place(point: str, layer: int, steered: bool = False) -> str:
    """A point in words, such as "the residual add after the MLP of layer 9"."""
    if steered and point == "resid_out":
        return f"the steering at layer {layer}"
    words = WORDS[point]
    return words if point in OUTSIDE else f"{words} of layer {layer}"
