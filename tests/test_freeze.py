"""What `freeze` promises: exactly what should train does, and nothing is computed for gradients below it."""

import re
from dataclasses import replace

import pytest
import torch
from random_weights import random_backbone
from torch import nn

import freeze
import lora
import run
from model import EmotionModel, Wav2Vec2, Wav2Vec2Config

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Wav2Vec2Config(
    conv_channels=(32,) * 7, width=64, heads=4, ffn=128, layers=3, position_kernel=16, position_groups=4
)
TINY_LARGE = replace(TINY, conv_norm="layer", conv_bias=True, pre_norm=True)  # the kind of the large models
TINY_WAVLM = replace(TINY, relative_buckets=32, relative_distance=100)
RANDOM = replace(
    TINY,
    hidden_dropout=0.3,
    attention_dropout=0.3,
    activation_dropout=0.3,
    projection_dropout=0.3,
    layer_drop=0.3,
    mask_time_prob=0.3,
    mask_feature_prob=0.3,
    mask_feature_length=8,
)
# name: (trainable_layers, layers with LoRA, the depth at which the frozen prefix ends in a model of three layers)
METHODS = {
    "all": ("all", [], -1),
    "last 3": (3, [], 0),
    "last 1": (1, [], 2),
    "first and last": ([2, 0, 2], [], 0),
    "middle": ([1], [], 1),
    "heads only": (0, [], 4),
    "LoRA": (0, [0, 1, 2], 0),
    "LoRA on the last": (0, [2], 2),
    "LoRA below a trainable layer": (1, [1], 1),
}


def build(method: str, config: Wav2Vec2Config = TINY) -> EmotionModel:
    trainable, with_lora, _ = METHODS[method]
    torch.manual_seed(0)
    model = EmotionModel(random_backbone(config), ["activation", "valence"], (1, 7), head_width=8)
    freeze.freeze(model, trainable)
    if with_lora:
        lora.inject(model, 2, 4, ["q", "v"], with_lora)
    return model.eval()


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def waveforms() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, generator=generator) for length in (2000, 4000, 3000)]


def graph_leaves(tensor: torch.Tensor) -> set[int]:
    """The ids of all tensors that a backward pass from `tensor` would put a gradient on."""
    seen, leaves, stack = set(), set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return leaves


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("config", [TINY, TINY_LARGE, TINY_WAVLM], ids=["post-norm", "pre-norm", "WavLM"])
@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_named_parts_train(method, config):
    """By parameter name. The CNN never, the mask embedding only with masking, the final norm with layers below it."""
    trainable, with_lora, _ = METHODS[method]
    model = build(method, config)
    patterns = ["head.*"]
    patterns += [rf"backbone\.layers\.{n}\.attention\.[qv]\.[AB]" for n in with_lora]
    patterns += [rf"backbone\.layers\.{n}\..*" for n in freeze.layer_numbers(trainable, 3)]
    if trainable == "all":
        patterns += [r"backbone\.(projection\.(norm|linear)|position\.conv|norm|relative_bias)\..*"]
    elif config.pre_norm and trainable:
        patterns += [r"backbone\.norm\..*"]
    expected = {name for name, _ in model.named_parameters() if any(re.fullmatch(p, name) for p in patterns)}
    assert trainable_names(model) == expected


@pytest.mark.parametrize(
    ("trainable", "published"),
    [
        (0, 0),
        (1, 7_087_872),  # 4 (768^2 + 768) + 2 * 768 * 3072 + 3072 + 768 + 2 norms
        (3, 21_263_616),
        ([0, 5], 2 * 7_087_872),
        (12, 12 * 7_087_872),
        ("all", 90_170_368),  # with projection, positional convolution and norm
    ],
)
def test_trainable_parameters_of_base_are_the_published_ones(trainable, published):
    """In all transformers counts 94,371,712: 4,200,448 of the CNN, 768 mask embedding, 128 of weight norm less."""
    with torch.device("meta"):
        backbone = Wav2Vec2(Wav2Vec2Config())
    freeze.freeze(backbone, trainable)
    assert freeze.count(backbone) == (94_371_712 - 128, published)
    assert 94_371_712 - 4_200_448 - 768 - 128 == 90_170_368


def test_the_mask_embedding_trains_with_masking_alone():
    """Without masking it would never get a gradient."""
    assert "backbone.projection.mask_embedding" not in trainable_names(build("all"))
    assert "backbone.projection.mask_embedding" in trainable_names(build("all", RANDOM))
    assert "backbone.projection.mask_embedding" not in trainable_names(build("last 3", RANDOM))


def test_freezing_again_forgets_what_was_before():
    """The last call alone counts; the head stays trainable in all of them."""
    model = build("all", TINY_LARGE)
    freeze.freeze(model, 1)
    assert trainable_names(model) == trainable_names(build("last 1", TINY_LARGE))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (4, "trainable_layers: the model has 3 layers, found 4"),
        (-1, "trainable_layers: the model has 3 layers, found -1"),
        ([0, 3], "trainable_layers: no layer 3; expected numbers from 0 to 2"),
        ([-1], "trainable_layers: no layer -1; expected numbers from 0 to 2"),
        ("last", "trainable_layers: expected a count, a list of numbers or 'all', found 'last'"),
    ],
)
def test_layers_that_do_not_exist_are_an_error(value, message):
    """It says how many there are."""
    with pytest.raises(ValueError, match=message):
        freeze.freeze(random_backbone(TINY), value)


# ---------------------------------------------------------------- where the prefix ends


@pytest.mark.parametrize("config", [TINY, TINY_LARGE, TINY_WAVLM], ids=["post-norm", "pre-norm", "WavLM"])
@pytest.mark.parametrize("method", METHODS)
def test_the_prefix_ends_before_the_first_module_that_trains(method, config):
    """No later, so that it can be cached; no earlier, so that the cache is as deep as it can be."""
    model, depth = build(method, config), METHODS[method][2]
    assert freeze.prefix_depth(model) == freeze.prefix_depth(model.backbone) == depth
    before = {id(p) for module in model.backbone.before(depth) for p in module.parameters()}
    assert not [p for p in model.parameters() if p.requires_grad and id(p) in before]
    if depth <= 2:
        deeper = {id(p) for module in model.backbone.before(depth + 1) for p in module.parameters()}
        assert [p for p in model.parameters() if p.requires_grad and id(p) in deeper]


@pytest.mark.parametrize(
    "config", [TINY, TINY_LARGE, TINY_WAVLM, RANDOM], ids=["post-norm", "pre-norm", "WavLM", "masked"]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_graph_ends_at_exactly_what_trains(method, config):
    """No autograd node before the first trainable module: the graph's leaves are the trainable parameters."""
    if config is RANDOM:  # a dropped layer would be missing from the graph, rightly; so would one with no span
        config = replace(RANDOM, layer_drop=0.0)
    model = build(method, config)
    depth = freeze.prefix_depth(model)
    freeze.train_mode(model, depth)
    x, lengths = model.encode(waveforms(), depth)
    assert x.grad_fn is None
    assert not x.requires_grad
    leaves = graph_leaves(model(x, lengths, depth).sum())
    assert leaves == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_not_even_a_forward_pass_without_no_grad_records_the_prefix(method):
    """From the features through all layers with gradients on: nothing before the prefix's end requires one."""
    model, depth = build(method), METHODS[method][2]
    recorded = []
    for module in model.backbone.before(depth)[1:]:  # the CNN is never recorded
        module.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    x, lengths = model.encode(waveforms(), -1)
    leaves = graph_leaves(model(x, lengths, -1).sum())
    assert not x.requires_grad
    assert not any(recorded)
    assert len(recorded) == (0 if depth < 0 else 3 + min(depth, 3))  # projection, position, norm, layers
    assert leaves == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("method", METHODS)
def test_the_prefix_is_in_eval_mode_while_the_rest_trains(method):
    """Also after an evaluation in between."""
    model, depth = build(method), METHODS[method][2]
    for _ in range(2):
        freeze.train_mode(model, depth)
        before = {m for module in model.backbone.before(depth) for m in module.modules()}
        containers = {model, model.backbone, model.backbone.layers}
        after = set(model.modules()) - before - containers
        assert not any(module.training for module in before)
        assert all(module.training for module in after)
        assert set(model.head.modules()) <= after
        model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_the_prefix_computes_the_same_in_training_as_in_evaluation(method):
    """No dropout, layer drop or masking reaches it, though what follows has all of them."""
    model, depth = build(method, RANDOM), METHODS[method][2]
    expected, lengths = model.encode(waveforms(), depth)
    freeze.train_mode(model, depth)
    for _ in range(2):
        assert torch.equal(model.encode(waveforms(), depth)[0], expected)
    outputs = torch.stack([model(expected, lengths, depth) for _ in range(4)])
    assert (outputs[1:] != outputs[0]).any() == (method != "heads only")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("config", [TINY, TINY_LARGE, TINY_WAVLM], ids=["post-norm", "pre-norm", "WavLM"])
@pytest.mark.parametrize("method", METHODS)
def test_without_the_prefix_the_rest_computes_the_same(method, config):
    """Its parameters are gone from memory, and it still counts them; dropping it twice is fine."""
    model, depth = build(method, config), METHODS[method][2]
    x, lengths = model.encode(waveforms(), depth)
    expected, counts = model(x, lengths, depth), freeze.count(model)
    freeze.drop_prefix(model, depth)
    freeze.drop_prefix(model, depth)
    gone = {p for module in model.backbone.before(depth) for p in module.parameters()}
    assert gone
    for parameter in model.parameters():
        assert parameter.is_meta == (parameter in gone)
    freeze.train_mode(model, depth)
    assert torch.equal(model(x, lengths, depth), expected)
    assert freeze.count(model) == counts
    freeze.load_trained(model, freeze.trained_state(model))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_matrices_are_kept_in_the_type_that_autocast_would_use(method):
    """Norms and all that trains stay in fp32, and what follows hidden state 0 computes the same bit for bit."""
    model = build(method)
    x, lengths = model.encode(waveforms(), 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(x, lengths, 0)
    freeze.cast_frozen(model, torch.bfloat16)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            matrix = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and not parameter.requires_grad
            assert parameter.dtype == (torch.bfloat16 if matrix else torch.float32), f"{name}.{key}"
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(x, lengths, 0), expected)


# ---------------------------------------------------------------- checkpoints, table, optimiser


@pytest.mark.parametrize("method", METHODS)
def test_what_trained_comes_back_whole(method):
    """Into a model built anew; later training does not reach into what was taken."""
    model, other = build(method), build(method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    state = freeze.trained_state(model)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.head[0].weight.zero_()
    assert state.keys() == trainable_names(model)
    freeze.load_trained(other, state)
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())


def test_a_checkpoint_of_another_method_or_shape_is_an_error():
    """By the parameter's name, before anything is changed: one value would else be stretched over many."""
    model = build("last 1")
    before = freeze.trained_state(model)
    with pytest.raises(ValueError, match=r"does not fit the model: backbone\.layers\.2\.attention.* on one side only"):
        freeze.load_trained(model, freeze.trained_state(build("heads only")))
    with pytest.raises(ValueError, match=r"does not fit the model: backbone\.layers\.0\..* on one side only"):
        freeze.load_trained(model, freeze.trained_state(build("last 3")))
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["head.3.bias"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"head\.3\.bias is \(1,\), expected \(2,\)"):
        freeze.load_trained(model, state)
    assert all(torch.equal(value, before[name]) for name, value in freeze.trained_state(model).items())


@pytest.mark.parametrize("method", METHODS)
def test_the_table_adds_up(method):
    """Its lines sum to its last line, which is what the model counts; layers alike share a line."""
    model = build(method)
    lines = freeze.table(model).splitlines()
    rows = [re.fullmatch(r"(\S.*?) +([\d,]+) +([\d,]+)(?:  \((.*)%\))?", line) for line in lines[1:]]
    numbers = [[int(row[i].replace(",", "")) for i in (2, 3)] for row in rows]
    assert lines[0].split() == ["parameters", "trainable"]
    assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == numbers[-1] == list(freeze.count(model))
    assert rows[-1][1] == "all"
    assert float(rows[-1][4]) == pytest.approx(100 * numbers[-1][1] / numbers[-1][0], abs=0.01)
    labels = [row[1] for row in rows[4:-2]]
    expected = {"all": ["layers 0 to 2"], "last 1": ["layers 0 to 1", "layer 2"]}
    expected |= {"first and last": ["layer 0", "layer 1", "layer 2"], "middle": ["layer 0", "layer 1", "layer 2"]}
    expected["LoRA below a trainable layer"] = ["layer 0", "layer 1", "layer 2"]
    expected["LoRA on the last"] = ["layers 0 to 1", "layer 2"]
    assert labels == expected.get(method, ["layers 0 to 2"])


@pytest.mark.parametrize("config", [TINY_LARGE, RANDOM], ids=["pre-norm", "masked"])
@pytest.mark.parametrize("method", METHODS)
def test_every_trainable_parameter_is_in_exactly_one_optimiser_group(method, config):
    """And nothing frozen; heads at their own rate, weight decay for matrices alone."""
    model = build(method, config)
    groups = run.make_optimizer(model, 1e-4, 1e-3, 0.01).param_groups
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    head = {id(parameter) for parameter in model.head.parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr"] == (1e-3 if id(parameter) in head else 1e-4)
            assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0)
