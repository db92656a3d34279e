"""Finetune Wav2Vec 2.0 for activation and valence.

    python train.py configs/lora_r8.yaml [key=value ...]

    torchrun --nproc_per_node=2 train.py configs/lora_r8.yaml      the same run in two processes, each with half a batch

A run lives in `runs/<name>`. The same command again resumes a run that was stopped and reports one that is finished.
Ctrl-C and SIGTERM let the step end and save; killed, a run goes on after the last finished epoch. On a CPU a resumed
run is the uninterrupted one, bit by bit: random numbers of a step follow from the seed and the number of the step.
"""

import argparse
import csv
import hashlib
import json
import math
import platform
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import frozen
import run
from config import Config, load_config
from freeze import count, load_trained, table, train_mode, trained_state
from machine import hardware, parallel, writing
from metrics import bootstrap_ci, ccc, ccc_loss
from model import EmotionModel
from report.results import read_json

RESULTS = ("best.pt", "last.pt", "result.json")  # what makes a directory that of a run
COST_KEYS = {"micro_batch_size", "gradient_checkpointing", "cache_dir", "cache_tier"}  # may change in a run's course
ADVICE = "lower lr or head_lr, or set precision: fp32, under another name"


def step(
    model: EmotionModel,
    x: Tensor,
    lengths: Sequence[int],
    labels: Tensor,
    depth: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
    micro_batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One training step on packed hidden state `depth`; returns the loss and the predictions `(B, K)`.

    CCC is a statistic of the batch, not a mean over it. Micro-batches therefore only bound the memory: each is
    recomputed in the backward pass, and the loss is that of the whole batch, exactly. With several processes `x` is
    this one's share of the batch, `labels` and predictions are those of all. In fp32 and bf16, where a step is taken
    whatever its gradient, a gradient that is not finite makes the returned loss NaN.
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        if micro_batch_size is None:
            predictions = model(x, lengths, depth)
        else:
            parts = [lengths[i : i + micro_batch_size] for i in range(0, len(lengths), micro_batch_size)]
            inputs = zip(x.split([sum(part) for part in parts]), parts, strict=True)
            predictions = torch.cat([checkpoint(model, *part, depth, use_reentrant=False) for part in inputs])
    predictions = parallel.gather(predictions, len(labels))
    loss = ccc_loss(predictions, labels)
    scaler.scale(loss).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parallel.add_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach() + (0 if scaler.is_enabled() else 0 * norm), predictions.detach()


def make_optimizer(model: EmotionModel, lr: float, head_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with `lr` for the backbone, `head_lr` for what is behind it, and weight decay for matrices alone."""
    groups = {(part, decays): [] for part in ("backbone", "head") for decays in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["backbone" if name.startswith("backbone.") else "head", parameter.ndim > 1].append(parameter)
    rates = {"backbone": lr, "head": head_lr}
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rates[part], "peak_lr": rates[part], "weight_decay": weight_decay * decays}
            for (part, decays), parameters in groups.items()
            if parameters
        ],
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def schedule(number: int, total: int, warmup: int) -> float:
    """Factor of the rates at a step: a linear rise over `warmup` steps, then a linear fall to zero at the end."""
    return min((number + 1) / max(warmup, 1), (total - number) / max(total - warmup, 1), 1.0)


def seed_step(seed: int, number: int, device: torch.device) -> None:
    """Let the random numbers of a step (dropout, masking) follow from these and the process: none is kept to resume."""
    value = int(np.random.SeedSequence([seed, number, parallel.rank()]).generate_state(1)[0])
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)  # without a look at every other kind of device: 0.1 ms
    else:
        torch.manual_seed(value)


@torch.no_grad()
def evaluate(model: EmotionModel, prefix: frozen.Prefix, numbers: Sequence[int], batch_size: int) -> Tensor:
    """Predictions `(len(numbers), K)` on the CPU, labels scaled to 0..1."""
    model.eval()
    predictions = []
    for batch, x, lengths in prefix(frozen.in_order(numbers, batch_size)):
        with torch.autocast(x.device.type, prefix.dtype, enabled=prefix.dtype != torch.float32):
            predictions.append(parallel.gather(model(x, lengths, prefix.depth).float(), len(batch)))
    return torch.cat(predictions).cpu()


def open_directory(config: Config) -> Path:
    """The run's directory. Raises ValueError if another configuration has run there; COST_KEYS alone may change."""
    directory = Path(config.output_dir) / config.name
    if parallel.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".*.tmp"):  # by a process that was killed while it saved
            left.unlink()
        path, here = directory / "config.yaml", run.plain(config)
        if not path.is_file() or not any((directory / name).is_file() for name in RESULTS):
            writing.write_yaml(path, here)  # over one that came to nothing too: a mistake in it can be mended
        there = run.plain(load_config(path))
        changed = [key for key in here if here[key] != there[key] and key not in COST_KEYS]
        if told := [f"{key} {there[key]!r}, now {here[key]!r}" for key in changed[:5]]:
            raise ValueError(f"{directory} holds another run ({'; '.join(told)}); choose another name=")
    parallel.wait()
    if not (directory / "config.yaml").is_file():
        raise FileNotFoundError(f"{directory / 'config.yaml'}: not there; output_dir must be on a disk that all share")
    return directory


def train(config: Config) -> dict:
    """Run an experiment to its end, from where it was left if it was begun; returns what `result.json` holds."""
    began = time.perf_counter()
    device = hardware.pick_device(config.device)
    precision = hardware.pick_precision(config.precision, device)
    directory = open_directory(config)
    if parallel.any_of((directory / "result.json").is_file()):
        return read_json(directory / "result.json")

    # Data
    with parallel.first_alone():  # it writes the demo corpus
        utterances, label_range = run.load_utterances(config)
    paths, seconds = [utterance.source for utterance in utterances], data.check_audio(utterances)
    labels = torch.tensor([[utterance.labels[target] for target in config.targets] for utterance in utterances])
    labels = data.scale_labels(labels, label_range)
    split = {name: [i for i, u in enumerate(utterances) if u.split == name] for name in data.SPLITS}
    corpus = describe(config.corpus, utterances, seconds)
    print(report_corpus(corpus))

    # Model, and its frozen prefix: computed, or read from the cache and then not even in memory
    with parallel.first_alone():  # it downloads
        model, backbone = run.build_model(config, label_range)
    prefix = frozen.Prefix(model, paths, device, precision, config.micro_batch_size)
    print(f"{table(model)}\n{hardware.device_name(device)}, {precision}")
    if config.cache:
        prefix.open_cache(config.cache_dir, config.cache_dtype, backbone, sum(seconds), config.cache_tier)
        prefix.cache.note_user(directory, backbone["source"])
    prefix.drop_if_cached()
    run.require_finite(model, backbone)
    hardware.prepare(model, device, precision, config.tf32, config.compile)
    run_on = {"backbone": backbone, "corpus": corpus, "precision": precision}  # the same from beginning to end
    optimizer = make_optimizer(model, config.lr, config.head_lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # State: all that the loop changes beside parameters, optimizer and scaler
    state = {"epoch": 0, "best": -2.0, "best_epoch": 0, "seconds": 0.0, "cache_build": 0.0, "peak": 0, "log": []}
    state |= {"losses": [], "done": 0.0, "train_seconds": 0.0}  # of the epoch under way; a loss for each step so far
    state["total_parameters"], state["trainable_parameters"] = count(model)
    if (directory / "last.pt").is_file():
        state = resume(directory / "last.pt", run_on, state, model, optimizer, scaler, device)
    parallel.require_same(**run_on, epoch=state["epoch"], step=len(state["losses"]))
    began, prefix.build_seconds = began - state["seconds"], state["cache_build"]

    def save() -> None:
        check_losses(epoch, state["losses"], batches, paths)
        state["seconds"], state["cache_build"] = time.perf_counter() - began, prefix.build_seconds
        state["peak"] = max(state["peak"], hardware.peak_memory(device))  # of every process that worked on this run
        last = run_on | {"trained": trained_state(model), "optimizer": optimizer.state_dict()}
        writing.save(directory / "last.pt", last | {"scaler": scaler.state_dict(), "state": state})
        parallel.wait()  # until it is there: torchrun stops all where one ends

    together = min(config.batch_size, (config.micro_batch_size or config.batch_size) * parallel.size())
    steps = len(data.batches(len(split["train"]), config.batch_size, config.seed, 0))
    options = prefix.dtype, config.clip, config.micro_batch_size
    before = steps * state["epoch"] + len(state["losses"])
    bar = tqdm(total=steps * config.epochs, initial=before, unit="step", disable=parallel.rank() > 0 or None)
    with frozen.stop_between_batches(prefix.stop, save), hardware.out_of_memory() as short_of_memory:
        while state["epoch"] < config.epochs and state["epoch"] - state["best_epoch"] < config.patience:
            epoch, losses, start = state["epoch"] + 1, state["losses"], time.perf_counter() - state["train_seconds"]
            bar.set_description(f"epoch {epoch}")
            train_mode(model, prefix.depth)
            batches = data.batches(len(split["train"]), config.batch_size, config.seed, epoch)
            batches = [parallel.even([split["train"][i] for i in batch], seconds) for batch in batches]
            for batch, x, lengths in prefix(batches[len(losses) :]):
                number = steps * (epoch - 1) + len(losses)
                set_rates(optimizer, schedule(number, steps * config.epochs, config.warmup))
                seed_step(config.seed, number, device)
                target = labels[batch].to(device, non_blocking=True)
                loss, _ = step(model, x, lengths, target, prefix.depth, optimizer, scaler, *options)
                losses.append(loss)
                state["done"] += sum(seconds[utterance] for utterance in batch)
                state["train_seconds"] = time.perf_counter() - start
                bar.update()
                if device.type == "cpu" or len(losses) % 20 == 0 or len(losses) == steps:  # reading it makes a GPU wait
                    check_losses(epoch, losses, batches, paths)
                    rate = state["done"] / state["train_seconds"]
                    so_far = f", dev CCC {state['best']:.3f}" if state["log"] else ""
                    bar.set_postfix_str(f"loss {loss.item():.3f}{so_far}, {rate:.0f} s of audio/s")
            train_loss = torch.stack(losses).mean().item()
            train_seconds = state["train_seconds"] = time.perf_counter() - start
            dev = ccc(evaluate(model, prefix, split["dev"], together), labels[split["dev"]]).tolist()
            if not all(map(math.isfinite, dev)):  # the last step may have been the one too many
                raise ValueError(f"epoch {epoch}: dev CCC {dev} is not finite, and the epoch is not saved; {ADVICE}")
            if prefix.cache is not None and parallel.any_of(not prefix.cache.has(split["test"])):
                evaluate(model, prefix, split["test"], together)  # so that the cache is whole
            prefix.drop_if_cached()
            mean = sum(dev) / len(dev)
            row = {"epoch": epoch, "train_loss": train_loss, "train_seconds": train_seconds}
            row |= {f"dev_ccc_{target}": value for target, value in zip(config.targets, dev, strict=True)}
            row |= {"dev_ccc": mean, "audio_seconds_per_second": state["done"] / train_seconds}
            state["log"].append(row | {"seconds": time.perf_counter() - began})
            state |= {"epoch": epoch, "losses": [], "done": 0.0, "train_seconds": 0.0}
            if mean > state["best"]:
                state |= {"best": mean, "best_epoch": epoch}
                best = {"trained": trained_state(model), "backbone": backbone, "label_range": list(label_range)}
                writing.save(directory / "best.pt", best | {"config": run.plain(config), "epoch": epoch})
            writing.write_text(directory / "log.jsonl", "".join(json.dumps(row) + "\n" for row in state["log"]))
            save()
            scores = "  ".join(f"{target} {value:6.3f}" for target, value in zip(config.targets, dev, strict=True))
            bar.write(f"epoch {epoch:3}  loss {train_loss:.3f}  dev CCC  {scores}  {train_seconds:8.1f} s")
    bar.close()
    if short_of_memory:
        advice = advise_on_memory(model, prefix, seconds, labels, optimizer, scaler, config.batch_size, *options)
        raise MemoryError(f"{short_of_memory[0]}\n{advice}")

    # Test
    best = run.load_checkpoint(directory / "best.pt", backbone)
    parallel.require_same(best_epoch=best["epoch"])
    load_trained(model, best["trained"])
    predictions = data.unscale_labels(evaluate(model, prefix, split["test"], together), label_range).numpy()
    tested = [utterances[i] for i in split["test"]]
    write_predictions(directory / "predictions_test.csv", config.targets, tested, predictions)
    state["peak"] = max(state["peak"], hardware.peak_memory(device))  # before the statistics, no part of the method
    result = summarise(config, state, tested, predictions, time.perf_counter() - began)
    result |= {"device": hardware.device_name(device), **run_on}
    result["cache_bytes"] = prefix.cache.stored_bytes() if prefix.cache else 0
    if prefix.cache:
        prefix.cache.close()
    writing.write_text(directory / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def resume(
    path: Path,
    run_on: dict,
    state: dict,
    model: EmotionModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> dict:
    """Put model, optimizer and scaler where a run was stopped; returns what `state`, that of a new run, was there.

    Raises ValueError, also where backbone, corpus or precision of `run_on` are others than they were.
    """
    last = run.load_checkpoint(path, run_on["backbone"])
    if last.get("corpus") != run_on["corpus"]:
        found = "other utterances, labels or lengths than the corpus has now"
        raise ValueError(f"{path}: was trained on {found}; put it back, or train anew under another name")
    if last.get("precision") != run_on["precision"]:
        found = f"in {last.get('precision')}, but this device takes {run_on['precision']}"
        raise ValueError(f"{path}: was trained {found}; go on with one of that kind, or anew under another name")
    try:
        load_trained(model, last["trained"])
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        if [*map(type, state.values())] != [type(last["state"][key]) for key in state]:
            raise TypeError("its state is none of a run")
        state = last["state"] | {"losses": [loss.to(device) for loss in last["state"]["losses"]]}
        print(f"resuming after epoch {state['epoch']} and {len(state['losses'])} steps of the next")
    except Exception as error:  # of a file of something else, nearly any of them
        reason = writing.first_line(error)
        raise ValueError(f"{path}: does not fit this run ({reason}); delete it to train anew") from None
    return state


def check_losses(epoch: int, losses: list[Tensor], batches: Sequence[Sequence[int]], paths: Sequence[str]) -> None:
    """Raise ValueError if one of the last twenty losses of an epoch is not finite; it names the files of the batch."""
    first = max(0, len(losses) - 20)
    finite = torch.stack(losses[first:]).isfinite().tolist() if losses else []
    if False in finite:
        step = first + finite.index(False)
        what = (
            f"epoch {epoch}, step {step + 1}: loss or gradient is not finite, and nothing since the last save is kept"
        )
        data.raise_listed(f"{what}; {ADVICE}; the files of the batch", [paths[number] for number in batches[step]])


def advise_on_memory(
    model: EmotionModel,
    prefix: frozen.Prefix,
    seconds: Sequence[float],
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch_size: int,
    dtype: torch.dtype,
    clip: float,
    micro_batch_size: int | None,
) -> str:
    """What to set so that a step on the longest utterances fits in memory; found by taking it, so the model is lost."""
    same = "the loss stays that of the whole batch, and the same command with it goes on from what was last saved"
    size = micro_batch_size or batch_size
    if parallel.size() > 1:  # the others wait for this one, or have ended
        return f"set micro_batch_size below {math.ceil(size / parallel.size())}: {same}"
    longest = sorted(range(len(seconds)), key=seconds.__getitem__)[-batch_size:]
    while size > 1:
        size //= 2
        prefix.at_once = size
        with hardware.out_of_memory() as short:
            for _, x, lengths in prefix([longest]):
                target = labels[longest].to(x.device)
                step(model, x, lengths, target, prefix.depth, optimizer, scaler, dtype, clip, size)
        if not short:
            what = f"a step on the {len(longest)} longest utterances"
            return f"measured: {what} fits with micro_batch_size={size}; {same}"
    return "measured: not one utterance at a time fits; train fewer layers, or set gradient_checkpointing: true"


def describe(name: str, utterances: Sequence[data.Utterance], seconds: Sequence[float]) -> dict:
    """The corpus in numbers: utterances, speakers and hours of each split; and a SHA-256 of all but paths and sound."""
    rows = [[Path(u.source).name, u.split, u.speaker, u.labels, s] for u, s in zip(utterances, seconds, strict=True)]
    corpus: dict = {"name": name, "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    for split in data.SPLITS:
        chosen = [(u.speaker, s) for u, s in zip(utterances, seconds, strict=True) if u.split == split]
        hours = sum(s for _, s in chosen) / 3600
        corpus[split] = {"utterances": len(chosen), "speakers": len({speaker for speaker, _ in chosen}), "hours": hours}
    return corpus


def report_corpus(corpus: dict) -> str:
    """The same in a line a split."""
    lines = [run.DEMO_NOTE] if corpus["name"] == "demo" else []
    line = "{:6}{utterances:8,} utterances{speakers:6} speakers{hours:9.3f} h"
    return "\n".join([*lines, *(line.format(split, **corpus[split]) for split in data.SPLITS)])


def summarise(
    config: Config, state: dict, tested: Sequence[data.Utterance], predictions: np.ndarray, seconds: float
) -> dict:
    """Scores of the test set (predictions in the corpus scale) and what they cost."""
    test, speakers = {}, [utterance.speaker for utterance in tested]
    for k, target in enumerate(config.targets):
        label = np.array([utterance.labels[target] for utterance in tested])
        score = ccc(torch.from_numpy(predictions[:, k : k + 1]).double(), torch.from_numpy(label[:, None])).item()
        test[target] = {
            "ccc": score,
            "ci95": bootstrap_ci(predictions[:, k], label, speakers),
            "utterances": len(tested),
        }
    per_epoch = statistics.median(row["train_seconds"] for row in state["log"])
    return {
        **({"note": run.DEMO_NOTE} if config.corpus == "demo" else {}),
        "test": test,
        "seconds": {"total": seconds, "cache_build": state["cache_build"], "per_epoch": per_epoch},
        "epochs": state["epoch"],
        "best_epoch": state["best_epoch"],
        "dev_ccc": state["best"],
        "peak_memory_bytes": state["peak"],
        "processes": parallel.size(),
        "trainable_parameters": state["trainable_parameters"],
        "total_parameters": state["total_parameters"],
        "audio_seconds_per_second": statistics.median(row["audio_seconds_per_second"] for row in state["log"]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "config": run.plain(config),
    }


def write_predictions(
    path: Path, targets: Sequence[str], utterances: Sequence[data.Utterance], predictions: np.ndarray
) -> None:
    """CSV of the test set: file, speaker, prediction and label of every target, all in the corpus scale.

    Where utterances are parts of files, columns `start` and `end` in seconds follow; an empty `end` is the file's.
    """
    times = ["start", "end"] if any(utterance.source != utterance.path for utterance in utterances) else []

    def save(file: Path) -> None:
        with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file", "speaker", *targets, *(f"{target}_label" for target in targets), *times])
            for utterance, row in zip(utterances, predictions.tolist(), strict=True):
                labels = [utterance.labels[target] for target in targets]
                labels += [getattr(utterance, time) for time in times]
                names = map(data.text_cell, (utterance.path, utterance.speaker))
                writer.writerow([*names, *(f"{value:.4f}" for value in row), *labels])

    writing.replace(path, save)


def report(result: dict, directory: Path) -> str:
    """A finished run in a few lines."""
    lines = []
    for target, score in result["test"].items():
        interval = "" if score["ci95"] is None else "   95% [{:.3f}, {:.3f}] over speakers".format(*score["ci95"])
        lines.append(f"test CCC  {target:12}{score['ccc']:6.3f}{interval}")
    seconds, memory = result["seconds"], result["peak_memory_bytes"] / 1e9
    lines.append(
        f"{result['epochs']} epochs, the best was {result['best_epoch']}; {seconds['total']:.0f} s in all, "
        f"{seconds['per_epoch']:.1f} s an epoch, peak memory {memory:.2f} GB"
    )
    lines.append(f"{directory}: result.json, predictions_test.csv, best.pt, log.jsonl")
    return "\n".join([*lines, *filter(None, [result.get("note")])])


def main() -> None:
    parser = argparse.ArgumentParser(description="Finetune Wav2Vec 2.0 for activation and valence.")
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set otherwise")
    arguments = parser.parse_args()
    for number in frozen.STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    config = load_config(arguments.config, arguments.overrides)
    try:
        parallel.start()
        with redirect_stdout(None if parallel.rank() else sys.stdout):
            print(report(train(config), Path(config.output_dir) / config.name))
        parallel.finish()
    except frozen.Stopped:
        sys.exit("\nstopped and saved after the last step; the same command continues there")
    except (KeyboardInterrupt, RuntimeError) as error:
        if not isinstance(error.__cause__ or error, KeyboardInterrupt):  # Python wraps one that meets a class half made
            raise
        sys.exit("\nstopped; the same command continues from what was last saved")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"{parallel.name()}error: {error}")
