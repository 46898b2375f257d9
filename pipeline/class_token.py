"""The last layer of a vision transformer for its class token alone.

Heads of these models read the class token and no other, so what the last layer makes of the others is thrown away. Keys
and values are made of all tokens still; queries, the layer's output and its MLP, of one. A ViT of 12 layers does a
fourteenth less work, with the same result but for rounding.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Their heads read the class token and no other
HEADS = ("ViTForImageClassification", "DeiTForImageClassification", "ViTMSNForImageClassification")
ROUNDING = 32  # times the precision of the dtype: how far logits may differ, relative to the largest


class ClassTokenLayer(torch.nn.Module):
    """A ViT's layer: tokens [N, T, D] in, its class token [N, 1, D] out."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens_NTD: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        layer, attention = self.layer, self.layer.attention
        normed_NTD = layer.layernorm_before(tokens_NTD)
        heads_N1D = scaled_dot_product_attention(
            _by_head(attention.q_proj(normed_NTD[:, :1]), attention.head_dim),
            _by_head(attention.k_proj(normed_NTD), attention.head_dim),
            _by_head(attention.v_proj(normed_NTD), attention.head_dim),
            scale=attention.scaling,
        )
        token_N1D = tokens_NTD[:, :1] + attention.o_proj(heads_N1D.transpose(1, 2).flatten(2))
        class_N1D: torch.Tensor = token_N1D + layer.mlp(layer.layernorm_after(token_N1D))
        return class_N1D


def narrow_last_layer(network: Any, images_NCHW: torch.Tensor) -> bool:
    """Replaces the last layer of an image classifier of transformers, and says whether it did.

    It leaves a network alone that it does not know, or whose logits for the images would not be what they were.
    """
    layers = getattr(network.base_model, "layers", None)  # other releases of transformers have had them elsewhere
    if type(network).__name__ not in HEADS or layers is None:
        return False
    whole, same = layers[-1], False
    with suppress(Exception), torch.inference_mode():  # transformers promises no names for parts, nor kinds of errors
        expected = network(pixel_values=images_NCHW).logits
        layers[-1] = ClassTokenLayer(whole)
        allowed = ROUNDING * torch.finfo(expected.dtype).eps * expected.abs().max()
        same = bool(((network(pixel_values=images_NCHW).logits - expected).abs() <= allowed).all())
    if not same:
        layers[-1] = whole
    return same


def _by_head(states_NTD: torch.Tensor, head_dim: int) -> torch.Tensor:
    return states_NTD.view(*states_NTD.shape[:-1], -1, head_dim).transpose(1, 2)
