"""What `lora` promises: an exact start, PEFT's arithmetic, and surgery that never passes over anything."""

import pytest
import torch
from random_weights import random_backbone
from torch import nn

import lora
import weights
from freeze import count, freeze
from machine.fast import Linear
from model import EmotionModel, Wav2Vec2, Wav2Vec2Config

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Wav2Vec2Config(
    conv_channels=(32,) * 7, width=64, heads=4, ffn=128, layers=3, position_kernel=16, position_groups=4
)
PEFT_NAMES = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.out_proj",
    "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense",
}


def waveforms(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, generator=generator) for length in lengths or (8000, 16000)]


def fill(module: nn.Module, scale: float = 0.2) -> None:
    """Give every B random values, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, _, adapter in lora.adapters(module):
            adapter.B.normal_(std=scale, generator=generator)


def final(backbone: Wav2Vec2) -> torch.Tensor:
    return torch.cat(backbone.hidden_states(waveforms())[-1])


# ---------------------------------------------------------------- the start


def test_training_starts_at_exactly_the_base_model():
    """Bit for bit, at every hidden state: B is zero. A is not, else B would have no gradient."""
    backbone = random_backbone(TINY)
    before = backbone.hidden_states(waveforms())
    lora.inject(backbone, 4, 8, lora.TARGETS)
    after = backbone.hidden_states(waveforms())
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    for _, _, adapter in lora.adapters(backbone):
        assert not adapter.B.any()
        assert (adapter.A != 0).all()


def test_inject_returns_the_names_of_what_it_wrapped():
    """They are module names of the backbone; all else stays as it was."""
    model = EmotionModel(random_backbone(TINY), ["valence"], (1, 7))
    names = lora.inject(model, 2, 4, ["q", "fc2"], layers=[0, 2])
    assert names == [
        "layers.0.attention.q",
        "layers.0.feed_forward.fc2",
        "layers.2.attention.q",
        "layers.2.feed_forward.fc2",
    ]
    wrapped = {name for name, module in model.backbone.named_modules() if isinstance(module, lora.LoRALinear)}
    assert wrapped == set(names)


@pytest.mark.parametrize(
    ("targets", "published"), [("q v", 294_912), ("q k v o", 589_824), ("q k v o fc1 fc2", 1_327_104)]
)
def test_parameter_counts_on_base_are_the_published_ones(targets, published):
    """Rank 8 on all twelve layers of wav2vec2-base, the rest frozen."""
    with torch.device("meta"):
        backbone = Wav2Vec2(Wav2Vec2Config())
    total, _ = count(backbone)
    freeze(backbone, 0)
    lora.inject(backbone, 8, 16, targets.split())
    assert count(backbone) == (total + published, published)


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 8.0), (4, 3.0), (8, 16.0)])
def test_the_update_is_alpha_over_rank_times_b_a(rank, alpha):
    """`y = W x + b + (alpha / R) B A x`, against the matrices multiplied out in float64."""
    base = nn.Linear(16, 24)
    adapter = lora.LoRALinear(base, rank, alpha)
    nn.init.normal_(adapter.B)
    x = torch.randn(200, 16)
    weight = base.weight.double() + alpha / rank * adapter.B.double() @ adapter.A.double()
    expected = x.double() @ weight.T + base.bias.double()
    torch.testing.assert_close(adapter(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_merging_keeps_the_outputs_and_puts_the_plain_layers_back():
    """Differences of at most 1e-5, though the update was far from zero; nothing of LoRA remains."""
    backbone = random_backbone(TINY)
    base, kinds = final(backbone), {name: type(module) for name, module in backbone.named_modules()}
    names = [name for name, _ in backbone.named_parameters()]
    lora.inject(backbone, 4, 8, lora.TARGETS)
    fill(backbone)
    adapted = final(backbone)
    assert (adapted - base).abs().max() > 0.1
    lora.merge(backbone)
    assert (final(backbone) - adapted).abs().max() <= 1e-5
    assert {name: type(module) for name, module in backbone.named_modules()} == kinds
    assert [name for name, _ in backbone.named_parameters()] == names
    lora.merge(backbone)  # nothing left to do
    assert (final(backbone) - adapted).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"), [(4, 8, "q v"), (4, 3, "q k v o"), (8, 16, "q k v o fc1 fc2"), (2, 16, "fc1 o")]
)
def test_hidden_states_are_pefts_given_the_same_matrices(tmp_path, rank, alpha, targets):
    """Every hidden state within 1e-4 of transformers with PEFT, unbatched; for all targets and any alpha."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        conv_dim=(32,) * 7,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        num_hidden_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
    )
    theirs = transformers.Wav2Vec2Model(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = weights.load_backbone(tmp_path)
    with torch.inference_mode():
        base = theirs(waveforms()[0][None]).last_hidden_state

    modules = [PEFT_NAMES[target].split(".")[1] for target in targets.split()]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)).eval()
    names = lora.inject(ours, rank, alpha, targets.split())
    matrices = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    assert len(matrices) == 2 * len(names)
    with torch.no_grad():
        for name in names:
            _, number, _, target = name.split(".")
            source = f"base_model.model.encoder.layers.{number}.{PEFT_NAMES[target]}"
            adapter = ours.get_submodule(name)
            matrices[f"{source}.lora_B.default.weight"].normal_(std=0.2)
            adapter.A.copy_(matrices[f"{source}.lora_A.default.weight"])
            adapter.B.copy_(matrices[f"{source}.lora_B.default.weight"])
    mine = ours.hidden_states(waveforms())
    with torch.inference_mode():
        for i, waveform in enumerate(waveforms()):
            expected = theirs(waveform[None], output_hidden_states=True).hidden_states
            for depth, state in enumerate(expected):
                torch.testing.assert_close(mine[depth][i], state[0], atol=1e-4, rtol=0)
            if i == 0:
                assert (expected[-1] - base).abs().max() > 0.02  # the matrices do something


# ---------------------------------------------------------------- training


def test_dropout_acts_in_training_alone_and_on_the_low_rank_path_alone():
    """In eval mode the adapter is a fixed matrix; with B = 0 even training mode gives the base's output."""
    base = Linear(16, 24)  # as the model has them: every product below goes the same way, whatever the processor
    adapter = lora.LoRALinear(base, 4, 8, dropout=0.5)
    x = torch.randn(200, 16)
    assert torch.equal(adapter.train()(x), base(x))
    assert torch.equal(adapter.eval()(x), base(x))
    nn.init.normal_(adapter.B)
    with torch.no_grad():
        assert torch.equal(adapter(x), adapter(x))
        adapter.train()
        assert not torch.equal(adapter(x), adapter(x))
        mean = torch.stack([adapter(x) for _ in range(2000)]).mean(0)
        adapter.eval()
        assert (mean - adapter(x)).abs().mean() < 0.1 * (adapter(x) - base(x)).abs().mean()  # unbiased


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_after_a_step_every_lora_parameter_has_a_gradient_and_nothing_frozen_has(dropout):
    """B from the first step on, A from the second, when B is no longer zero."""
    torch.manual_seed(0)
    model = EmotionModel(random_backbone(TINY), ["activation", "valence"], (1, 7))
    freeze(model, 0)
    lora.inject(model, 4, 8, lora.TARGETS, dropout=dropout)
    model.train()
    trained = {name: p for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 6 * 3
    x, lengths = model.encode(waveforms(), 0)
    for step in range(2):
        model.zero_grad()
        model(x, lengths, 0).square().sum().backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None, name
            assert parameter.grad.any() == (step == 1 or name.endswith(".B")), name
        assert not [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_formula(dropout):
    """For A, B and the input, against the plain expression in float64 under the same random draws."""
    base = nn.Linear(16, 24)
    adapter = lora.LoRALinear(base, 4, 3.0, dropout).train()
    nn.init.normal_(adapter.B)
    x = torch.randn(100, 16, requires_grad=True)
    torch.manual_seed(5)
    ours = torch.autograd.grad(adapter(x).square().sum(), (x, adapter.A, adapter.B))
    x64, a64, b64 = (tensor.detach().double().requires_grad_() for tensor in (x, adapter.A, adapter.B))
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones(100, 16), dropout).double()
    y = x64 @ base.weight.double().T + base.bias.double() + 3.0 / 4 * (mask * x64) @ a64.T @ b64.T
    for mine, expected in zip(ours, torch.autograd.grad(y.square().sum(), (x64, a64, b64)), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["q", "query"]}, "lora_targets: no query; expected some of q, k, v, o, fc1, fc2"),
        ({"layers": [3]}, "lora_layers: no layer 3; expected numbers from 0 to 2"),
        ({"layers": [-1]}, "lora_layers: no layer -1; expected numbers from 0 to 2"),
        ({"rank": 0}, "lora_rank: expected at least 1, found 0"),
        ({"targets": []}, "nothing to wrap; expected at least one of each"),
        ({"layers": []}, "nothing to wrap; expected at least one of each"),
    ],
)
def test_what_cannot_be_wrapped_is_an_error_and_leaves_the_model_whole(arguments, message):
    """The message names the key and what there is."""
    backbone = random_backbone(TINY)
    with pytest.raises(ValueError, match=message):
        lora.inject(backbone, **{"rank": 4, "alpha": 8, "targets": ["q"], **arguments})
    assert not list(lora.adapters(backbone))


def test_wrapping_twice_is_an_error():
    """By name; other layers and targets can still be wrapped."""
    backbone = random_backbone(TINY)
    lora.inject(backbone, 4, 8, ["q"], layers=[1])
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.q has LoRA already"):
        lora.inject(backbone, 4, 8, ["q"], layers=[1])
    assert lora.inject(backbone, 4, 8, ["q"], layers=[2]) == ["layers.2.attention.q"]
