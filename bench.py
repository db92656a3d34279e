"""Time and memory of one training step, method by method, beside transformers + PEFT doing the same.

    python bench.py [--peer] [--turns 8] [--rounds 5] [--out bench.json]

Every method runs in a process of its own on the same random turns of 2.75 to 11 s. Methods that are compared take
turns, a step each, so that they see the same machine. Ours run the very code of a training run: audio files or cache,
frozen prefix, `train.step`. The peer gets its waveforms from memory, padded, with everything configured as well as it
can be: feature encoder and frozen layers without gradient, sdpa, fused AdamW, no layer drop, no masking, the same
dropout.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import run
from config import load_config

WARM_UP = 2  # steps; the first fills a cache
CONFIGS = sorted(Path(__file__).parent.glob("configs/*.yaml"))
PEERS = {  # method: trainable layers, LoRA layers, and the configs it is the counterpart of
    "full": ("all", (), ("full", "full_checkpointing")),
    "last 3": (3, (), ("partial3", "partial3_cached")),
    "LoRA r8": (0, range(12), ("lora_r8",)),
    "LoRA r8 last 3": (0, range(9, 12), ("lora_last3_cached",)),
}


def make_turns(count: int, seed: int = 0) -> list[np.ndarray]:
    """Waveforms `(S,)` of 2.75 to 11 s, 5.7 s on average as in MSP-Podcast, filled with noise."""
    random = np.random.default_rng(seed)
    seconds = 2.75 + 8.25 * random.beta(1.1, 1.97, size=count)
    return [0.1 * random.standard_normal(int(s * 16_000)).astype("f4") for s in seconds]


def ours(config_path: str, turns: list[np.ndarray], folder: Path, precision: str) -> tuple[Callable[[], None], int]:
    """A step of a config on the turns, and its number of trainable parameters. The first call fills the cache."""
    import soundfile

    import freeze
    import train
    import weights
    from model import Wav2Vec2Config

    config = load_config(config_path)
    paths = [str(folder / f"{number}.wav") for number in range(len(turns))]
    for path, turn in zip(paths, turns, strict=True):
        soundfile.write(path, turn, 16_000)
    backbone = weights.random_backbone(
        Wav2Vec2Config(hidden_dropout=config.hidden_dropout)
    )  # times do not depend on it
    model = run.assemble(config, backbone, (1, 7))
    device = run.pick_device(config.device)
    prefix = run.Prefix(model, paths, device, precision)
    run.prepare(model, device, precision)
    if config.cache:
        prefix.open_cache(str(folder / "cache"), config.cache_dtype, {"sha256": "random"})
    optimizer = train.make_optimizer(model, config.lr, config.head_lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    labels = torch.rand(len(turns), 2, device=device)
    freeze.train_mode(model, prefix.depth)

    def step() -> None:
        for _, x, lengths in prefix([range(len(turns))]):
            train.step(model, x, lengths, labels, prefix.depth, optimizer, scaler, prefix.dtype, config.clip)
        prefix.drop_if_cached()
        synchronize(device)

    return step, freeze.count(model)[1]


def peer(method: str, turns: list[np.ndarray], precision: str) -> tuple[Callable[[], None], int]:
    """The same step in transformers and PEFT."""
    sys.modules["torchaudio"] = None  # beside a CPU build of torch it breaks the import of transformers
    from torch import nn
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from metrics import ccc_loss

    trainable, lora_layers, _ = PEERS[method]
    off = {"layerdrop": 0.0, "mask_time_prob": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = Wav2Vec2Model(Wav2Vec2Config(attn_implementation="sdpa", hidden_dropout=0.1, feat_proj_dropout=0.0, **off))
    if trainable != "all":
        model.requires_grad_(False)
        for layer in list(model.encoder.layers)[12 - trainable :]:
            layer.requires_grad_(True)
    model.freeze_feature_encoder()
    base = model
    if lora_layers:
        from peft import LoraConfig, get_peft_model

        where = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": list(lora_layers)}
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **where))
    device = run.pick_device("auto")
    head = nn.Sequential(nn.Linear(768, 256), nn.GELU(), nn.Linear(256, 2)).to(device)
    model.to(device).train()
    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    waveforms = [torch.from_numpy(turn).to(device) for turn in turns]
    padded = nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(w, dtype=torch.long) for w in waveforms], batch_first=True)
    labels = torch.rand(len(turns), 2, device=device)
    dtype = run.DTYPES[precision]

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = model(padded, attention_mask=mask).last_hidden_state
            valid = base._get_feature_vector_attention_mask(x.shape[1], mask)[..., None]
            predictions = head((x * valid).sum(1) / valid.sum(1))
        scaler.scale(ccc_loss(predictions, labels)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)

    return step, sum(p.numel() for p in parameters)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def work(arguments: argparse.Namespace) -> None:
    """A worker: builds one method, then runs a step for each line that it reads and answers with its figures."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    turns = make_turns(arguments.turns)
    side, _, method = arguments.worker.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        built = ours(method, turns, Path(folder), arguments.precision) if side == "ours" else None
        step, trainable = built or peer(method, turns, arguments.precision)
        for _ in sys.stdin:
            start = time.perf_counter()
            step()
            figures = {"seconds": time.perf_counter() - start, "trainable_parameters": trainable}
            figures["peak_memory_bytes"] = run.peak_memory(run.pick_device("auto"))
            print(json.dumps(figures), flush=True)


def measure(methods: list[str], arguments: argparse.Namespace) -> dict[str, dict]:
    """Figures by method: warm-up first, then `rounds` times a step of each in turn."""
    flags = [f"--{key}={getattr(arguments, key)}" for key in ("turns", "threads", "precision")]
    workers = {
        method: subprocess.Popen(
            [sys.executable, __file__, f"--worker={method}", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if arguments.verbose else subprocess.DEVNULL,
            text=True,
        )
        for method in methods
    }
    figures: dict[str, list[dict]] = {method: [] for method in methods}
    for _ in tqdm(range(arguments.rounds + WARM_UP), desc=", ".join(map(name_of, methods)), unit="round", disable=None):
        for method, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                raise ValueError(f"{method} failed; run with --verbose to see why")
            figures[method].append(json.loads(answer))
    for worker in workers.values():
        worker.communicate()
    return {method: summarise(rows) for method, rows in figures.items()}


def name_of(method: str) -> str:
    """How a method is called in tables: a config by its file's name."""
    side, _, what = method.partition(":")
    return Path(what).stem if side == "ours" else f"transformers + PEFT: {what}"


def summarise(rows: list[dict]) -> dict:
    """First step (which fills a cache), then median and spread of the steps after the warm-up."""
    seconds = [row["seconds"] for row in rows[WARM_UP:]]
    return {
        **rows[-1],
        "first_step_seconds": rows[0]["seconds"],
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
    }


def table(result: dict) -> str:
    """Markdown: a row a method, with factors against our full finetuning and the peer's same method, each measured in
    turn with it."""
    lines = [
        "| method | s a step (min to max) | audio s/s | vs our full | vs peer | peak memory | vs peer | trainable |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for number, group in enumerate(result["groups"]):
        full = next((row for method, row in group.items() if name_of(method) == "full"), None)
        other = next((row for method, row in group.items() if method.startswith("peer:")), None)
        for method, row in group.items():
            if number > 0 and row is full:
                continue  # the reference again
            cells = [name_of(method), "{seconds:.2f} ({seconds_min:.2f} to {seconds_max:.2f})".format(**row)]
            cells.append(f"{result['audio_seconds'] / row['seconds']:.1f}")
            cells.append(f"{full['seconds'] / row['seconds']:.2f}x" if full else "")
            compared = other and row is not other
            cells.append(f"{other['seconds'] / row['seconds']:.1f}x" if compared else "")
            cells.append(f"{row['peak_memory_bytes'] / 1e9:.2f} GB")
            cells.append(f"{row['peak_memory_bytes'] / other['peak_memory_bytes']:.2f}" if compared else "")
            lines.append(f"| {' | '.join(cells)} | {row['trainable_parameters'] / 1e6:.2f} M |")
    return "\n".join(lines)


def make_groups(configs: list[Path], with_peer: bool) -> list[list[str]]:
    """What is measured in turn: configs of a kind, the peer's counterpart, and our full finetuning as the reference."""
    by_name = {path.stem: f"ours:{path}" for path in configs}
    groups = []
    for name, (*_, counterparts) in PEERS.items():
        if group := [by_name[stem] for stem in counterparts if stem in by_name]:
            groups.append(group + [f"peer:{name}"] * with_peer)
    grouped = {method for group in groups for method in group}
    groups += [[method] for method in by_name.values() if method not in grouped]
    if reference := by_name.get("full"):
        groups = [group if reference in group else [reference, *group] for group in groups]
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a training step, method by method.")
    parser.add_argument("--peer", action="store_true", help="transformers + PEFT as well (both must be installed)")
    parser.add_argument("--configs", nargs="+", default=[p for p in CONFIGS if "amp" not in p.stem], type=Path)
    parser.add_argument("--turns", type=int, default=8, help="utterances in the batch")
    parser.add_argument("--rounds", type=int, default=5, help="steps that count, after two of warm-up")
    parser.add_argument("--precision", default="fp32", choices=run.DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="bench.json")
    parser.add_argument("--verbose", action="store_true", help="show what the processes say")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(arguments)
    audio = [len(turn) / 16_000 for turn in make_turns(arguments.turns)]
    torch.set_num_threads(arguments.threads)
    result = {
        "machine": run.device_name(run.pick_device("auto")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "precision": arguments.precision,
        "turns": arguments.turns,
        "rounds": arguments.rounds,
        "audio_seconds": sum(audio),
        "padded_seconds": max(audio) * len(audio),
        "groups": [measure(group, arguments) for group in make_groups(arguments.configs, arguments.peer)],
    }
    run.write_text(Path(arguments.out), json.dumps(result, indent=2) + "\n")
    print(f"{result['machine']}, {arguments.precision}, {arguments.turns} turns, {sum(audio):.1f} s of audio")
    print(f"{table(result)}\n{arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
