"""Per-layer shapes: hand-computed MACs, every architecture, and a model left as it was found."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf import Allocation, make_searchable
from fliqs_hf.cost import LayerInfo, example_image, trace_layers, unlisted_bytes, weight_bytes
from fliqs_hf.errors import AllocationError, ConfigError
from fliqs_hf.nn import pack_model, quantizable_layers
from tests.helpers.models import ARCHITECTURES, images, tiny


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


def by_name(layers: tuple[LayerInfo, ...]) -> dict[str, LayerInfo]:
    return {layer.name: layer for layer in layers}


def test_macs_of_a_vit_by_hand() -> None:
    # 32 × 32 image, patch 8: 16 patches, 17 tokens with [CLS]; width 32, MLP 48, 5 labels, 2 blocks.
    layers = trace_layers(tiny("vit"))
    found = by_name(layers)
    block = [17 * 32 * 32] * 4 + [17 * 32 * 48] * 2
    patch, classifier = 16 * 32 * (3 * 8 * 8), 32 * 5
    assert [layer.macs for layer in layers] == [patch, *block, *block, classifier]
    assert layers[0].kind == "conv2d" and (layers[0].weight_numel, layers[0].out_channels) == (32 * 3 * 64, 32)
    assert found["classifier"] == LayerInfo("classifier", "linear", 160, 160, 5, layers[-1].input_group, 32, 5)


CONVOLUTIONS: tuple[tuple[dict[str, Any], tuple[int, int], int], ...] = (
    # arguments of Conv2d, output (height, width) for a 12 × 10 input worked out by hand, weights per output channel
    ({"in_channels": 6, "out_channels": 4, "kernel_size": 3}, (10, 8), 6 * 9),
    ({"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1, "stride": 2}, (6, 5), 6 * 9),
    ({"in_channels": 6, "out_channels": 4, "kernel_size": 3, "dilation": 2}, (8, 6), 6 * 9),
    (
        {"in_channels": 6, "out_channels": 4, "kernel_size": (1, 5), "padding": (0, 2), "stride": (3, 1)},
        (4, 10),
        6 * 5,
    ),
    ({"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3, "padding": "same"}, (12, 10), 2 * 9),
    ({"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6, "padding": 1}, (12, 10), 1 * 9),
)


@pytest.mark.parametrize(("arguments", "out_size", "per_channel"), CONVOLUTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_convolutions_by_hand(
    arguments: dict[str, Any], out_size: tuple[int, int], per_channel: int, batch: int
) -> None:
    model = nn.Sequential(nn.Conv2d(**arguments))
    (layer,) = trace_layers(model, torch.zeros(batch, 6, 12, 10))
    out = arguments["out_channels"]
    outputs = out * out_size[0] * out_size[1]
    elements = (6 * 12 * 10, outputs)
    assert layer == LayerInfo("0", "conv2d", outputs * per_channel, out * per_channel, out, 0, *elements)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_on_every_kind_of_layer(architecture: str) -> None:
    """Plain, searchable, packed and weightless models have the same shapes, and no layer is missed."""
    model = tiny(architecture)
    inputs = images(1)
    layers = trace_layers(model, inputs)
    rest = {layer.name for layer in layers if not layer.quantizable}
    fused = {f"vision_model.head.attention.{part}" for part in ("in_proj_weight", "out_proj")}
    assert rest == (fused if architecture == "siglip" else set())
    assert {layer.name for layer in layers} - rest == set(quantizable_layers(model))
    for layer in layers:
        if not layer.quantizable:
            continue
        weight = model.get_submodule(layer.name).weight
        assert (layer.weight_numel, layer.out_channels) == (weight.numel(), len(weight))

    cls, config = ARCHITECTURES[architecture]
    weightless = on_meta(cls, config())
    assert trace_layers(weightless, inputs.to("meta")) == layers
    assert next(weightless.parameters()).is_meta
    if hasattr(config(), "image_size") or hasattr(config(), "vision_config"):
        assert trace_layers(weightless) == layers

    switch = make_searchable(model, ["int4", "e4m3"])
    assert trace_layers(model, inputs) == layers
    pack_model(model, Allocation.uniform(switch.names, "e2m1", "int8"))
    assert trace_layers(model, inputs) == layers


@pytest.mark.parametrize("architecture", ["vit", "deit", "deit-distilled", "beit", "dinov2", "swin", "siglip", "clip"])
def test_queries_keys_and_values_share_an_input(architecture: str) -> None:
    groups: dict[int, list[str]] = {}
    for layer in trace_layers(tiny(architecture)):
        groups.setdefault(layer.input_group, []).append(layer.name)
    shared = [[name.rpartition(".") for name in names] for names in groups.values() if len(names) > 1]
    assert len(shared) == (3 if architecture == "swin" else 2)  # one per block, and no others
    for names in shared:
        assert len({parent for parent, _, _ in names}) == 1
        assert sorted(leaf[0] for _, _, leaf in names) == ["k", "q", "v"]  # q_proj or query, by version


def test_the_first_convolution_and_the_shortcut_of_a_stage_share_an_input() -> None:
    found = by_name(trace_layers(tiny("resnet"), images(1)))
    stage = "resnet.encoder.stages.1.layers.0"
    first, second, shortcut = (
        found[f"{stage}.{layer}.convolution"].input_group for layer in ("layer.0", "layer.1", "shortcut")
    )
    assert first == shortcut != second


class Net(nn.Module):
    """Layers whose inputs are alike in shape, in value or in memory, but not always the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.view, self.changed, self.copy = (nn.Linear(4, 4) for _ in range(5))
        self.twice, self.idle, self.convolution = nn.Linear(4, 3), nn.Linear(4, 4), nn.Conv2d(2, 2, 1)
        self.norm, self.dropout = nn.BatchNorm2d(2), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        (
            self.twice(x),
            self.b(input=x),
            self.a(x),
            self.view(x.view(x.shape)),
            self.copy(x.clone()),
            self.convolution(x),
        )
        x += 1
        self.changed(x)
        return self.twice(functional.pad(x, (0, 0, 0, 1)))


def test_input_groups_mean_the_very_same_tensor() -> None:
    found = by_name(trace_layers(Net(), torch.zeros(1, 2, 3, 4)))
    assert found["a"].input_group == found["b"].input_group
    groups = [found[name].input_group for name in ("a", "view", "changed", "copy", "twice", "convolution")]
    assert len(set(groups)) == len(groups)


def test_calls_are_added_up_per_image_and_in_the_order_of_first_calls() -> None:
    layers = trace_layers(Net(), torch.zeros(5, 2, 3, 4))
    assert [layer.name for layer in layers] == ["twice", "b", "a", "view", "copy", "convolution", "changed"]
    assert layers[0].macs == (2 * 3 + 2 * 4) * 4 * 3


def test_layers_never_called_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fliqs_hf.cost"):
        layers = trace_layers(Net(), torch.zeros(1, 2, 3, 4))
    assert "idle" not in by_name(layers)
    assert "idle" in caplog.text
    with pytest.raises(AllocationError, match="'idle' is never called"):
        trace_layers(Net(), torch.zeros(1, 2, 3, 4), names=["a", "idle"])


def test_the_text_tower_is_skipped_when_only_images_are_given() -> None:
    _, config = ARCHITECTURES["clip"]
    tower = on_meta(hf.CLIPModel, config()).vision_model
    whole = on_meta(hf.CLIPModel, config())
    whole.forward = whole.get_image_features
    assert len(trace_layers(whole)) == len(trace_layers(tower)) + 1  # and the projection
    assert not any("text" in layer.name for layer in trace_layers(whole))


def test_names_choose_the_layers() -> None:
    model = tiny("vit")
    everything = by_name(trace_layers(model))
    chosen = [name for name in everything if "layers.1" in name]
    assert [layer.name for layer in trace_layers(model, names=reversed(chosen))] == chosen
    with pytest.raises(AllocationError, match=r"'vit.nothing', which is no layer of ViTFor.* that can be quantized"):
        trace_layers(model, names=["vit.nothing"])


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    return state, hooks, [module.training for module in model.modules()], torch.get_rng_state()


def assert_same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


@pytest.mark.parametrize("architecture", ["vit", "mobilenet_v2"])
def test_the_model_is_left_as_it_was(architecture: str) -> None:
    model = tiny(architecture).train()
    next(model.children()).eval()  # training and evaluation mode mixed
    model.get_submodule("classifier").register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    trace_layers(model)
    assert_same(before, fingerprint(model))


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = Net().train()
    before = fingerprint(model)
    with pytest.raises(ConfigError, match=r"cannot trace Net: .*RuntimeError: mat1 and mat2.*give `inputs`"):
        trace_layers(model, torch.zeros(1, 2, 3, 5))  # `twice` is called with 5 features for its 4
    assert_same(before, fingerprint(model))


def test_inside_inference_mode() -> None:
    """Tensors made there have no version, by which an input changed in place is told from the original."""
    model, x = Net(), torch.zeros(1, 2, 3, 4)
    outside = trace_layers(model, x)
    with torch.inference_mode():
        assert trace_layers(model, x) == outside
        assert trace_layers(model, torch.zeros(1, 2, 3, 4)) == outside


def test_inputs_as_keyword_arguments_scale_the_cost() -> None:
    model = tiny("vit")
    pixels = torch.zeros(2, 3, 16, 16)  # 4 patches instead of 16
    layers = trace_layers(model, {"pixel_values": pixels, "interpolate_pos_encoding": True})
    assert [layer.macs for layer in layers[:2]] == [4 * 32 * 192, 5 * 32 * 32]


def test_example_image_from_the_config(caplog: pytest.LogCaptureFixture) -> None:
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "patch_size": 4,
    }

    def shape(**sizes: Any) -> list[int]:
        return list(example_image(on_meta(hf.ViTForImageClassification, hf.ViTConfig(**small, **sizes))).shape)

    assert shape(image_size=16) == [1, 3, 16, 16]
    assert shape(image_size=(16, 8), num_channels=1) == [1, 1, 16, 8]
    assert shape(image_size=[8, 16]) == [1, 3, 8, 16]
    assert list(example_image(tiny("siglip")).shape) == [1, 3, 32, 32]  # in the nested vision_config
    assert example_image(tiny("vit").to(torch.bfloat16)).dtype == torch.bfloat16
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="fliqs_hf.cost"):
        assert list(example_image(tiny("resnet")).shape) == [1, 3, 224, 224]
    assert "224 × 224" in caplog.text
    assert list(example_image(tiny("resnet"), 64).shape) == [1, 3, 64, 64]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"Net has no config.*pass `inputs`"):
        trace_layers(Net())
    with pytest.raises(ConfigError, match=r"calls no layer that is .*Linear or Conv1D"):
        trace_layers(nn.ReLU(), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="batch 1 or more"):
        trace_layers(Net(), torch.zeros(0, 2, 3, 4))
    with pytest.raises(ConfigError, match="size -1"):
        example_image(tiny("vit"), -1)

    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.sum().item()

    with pytest.raises(ConfigError, match=r"meta device.*trace the model on the CPU"):
        trace_layers(nn.Sequential(Reads(2, 2, device="meta")), torch.zeros(1, 2, device="meta"))
    with pytest.raises(ConfigError, match=r"kind='conv3d' must be one of .*'conv2d'.*'linear'.*'fp32'"):
        LayerInfo("a", "conv3d", 1, 1, 1, 0)
    with pytest.raises(ConfigError, match="macs=0"):
        LayerInfo("a", "linear", 0, 1, 1, 0)


def test_a_convolution_with_another_forward_pass_is_no_layer_of_ours() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight / self.weight.std(), self.bias)

    class Depthwise(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, groups=channels)

    layers = trace_layers(nn.Sequential(Depthwise(2), Standardized(2, 2, 1)), torch.zeros(1, 2, 5, 5))
    assert [(layer.name, layer.kind) for layer in layers] == [("0", "conv2d"), ("1", "fp32")]


@pytest.mark.parametrize("architecture", ["vit", "mobilenet_v2"])
def test_weights_and_everything_else_add_up_to_the_file(architecture: str, tmp_path: Any) -> None:
    model = tiny(architecture)
    layers = trace_layers(model, images(1))
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert weight_bytes(layers, {}, other_bytes=unlisted_bytes(model, layers)) == total

    allocation = Allocation.uniform([layer.name for layer in layers], "e2m1")
    predicted = weight_bytes(layers, allocation, other_bytes=unlisted_bytes(model, layers))
    pack_model(model, allocation)
    assert predicted == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert unlisted_bytes(model, layers) == predicted - weight_bytes(layers, allocation)


def test_a_tied_weight_counts_once() -> None:
    model = Net()
    model.b.weight = model.a.weight
    layers = trace_layers(model, torch.zeros(1, 2, 3, 4), names=["twice"])
    parameters = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    assert unlisted_bytes(model, layers) == parameters - model.twice.weight.numel() * 4
