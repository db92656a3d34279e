"""What `model` promises: no padding, so no influence between utterances; the numbers of its peers; exact freezing."""

import copy
import importlib.machinery
import importlib.util
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, perturb, speech_like, tiny_settings
from random_weights import random_backbone
from torch import Tensor
from torch._dynamo.utils import counters

import lora
import model
import run
import train
import weights
from config import Config
from formats import wavlm
from formats.huggingface import save_backbone
from machine import fast
from model import EmotionModel, Wav2Vec2, Wav2Vec2Config

SMALL = Wav2Vec2Config(conv_channels=(32,) * 7, width=64, layers=3, heads=4, ffn=128)
KINDS = {
    "base": SMALL,
    "large": replace(SMALL, conv_norm="layer", conv_bias=True, pre_norm=True),
    "WavLM": replace(SMALL, relative_buckets=64, relative_distance=200),
}
KINDS["WavLM large"] = replace(KINDS["large"], relative_buckets=64, relative_distance=200)
LENGTHS = (400, 720, 7331, 320_000, 16_000, 401)  # samples: one frame, two frames, an odd number, 20 s


def build(config: Wav2Vec2Config, seed: int = 0) -> Wav2Vec2:
    """A random backbone in which every parameter has a value of its own, and attention a bias that matters."""
    backbone = perturb(random_backbone(config, seed), seed)
    if config.relative_buckets:
        torch.nn.init.normal_(backbone.relative_bias.weight, generator=torch.Generator().manual_seed(seed))
    return backbone


@pytest.fixture(scope="module", params=KINDS)
def backbone(request) -> Wav2Vec2:
    """Small, of either kind, in eval mode; tests do not change it."""
    return build(KINDS[request.param])


def frames(samples: int) -> int:
    """By the definition of an unpadded convolution, seven times over."""
    for kernel, stride in zip(TINY["conv_kernel"], TINY["conv_stride"], strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def packed(config: Wav2Vec2Config, lengths: list[int], depth: int = 0, seed: int = 0) -> Tensor:
    """Random packed hidden states `(N, D)`, features `(N, C)` for depth -1."""
    width = config.conv_channels[-1] if depth < 0 else config.width
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- without padding


def largest_difference(backbone: Wav2Vec2, waveforms: list[Tensor], order: list[int]) -> float:
    """... over all hidden states, between utterances alone and in a batch of this order."""
    together = backbone.hidden_states([waveforms[i] for i in order])
    worst = 0.0
    for place, i in enumerate(order):
        for one, many in zip(backbone.hidden_states([waveforms[i]]), together, strict=True):
            worst = max(worst, (one[0] - many[place]).abs().max().item())
    return worst


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [3, 0], [5, 4, 2, 1, 0, 0, 1]])
def test_an_utterance_alone_is_the_utterance_in_any_batch(backbone, order):
    """Within 1e-5 at every hidden state, from 400 samples to 20 s, whoever the batch mates are."""
    assert largest_difference(backbone, [speech_like(n) for n in LENGTHS], order) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_alone_is_in_any_batch_at_the_published_widths(kind):
    """Matrix products of 512 and 768 take other paths in the libraries than small ones: within 1e-5 there too."""
    config = replace(KINDS[kind], conv_channels=(512,) * 7, width=768, heads=12, ffn=3072, layers=2)
    waveforms = [speech_like(n) for n in (400, 720, 7331, 400, 30_000)]
    assert largest_difference(build(config), waveforms, [4, 0, 2, 1, 3]) <= 1e-5


def test_utterances_do_not_see_each_other(backbone):
    """Replacing one utterance by NaN leaves every other as it was: nothing leaks, not even multiplied by zero."""
    waveforms = [speech_like(n) for n in (4000, 7331, 900)]
    spoilt = [waveforms[0], torch.full((7331,), math.nan), waveforms[2]]
    for before, after in zip(backbone.hidden_states(waveforms), backbone.hidden_states(spoilt), strict=True):
        assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
        assert after[1].isnan().all()


@pytest.mark.parametrize("samples", [400, 401, 719, 720, 1039, 1040, 7331, 16_000, 16_080, 48_000])
def test_frame_counts_are_those_of_unpadded_convolutions(backbone, samples):
    """`(S - 400) // 320 + 1`, and the features are `(T, C)`."""
    features, lengths = backbone.feature_encoder([speech_like(samples), speech_like(400)])
    assert lengths == [frames(samples), 1] == [(samples - 400) // 320 + 1, 1]
    assert features.shape == (sum(lengths), 32)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_a_waveform_too_short_for_one_frame_is_an_error(backbone, samples):
    """It names both lengths, wherever in the batch it is."""
    with pytest.raises(ValueError, match=f"waveform of {samples} samples: one frame needs 400"):
        backbone.hidden_states([speech_like(500), torch.zeros(samples)])


def test_the_feature_encoder_has_no_gradient(backbone):
    """It is frozen in every method: no autograd node comes out of it, even with gradients on."""
    features, _ = backbone.feature_encoder([speech_like(4000)])
    assert not features.requires_grad


def test_silence_is_finite(backbone):
    """Zero variance over time is no division by zero."""
    for state in backbone.hidden_states([torch.zeros(2000), speech_like(2000)]):
        assert all(x.isfinite().all() for x in state)


# ---------------------------------------------------------------- the numbers of others


def assert_hidden_states(ours: list[list[Tensor]], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(expected)
    for depth, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a[0].shape == b.shape and torch.allclose(a[0], b, rtol=0, atol=tolerance), depth


def make_pair(transformers, folder: Path, kind: str, **sizes) -> tuple[torch.nn.Module, Wav2Vec2]:
    """A transformers model of a kind, of wav2vec2-base's sizes but for `sizes`, and ours from its file."""
    large, name = KINDS[kind].pre_norm, "WavLM" if KINDS[kind].relative_buckets else "Wav2Vec2"
    config = getattr(transformers, f"{name}Config")(
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
        conv_bias=large,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        **sizes,
    )
    theirs = perturb(getattr(transformers, f"{name}Model")(config))
    theirs.save_pretrained(folder)
    return theirs, weights.load_backbone(folder)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, transformers, tmp_path_factory):
    """Both at the published widths, two layers of them."""
    return make_pair(transformers, tmp_path_factory.mktemp("pair"), request.param, num_hidden_layers=2)


@torch.no_grad()
def assert_parity(theirs: torch.nn.Module, ours: Wav2Vec2, samples: int) -> None:
    """Features and every hidden state of the unbatched forward within 1e-4.

    Of pre-norm models transformers 5 gives the last state before the final norm: `last_hidden_state` is after it.
    """
    waveform = speech_like(samples)
    output = theirs(waveform[None], output_hidden_states=True)
    features, _ = ours.feature_encoder([waveform])
    assert torch.allclose(features, theirs.feature_extractor(waveform[None])[0].T, rtol=0, atol=1e-4)
    expected = [state[0] for state in (*output.hidden_states[:-1], output.last_hidden_state)]
    assert_hidden_states(ours.hidden_states([waveform]), expected)


@pytest.mark.parametrize("samples", [400, 720, 7331, 32_000])
def test_every_hidden_state_is_that_of_transformers(pair, samples):
    """At the published widths, from one frame up."""
    assert_parity(*pair, samples)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hidden_state_of_20_seconds_is_that_of_transformers(transformers, tmp_path, kind):
    """... with narrow convolutions, so that the comparison is quick: what grows with the length is all there."""
    pair = make_pair(transformers, tmp_path, kind, num_hidden_layers=4, conv_dim=[64] * 7)
    assert_parity(*pair, 320_000)


def test_every_gradient_is_that_of_transformers(pair):
    """Of a loss over the output, for each parameter behind the feature encoder, relative to its largest value."""
    theirs, ours = pair
    theirs.freeze_feature_encoder()
    waveform = speech_like(7331)
    target = packed(ours.config, [frames(7331)])
    ((theirs(waveform[None])[0][0] - target) ** 2).mean().backward()
    features, lengths = ours.feature_encoder([waveform])
    ((ours(features, lengths) - target) ** 2).mean().backward()

    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    position = theirs.encoder.pos_conv_embed.conv
    if hasattr(position, "parametrizations"):  # the gradient of g is that of w projected on v / |v|
        norm = position.parametrizations.weight
        direction = norm.original1 / norm.original1.norm(dim=(0, 1), keepdim=True)
        projected = (ours.position.conv.weight.grad * direction).sum((0, 1), keepdim=True)
        assert torch.allclose(projected, norm.original0.grad, rtol=1e-3, atol=1e-4 * norm.original0.grad.abs().max())
    compared = 0
    for key, gradient in expected.items():
        name = weights.our_name(key)
        if name in dict(ours.named_parameters()):
            compared += 1
            mine = ours.get_parameter(name).grad
            gradient = gradient.view_as(mine)  # of a gate's scale it is (1, H, 1, 1)
            assert torch.allclose(mine, gradient, rtol=0, atol=1e-4 * gradient.abs().max().clamp(min=1e-3)), name
    wavlm = 2 * 3 + 1 if ours.config.relative_buckets else 0  # gates of two layers, bias
    assert compared == 2 * 16 + 2 + 4 + 1 + wavlm  # two layers, final norm, projection with its norm, position's bias
    ours.zero_grad()
    theirs.zero_grad()


@pytest.fixture(scope="module")
def torchaudio_wav2vec2():
    """torchaudio's model is pure Python: loaded by itself, it works where torchaudio as a whole does not import."""
    spec = importlib.machinery.PathFinder.find_spec("torchaudio")
    if spec is None:
        pytest.skip("torchaudio is not installed")
    folder = f"{spec.submodule_search_locations[0]}/models/wav2vec2"
    spec = importlib.util.spec_from_file_location(
        "torchaudio_wav2vec2", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    module = sys.modules["torchaudio_wav2vec2"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
@pytest.mark.parametrize("large", [False, True], ids=["base", "large"])
def test_every_hidden_state_is_that_of_torchaudio(torchaudio_wav2vec2, tmp_path, large):
    """Within 1e-4, given its weights under the names that a Hugging Face file has for them."""
    theirs = torchaudio_wav2vec2.wav2vec2_model(
        extractor_mode="layer_norm" if large else "group_norm",
        extractor_conv_layer_config=[(32, k, s) for k, s in zip(TINY["conv_kernel"], TINY["conv_stride"], strict=True)],
        extractor_conv_bias=large,
        encoder_embed_dim=64,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=128,
        encoder_pos_conv_groups=16,
        encoder_num_layers=3,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=128,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=large,
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    perturb(theirs)
    tensors = {
        name.replace("encoder.feature_projection", "feature_projection").replace(
            "encoder.transformer", "encoder"
        ): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    ours = weights.load_backbone(tmp_path)
    for samples in (400, 7331, 48_000):
        waveform = speech_like(samples)
        layers, _ = theirs.extract_features(waveform[None])
        final, _ = theirs(waveform[None])
        states = ours.hidden_states([waveform])
        assert_hidden_states(states[1:-1], [layer[0] for layer in layers[:-1]])
        assert_hidden_states(states[-1:], [final[0]])


@torch.no_grad()
def test_golden_numbers(tiny_checkpoint, tiny_large_checkpoint):
    """The mean magnitude of each hidden state of a fixed checkpoint and waveform, to four digits."""
    t = torch.arange(8000) / 16_000
    waveform = 0.1 * torch.sin(2 * torch.pi * (200 * t + 300 * t**2))
    base, large = (0.835055, 0.812666, 0.757006, 0.819977), (1.375565, 2.002954, 2.727559, 0.825973)
    for folder, golden in ((tiny_checkpoint, base), (tiny_large_checkpoint, large)):
        states = weights.load_backbone(folder).hidden_states([waveform])
        assert [state[0].abs().mean().item() for state in states] == pytest.approx(list(golden), rel=1e-4)


# ---------------------------------------------------------------- parameters and depths


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_base_model_has_the_published_number_of_parameters():
    """94,371,712, less the 128 norms of the positional convolution, which are folded into its weight here."""
    with torch.device("meta"):
        base = Wav2Vec2(Wav2Vec2Config())
    assert count(base.feature_encoder) == 4_200_448
    assert count(base.projection) == 395_008 + 768  # the mask embedding
    assert count(base.position) == 4_719_488 - 128
    assert [count(layer) for layer in base.layers] == [7_087_872] * 12
    assert count(base.norm) == 1_536
    assert count(base) == 94_371_712 - 128


@torch.no_grad()
def test_forward_composes(backbone):
    """From -1 to any depth and on from there is the whole way, bit for bit; so is every state of `hidden_states`.

    Without gradients, as there: where WavLM's bias wants one, PyTorch's attention takes another kernel.
    """
    waveforms = [speech_like(n) for n in (4000, 400, 7331)]
    x, lengths = backbone.feature_encoder(waveforms)
    whole, states = backbone(x, lengths), backbone.hidden_states(waveforms)
    assert len(states) == 4
    for depth in range(-1, 4):
        middle = backbone(x, lengths, -1, depth)
        assert torch.equal(backbone(middle, lengths, depth), whole), depth
        assert torch.equal(middle, x if depth < 0 else torch.cat(states[depth])), depth
        for later in range(depth, 4):
            assert torch.equal(backbone(middle, lengths, depth, later), backbone(x, lengths, -1, later))


@pytest.mark.parametrize("depth", range(-1, 5))
def test_before_is_exactly_what_leads_up_to_a_depth(backbone, depth):
    """What runs up to hidden state `depth` is in `before(depth)`, what runs after it is not, and nothing is in both.

    But WavLM's bias, which every layer needs: it is in `before` with the last of them.
    """
    modules = {name: module for name, module in backbone.named_modules() if [*module.parameters(recurse=False)]}
    called: set[str] = set()
    handles = [module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module in modules.items()]
    x, lengths = backbone.feature_encoder([speech_like(1000)])
    called.clear()
    state = backbone(x, lengths, -1, min(depth, 3))
    until = set(called)
    called.clear()
    if depth <= 3:
        backbone(state, lengths, depth)
    after = set(called)
    for handle in handles:
        handle.remove()
    before = {id(parameter) for part in backbone.before(depth) for parameter in part.parameters()}
    inside = {name for name, module in modules.items() if id(next(module.parameters(recurse=False))) in before}
    encoder = {name for name in modules if name.startswith("feature_encoder.")}
    shared = {"relative_bias"} if 0 < depth < 3 else set()
    assert until - shared <= inside and not after & inside
    called_or_functional = until | after | encoder | {"projection", "projection.norm", "projection.linear"}
    assert called_or_functional | {"position.conv"} == set(modules)
    assert (inside == set(modules)) == (depth >= 3)
    assert encoder <= inside


@pytest.mark.parametrize("kind", ["base", "WavLM"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_memory_alone(dropout, kind):
    """Equal outputs and gradients with and without, under dropout too; each layer is computed a second time."""
    gradients, calls = [], []
    for checkpointing in (False, True):
        backbone = build(replace(KINDS[kind], hidden_dropout=dropout, attention_dropout=dropout)).train()
        backbone.gradient_checkpointing = checkpointing
        lengths = [5, 1, 17]
        x = packed(SMALL, lengths).requires_grad_()
        for layer in backbone.layers:
            layer.attention.register_forward_pre_hook(lambda *_, again=checkpointing: calls.append(again))
        torch.manual_seed(0)
        y = backbone(x, lengths, 0)
        y.square().sum().backward()
        behind = [p for name, p in backbone.named_parameters() if name.startswith(("layers.", "relative_bias."))]
        gradients.append([y, x.grad, *(parameter.grad for parameter in behind)])
    assert gradients[0][1].abs().sum() > 0
    assert (calls.count(False), calls.count(True)) == (3, 6)
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


# ---------------------------------------------------------------- regularisation

REGULARISATION = (
    "hidden_dropout",
    "attention_dropout",
    "activation_dropout",
    "projection_dropout",
    "layer_drop",
    "mask_time_prob",
    "mask_feature_prob",
)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", REGULARISATION)
def test_each_regularisation_acts_in_training_mode_alone(field, kind):
    """In eval mode a configured backbone equals the plain one bit for bit; in training mode it is random."""
    plain = build(KINDS[kind])
    regular = build(replace(KINDS[kind], **{field: 0.5}))
    lengths = [40, 1, 23]
    x = packed(SMALL, lengths, depth=-1)
    expected = plain(x, lengths)
    assert torch.equal(regular(x, lengths), expected)
    assert torch.equal(plain.train()(x, lengths), expected)
    regular.train()
    torch.manual_seed(1)
    one, again = regular(x, lengths), regular(x, lengths)
    torch.manual_seed(1)
    same = regular(x, lengths)
    assert torch.equal(one, same) and not torch.equal(one, again) and not torch.equal(one, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_in_eval_mode_has_no_regularisation(kind):
    """With everything before a depth in eval mode, the way there is the plain one; what follows is random."""
    plain = build(KINDS[kind])
    regular = build(replace(KINDS[kind], **dict.fromkeys(REGULARISATION, 0.5))).train()
    lengths = [40, 23]
    x = packed(SMALL, lengths, depth=-1)
    for depth in range(0, 3):
        regular.train()
        for module in regular.before(depth):
            module.eval()
        state = regular(x, lengths, -1, depth)
        assert torch.equal(state, plain(x, lengths, -1, depth))
        torch.manual_seed(0)
        assert not torch.equal(regular(state, lengths, depth), plain(state, lengths, depth))


@torch.no_grad()
def test_dropout_keeps_the_expected_value():
    """The mean over many draws of the projection's dropout is the output without: what stays is scaled up."""
    backbone = build(replace(SMALL, projection_dropout=0.5)).train()
    x = packed(SMALL, [3], depth=-1)
    mean = torch.stack([backbone.projection(x, [3]) for _ in range(2000)]).mean(0)
    assert torch.allclose(mean, backbone.eval().projection(x, [3]), atol=0.3)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_dropout_acts_on_the_embedding_and_on_both_halves_of_a_layer(kind):
    """At a probability of one the embedding is zero, and a layer is what is left of it: its residual path."""
    backbone = build(replace(KINDS[kind], hidden_dropout=1.0)).train()
    lengths = [7, 2]
    assert torch.equal(backbone(packed(SMALL, lengths, depth=-1), lengths, -1, 0), torch.zeros(9, 64))
    x, layer = packed(SMALL, lengths), backbone.layers[0]
    expected = x if layer.pre_norm else layer.feed_forward_norm(layer.attention_norm(x))
    assert torch.equal(backbone(x, lengths, 0, 1), expected)


@torch.no_grad()
def test_activation_dropout_acts_between_the_linear_layers():
    """At a probability of one nothing but the second layer's bias comes out."""
    feed_forward = build(replace(SMALL, activation_dropout=1.0)).train().layers[0].feed_forward
    assert torch.equal(feed_forward(packed(SMALL, [5])), feed_forward.fc2.bias.expand(5, -1))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_layer_drop_of_one_skips_every_layer(kind):
    """A dropped layer is the identity: what is left is the final norm of the pre-norm kind."""
    backbone = build(replace(KINDS[kind], layer_drop=1.0)).train()
    x = packed(SMALL, [7, 2])
    expected = backbone.norm(x) if KINDS[kind].pre_norm else x
    assert torch.equal(backbone(x, [7, 2], 0), expected)


@torch.no_grad()
def test_masked_frames_are_the_mask_embedding():
    """SpecAugment over time replaces whole frames, in spans, within each utterance, and leaves the others alone."""
    backbone = build(replace(SMALL, mask_time_prob=0.3, mask_time_length=5))
    lengths = [200, 3, 100]
    x = packed(SMALL, lengths, depth=-1)
    plain = backbone.projection(x, lengths)
    torch.manual_seed(0)
    masked = backbone.projection.train()(x, lengths)
    hit = (masked == backbone.projection.mask_embedding).all(1)
    assert torch.equal(masked[~hit], plain[~hit])
    assert 0.1 < hit[:200].float().mean() < 0.35
    runs = "".join("x" if value else " " for value in hit[:200]).split()
    assert min(len(run) for run in runs) >= 5


@torch.no_grad()
def test_masked_channels_are_zero_over_the_whole_utterance():
    """SpecAugment over channels draws its spans for each utterance."""
    backbone = build(replace(SMALL, mask_feature_prob=0.25, mask_feature_length=4))
    lengths = [30, 20]
    x = packed(SMALL, lengths, depth=-1)
    plain = backbone.projection(x, lengths)
    torch.manual_seed(0)
    masked = backbone.projection.train()(x, lengths)
    zero = [(part == 0).all(0) for part in masked.split(lengths)]
    assert not torch.equal(zero[0], zero[1]) and all(4 <= part.sum() <= 24 for part in zero)
    keep = torch.cat([~part.expand(n, -1) for part, n in zip(zero, lengths, strict=True)])
    assert torch.equal(masked[keep], plain[keep]) and (masked[~keep] == 0).all()


@pytest.mark.parametrize(
    ("size", "probability", "length"), [(1000, 0.65, 10), (50, 0.1, 10), (3, 0.5, 10), (1, 1.0, 1)]
)
def test_span_masks_have_the_expected_number_of_spans(size, probability, length):
    """`p S / L` spans on average, rounded at random; no more than the utterance is ever masked."""
    torch.manual_seed(0)
    masks = torch.stack([fast.span_mask(size, probability, length) for _ in range(2000)])
    length = min(length, size)
    starts = size - length + 1
    spans = probability * size / length
    inner = torch.arange(size)
    covering = torch.minimum(torch.minimum(inner + 1, size - inner), torch.tensor(min(length, starts)))
    low, share = math.floor(spans), spans - math.floor(spans)
    free = (1 - covering / starts) ** low * (1 - share * covering / starts)
    assert masks.shape == (2000, size) and masks.dtype == torch.bool
    assert masks.float().mean().item() == pytest.approx(1 - free.mean().item(), abs=0.02)


# ---------------------------------------------------------------- attention and linear layers


def test_distances_share_buckets_as_in_wavlm():
    """Of 320 buckets 80 in either direction are for one distance each; from 800 frames on there is one."""
    buckets = wavlm.distance_buckets(1000, 320, 800, torch.device("cpu"))
    behind, ahead = buckets[:1000].flip(0), buckets[999:]  # by distance
    assert behind[:80].tolist() == list(range(80))
    assert ahead[1:80].tolist() == list(range(161, 240))
    assert torch.equal(ahead[1:], behind[1:] + 160)
    assert behind[80:83].tolist() == [80, 80, 80]
    assert behind[799:].unique().tolist() == [159]
    assert set(behind.diff().tolist()) == {0, 1}
    assert len(behind.unique()) == 160


def test_the_bias_of_attention_is_that_of_transformers(transformers):
    """Bit for bit, for every pair of frames up to half a minute, with the published buckets and others."""
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    for buckets, longest, frames in ((320, 800, 1500), (64, 200, 300), (320, 800, 1)):
        config = replace(SMALL, layers=0, relative_buckets=buckets, relative_distance=longest)
        backbone, theirs = build(config), WavLMAttention(64, 4, num_buckets=buckets, max_distance=longest)
        theirs.rel_attn_embed.weight.data = backbone.relative_bias.weight.data
        assert torch.equal(backbone.relative_bias(frames), theirs.compute_bias(frames, frames))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fp32_on_a_gpu_is_fp32_on_the_cpu(backbone):
    """Every hidden state and the pooling, which go other ways there."""
    weights_there = copy.deepcopy(backbone).cuda()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    waveforms = [speech_like(samples) for samples in (400, 7331, 16_000)]
    there = weights_there.hidden_states([waveform.cuda() for waveform in waveforms])
    for ours, theirs in zip(backbone.hidden_states(waveforms), there, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other.cpu(), rtol=0, atol=1e-4)
    x, lengths = packed(backbone.config, [3, 50]), [3, 50]
    assert torch.allclose(
        fast.mean(x.cuda(), fast.Frames(lengths)).cpu(), fast.mean(x, fast.Frames(lengths)), rtol=0, atol=1e-6
    )


@torch.no_grad()
def test_autocast_reaches_the_matrix_products(backbone):
    """In bf16 the result is near the fp32 one, but not it."""
    x, lengths = backbone.feature_encoder([speech_like(7331)])
    exact = backbone(x, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(x, lengths)
    assert not torch.equal(exact, rounded.float())
    assert (exact - rounded).abs().mean() < 0.05 * exact.abs().mean()


def test_compiled_layers_are_the_same_and_compiled_once_for_all_lengths(backbone, monkeypatch):
    """`compile: true`, with gradients, traced by PyTorch's compiler but run without its slow code generator."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    emotion = emotion_model(copy.deepcopy(backbone))
    run.prepare(emotion, torch.device("cpu"), "fp32", compiled=True)
    graphs = []
    for lengths in ([5, 7], [12, 30, 8], [3], [50, 2, 7, 9]):
        x = packed(backbone.config, lengths).requires_grad_()
        found = emotion.backbone(x, lengths, 0)
        assert torch.allclose(found, backbone(x, lengths, 0), rtol=0, atol=1e-5)
        found.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


# ---------------------------------------------------------------- WavLM in use


@pytest.mark.parametrize("method", [{"trainable_layers": 1}, {"lora_rank": 2}, {}], ids=["last layer", "LoRA", "heads"])
def test_wavlm_trains_on_its_cache_as_without(tmp_path, tiny_manifest, method):
    """Losses to 1e-5 over three epochs, the prefix dropped after the first; the run comes back with its predictions."""
    save_backbone(build(KINDS["WavLM"]), tmp_path / "wavlm")
    losses, predictions = [], []
    for name, cached in (("plain", {}), ("cached", {"cache": True, "cache_dtype": "float32"})):
        keys = tiny_settings(tmp_path, tmp_path / "wavlm", tiny_manifest, **method, **cached)
        train.train(Config(name=name, **keys))
        directory = tmp_path / "runs" / name
        lines = (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
        losses += [json.loads(line)["train_loss"] for line in lines]
        predictions.append(run.load_run(directory).predict(speech_like(8000), 16_000))
    assert len(losses) == 6
    assert losses[:3] == pytest.approx(losses[3:], abs=1e-5)
    assert predictions[0] == pytest.approx(predictions[1], abs=1e-4)


def test_lora_on_wavlm_is_a_change_of_its_weights(transformers, tmp_path):
    """Merged, written and read by transformers: the outputs of the model with LoRA, within 1e-4."""
    backbone = build(KINDS["WavLM"])
    before = backbone.hidden_states([speech_like(4000)])[-1][0]
    lora.inject(backbone, 2, 4.0, ["q", "k", "v", "o"])
    perturb(backbone, seed=3)
    for _, _, adapter in lora.adapters(backbone):
        torch.nn.init.normal_(adapter.B, std=0.1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = backbone.hidden_states([speech_like(4000)])[-1][0]
        lora.merge(backbone)
        save_backbone(backbone, tmp_path)
        expected = transformers.WavLMModel.from_pretrained(tmp_path).eval()(speech_like(4000)[None])[0][0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(found, before, rtol=0, atol=1e-2)


# ---------------------------------------------------------------- the emotion model


def emotion_model(backbone: Wav2Vec2, targets: tuple[str, ...] = ("activation", "valence"), **settings) -> EmotionModel:
    torch.manual_seed(0)
    settings = {"label_range": (1, 7), "head_width": 16, **settings}
    return EmotionModel(backbone, targets, **settings).eval()


def test_predictions_are_named_and_in_the_scale_of_the_corpus(backbone):
    """0 and 1 of the head are the ends of the range; a head that knows nothing predicts its middle."""
    waveform = speech_like(7331)
    emotion = emotion_model(backbone, ("valence", "dominance", "activation"), label_range=(1, 7))
    torch.nn.init.zeros_(emotion.head[-1].weight)
    assert emotion.predict(waveform, 16_000) == {"valence": 4.0, "dominance": 4.0, "activation": 4.0}
    emotion.head[-1].bias.data = torch.tensor([0.0, 1.0, 0.25])
    assert emotion.predict(waveform, 16_000) == {"valence": 1.0, "dominance": 7.0, "activation": 2.5}


def test_predictions_are_those_of_the_parts(backbone):
    """predict is normalise, encode, pool, head and scale, whatever mode the model was in before."""
    waveform = speech_like(7331)
    emotion = emotion_model(backbone, head_dropout=0.5).train()
    predicted = emotion.predict(waveform, 16_000)
    assert not emotion.training
    state = backbone.hidden_states([(waveform - waveform.mean()) / torch.sqrt(waveform.var(correction=0) + 1e-7)])[-1][
        0
    ]
    expected = 1 + 6 * emotion.head(state.mean(0))
    assert list(predicted.values()) == pytest.approx(expected.tolist(), abs=1e-4)


def test_predictions_do_not_depend_on_the_sample_rate(backbone):
    """The same sound at 8 to 48 kHz: within a thousandth of the range, and at any level or offset."""
    emotion = emotion_model(backbone)

    def sound(rate: int) -> Tensor:
        t = torch.arange(rate, dtype=torch.float64) / rate
        return sum(torch.sin(2 * torch.pi * (f * t + 100 * t**2)) for f in (150, 420, 900)).float() * 0.1

    expected = list(emotion.predict(sound(16_000), 16_000).values())
    for rate in (8000, 22_050, 44_100, 48_000):
        assert list(emotion.predict(sound(rate), rate).values()) == pytest.approx(expected, abs=2e-3), rate
    louder = list(emotion.predict(3 * sound(16_000) + 0.1, 16_000).values())
    assert louder == pytest.approx(expected, abs=1e-3)
    other = list(emotion.predict(speech_like(16_000), 16_000).values())
    assert max(abs(a - b) for a, b in zip(other, expected, strict=True)) > 2e-2


@pytest.mark.parametrize("normalised", [True, False])
def test_waveforms_are_normalised_where_the_checkpoint_asks(normalised):
    """... and used as they are elsewhere: there, and there alone, the level matters."""
    emotion = emotion_model(build(replace(KINDS["large"], normalize_waveform=normalised)))
    waveform = speech_like(4000)
    quiet, _ = emotion.encode([0.01 * waveform], -1)
    loud, _ = emotion.encode([waveform], -1)
    assert torch.allclose(quiet, loud, atol=0.05 * loud.abs().max().item()) == normalised


def test_normalised_waveforms_have_no_mean_and_unit_variance():
    """`(x - mean) / sqrt(var + 1e-7)`, population variance; silence stays silence."""
    y = model.normalize(speech_like(4000))
    assert abs(y.mean()) < 1e-5 and abs(y.var(correction=0) - 1) < 1e-3
    assert torch.equal(model.normalize(torch.full((500,), 0.25)), torch.zeros(500))
    assert torch.allclose(model.normalize(torch.tensor([-3e-4, 3e-4])), torch.tensor([-0.6882, 0.6882]), atol=1e-4)


def test_predictions_from_every_depth_are_the_same(backbone):
    """encode to any depth, then forward from it: from the features to the pooled utterance, alone or in a batch."""
    emotion = emotion_model(backbone)
    waveforms = [speech_like(n) for n in (400, 7331, 4000)]
    with torch.no_grad():
        expected = emotion(*emotion.encode(waveforms, -1))
        assert expected.shape == (3, 2)
        for depth in range(-1, 5):
            x, lengths = emotion.encode(waveforms, depth)
            assert torch.allclose(emotion(x, lengths, depth), expected, rtol=0, atol=1e-6), depth
        assert (x.shape, lengths) == ((3, 64), [1, 1, 1])
        alone = torch.cat([emotion(*emotion.encode([waveform], -1)) for waveform in waveforms])
    assert torch.allclose(alone, expected, rtol=0, atol=1e-5)


def test_pooling_is_the_mean_over_frames_in_fp32():
    """... of each utterance, also from 16 bit."""
    x = packed(SMALL, [3, 1, 5]).to(torch.bfloat16)
    pooled = fast.mean(x, fast.Frames([3, 1, 5]))
    assert pooled.dtype == torch.float32
    assert torch.allclose(pooled, torch.stack([x[:3].float().mean(0), x[3].float(), x[4:].float().mean(0)]))


POOLINGS = ("mean", "mean_std", "attentive", "layers")


def pooled(backbone: Wav2Vec2, pooling: str, **settings) -> EmotionModel:
    """With every parameter of the pooling filled, as they begin at zero."""
    emotion = emotion_model(backbone, pooling=pooling, **settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in emotion.named_parameters():
        if not name.startswith(("backbone.", "head.")):
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return emotion


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling_is_its_definition(backbone, pooling):
    """Against the hidden states, utterance by utterance and in float64; with one frame, and alone as in a batch."""
    emotion = pooled(backbone, pooling, head_width=0)
    waveforms = [speech_like(n) for n in (400, 7331, 4000)]
    states = backbone.hidden_states([model.normalize(waveform) for waveform in waveforms])
    found = emotion.infer(waveforms)
    assert torch.allclose(torch.cat([emotion.infer([waveform]) for waveform in waveforms]), found, rtol=0, atol=1e-5)
    for number, prediction in enumerate(found):
        frames = [state[number].double() for state in states]
        x = frames[-1].mean(0)
        if pooling == "mean_std":
            x = torch.cat([x, frames[-1].std(0, correction=0)])
        if pooling == "attentive":
            x = (torch.softmax(frames[-1] @ emotion.score.weight[0].double(), 0)[:, None] * frames[-1]).sum(0)
        if pooling == "layers":
            shares = emotion.layer_weights.double().softmax(0)
            x = sum(share * state.mean(0) for share, state in zip(shares, frames, strict=True))
        expected = emotion.head[0].weight.double() @ x + emotion.head[0].bias.double()
        assert torch.allclose(prediction.double(), expected, rtol=0, atol=1e-5), number


@pytest.mark.parametrize("pooling", ["attentive", "layers"])
def test_a_learnt_pooling_starts_at_the_plain_mean_and_has_a_gradient(backbone, pooling):
    """Over the frames, and over the layers; from there it can move."""
    emotion = emotion_model(backbone, pooling=pooling, head_width=0)
    waveforms = [speech_like(n) for n in (7331, 4000)]
    means = [
        [state.mean(0) for state in part] for part in backbone.hidden_states(list(map(model.normalize, waveforms)))
    ]
    layers = torch.stack([torch.stack(part) for part in means])  # (L+1, B, D)
    expected = emotion.head(layers.mean(0) if pooling == "layers" else layers[-1])
    x, lengths = emotion.encode(waveforms, emotion.deepest)
    predictions = emotion(x, lengths, emotion.deepest)
    assert torch.allclose(predictions, expected, rtol=0, atol=1e-5)
    predictions.square().sum().backward()
    parameter = emotion.score.weight if pooling == "attentive" else emotion.layer_weights
    assert parameter.grad.norm() > 1e-4


def test_poolings_differ_and_a_constant_channel_has_a_gradient(backbone):
    """Four poolings, four predictions; the root in the standard deviation is finite at 0 and so is its gradient."""
    waveforms = [speech_like(n) for n in (7331, 4000)]
    torch.manual_seed(0)
    found = [pooled(backbone, pooling, head_width=width).infer(waveforms) for pooling in POOLINGS for width in (0, 16)]
    for i, one in enumerate(found):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in found[:i])
    x = torch.ones(5, 64, requires_grad=True)
    emotion_model(backbone, pooling="mean_std").statistics(x, [4, 1])[:, 1].sum().backward()
    assert x.grad.isfinite().all()
