"""A last layer that makes the class token alone gives the logits of one that makes all, or is not put in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from pipeline.class_token import ClassTokenLayer, narrow_last_layer

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IMAGES = {"image_size": 16, "patch_size": 4, "num_labels": 7}


def _network(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")(**SIZES, **IMAGES, **options)
    network = getattr(transformers, kind)(config).eval()
    for parameter in network.parameters():  # as they come, biases are zero and the position of a token tells nothing
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def _logits(network: Any, images_NCHW: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = network(pixel_values=images_NCHW).logits
    return logits


@pytest.fixture(name="images_NCHW")
def _images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTForImageClassification", {}),
        ("ViTForImageClassification", {"qkv_bias": False, "attn_implementation": "eager", "hidden_act": "relu"}),
        ("DeiTForImageClassification", {}),
        ("ViTMSNForImageClassification", {}),
    ],
)
def test_the_logits_are_those_of_the_whole_layer(kind: str, options: dict[str, Any], images_NCHW: torch.Tensor) -> None:
    network = _network(kind, **options)
    expected_NC = _logits(network, images_NCHW)

    assert narrow_last_layer(network, images_NCHW[:1])

    torch.testing.assert_close(_logits(network, images_NCHW), expected_NC, rtol=1e-5, atol=1e-5)


def test_the_last_layer_makes_one_token(images_NCHW: torch.Tensor) -> None:
    network = _network("ViTForImageClassification")
    narrow_last_layer(network, images_NCHW)

    with torch.inference_mode():
        assert network.vit(images_NCHW).last_hidden_state.shape == (5, 1, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_allowed_its_rounding(dtype: torch.dtype, images_NCHW: torch.Tensor) -> None:
    assert narrow_last_layer(_network("ViTForImageClassification").to(dtype), images_NCHW.to(dtype))


@pytest.mark.parametrize("kind", ["DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification"])
def test_heads_that_read_more_than_the_class_token_keep_the_whole_layer(kind: str, images_NCHW: torch.Tensor) -> None:
    network = _network(kind)

    assert not narrow_last_layer(network, images_NCHW)

    assert not any(isinstance(part, ClassTokenLayer) for part in network.modules())


def test_a_network_that_is_not_what_its_name_says_keeps_the_whole_layer(images_NCHW: torch.Tensor) -> None:
    class OtherHead(transformers.ViTForImageClassification):
        def forward(self, pixel_values: torch.Tensor) -> Any:
            tokens_NTD = self.vit(pixel_values).last_hidden_state
            return transformers.modeling_outputs.ImageClassifierOutput(logits=self.classifier(tokens_NTD.mean(1)))

    OtherHead.__name__ = "ViTForImageClassification"
    network = OtherHead(_network("ViTForImageClassification").config).eval()
    expected_NC = _logits(network, images_NCHW)

    assert not narrow_last_layer(network, images_NCHW)

    torch.testing.assert_close(_logits(network, images_NCHW), expected_NC, rtol=0, atol=0)


def test_a_network_whose_parts_have_other_names_keeps_the_whole_layer(images_NCHW: torch.Tensor) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self, block: torch.nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *inputs: Any, **options: Any) -> torch.Tensor:
            tokens_NTD: torch.Tensor = self.block(*inputs, **options)
            return tokens_NTD

    network = _network("ViTForImageClassification")
    network.vit.layers[-1] = last = Renamed(network.vit.layers[-1])

    assert not narrow_last_layer(network, images_NCHW)

    assert network.vit.layers[-1] is last


def test_a_network_whose_layers_are_elsewhere_is_left_alone(images_NCHW: torch.Tensor) -> None:
    network = _network("ViTForImageClassification")
    expected_NC = _logits(network, images_NCHW)
    network.base_model_prefix = "classifier"  # which has no layers

    assert not narrow_last_layer(network, images_NCHW)

    torch.testing.assert_close(_logits(network, images_NCHW), expected_NC, rtol=0, atol=0)
