"""What several test files need: small checkpoints, written here key by key and without our own loader."""

import json
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the processor; before PyTorch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

if "--avx2" in sys.argv or os.environ.get(
    "TESTS_AVX2"
):  # before PyTorch is imported; programs that tests start inherit it
    os.environ |= {"TESTS_AVX2": "1", "ATEN_CPU_CAPABILITY": "avx2"}
    os.environ |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
if "--coarse-clock" in sys.argv or os.environ.get("TESTS_COARSE_CLOCK"):
    folder = str(Path(__file__).parent / "coarse_clock")
    os.environ |= {"TESTS_COARSE_CLOCK": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    runpy.run_path(f"{folder}/sitecustomize.py")

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError, RuntimeError):
    # where it is installed for another build of torch, `import transformers` and `import peft` would fail with it
    sys.modules.setdefault("torchaudio", None)


def pytest_addoption(parser) -> None:
    parser.addoption("--full-size", action="store_true", help="compare models of the published sizes too: minutes, GB")
    parser.addoption("--avx2", action="store_true", help="pretend that the processor has AVX2 and nothing newer")
    parser.addoption("--coarse-clock", action="store_true", help="let every clock advance in steps of 16 ms")
    parser.addoption("--soak", type=int, default=10, metavar="N", help="epochs of the runs that must stay flat; 200")
    parser.addoption("--kills", type=int, default=10, help="how often the tests of resuming kill a run; 100: minutes")
    help = "mutated files that each reader is given; the everyday suite has a few, several thousand take minutes"
    parser.addoption("--fuzz", type=int, default=60, metavar="N", help=help)


@pytest.fixture
def full_size(request) -> None:
    """A test that asks for this is one on request."""
    if not request.config.getoption("--full-size"):
        pytest.skip("on request: pytest --full-size")


TINY = {  # as transformers names them
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "conv_dim": [32] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "layer_norm_eps": 1e-5,
}


def tiny_tensors(large: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """A bare Hugging Face state dict of the TINY shape; `large`: every convolution with bias and LayerNorm."""
    width, ffn, channels = TINY["hidden_size"], TINY["intermediate_size"], TINY["conv_dim"]
    shapes: dict[str, tuple[int, ...]] = {"masked_spec_embed": (width,)}

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    for i, kernel in enumerate(TINY["conv_kernel"]):
        layer = f"feature_extractor.conv_layers.{i}"
        shapes[f"{layer}.conv.weight"] = (channels[i], channels[i - 1] if i else 1, kernel)
        if large:
            shapes[f"{layer}.conv.bias"] = (channels[i],)
        if large or i == 0:
            norm(f"{layer}.layer_norm", channels[i])
    norm("feature_projection.layer_norm", channels[-1])
    linear("feature_projection.projection", channels[-1], width)
    position, kernel = "encoder.pos_conv_embed.conv", TINY["num_conv_pos_embeddings"]
    shapes[f"{position}.bias"] = (width,)
    shapes[f"{position}.parametrizations.weight.original0"] = (1, 1, kernel)
    shapes[f"{position}.parametrizations.weight.original1"] = (width, width // 16, kernel)
    norm("encoder.layer_norm", width)
    for i in range(TINY["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.attention.{name}", width, width)
        norm(f"{layer}.layer_norm", width)
        linear(f"{layer}.feed_forward.intermediate_dense", width, ffn)
        linear(f"{layer}.feed_forward.output_dense", ffn, width)
        norm(f"{layer}.final_layer_norm", width)

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm.weight" in name or "original0" in name:
            tensors[name] = 1 + 0.2 * noise
        elif len(shape) == 1:
            tensors[name] = 0.1 * noise
        else:
            tensors[name] = noise * (2 / noise[0].numel()) ** 0.5
    return tensors


def tiny_config(large: bool = False) -> dict:
    """The `config.json` that belongs to `tiny_tensors`."""
    kind = {"feat_extract_norm": "layer" if large else "group", "do_stable_layer_norm": large, "conv_bias": large}
    return {"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"], "hidden_act": "gelu", **TINY, **kind}


def write_tiny_checkpoint(folder: Path, large: bool = False) -> Path:
    save_file(tiny_tensors(large), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny_config(large)), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": true}', encoding="utf-8")
    return folder


ACCELERATORS = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.fixture(params=["cpu", *ACCELERATORS])
def device(request) -> torch.device:
    """The CPU, and every kind of accelerator that is there: whatever holds on one holds on all."""
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device(request.param)


def forget_plots(monkeypatch) -> None:
    """Let `report.plots` be imported anew, for instance without matplotlib."""
    import report

    monkeypatch.delitem(sys.modules, "report.plots", raising=False)
    monkeypatch.delattr(report, "plots", raising=False)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Pictures are made as ever, and their files are there, but empty: to fill them takes half a second each."""
    with suppress(ImportError):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **how: Path(file).touch())


@pytest.fixture
def one_thread():
    """Such small matrices are not worth two, which wait for each other wherever the processor is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face directory with a model of the base kind: width 64, 3 layers."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_large_checkpoint(tmp_path_factory) -> Path:
    """The same of the large kind: pre-norm, every convolution with bias and LayerNorm."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny_large"), large=True)


def write_old_wav(path: Path, waveform: np.ndarray) -> None:
    """At 16 kHz, last changed in 2001: opening a cache waits where a file has only just changed."""
    soundfile.write(path, waveform, 16_000)
    os.utime(path, (1e9, 1e9))


@pytest.fixture(scope="session")
def tiny_manifest(tmp_path_factory) -> Path:
    """A corpus of 12, 4 and 4 recordings of 0.3 to 0.6 s by 4, 2 and 2 speakers; labels from 1 to 7."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    rows = ["path,split,speaker,activation,valence"]
    for split, count in (("train", 12), ("dev", 4), ("test", 4)):
        for number in range(count):
            activation, valence = rng.uniform(1, 7, 2).round(3)
            waveform = speech_like(int(rng.integers(4800, 9600)), number).numpy()
            waveform += 0.03 * activation * rng.standard_normal(len(waveform))  # something to be learnt
            write_old_wav(folder / f"{split}{number}.wav", waveform / 4)
            speaker = f"{split}-{number % max(2, count // 3)}"
            rows.append(f"{split}{number}.wav,{split},{speaker},{activation},{valence}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / "manifest.csv"


def tiny_settings(folder: Path, checkpoint: Path, manifest: Path, /, **keys) -> dict:
    """The keys of a small experiment below `folder`; those that are given win."""
    places = {"output_dir": str(folder / "runs"), "cache_dir": str(folder / "cache"), "backbone": str(checkpoint)}
    corpus = {"corpus": "manifest", "manifest": str(manifest), "label_range": [1, 7]}
    return {**places, **corpus, "epochs": 3, "batch_size": 4, "device": "cpu", **keys}


@pytest.fixture(scope="session")
def transformers():
    """The peer, or a skip. Its configurations here leave nothing to chance: no dropout, no masking, eager attention."""
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def published_recipe(transformers, **settings) -> torch.nn.Module:
    """The emotion model that audeering published, as its card builds it on transformers, with random weights."""

    class Head(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.dense = torch.nn.Linear(config.hidden_size, config.hidden_size)
            self.dropout = torch.nn.Dropout(config.final_dropout)
            self.out_proj = torch.nn.Linear(config.hidden_size, config.num_labels)

        def forward(self, x):
            return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))

    class Published(transformers.Wav2Vec2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.wav2vec2 = transformers.Wav2Vec2Model(config)
            self.classifier = Head(config)
            self.post_init()

        def forward(self, input_values):
            return self.classifier(self.wav2vec2(input_values)[0].mean(1))

    large = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    names = {0: "arousal", 1: "dominance", 2: "valence"}
    given = {"id2label": names, "pooling_mode": "mean", "vocab_size": None, **large, **settings}
    torch.manual_seed(0)
    model = perturb(Published(transformers.Wav2Vec2Config(**given)))
    model.classifier.dense.weight.data *= 10  # fresh weights are so small that tanh would do nothing
    model.classifier.out_proj.weight.data *= 10
    return model


@pytest.fixture(scope="session")
def published_model(transformers, tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """The directory that holds a small one, as `save_pretrained` writes it, and the model."""
    folder, model = tmp_path_factory.mktemp("published"), published_recipe(transformers, **TINY)
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder, model


@torch.no_grad()
def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a value of its own: fresh norms are ones and fresh biases zeros, and hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and not name.endswith(("original0", "weight_g")):
            parameter.add_(noise * (0.3 * parameter.std()))
        elif name.endswith(("weight", "original0", "weight_g")):
            parameter.mul_(1 + 0.2 * noise)
        else:
            parameter.add_(0.1 * noise)
    return model.eval()


def speech_like(samples: int, seed: int = 0) -> Tensor:
    """Gliding harmonics and noise, `(S,)`, with a small offset: a waveform with structure at every scale."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + samples)
    t = torch.arange(samples) / 16_000
    glides = torch.rand(6, generator=generator)
    tones = sum(g * torch.sin(2 * torch.pi * (130 * (i + 1) * t + 20 * g * t**2)) for i, g in enumerate(glides))
    return 0.02 + 0.1 * tones + 0.05 * torch.randn(samples, generator=generator)
