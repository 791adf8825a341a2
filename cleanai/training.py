"""Evaluation and fine-tuning."""
from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cleanai import UserError
from cleanai.checkpoints import find_checkpoint
from cleanai.compute import Compute
from cleanai.data import Images, ImageSet
from cleanai.models import save_network
from cleanai.progress import progress
from cleanai.scenario import Scenario

EVALUATION_BATCH = 500
SAVE_EVERY = 5  # epochs
WARM_UP = 0.2  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of a set of images; `correct` (N,) says of each whether it was recognised."""

    accuracy_percent: float
    loss: float
    correct: torch.Tensor


def evaluate(network: nn.Module, images: ImageSet, compute: Compute, title: str = "Evaluating") -> Evaluation:
    """Accuracy and mean cross-entropy of a network on all images; the network's mode is left as it was."""
    was_training = network.training
    network.eval()
    correct, loss = [], torch.zeros((), device=images.labels.device, dtype=torch.float64)
    with torch.inference_mode():
        batches = images.batches(EVALUATION_BATCH)
        for inputs, labels in progress(batches, title, "batch", total=-(-len(images) // EVALUATION_BATCH)):
            with compute.autocast():
                outputs = network(inputs)
            loss += F.cross_entropy(outputs.float(), labels, reduction="sum")
            correct.append(outputs.argmax(1) == labels)
    network.train(was_training)
    hits = torch.cat(correct).cpu()
    return Evaluation(
        accuracy_percent=100 * int(hits.sum()) / len(images), loss=loss.item() / len(images), correct=hits
    )


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
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> list[dict[str, float]]:
    """Train a network in place with Adam; return its history, one dictionary per epoch.

    Saves it after every fifth epoch, and after each epoch what an interrupted run goes on from; ends with
    `scenario.final`, and finds that, or the beginning of it, when an earlier run left it. `facts` go into the
    checkpoints; their `config` says which earlier run fits.

    Every epoch draws its order, shifts and flips from its own seed, so they are the same after an interruption.
    Raises UserError when an earlier run had other settings, or the loss is no longer a number.
    """
    finished = find_checkpoint(scenario.final, facts["config"])
    if finished:
        _load_into(network, finished, scenario.final)
        if scenario.resume.exists():  # the earlier run was killed between its last two acts
            scenario.resume.unlink()
        print(f"Found the fine-tuned network of an earlier run: {scenario.final}")
        return finished["history"]

    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=compute.device.type == "cuda")
    history: list[dict[str, float]] = []
    interrupted = find_checkpoint(scenario.resume, facts["config"])
    if interrupted:
        _load_into(network, interrupted, scenario.resume, optimizer)
        for group in optimizer.param_groups:
            group["fused"] = optimizer.defaults["fused"]  # the interrupted run may have been on another device
        history = interrupted["history"]
        print(f"Going on after epoch {len(history)} of an interrupted run")

    for epoch in range(len(history) + 1, epochs + 1):
        started = time.perf_counter()
        rate, loss, accuracy = _train_epoch(network, optimizer, images, compute, epoch, epochs, batch_size, lr, seed)
        test = evaluate(network, images.test, compute, f"Epoch {epoch}/{epochs}, test images")
        if not (math.isfinite(loss) and math.isfinite(test.loss)):
            raise UserError(f"The loss is no longer a number in epoch {epoch}: use a lower --lr than {lr}")
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
            state = {"optimizer": optimizer.state_dict(), "history": history}
            save_network(scenario.resume, network, {**facts, "epoch": epoch, **state})

    save_network(scenario.final, network, {**facts, "epoch": epochs, "history": history})
    if scenario.resume.exists():
        scenario.resume.unlink()
    return history


def estimate_epoch_seconds(network: nn.Module, images: Images, compute: Compute, batch_size: int) -> float:
    """The time one training epoch will take, from a few steps of a copy of the network."""
    trial = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(trial.parameters())
    generator = torch.Generator().manual_seed(0)
    batch = torch.arange(min(batch_size, len(images.train)))
    for step in range(4):
        if step == 2:  # the first steps choose algorithms and take memory
            compute.synchronize()
            started = time.perf_counter()
        _train_step(trial, optimizer, *images.train.augmented_batch(batch, images.mirror, generator), compute)
    compute.synchronize()
    return (time.perf_counter() - started) / 2 * max(1, len(images.train) // batch_size)


def _load_into(
    network: nn.Module, checkpoint: dict[str, Any], path: Path, optimizer: torch.optim.Optimizer | None = None
) -> None:
    try:
        network.load_state_dict(checkpoint["state_dict"])
        if optimizer is not None:
            optimizer.load_state_dict(checkpoint["optimizer"])
            for parameter, state in optimizer.state.items():
                if not all(value.shape in ((), parameter.shape) for value in state.values()):
                    raise ValueError("the optimizer's state is that of another network")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit the network it would go on from: start over with --fresh") from error


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    compute: Compute,
    epoch: int,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> tuple[float, float, float]:
    """Train for one epoch; return the last learning rate, the mean loss and the accuracy in percent."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(images.train), generator=generator)
    # Batches of one size: what is left over, other images in every epoch, waits for the next.
    batches = order.split(batch_size)[: max(1, len(order) // batch_size)]
    loss_sum = torch.zeros((), device=compute.device)
    hits = torch.zeros((), device=compute.device)
    network.train()
    for step, batch in enumerate(progress(batches, f"Epoch {epoch}/{epochs}", "batch")):
        rate = learning_rate((epoch - 1) * len(batches) + step, epochs * len(batches), lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = images.train.augmented_batch(batch, images.mirror, generator)
        loss, outputs = _train_step(network, optimizer, inputs, labels, compute)
        loss_sum += loss
        hits += (outputs.argmax(1) == labels).float().mean()
    mean_loss = loss_sum.item() / len(batches)
    return rate, mean_loss, 100 * hits.item() / len(batches)


def _train_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, labels: torch.Tensor, compute: Compute
) -> tuple[torch.Tensor, torch.Tensor]:
    with compute.autocast():
        outputs = network(inputs)
        loss = F.cross_entropy(outputs, labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach(), outputs.detach()
