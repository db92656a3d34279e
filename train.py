"""Finetune Wav2Vec 2.0 for activation and valence.

    python train.py configs/lora_r8.yaml [key=value ...]
    torchrun --nproc_per_node=2 train.py configs/lora_r8.yaml      the same run in two processes, each with half a batch

A run lives in `runs/<name>`. The same command resumes a run that was stopped and reports one that is finished. Ctrl-C
and SIGTERM let the step end and save; after a kill, a run continues from the end of the last epoch. On a CPU with the
same number of processes, a resumed run is bit-for-bit identical to an uninterrupted one.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import data
import run
import weights
from cache import Prefix, open_cache
from config import Config, extra, load_config
from freeze import count, load_trained, table, train_mode, trained_state
from machine import fast, hardware
from machine.hardware import parallel
from metrics import ccc


@dataclass
class Progress:
    """What the loop changes beside parameters, optimizer and scaler; `last.pt` keeps it."""

    epoch: int = 0  # finished
    best: float = -2.0  # mean CCC over the targets on the development set
    best_epoch: int = 0
    log: list[dict] = field(default_factory=list)  # a row for each epoch
    losses: list[Tensor] = field(default_factory=list)  # of the epoch under way, one for each step so far
    done: float = 0.0  # seconds of audio heard in it
    train_seconds: float = 0.0  # that it has taken
    seconds: float = 0.0  # that the run has taken, over all its starts
    cache_build: float = 0.0  # seconds, of these
    peak: int = 0  # bytes of memory, of every process that worked on this run


class Experiment:
    """All that a run works with: corpus, model, frozen prefix with its cache, optimizer, and how far it has come.

    A stopped run continues from `last.pt`. Raises ValueError, also if backbone, corpus or precision have changed.
    """

    def __init__(self, config: Config, directory: Path, began: float):
        self.config, self.directory = config, directory
        self.began = began  # when the run would have begun if it had never been stopped
        self.device = device = hardware.pick_device(config.device, parallel.local_rank(), config.compile)
        path = directory / "last.pt"
        last = run.load_checkpoint(path) if path.is_file() else {}
        wanted = last.get("precision", "auto") if config.precision == "auto" else config.precision
        precision = hardware.pick_precision(wanted, device)
        if config.cache_tier == "gpu" and device.type == "cpu":
            raise ValueError("cache_tier: found gpu, but the device is the CPU; expected auto or disk")
        with parallel.first_alone():  # it writes the demo corpus
            self.utterances, self.label_range = run.load_utterances(config)
        self.seconds = data.check_audio(self.utterances)  # of each
        corpus = run.describe_corpus(config.corpus, self.utterances, self.seconds)
        labels = [[utterance.labels[target] for target in config.targets] for utterance in self.utterances]
        self.labels = data.scale_labels(torch.tensor(labels), self.label_range)  # (utterances, K), from 0 to 1
        print(run.report_corpus(corpus))
        with parallel.first_alone():  # it downloads
            self.model, backbone = run.build_model(config, self.label_range)
        print(f"{table(self.model)}\n{hardware.device_name(device)}, {precision}, {fast.Kernels.describe(device)}")
        self.identity = {"backbone": backbone, "corpus": corpus, "precision": precision}  # the same at every start
        paths, cache = [utterance.source for utterance in self.utterances], None
        if config.cache:
            how = {"backbone": backbone["sha256"], "precision": precision, "dtype": config.cache_dtype}
            cache = open_cache(config.cache_dir, self.model, paths, tf32=config.tf32 and device.type == "cuda", **how)
            hardware.require_space({cache.directory: cache.space(sum(self.seconds))})
            cache.note_user(directory, backbone["source"])
        self.prefix = Prefix(self.model, paths, device, hardware.DTYPES[precision], cache, config.micro_batch_size)
        parallel.wait()
        self.prefix.release_if_cached(config.cache_tier)
        weights.require_finite(dict(self.model.named_parameters()), backbone["source"])
        run.prepare(self.model, device, precision, config.tf32, config.compile)
        self.optimizer = run.make_optimizer(self.model, config.lr, config.head_lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.progress = Progress()
        self.batches: list[Sequence[int]] = []  # of the epoch under way
        if last:
            self.resume(last, path)
        parallel.require_same(**self.identity, epoch=self.progress.epoch, step=len(self.progress.losses))

    def resume(self, last: dict, path: Path) -> None:
        """Put model, optimizer, scaler and progress where the run was stopped."""
        for kind, now in self.identity.items():
            run.require_same(path, kind, last, now)
        try:
            load_trained(self.model, last["trained"])
            self.optimizer.load_state_dict(last["optimizer"])
            self.scaler.load_state_dict(last["scaler"])
            before = vars(self.progress)
            state = {key: last["state"][key] for key in before}
            if [*map(type, state.values())] != [*map(type, before.values())]:
                raise TypeError("its state is not that of a run")
            before.update(state, losses=[loss.to(self.device) for loss in state["losses"]])
        except Exception as error:  # of a file of something else, nearly any of them
            reason = hardware.first_line(error)
            raise ValueError(f"{path}: does not fit this run ({reason}); delete it to train anew") from None
        self.began -= self.progress.seconds
        run.settle_best(self.directory, self.progress.best_epoch)
        print(f"resuming after epoch {self.progress.epoch} and {len(self.progress.losses)} steps of the next")

    def split(self, name: str) -> list[int]:
        """The indices of the utterances of a split."""
        return [i for i, utterance in enumerate(self.utterances) if utterance.split == name]

    def evaluate(self, name: str, watch: hardware.Watch) -> Tensor:
        """Predictions `(utterances, K)` of a split on the CPU, from 0 to 1."""
        size = self.config.batch_size
        size = min(size, (self.config.micro_batch_size or size) * parallel.size())  # at once, over all processes
        return run.evaluate(self.model, self.prefix, self.split(name), size, watch)

    def account(self) -> None:
        """Note what the run has cost so far."""
        p = self.progress
        p.seconds, p.cache_build = time.perf_counter() - self.began, p.cache_build + self.prefix.seconds
        p.peak, self.prefix.seconds = max(p.peak, hardware.peak_memory(self.device)), 0.0

    def save(self) -> None:
        """Write `last.pt`: what a resumed run continues from. Losses that are not finite are refused."""
        check_losses(self)
        self.account()
        last = self.identity | {"trained": trained_state(self.model), "optimizer": self.optimizer.state_dict()}
        last |= {"scaler": self.scaler.state_dict(), "state": vars(self.progress)}
        hardware.save(self.directory / "last.pt", last)
        parallel.wait()  # until it is there: torchrun stops all where one ends


def train(config: Config) -> dict:
    """Run an experiment to its end, from where it was left if it was begun; returns what `result.json` holds."""
    began, directory = time.perf_counter(), Path(config.output_dir) / config.name
    try:
        with hardware.locked(directory):
            return start_or_resume(config, directory, began)
    except RuntimeError as error:
        if not hardware.is_out_of_memory(error):
            raise
        reason = hardware.first_line(error)
    raise MemoryError(f"{reason}\n{extra('machine.gpu', reason).memory_advice(run.plain(config), parallel.size())}")


def start_or_resume(config: Config, directory: Path, began: float) -> dict:
    """All of `train` that holds memory."""
    run.open_directory(config, directory)
    if parallel.any_of((directory / "result.json").is_file()):
        result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
        run.require_content(config, result, directory)
        return result
    e = Experiment(config, directory, began)
    with hardware.watched_signals() as watch, closing(e.prefix.cache) if e.prefix.cache else nullcontext():
        try:
            fit(e, watch)
        except hardware.Stopped:
            e.save()
            raise
        return finish(e, watch)  # a stop here saves nothing: the model holds the best epoch, not the last


def fit(e: Experiment, watch: hardware.Watch) -> None:
    """The training loop."""
    p, config, model, prefix, indices = e.progress, e.config, e.model, e.prefix, e.split("train")
    steps = len(data.batches(len(indices), config.batch_size, config.seed, 0))
    total, before = steps * config.epochs, steps * p.epoch + len(p.losses)
    how: dict[str, Any] = {"depth": prefix.depth, "optimizer": e.optimizer, "scaler": e.scaler}
    how |= {"dtype": prefix.dtype, "clip": config.clip, "micro_batch_size": config.micro_batch_size}
    bar = tqdm(total=total, initial=before, unit="step", disable=parallel.rank() > 0 or None)
    while p.epoch < config.epochs and p.epoch - p.best_epoch < config.patience:
        start = time.perf_counter() - p.train_seconds
        drawn = data.batches(len(indices), config.batch_size, config.seed, p.epoch + 1)
        e.batches = [parallel.even([indices[i] for i in batch], e.seconds) for batch in drawn]
        rest = e.batches[len(p.losses) :]
        bar.set_description(f"epoch {p.epoch + 1}")
        train_mode(model, prefix.depth)
        for batch, (x, lengths) in watch(zip(rest, prefix([parallel.share(batch) for batch in rest]), strict=True)):
            number = steps * p.epoch + len(p.losses)
            run.set_rates(e.optimizer, number, total, config.warmup)
            run.seed_step(config.seed, number, e.device)
            loss, _ = run.step(model, x, lengths, fast.send(e.labels[batch], e.device), **how)
            p.losses.append(loss)
            p.done += sum(e.seconds[utterance] for utterance in batch)
            p.train_seconds = time.perf_counter() - start
            bar.update()
            if e.device.type == "cpu" or len(p.losses) % 20 == 0 or len(p.losses) == steps:  # reading makes a GPU wait
                check_losses(e)
                so_far = f", dev CCC {p.best:.3f}" if p.log else ""
                speed = run.per_second(p.done, p.train_seconds)
                bar.set_postfix_str(f"loss {loss.item():.3f}{so_far}, {speed:.0f} s of audio/s")
        end_epoch(e, watch, bar)
    bar.close()
    if e.scaler.is_enabled() and e.scaler.get_scale() <= 2**16 / 2 ** (steps * p.epoch):  # halved at every step
        raise ValueError(f"no gradient of any step was finite, so nothing has been trained; {run.ADVICE}")


def check_losses(e: Experiment) -> None:
    """Raise ValueError if one of the last twenty losses is not finite; it names the files of the batch.

    In fp16 this also happens once the scale has fallen below 1: then gradients are not finite even unscaled.
    """
    losses = e.progress.losses
    finite = torch.stack(losses[-20:]).isfinite().tolist() if losses else []
    if losses and e.scaler.is_enabled() and e.scaler.get_scale() < 1:
        finite[-1] = False
    if False in finite:
        step = len(losses) - len(finite) + finite.index(False)
        what = f"epoch {e.progress.epoch + 1}, step {step + 1}: loss or gradient is not finite, and nothing since the "
        what += f"last save is kept; {run.ADVICE}; the files of the batch"
        data.raise_listed(what, [e.prefix.paths[utterance] for utterance in e.batches[step]])


def end_epoch(e: Experiment, watch: hardware.Watch, bar: tqdm) -> None:
    """Score the development set, keep the best model, write the log, save."""
    p, config, prefix = e.progress, e.config, e.prefix
    train_loss = torch.stack(p.losses).mean().item()
    dev = ccc(e.evaluate("dev", watch), e.labels[e.split("dev")]).tolist()
    if not torch.tensor(dev).isfinite().all():  # the last step may have been the one too many
        raise ValueError(f"epoch {p.epoch + 1}: dev CCC {dev} is not finite, and the epoch is not saved; {run.ADVICE}")
    if prefix.cache and parallel.any_of(prefix.cache.writable and not prefix.cache.has(e.split("test"))):
        e.evaluate("test", watch)  # so that the cache is whole
    parallel.wait()
    prefix.release_if_cached(config.cache_tier)
    row = {"epoch": p.epoch + 1, "train_loss": train_loss, "train_seconds": p.train_seconds}
    row |= {f"dev_ccc_{target}": value for target, value in zip(config.targets, dev, strict=True)}
    row |= {"dev_ccc": sum(dev) / len(dev), "audio_seconds_per_second": run.per_second(p.done, p.train_seconds)}
    p.log.append(row | {"seconds": time.perf_counter() - e.began})
    p.epoch, p.losses, p.done, p.train_seconds = p.epoch + 1, [], 0.0, 0.0
    if row["dev_ccc"] > p.best:
        p.best, p.best_epoch = row["dev_ccc"], p.epoch
        best = {"trained": trained_state(e.model), "backbone": e.identity["backbone"], "epoch": p.epoch}
        best |= {"config": run.plain(config), "label_range": list(e.label_range)}
        hardware.save(e.directory / run.PENDING, best)
    hardware.write_text(e.directory / "log.jsonl", "".join(json.dumps(row) + "\n" for row in p.log))
    e.save()
    run.settle_best(e.directory, p.best_epoch)
    shown = "  ".join(f"{target} {value:6.3f}" for target, value in zip(config.targets, dev, strict=True))
    bar.write(f"epoch {p.epoch:3}  loss {train_loss:.3f}  dev CCC  {shown}  {row['train_seconds']:8.1f} s")


def finish(e: Experiment, watch: hardware.Watch) -> dict:
    """Test the best model and write predictions and `result.json`, which it returns."""
    path, cache = e.directory / "best.pt", e.prefix.cache
    best = run.load_checkpoint(path)
    run.require_same(path, "backbone", best, e.identity["backbone"])
    parallel.require_same(best_epoch=best["epoch"])
    load_trained(e.model, best["trained"])
    predictions = data.unscale_labels(e.evaluate("test", watch), e.label_range).numpy()
    tested = [e.utterances[i] for i in e.split("test")]
    run.write_predictions(e.directory / "predictions_test.csv", e.config.targets, tested, predictions)
    e.account()  # before the statistics, which are no part of the method
    result = run.summarise(e.config, vars(e.progress), tested, predictions)
    result |= {"device": hardware.device_name(e.device), "processes": parallel.size(), **e.identity}
    result["total_parameters"], result["trainable_parameters"] = count(e.model)
    result["cache_bytes"] = cache.stored_bytes() if cache else 0
    hardware.write_text(e.directory / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Finetune Wav2Vec 2.0 for activation and valence.")
    parser.add_argument("config", help="a YAML file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to set otherwise")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # no encoding of a terminal or pipe ends a run
    for number in hardware.STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    config = load_config(arguments.config, arguments.overrides)
    try:
        parallel.start()
        with redirect_stdout(None if parallel.rank() else sys.stdout):
            print(run.report(train(config), Path(config.output_dir) / config.name))
        parallel.finish()
    except hardware.Stopped:
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
