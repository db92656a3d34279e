"""The demo corpus: a synthetic voice whose labels are the knobs it was made with. It says nothing about emotion."""

import os
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE = 16_000  # Hz
DEMO_SEED = 5  # one for which loudness and labels happen to be uncorrelated
DEMO_SPEAKERS = {"train": 8, "dev": 4, "test": 4}
FORMANTS = {"i": (300, 2300, 3000, 3600), "e": (450, 2000, 2700, 3600), "a": (750, 1250, 2550, 3500)}  # Hz
FORMANTS |= {"o": (480, 900, 2500, 3400), "u": (330, 800, 2400, 3400)}  # of an average voice
BANDWIDTHS = np.array([70, 100, 140, 200])  # Hz, of the four formants


def synthesize_demo(root: str | Path, train: int = 96, dev: int = 32, test: int = 32) -> Path:
    """Make the demo corpus in `root`, unless it is there already, and return the path of its manifest.

    Labels are 1..7. Each speaker has a pitch and a vocal tract and is in one split. Every run makes the same files.
    Raises ValueError if `root` holds another manifest.csv.
    """
    root = Path(root)
    manifest, voices, first_speaker = root / "manifest.csv", {}, 0
    rows = ["path,split,speaker,activation,valence,dominance"]
    for split, count in zip(DEMO_SPEAKERS, (train, dev, test), strict=True):
        for index in range(count):
            speaker = first_speaker + index % DEMO_SPEAKERS[split]
            rng = np.random.default_rng([DEMO_SEED, first_speaker, index])
            labels = rng.uniform(1, 7, size=3).round(3)
            path = f"{split}_{index:03d}.wav"
            rows.append(f"{path},{split},demo{speaker:02d},{','.join(map(str, labels.tolist()))}")
            voices[root / path] = rng, speaker, (labels - 1) / 6
        first_speaker += DEMO_SPEAKERS[split]
    text = "\n".join([*rows, ""]).encode()
    if manifest.exists() and manifest.read_bytes() != text:
        raise ValueError(f"{manifest}: not this version's demo; delete it or set another `data_root`")
    if all(path.exists() for path in (manifest, *voices)):
        return manifest
    root.mkdir(parents=True, exist_ok=True)
    for path, controls in voices.items():
        soundfile.write(path, _voice(*controls), SAMPLE_RATE, subtype="PCM_16")
    partial = root / "manifest.csv.part"
    partial.write_bytes(text)
    os.replace(partial, manifest)  # last and in one move: where there is a manifest, its audio was written whole
    return manifest


def _voice(rng: np.random.Generator, speaker: int, knobs: np.ndarray) -> np.ndarray:
    """Buzz and breath through four resonators, (S,) of 0.9 to 1.8 s within -1..1. Activation, valence, dominance: 0..1.

    Activation raises pitch, pitch range, syllable rate and treble. Valence turns the pitch from falling to rising,
    takes breath out of the voice and, as a smile does, lifts the upper formants. Dominance separates the syllables.
    Loudness is random, since the waveform is normalised before the backbone sees it.
    """
    from scipy.signal import lfilter, sosfilt

    activation, valence, dominance = knobs
    # Multiples of two irrational numbers spread the speakers evenly over the plane of pitch and vocal tract.
    own_pitch = 95 * 2 ** (1.1 * (0.7549 * speaker % 1))  # Hz
    own_tract = 0.92 + 0.18 * (0.5698 * speaker % 1)  # factor on all formants
    count = int(SAMPLE_RATE * rng.triangular(0.9, 1.05, 1.8))
    time = np.arange(count) / SAMPLE_RATE  # s
    syllable = (2.5 + 3.5 * activation) * rng.uniform(0.9, 1.1) * time + rng.uniform()  # one more for each
    openness = np.sin(np.pi * syllable) ** 2  # 0 between two syllables, 1 amid one

    octaves = 0.8 * (activation - 0.5) + (0.05 + 0.25 * activation) * openness
    octaves += (valence - 0.5) * (time / time[-1] - 0.5)
    buzz = np.diff(np.floor(np.cumsum(own_pitch * 2**octaves / SAMPLE_RATE)), prepend=0)  # a pulse a period
    breath = rng.standard_normal(count) * 10 ** (-(10 + 25 * valence) / 20)
    pole = 0.97 - 0.25 * activation  # of the low-pass that tilts the spectrum
    source = lfilter([1 - pole], [1, -pole], buzz + breath)
    source *= 0.05 + 0.95 * openness ** (0.4 + 1.6 * dominance)

    vowels = np.array(list(FORMANTS.values()))[rng.integers(len(FORMANTS), size=int(syllable[-1]) + 2)] * own_tract
    vowels[:, 1:] *= 1 + 0.25 * (valence - 0.5)
    radius = np.exp(-np.pi * BANDWIDTHS / SAMPLE_RATE)
    speech, state = np.empty(count), np.zeros((4, 2))
    step = SAMPLE_RATE // 100  # the formants glide in steps of 10 ms
    for start in range(0, count, step):
        index, glide = divmod(syllable[start], 1)
        formants = (1 - glide) * vowels[int(index)] + glide * vowels[int(index) + 1]  # (4,) Hz
        turn, zero, one = -2 * radius * np.cos(2 * np.pi * formants / SAMPLE_RATE), np.zeros(4), np.ones(4)
        # One resonator a row, b0 b1 b2 a0 a1 a2, with gain 1 at 0 Hz.
        sections = np.stack([1 + turn + radius**2, zero, zero, one, turn, radius**2], axis=1)
        speech[start : start + step], state = sosfilt(sections, source[start : start + step], zi=state)
    return rng.uniform(0.02, 0.1) * speech / np.sqrt(np.mean(speech**2))
