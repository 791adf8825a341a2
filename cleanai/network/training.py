"""Fine-tuning."""
from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import Images
from cleanai.network.evaluation import Evaluation, evaluate
from cleanai.network.models import save_network
from cleanai.network.training_step import TrainingStep
from cleanai.runtime import distributed
from cleanai.runtime.checkpoints import find_checkpoint
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import remove_file
from cleanai.runtime.progress import progress
from cleanai.runtime.scenario import Scenario

SAVE_EVERY = 5  # epochs
WARM_UP = 0.2  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained with Adam: `lr` is the peak learning rate, `weight_decay` Adam's own."""

    epochs: int
    batch_size: int = 128
    lr: float = 0.001
    weight_decay: float = 0.0
    seed: int = 0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The learning rate at `step` of `steps`: a straight rise to `peak`, then a straight fall that ends at zero."""
    rise = max(1, round(WARM_UP * steps))
    return peak * min((step + 1) / rise, (steps - 1 - step) / max(1, steps - rise))


def fine_tune(
    network: nn.Module,
    images: Images,
    compute: Compute,
    scenario: Scenario,
    facts: dict[str, Any],
    settings: TrainSettings,
) -> tuple[list[dict[str, float]], Evaluation]:
    """Train a network in place with Adam; return its history, a dictionary per epoch, and what it ended with.

    Saves it after every fifth epoch, and after each epoch what an interrupted run goes on from; ends with
    `scenario.final`, and finds that, or the beginning of it, when an earlier run left it. With 0 epochs the network is
    only measured and saved. `facts` go into the checkpoints; their `config` says which earlier run fits.

    Every epoch draws its order, shifts and flips from its own seed, so they are the same after an interruption.

    Raises UserError when an earlier run had other settings, or the loss is no longer a number.
    """
    finished = find_checkpoint(scenario.final, facts["config"])
    if finished:
        _load_into(network, finished, scenario.final)
        remove_file(scenario.resume)  # there, when the earlier run was killed between its last two acts
        print(f"Found the fine-tuned network of an earlier run: {scenario.final}")
        return finished["history"], Evaluation.stored_in(finished, scenario.final)
    _require_even_shares(images, settings.batch_size)

    step = TrainingStep(network, images.train, compute, settings.weight_decay)
    epochs = settings.epochs
    history: list[dict[str, float]] = []
    interrupted = find_checkpoint(scenario.resume, facts["config"])
    if interrupted:
        _load_into(network, interrupted, scenario.resume, step)
        history = interrupted["history"]
        print(f"Going on after epoch {len(history)} of an interrupted run")
    if epochs:
        seconds = _estimate_epoch_seconds(network, images, compute, settings.batch_size)
        minutes = (epochs - len(history)) * seconds / 60
        print(f"An epoch takes about {seconds:.0f} s, all of the fine-tuning {minutes:.1f} minutes")
    else:
        test = evaluate(network, images.test, compute)

    for epoch in range(len(history) + 1, epochs + 1):
        started = time.perf_counter()
        rate, loss, accuracy = _train_epoch(network, step, images, compute, epoch, settings)
        test = evaluate(network, images.test, compute, f"Epoch {epoch}/{epochs}, test images")
        if not math.isfinite(test.loss):
            raise UserError(
                f"The test loss is no longer a number after epoch {epoch}: use a lower --lr than {settings.lr}, "
                "and --fresh"
            )
        history.append(
            {
                "epoch": epoch,
                "train_loss": loss,
                "train_accuracy_percent": accuracy,
                "test_loss": test.loss,
                "test_accuracy_percent": test.accuracy_percent,
                "learning_rate": rate,
                "seconds": time.perf_counter() - started,
            }
        )
        print(
            f"Epoch {epoch:>{len(str(epochs))}}/{epochs}: train loss {loss:.4f}, train accuracy {accuracy:.2f}%, "
            f"test loss {test.loss:.4f}, test accuracy {test.accuracy_percent:.2f}%, {history[-1]['seconds']:.0f} s"
        )
        if epoch % SAVE_EVERY == 0:
            save_network(scenario.epoch(epoch), network, {**facts, "epoch": epoch})
        if epoch < epochs:
            state = {"training": step.state_dict(), "history": history}
            save_network(scenario.resume, network, {**facts, "epoch": epoch, **state})

    save_network(
        scenario.final, network, {**facts, "epoch": epochs, "history": history, "evaluation": vars(test)}
    )
    remove_file(scenario.resume)
    return history, test


def train(
    network: nn.Module,
    images: Images,
    compute: Compute,
    settings: TrainSettings,
) -> None:
    """The training of `fine_tune` alone, in place: without tests between the epochs, and without files."""
    _require_even_shares(images, settings.batch_size)
    step = TrainingStep(network, images.train, compute, settings.weight_decay)
    for epoch in range(1, settings.epochs + 1):
        _train_epoch(network, step, images, compute, epoch, settings)


def _require_even_shares(images: Images, batch_size: int) -> None:
    share = min(batch_size, len(images.train))
    if share % distributed.processes():
        raise UserError(f"A batch of {share} images cannot be shared evenly by {distributed.processes()} processes")


def _estimate_epoch_seconds(network: nn.Module, images: Images, compute: Compute, batch_size: int) -> float:
    """The time one epoch will take, from a few steps of a copy of the network."""
    step = TrainingStep(copy.deepcopy(network).train(), images.train, compute)
    batch = torch.arange(min(batch_size, len(images.train)), device=compute.device)
    moves = images.train.draw_moves(len(batch), images.mirror, torch.Generator().manual_seed(0))
    for number in range(6):
        if number == 4:  # the first steps choose algorithms, and take memory
            compute.synchronize()
            started = time.perf_counter()
        step(batch, moves, rate=1e-6)
    compute.synchronize()
    seconds_per_image = (time.perf_counter() - started) / 2 / len(batch)
    return seconds_per_image * (len(images.train) + len(images.test) / 3)  # a step passes each image thrice


def _load_into(
    network: nn.Module, checkpoint: dict[str, Any], path: Path, step: TrainingStep | None = None
) -> None:
    try:
        network.load_state_dict(checkpoint["state_dict"])
        if step is not None:
            step.load_state_dict(checkpoint["training"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit the network it would go on from: start over with --fresh") from error


def _train_epoch(
    network: nn.Module,
    step: TrainingStep,
    images: Images,
    compute: Compute,
    epoch: int,
    settings: TrainSettings,
) -> tuple[float, float, float]:
    """Train for one epoch; return the last learning rate, the mean loss and the accuracy in percent."""
    generator = torch.Generator().manual_seed(settings.seed * 100_003 + epoch)
    count = len(images.train)
    # All that is random goes to the device at once.
    order = torch.randperm(count, generator=generator).to(compute.device)
    moves = images.train.draw_moves(count, images.mirror, generator)
    # Batches of one size: what is left over, other images in every epoch, waits for the next.
    steps = max(1, count // settings.batch_size)
    total = settings.epochs * steps
    rates = [learning_rate((epoch - 1) * steps + number, total, settings.lr) for number in range(steps)]
    results = torch.zeros(2, steps, device=compute.device)  # losses and shares recognised, read when all is done
    network.train()
    for number in progress(range(steps), f"Epoch {epoch}/{settings.epochs}", "batch"):
        batch = slice(number * settings.batch_size, (number + 1) * settings.batch_size)
        results[0, number], results[1, number] = step(order[batch], moves[batch], rates[number])
    losses, hits = distributed.sum_over_processes(results).div_(distributed.processes()).cpu()
    if not losses.isfinite().all():
        first = int(losses.isfinite().int().argmin())
        raise UserError(
            f"The loss is no longer a number in epoch {epoch}, step {first + 1} of {steps}, at a learning rate of "
            f"{rates[first]:.2g}: use a lower --lr than {settings.lr}, and --fresh"
        )
    return rates[-1], losses.mean().item(), 100 * hits.mean().item()
