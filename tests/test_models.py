"""Networks and the preprocessing around them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hpo.config import TrainConfig
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.errors import UnknownNameError, UsageError
from hpo.models.airnet import AirNet
from hpo.models.convnet import ConvNet, ResidualBlock
from hpo.models.layers import ACTIVATIONS, GATED_ACTIVATIONS, IMAGE_NORMS, INITS, VECTOR_NORMS, DropConnectLinear
from hpo.models.mlp import MLP
from hpo.models.preprocessed import MirrorAveraged, PreprocessedModel, build_model
from hpo.objective import Objective
from hpo.training.trainer import fit

CLASSES = tuple(f"class {label}" for label in range(10))
IMAGES = DataSpec((3, 32, 32), CLASSES)
DIGITS = DataSpec((1, 8, 8), CLASSES)
FEATURES = DataSpec((6,))


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def modules_of(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def task(model: Any, **fields: Any) -> Objective:
    return Objective(
        name="test", description="", load=lambda data_dir: pytest.fail("data were loaded"), model=model, **fields
    )


# --- MLP


@given(
    depth=st.integers(1, 4),
    width=st.integers(1, 20),
    activation=st.sampled_from(sorted(ACTIVATIONS | GATED_ACTIVATIONS)),
    init=st.sampled_from(INITS),
    norm=st.sampled_from(sorted(VECTOR_NORMS)),
    norm_first=st.booleans(),
    spec=st.sampled_from([IMAGES, DIGITS, FEATURES]),
)
def test_an_mlp_gives_one_output_a_class_and_every_parameter_a_gradient(
    depth: int, width: int, activation: str, init: str, norm: str, norm_first: bool, spec: DataSpec
) -> None:
    model = MLP(spec, depth=depth, width=width, activation=activation, init=init, norm=norm, norm_first=norm_first)
    outputs = model(torch.randn(5, *spec.input_shape))
    assert outputs.shape == (5, spec.num_outputs)
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_depth_is_the_number_of_hidden_layers() -> None:
    model = MLP(IMAGES, depth=20, width=100, activation="silu")
    assert [layer.out_features for layer in modules_of(model, nn.Linear)] == [100] * 20 + [10]
    assert len(modules_of(model, nn.SiLU)) == 20
    assert num_parameters(model) == (3072 + 1) * 100 + 19 * 101 * 100 + 101 * 10


def test_a_hidden_layer_is_linear_norm_activation_dropout() -> None:
    model = MLP(DIGITS, depth=3, width=8, activation="gelu", norm="batch", dropout=0.3)
    for layer in model.hidden:
        assert [type(module) for module in layer] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Dropout]  # type: ignore[attr-defined]
        assert layer[3].p == 0.3


def test_a_norm_may_come_after_the_activation_and_the_bias_stays_then() -> None:
    model = MLP(DIGITS, depth=3, width=8, activation="gelu", norm="batch", norm_first=False)
    for layer in model.hidden:
        assert [type(module) for module in layer][:3] == [nn.Linear, nn.GELU, nn.BatchNorm1d]  # type: ignore[attr-defined]
        assert layer[0].bias is not None
    before, after = (ConvNet(DIGITS, width=16, norm_first=norm_first) for norm_first in (True, False))
    assert [type(m) for m in before.features.modules() if not list(m.children())][:3] == [
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU,
    ]  # fmt: skip
    assert [type(m) for m in after.features.modules() if not list(m.children())][:3] == [
        nn.Conv2d, nn.ReLU, nn.BatchNorm2d,
    ]  # fmt: skip
    assert all(convolution.bias is not None for convolution in modules_of(after, nn.Conv2d))


def test_groups_have_sixteen_channels_where_that_comes_out_even() -> None:
    assert [norm.num_groups for norm in modules_of(MLP(DIGITS, width=64, norm="group"), nn.GroupNorm)] == [4, 4]
    assert [norm.num_groups for norm in modules_of(MLP(DIGITS, width=100, norm="group"), nn.GroupNorm)] == [1, 1]
    features = torch.randn(32, 64) * torch.arange(1, 65) + 7
    groups = VECTOR_NORMS["group"](64)(features).view(32, 4, 16)
    assert groups.mean(2).abs().max() < 1e-5
    torch.testing.assert_close(groups.var(2, correction=0), torch.ones(32, 4))


def test_swiglu_gates_one_half_of_a_layer_with_the_other() -> None:
    hidden = MLP(DIGITS, depth=2, width=5, activation="swiglu").hidden
    assert [(layer[0].in_features, layer[0].out_features) for layer in hidden] == [(64, 10), (5, 10)]
    inputs = torch.randn(3, 64)
    values, gates = hidden[0][0](inputs).split(5, dim=1)
    torch.testing.assert_close(hidden[0](inputs), values * gates * gates.sigmoid())


def test_squared_relu_is_the_square_of_relu() -> None:
    assert ACTIVATIONS["squared_relu"]()(torch.tensor([-2.0, 0.0, 3.0])).tolist() == [0.0, 0.0, 9.0]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_selu_keeps_mean_and_deviation_over_20_layers(dropout: float) -> None:
    torch.manual_seed(0)
    signal = torch.randn(1000, 3072)
    for layer in MLP(IMAGES, depth=20, width=256, activation="selu", dropout=dropout).hidden:
        signal = layer(signal)
        assert abs(signal.mean().item()) < 0.1
        assert 0.8 < signal.std().item() < 1.2


def test_dropout_after_selu_is_alpha_dropout() -> None:
    assert len(modules_of(MLP(DIGITS, activation="selu", dropout=0.1), nn.AlphaDropout)) == 2
    assert len(modules_of(MLP(DIGITS, activation="elu", dropout=0.1), nn.AlphaDropout)) == 0


def test_dropconnect_drops_weights_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    linear, *_ = modules_of(MLP(FEATURES, dropout=0.25, dropout_type="dropconnect"), DropConnectLinear)
    of_each_weight = torch.stack([linear(torch.eye(6)).T for _ in range(2000)]) / linear.weight
    assert of_each_weight.abs().round(decimals=3).unique().tolist() == pytest.approx([0, 1.333])
    assert of_each_weight.mean().item() == pytest.approx(1, abs=0.01)
    assert of_each_weight.mean((1, 2)).std() > 0.01, "each step drops others"


def test_spatial_dropout_drops_whole_channels() -> None:
    channels = ConvNet(IMAGES, dropout=0.5, dropout_type="spatial").features[2].residual[2](torch.ones(8, 64, 16, 16))
    assert channels.flatten(2).unique(dim=2).shape[2] == 1
    assert (channels == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_dropblock_drops_squares() -> None:
    torch.manual_seed(0)
    outputs = ConvNet(IMAGES, dropout=0.1, dropout_type="dropblock").features[2].residual[2](torch.ones(8, 64, 16, 16))
    dropped = (outputs == 0).float()
    # Whatever is dropped lies in a full square of 3x3 dropped positions.
    squares = -functional.max_pool2d(-dropped, 3, stride=1)
    covered = functional.max_pool2d(functional.pad(squares, (2, 2, 2, 2)), 3, stride=1)
    assert torch.equal(covered, dropped)
    assert 0.03 < dropped.mean() < 0.2


@pytest.mark.parametrize("width", [16, 32])
def test_a_shortcut_is_a_strided_convolution_and_has_no_stride_of_its_own_with_few_channels(width: int) -> None:
    block = ConvNet(IMAGES, width=width, norm="none").features[2]
    inputs = torch.randn(2, width // 4, 8, 8)
    seen: list[Tensor] = []
    block.shortcut.register_forward_hook(lambda layer, inputs, outputs: seen.append(outputs))
    block(inputs)
    torch.testing.assert_close(
        seen[0], functional.conv2d(inputs, block.shortcut[0].weight, block.shortcut[0].bias, stride=2)
    )
    assert block.shortcut[0].stride == ((1, 1) if width // 4 < 8 else (2, 2)), "oneDNN would write past its memory"


def test_a_block_is_skipped_the_more_often_the_deeper_it_is() -> None:
    torch.manual_seed(0)
    model = ConvNet(IMAGES, width=16, blocks=2, stochastic_depth=0.8)
    for depth, block in enumerate(modules_of(model, ResidualBlock), start=1):
        inputs = torch.randn(500, block.residual[0][0].in_channels, 4, 4)
        is_skipped = (block.residual(inputs) == 0).flatten(1).all(1)
        assert is_skipped.float().mean().item() == pytest.approx(0.2 * depth, abs=0.07)


@pytest.mark.parametrize("norm", VECTOR_NORMS)
def test_a_bias_is_dropped_where_a_norm_follows(norm: str) -> None:
    *hidden, output = modules_of(MLP(DIGITS, depth=2, norm=norm), nn.Linear)
    assert all((layer.bias is None) == (norm != "none") for layer in hidden)
    assert output.bias is not None
    *hidden, output = [m for m in ConvNet(DIGITS, norm=norm).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all((layer.bias is None) == (norm != "none") for layer in hidden)
    assert output.bias is not None


def test_dropout_acts_in_training_only() -> None:
    for model in (
        MLP(DIGITS, dropout=0.5),
        MLP(DIGITS, dropout=0.5, dropout_type="dropconnect"),
        ConvNet(DIGITS, dropout=0.5),
        ConvNet(DIGITS, dropout=0.5, dropout_type="spatial"),
        ConvNet(DIGITS, dropout=0.3, dropout_type="dropblock"),
        ConvNet(DIGITS, stochastic_depth=0.5),
    ):
        inputs = torch.randn(4, 1, 8, 8)
        model.train()
        assert not torch.equal(model(inputs), model(inputs))
        model.eval()
        assert torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS | GATED_ACTIVATIONS)
@pytest.mark.parametrize("init", ["auto", "glorot", "he", "lecun"])
def test_weights_are_initialised_as_asked_for_or_to_suit_the_activation(activation: str, init: str) -> None:
    """He: variance 2 / inputs; LeCun: 1 / inputs; Glorot: 2 / (inputs + outputs), 5/3 larger for tanh."""
    linear = modules_of(MLP(IMAGES, depth=2, width=512, activation=activation, init=init), nn.Linear)[0]
    suiting = {"tanh": "glorot", "selu": "lecun"}.get(activation, "he")
    expected = {
        "glorot": math.sqrt(2 / (3072 + linear.out_features)) * (5 / 3 if activation == "tanh" else 1),
        "he": math.sqrt(2 / 3072),
        "lecun": math.sqrt(1 / 3072),
    }[suiting if init == "auto" else init]
    assert linear.weight.std().item() == pytest.approx(expected, rel=0.01)
    assert linear.bias.abs().max() == 0


def test_orthogonal_weights_keep_lengths_but_for_the_gain_of_the_activation() -> None:
    for activation, gain in (("relu", math.sqrt(2)), ("selu", 1.0), ("tanh", 5 / 3)):
        weight = MLP(IMAGES, width=32, activation=activation, init="orthogonal").hidden[1][0].weight
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(32), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "network",
    [
        MLP(DIGITS, depth=12, width=64, activation="tanh", init="lsuv"),
        MLP(DIGITS, depth=3, activation="swiglu", init="lsuv"),
        ConvNet(DIGITS, norm="none", init="lsuv"),
    ],
    ids=["tanh", "swiglu", "convnet"],
)
def test_lsuv_gives_each_layer_outputs_of_unit_variance_on_the_training_data(network: nn.Module) -> None:
    torch.manual_seed(0)
    images = torch.randint(16, (600, 1, 8, 8), dtype=torch.uint8)
    model = PreprocessedModel(network, DIGITS)
    model.fit_statistics(Split(images, torch.arange(600) % 10))
    variances: list[float] = []
    *hidden, _ = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in hidden:
        layer.register_forward_hook(lambda *call: variances.append(call[2].var().item()))
    model(images[:512])
    assert variances == pytest.approx([1.0] * len(hidden), abs=0.1)
    assert network.training


def test_lsuv_keeps_the_directions_of_orthogonal_weights() -> None:
    torch.manual_seed(0)
    model = PreprocessedModel(MLP(DIGITS, width=32, init="lsuv"), DIGITS)
    model.fit_statistics(Split(torch.randint(16, (600, 1, 8, 8), dtype=torch.uint8), torch.arange(600) % 10))
    weight = modules_of(model, nn.Linear)[1].weight
    gram = weight @ weight.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(32), atol=1e-4, rtol=0)


def test_a_deep_relu_net_keeps_the_size_of_its_signal() -> None:
    torch.manual_seed(0)
    hidden = MLP(IMAGES, depth=20, width=256).hidden
    assert 0.2 < hidden(torch.randn(256, 3072)).square().mean() < 5


@pytest.mark.parametrize("network", [MLP, ConvNet])
def test_a_network_begins_by_giving_every_class_the_same_chance(network: type[nn.Module]) -> None:
    logits = network(IMAGES)(torch.randn(64, 3, 32, 32))
    loss = nn.functional.cross_entropy(logits, torch.arange(64) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.1)


# --- ConvNet


@given(
    width=st.integers(1, 24),
    blocks=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    init=st.sampled_from(INITS),
    norm=st.sampled_from(sorted(IMAGE_NORMS)),
    norm_first=st.booleans(),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(4, 40), st.integers(4, 40)),
)
def test_a_convnet_takes_images_of_any_size(
    width: int, blocks: int, activation: str, init: str, norm: str, norm_first: bool, shape: tuple[int, int, int]
) -> None:
    model = ConvNet(
        DataSpec(shape, CLASSES),
        width=width,
        blocks=blocks,
        activation=activation,
        init=init,
        norm=norm,
        norm_first=norm_first,
    )
    outputs = model(torch.randn(3, *shape))
    assert outputs.shape == (3, 10)
    outputs.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_default_convnet_is_small() -> None:
    assert num_parameters(ConvNet(IMAGES)) == 126_810


def test_a_stage_halves_the_resolution_once_and_adds_residual_blocks() -> None:
    for blocks in (1, 2, 3):
        model = ConvNet(IMAGES, blocks=blocks)
        features = model.features(torch.randn(1, 3, 32, 32))
        assert features.shape == (1, 64, 8, 8)
        convolutions = [m for m in modules_of(model, nn.Conv2d) if m.kernel_size == (3, 3)]
        assert len(convolutions) == 1 + 2 * 2 * blocks
        shortcuts = [m for m in modules_of(model, nn.Conv2d) if m.kernel_size == (1, 1)]
        assert len(shortcuts) == 2, "only where the shape changes"


def test_a_convnet_is_for_images() -> None:
    with pytest.raises(UsageError, match=r"images \(C, H, W\).* \(6,\)"):
        ConvNet(FEATURES)


@pytest.mark.parametrize("network", [MLP, ConvNet])
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"width": 0}, "width=0 is not allowed"),
        ({"width": -4}, "width=-4 is not allowed"),
        ({"dropout": 1.0}, "dropout=1.0 is not allowed"),
        ({"dropout": -0.1}, "dropout=-0.1 is not allowed"),
        ({"dropout": float("nan")}, "dropout=nan is not allowed"),
        ({"activation": "rleu"}, "no activation 'rleu'; did you mean 'relu'"),
        ({"init": "xavier"}, "no init 'xavier'. Available: auto, glorot, he, lecun, orthogonal, lsuv"),
        ({"norm": "batchnorm"}, "no norm 'batchnorm'; did you mean 'batch'"),
        ({"dropout_type": "dropoff"}, "no dropout_type 'dropoff'; did you mean 'dropout'"),
    ],
)
def test_an_impossible_argument_is_named(network: type[nn.Module], arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        network(DIGITS, **arguments)


def test_counts_below_one_are_named() -> None:
    with pytest.raises(UsageError, match="depth=0 is not allowed: it must be at least 1"):
        MLP(DIGITS, depth=0)
    with pytest.raises(UsageError, match="blocks=0 is not allowed: it must be at least 1"):
        ConvNet(DIGITS, blocks=0)
    with pytest.raises(UnknownNameError):
        MLP(DIGITS, activation="")


# --- AirNet


def correlated_images(count: int) -> Tensor:
    """Images whose neighbouring pixels and channels are alike, as photographs are."""
    noise = torch.randn(count, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    smooth = functional.avg_pool2d(noise, 5, stride=1)
    return torch.cat([smooth, smooth + 0.1 * noise[:, :, 2:-2, 2:-2], -smooth + 0.3 * noise[:, :, 4:, 4:]], dim=1)


def test_the_whitening_layer_decorrelates_patches_and_gives_each_filter_and_its_negative() -> None:
    model, images = AirNet(IMAGES, width=8), correlated_images(64)
    assert (torch.corrcoef(images.transpose(0, 1).flatten(1)) - torch.eye(3)).abs().max() > 0.5
    model.initialize_from_data(images / images.std())
    outputs = model.whitening(images / images.std()).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs[:12], -outputs[12:])
    covariance = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    off_diagonal = covariance - covariance.diagonal().diag()
    assert off_diagonal.abs().max() < 0.01
    assert covariance.diagonal().max().item() == pytest.approx(1, abs=0.01)


def test_an_airnet_begins_as_the_identity_and_trains_neither_its_filters_nor_the_scale_of_its_norms() -> None:
    model = AirNet(IMAGES)
    assert num_parameters(model) == 1_972_792
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert frozen == {"whitening.weight", *(f"{name}.weight" for name in norms)}
    first = modules_of(model, nn.Conv2d)[1]
    signal = torch.randn(2, 24, 9, 9)
    torch.testing.assert_close(first(signal)[:, :24], signal)


def test_an_airnet_learns_while_its_frozen_layer_stays() -> None:
    torch.manual_seed(0)
    images = (correlated_images(64) * 200 + 128).clamp(0, 255).to(torch.uint8)
    targets = (images.float().mean((1, 2, 3)) > 128).long()
    data = Split(images, targets)
    spec = DataSpec((3, 32, 32), ("dark", "bright"))
    model = PreprocessedModel(AirNet(spec, width=8), spec)
    model.fit_statistics(data)
    before = model.network.whitening.weight.clone()
    config = TrainConfig(optimizer="sgd", lr=0.5, batch_size=16, max_epochs=6, schedule="one_cycle", weight_decay=1e-3)
    *_, last = fit(model, Splits(data, data, spec), config)
    assert last.best_value is not None
    assert last.best_value > 0.9
    assert torch.equal(model.network.whitening.weight, before)  # type: ignore[arg-type]


# --- Preprocessing


class Echo(nn.Module):
    """Gives back the normalised inputs, to be looked at."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def fitted(network: nn.Module, spec: DataSpec, train: Split) -> PreprocessedModel:
    model = PreprocessedModel(network, spec)
    model.fit_statistics(train)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_images_are_normalised_by_channel(dtype: torch.dtype) -> None:
    images = (torch.rand(50, 3, 7, 9) * torch.tensor([10.0, 100.0, 250.0])[:, None, None]).to(dtype)
    outputs = fitted(Echo(), DataSpec((3, 7, 9), CLASSES), Split(images, torch.zeros(50, dtype=torch.long)))(images)
    assert outputs.dtype == torch.float32
    assert outputs.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert outputs.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_statistics_of_bytes_equal_those_of_the_same_numbers(seed: int) -> None:
    images = torch.randint(256, (5, 2, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    spec, labels = DataSpec((2, 3, 4), CLASSES), torch.zeros(5, dtype=torch.long)
    as_bytes, as_floats = (fitted(Echo(), spec, Split(inputs, labels)) for inputs in (images, images.float()))
    assert torch.allclose(as_bytes.input_mean, as_floats.input_mean)  # type: ignore[arg-type]
    assert torch.allclose(as_bytes.input_std, as_floats.input_std)  # type: ignore[arg-type]


def test_features_are_normalised_one_by_one_however_far_from_zero() -> None:
    features = torch.randn(200, 6) * torch.tensor([1e-3, 1, 10, 1e4, 1, 1]) + torch.tensor([0, 1e4, 5, -1e6, 0, 0])
    outputs = fitted(Echo(), DataSpec((6,), CLASSES), Split(features, torch.zeros(200, dtype=torch.long)))(features)
    assert outputs.mean(0).abs().max() < 1e-2
    assert outputs.std(0, correction=0).tolist() == pytest.approx([1] * 6, rel=1e-2)


@pytest.mark.parametrize("layout", ["length and features", "channels and length"])
def test_sequences_of_one_length_are_normalised_by_feature_on_either_side(layout: str) -> None:
    sequences = torch.randn(200, 20, 3) * torch.tensor([1e-2, 1, 100]) + torch.tensor([0.0, 5, -300])
    sequences[:, -2:] = 0.0  # the same at the end of each, as padding is
    trend = torch.linspace(0, 1, 20)[:, None] * torch.tensor([1e-2, 1, 100])
    sequences += trend
    turned = sequences if layout == "length and features" else sequences.transpose(1, 2)
    spec = DataSpec(tuple(turned.shape[1:]), CLASSES)
    outputs = fitted(Echo(), spec, Split(turned, torch.zeros(200, dtype=torch.long)))(turned)
    of_features = outputs if layout == "length and features" else outputs.transpose(1, 2)
    assert of_features.mean((0, 1)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert of_features.std((0, 1), correction=0).tolist() == pytest.approx([1] * 3, rel=1e-4)
    later, early = of_features[:, 12:18].mean((0, 1)), of_features[:, :6].mean((0, 1))
    assert (later > early + 0.2).all(), "what changes along the sequence is seen by the network"


def test_recordings_are_normalised_by_channel_and_not_by_sample() -> None:
    sounds = torch.randn(10, 2, 500) * torch.tensor([1.0, 1.2])[:, None]
    model = fitted(Echo(), DataSpec((2, 500), CLASSES), Split(sounds, torch.zeros(10, dtype=torch.long)))
    assert model.input_std[:, 0].tolist() == pytest.approx(sounds.std((0, 2), correction=0).tolist())  # type: ignore[index, operator]
    assert (model.input_std == model.input_std[:, :1]).all()  # type: ignore[index, operator]
    of_an_earlier_version = {name: each[..., :1] if each.ndim else each for name, each in model.state_dict().items()}
    restored = PreprocessedModel(Echo(), model.spec)
    restored.load_state_dict(of_an_earlier_version)
    assert torch.equal(restored(sounds), model(sounds))


@pytest.mark.parametrize(
    "inputs",
    [torch.full((9, 1, 4, 4), 7, dtype=torch.uint8), torch.full((9,), 7, dtype=torch.uint8), torch.full((9, 3), 0.1)],
)
def test_what_does_not_vary_is_only_centred(inputs: Tensor) -> None:
    model = fitted(Echo(), DataSpec(tuple(inputs.shape[1:]), CLASSES), Split(inputs, torch.zeros(9, dtype=torch.long)))
    assert model(inputs).abs().max() < 1e-6
    assert torch.isfinite(model(inputs + 1)).all()


def test_a_regression_gives_values_in_the_units_of_its_target() -> None:
    targets = torch.tensor([100.0, 200.0, 600.0])
    model = fitted(nn.Flatten(), DataSpec((1,)), Split(torch.tensor([[1.0], [2.0], [6.0]]), targets))
    assert model(torch.tensor([[1.0], [2.0], [6.0]])).tolist() == pytest.approx(targets.tolist(), rel=1e-5)
    assert model.predict(torch.tensor([[3.0]])) == pytest.approx([300.0], rel=1e-5)


def test_a_target_that_does_not_vary_is_predicted_as_it_is() -> None:
    model = fitted(nn.Linear(2, 1), DataSpec((2,)), Split(torch.randn(4, 2), torch.full((4,), 5.0)))
    assert torch.isfinite(model(torch.randn(4, 2))).all()


def test_a_classification_leaves_its_logits_alone() -> None:
    inputs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 9.0]])
    model = fitted(Echo(), DataSpec((2,), ("ham", "eggs")), Split(inputs, torch.tensor([1, 0, 1])))
    assert (model.target_mean, model.target_std) == (0, 1)  # type: ignore[comparison-overlap]
    assert model.predict(inputs) == ["eggs", "ham", "eggs"]
    assert model.classes == ("ham", "eggs")


@pytest.mark.parametrize("inputs", [torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8), torch.randn(4, 6)])
def test_a_model_takes_raw_examples_in_any_float_type(inputs: Tensor) -> None:
    spec = DataSpec(tuple(inputs.shape[1:]), CLASSES)
    model = fitted(MLP(spec), spec, Split(inputs, torch.arange(4)))
    expected = model(inputs)
    for dtype in (torch.float64, torch.bfloat16):
        outputs = model.to(dtype)(inputs)
        assert outputs.dtype == dtype
        assert torch.allclose(outputs.float(), expected, atol=0.05)


# --- Building and loading


@pytest.mark.parametrize(
    "network",
    [
        lambda: MLP(DIGITS, dropout=0.5, dropout_type="dropconnect"),
        lambda: ConvNet(DIGITS, width=8, dropout=0.5, dropout_type="dropblock"),
    ],
    ids=["dropconnect", "dropblock"],
)
def test_monte_carlo_dropout_is_that_of_every_kind_of_dropout(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = PreprocessedModel(network(), DIGITS)
    images = torch.randint(16, (6, 1, 8, 8), dtype=torch.uint8)
    passes = torch.stack([model.probabilities(images, dropout_samples=1) for _ in range(5)])
    assert passes.std(0).max() > 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_numbers_are_brought_into_their_units_in_full_precision(precision: torch.dtype) -> None:
    spec = DataSpec((3,), (), "regression")
    model = PreprocessedModel(nn.Sequential(nn.Linear(3, 1), Halved(precision)), spec)
    model.get_buffer("target_mean").fill_(70_000.0)
    model.get_buffer("target_std").fill_(500.0)
    outputs = model(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
    assert outputs.dtype == torch.float32
    assert len(outputs.unique()) > 32, "70 000 has three digits in bf16, and none in fp16"


class Halved(nn.Module):
    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs.to(self.precision)


def test_monte_carlo_dropout_is_the_mean_of_passes_with_dropout_and_nothing_else_of_a_training() -> None:
    torch.manual_seed(0)
    model = PreprocessedModel(MLP(DIGITS, norm="batch", dropout=0.4), DIGITS)
    nn.init.normal_(model.network.output.weight, std=0.5)  # type: ignore[arg-type]
    statistics = [norm.running_mean.clone() for norm in modules_of(model, nn.BatchNorm1d)]
    images = torch.randint(16, (6, 1, 8, 8), dtype=torch.uint8)
    plain = model.probabilities(images)
    torch.testing.assert_close(plain, model(images).softmax(1))
    sampled = [model.probabilities(images, dropout_samples=n) for n in (1, 500, 500)]
    assert (sampled[0] - plain).abs().max() > 0.05
    torch.testing.assert_close(sampled[1], sampled[2], atol=0.05, rtol=0)
    assert all(probabilities.sum(1).tolist() == pytest.approx([1.0] * 6) for probabilities in sampled)
    after = [norm.running_mean for norm in modules_of(model, nn.BatchNorm1d)]
    assert all(torch.equal(*pair) for pair in zip(statistics, after, strict=True))
    assert not any(module.training for module in model.modules())
    with pytest.raises(UsageError, match="a regression has no probabilities"):
        PreprocessedModel(MLP(FEATURES), FEATURES).probabilities(torch.randn(2, 6))


def test_averaging_over_the_mirror_image_makes_left_and_right_alike() -> None:
    torch.manual_seed(0)
    model = ConvNet(IMAGES, width=8).eval()
    nn.init.normal_(model.output.weight)
    images = torch.randn(5, 3, 32, 32)
    averaged = MirrorAveraged(model)
    torch.testing.assert_close(averaged(images), (model(images) + model(images.flip(-1))) / 2)
    torch.testing.assert_close(averaged(images), averaged(images.flip(-1)))
    assert not torch.allclose(model(images), model(images.flip(-1)), atol=1e-3)


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model(task(MLP), DIGITS, {"width": 16}, seed=5)
    torch.manual_seed(2)
    same = build_model(task(MLP), DIGITS, {"width": 16}, seed=5)
    other = build_model(task(MLP), DIGITS, {"width": 16}, seed=2**63 - 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.network.output.weight, other.network.output.weight)  # type: ignore[arg-type]


def test_building_a_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build_model(task(MLP), DIGITS, {}, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_reach_the_network() -> None:
    model = build_model(task(MLP), DIGITS, {"depth": 3, "width": 17, "norm": "layer"}, seed=0)
    assert [layer.out_features for layer in modules_of(model, nn.Linear)] == [17, 17, 17, 10]
    assert model.spec == DIGITS


@pytest.mark.parametrize(("network", "spec"), [(MLP, DIGITS), (ConvNet, IMAGES), (MLP, FEATURES)])
def test_a_loaded_model_predicts_what_the_trained_one_did(network: type[nn.Module], spec: DataSpec) -> None:
    """The statistics travel with the weights, through a file that holds nothing but tensors."""
    raw = torch.randint(256, (20, *spec.input_shape), dtype=torch.uint8)
    inputs = raw if len(spec.input_shape) == 3 else raw.float()
    targets = torch.arange(20) % 10 if spec.classes else torch.randn(20) * 50 + 1000
    trained = build_model(task(network), spec, {"norm": "batch", "width": 8}, seed=0)
    trained.fit_statistics(Split(inputs, targets))
    trained.train()(inputs)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    loaded = build_model(task(network), spec, {"norm": "batch", "width": 8}, seed=1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.eval()(inputs), trained.eval()(inputs))
    assert loaded.predict(inputs) == trained.predict(inputs)


def test_a_model_predicts_from_arrays_and_names_the_shape_that_it_takes() -> None:
    inputs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 9.0]])
    model = fitted(Echo(), DataSpec((2,), ("ham", "eggs")), Split(inputs, torch.tensor([1, 0, 1])))

    assert model.predict(inputs.numpy()) == model.predict(inputs) == ["eggs", "ham", "eggs"]
    assert model.probabilities(inputs.numpy()).shape == (3, 2)
    assert not model.train().predict(inputs) or not model.training, "no dropout, and no statistics that move"
    for ask in (model.predict, model.probabilities):
        with pytest.raises(UsageError, match=r"takes a batch of shape \(B, 2\), not \(3, 4\)"):
            ask(torch.zeros(3, 4))
