"""What the baseline promises: the mel bands of others, the frames of Wav2Vec 2.0, and no dependence on a batch."""

import numpy as np
import pytest
import torch
from conftest import speech_like, tiny_settings

import data
import freeze
import run
import train
from config import Config
from model import FIELD, HOP, EmotionModel
from report.logmel import BANDS, FLOOR, SPECTRUM, LogMel, mel_filters


def test_the_filters_are_those_of_transformers():
    """HTK's mel scale, triangles of height one."""
    audio = pytest.importorskip("transformers.audio_utils")
    theirs = audio.mel_filter_bank(SPECTRUM // 2 + 1, BANDS, 50, 8000, 16_000, norm=None, mel_scale="htk")
    ours = mel_filters(BANDS, SPECTRUM // 2 + 1, 50, 8000)
    assert np.allclose(ours.numpy(), theirs, atol=1e-6)
    assert (ours.sum(0) > 0.5).all()  # no band falls between two lines of the spectrum


def test_a_frame_is_its_definition():
    """The window, the spectrum, the bands and the logarithm of one frame, in float64."""
    waveform = speech_like(4000)
    x, lengths = LogMel().feature_encoder([waveform])
    assert (x.shape, lengths) == ((12, BANDS), [12])
    samples = waveform[3 * HOP : 3 * HOP + FIELD].double().numpy() * np.hanning(FIELD + 1)[:-1]
    power = np.abs(np.fft.rfft(samples, SPECTRUM)) ** 2
    expected = np.log10(power @ mel_filters(BANDS, SPECTRUM // 2 + 1, 50, 8000).numpy() + FLOOR)
    assert np.allclose(x[3].numpy(), expected, atol=1e-4)


def test_a_tone_is_loudest_in_its_band_and_silence_has_a_floor():
    """1000 Hz is 1000 mel; no frame is infinite."""
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(1600) / 16_000)
    x, _ = LogMel().feature_encoder([tone, torch.zeros(800)])
    low, high = (2595 * np.log10(1 + f / 700) for f in (50, 8000))
    assert x[0].argmax().item() == round((1000 - low) / (high - low) * (BANDS + 1)) - 1
    assert torch.allclose(x[-1], torch.full((BANDS,), float(np.log10(FLOOR))))


@pytest.mark.parametrize("pooling", ["mean_std", "attentive"])
def test_an_utterance_is_the_same_alone_and_in_any_batch(pooling):
    """And has the frames of Wav2Vec 2.0."""
    model = EmotionModel(LogMel(), ["activation"], (1, 7), pooling=pooling).eval()
    waveforms = [speech_like(n) for n in (400, 719, 720, 7331)]
    assert model.encode(waveforms, -1)[1] == [1, 1, 2, 22]
    together = model.infer(waveforms)
    for number, waveform in enumerate(waveforms):
        assert torch.allclose(model.infer([waveform])[0], together[number], rtol=0, atol=1e-6)
        assert torch.allclose(model.infer([3 * waveform + 0.1])[0], together[number], atol=1e-3)  # no level, no offset


def test_it_trains_as_any_method_and_comes_back_from_disk(tmp_path, tiny_checkpoint, tiny_manifest):
    """Through the cache, and with nothing of a backbone among what trains."""
    keys = tiny_settings(tmp_path, tiny_checkpoint, tiny_manifest, name="a", pooling="mean_std", cache=True)
    config = Config(**{**keys, "backbone": "logmel", "epochs": 20, "patience": 20})
    result = train.train(config)
    assert result["backbone"]["source"] == "logmel"
    head = 2 * BANDS * 256 + 256 + 256 * 2 + 2
    assert (result["trainable_parameters"], result["total_parameters"]) == (head, head)
    losses = [row["train_loss"] for row in train.run.load_checkpoint(tmp_path / "runs/a/last.pt")["state"]["log"]]
    assert losses[-1] < losses[0] - 0.1
    loaded = run.load_run(tmp_path / "runs" / "a")
    assert freeze.prefix_depth(loaded) == 1
    assert loaded.predict(speech_like(8000), data.SAMPLE_RATE).keys() == {"activation", "valence"}
