"""Training with Adam: resumable fine-tuning with checkpoints, and the bare loop."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from cleanai import UserError
from cleanai.data.images import Images
from cleanai.network.evaluation import Evaluation, evaluate, require_finite
from cleanai.network.models import load_into, save_network
from cleanai.network.training_step import Teacher, TrainingStep
from cleanai.runtime import distributed
from cleanai.runtime.checkpoints import find_checkpoint
from cleanai.runtime.compute import Compute
from cleanai.runtime.files import remove_file
from cleanai.runtime.progress import progress
from cleanai.runtime.scenario import Scenario

SAVE_EVERY = 5  # epochs
DISTIL_STEPS, DISTIL_RATE = 300, 0.001  # docs/method.md compares them
WARM_UP = 0.2  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class TrainSettings:
    """How a network is trained: `lr` is the peak learning rate, `weight_decay` that of Adam.

    `teacher` is that of the distillation, if there is one.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.001
    weight_decay: float = 0.0
    seed: int = 0
    teacher: Teacher | None = None

    @staticmethod
    def of(options: Any, original: nn.Module | None = None) -> TrainSettings:
        """The settings among the options of a script. By its option `distil` the `original` network is the teacher."""
        names = [field.name for field in fields(TrainSettings) if field.name != "teacher"]
        settings = TrainSettings(**{name: getattr(options, name) for name in names})
        if original is not None and options.distil:
            return replace(settings, teacher=Teacher(original, options.distil))
        return settings


class NotFinite(UserError):
    """The loss of a training is not finite."""


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The learning rate at `step` of `steps`: a linear rise to `peak`, then a linear fall, to zero after the last."""
    rise = max(1, round(WARM_UP * steps))
    return peak * min((step + 1) / rise, (steps - step) / (steps - rise + 1))


def fine_tune(
    network: nn.Module,
    images: Images,
    compute: Compute,
    settings: TrainSettings,
    scenario: Scenario,
    facts: dict[str, Any],
) -> tuple[list[dict[str, float]], Evaluation]:
    """Train a network in place; return its history, a dictionary per epoch, and the evaluation of the last epoch.

    Saves every fifth epoch, after each epoch the state to resume from, and at the end `scenario.final`. When an earlier
    run left that file or that state, training continues there. With 0 epochs the network is only measured and saved.
    `facts` go into the checkpoints; their `config` identifies the earlier run. Every epoch draws its random numbers
    from its own seed, so an interruption does not change them.

    Raises UserError when an earlier run had other settings, or when the loss is not finite.
    """
    finished = find_checkpoint(scenario.final, facts["config"])
    if finished:
        load_into(network, finished["state_dict"], scenario.final)
        remove_file(scenario.resume)  # left when a run was killed between the last two lines of this function
        print(f"Found the fine-tuned network of an earlier run: {scenario.final}")
        return finished["history"], Evaluation.stored_in(finished)
    history: list[dict[str, float]] = []
    if settings.epochs:
        require_even_shares(images, settings.batch_size)
        step = TrainingStep(network, images.train, compute, settings.weight_decay, settings.teacher)
        history = _resume(network, step, scenario, facts["config"])
        _print_estimate(network, images, compute, settings, settings.epochs - len(history))
    else:
        find_checkpoint(scenario.resume, facts["config"])  # refuses an interrupted run with other settings
        test = evaluate(network, images.test, compute)
        require_finite(test, "taken as it is")
    for exported in (scenario.exported, scenario.quantized, scenario.standalone):
        remove_file(exported)  # of another network, whose checkpoint the user deleted
    for epoch in range(len(history) + 1, settings.epochs + 1):
        started = time.perf_counter()
        results = _train_epoch(network, step, images, compute, epoch, settings)
        test = evaluate(network, images.test, compute, f"Epoch {epoch}/{settings.epochs}, test images")
        if not math.isfinite(test.loss):
            raise UserError(
                f"The test loss is not finite after epoch {epoch}: use a lower --lr than {settings.lr}, and --fresh"
            )
        tested = {"test_loss": test.loss, "test_accuracy_percent": test.accuracy_percent}
        history.append({"epoch": epoch, **results, **tested, "seconds": time.perf_counter() - started})
        _print_epoch(history[-1], settings.epochs)
        if epoch % SAVE_EVERY == 0:
            save_network(scenario.epoch(epoch), network, {**facts, "epoch": epoch})
        if epoch < settings.epochs:
            state = {"training": step.state_dict(), "history": history}
            save_network(scenario.resume, network, {**facts, "epoch": epoch, **state})

    # Without times: trained again, the file is the same, byte for byte, and what was made from it stays valid.
    untimed = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history]
    state = {"epoch": settings.epochs, "history": untimed, "evaluation": vars(test)}
    save_network(scenario.final, network, {**facts, **state})
    remove_file(scenario.resume)
    return history, test


def train(network: nn.Module, images: Images, compute: Compute, settings: TrainSettings, title: str = "Epoch") -> None:
    """The training of `fine_tune` in place, without evaluation and without files."""
    require_even_shares(images, settings.batch_size)
    step = TrainingStep(network, images.train, compute, settings.weight_decay, settings.teacher)
    for epoch in range(1, settings.epochs + 1):
        _train_epoch(network, step, images, compute, epoch, settings, title)


def distil(
    network: nn.Module, original: nn.Module, images: Images, compute: Compute, batch_size: int, seed: int
) -> None:
    """Train a pruned network in place, without labels, to give the outputs of the original one.

    The last part of the repair: `DISTIL_STEPS` batches, rounded to whole epochs of as many training images as that
    takes. Raises UserError when it diverges.
    """
    count = len(images.train)
    epochs = math.ceil(DISTIL_STEPS / max(1, count // batch_size))
    needed = math.ceil(DISTIL_STEPS / epochs) * batch_size
    images = images.with_train_samples(needed, seed) if needed < count else images
    settings = TrainSettings(epochs, batch_size, DISTIL_RATE, seed=seed, teacher=Teacher(original, 1.0))
    try:
        train(network, images, compute, settings, "Distilling, epoch")
    except NotFinite as error:
        raise UserError("The loss of the distillation is not finite: use --repair full") from error


def _resume(
    network: nn.Module, step: TrainingStep, scenario: Scenario, config: dict[str, Any]
) -> list[dict[str, float]]:
    """Load the state that an interrupted run left, if there is one; return the history so far."""
    interrupted = find_checkpoint(scenario.resume, config)
    if not interrupted:
        return []
    load_into(network, interrupted["state_dict"], scenario.resume)
    try:
        step.load_state_dict(interrupted["training"])
    except ValueError as error:
        raise UserError(f"{scenario.resume} does not fit this network ({error}): start over with --fresh") from error
    print(f"Resuming after epoch {len(interrupted['history'])} of an interrupted run")
    return interrupted["history"]


def require_even_shares(images: Images, batch_size: int) -> None:
    """UserError when several processes cannot share a batch."""
    share = min(batch_size, len(images.train))
    if share % distributed.processes():
        raise UserError(f"A batch of {share} images cannot be shared evenly by {distributed.processes()} processes")


def _print_estimate(network: nn.Module, images: Images, compute: Compute, settings: TrainSettings, epochs: int) -> None:
    """Print how long the epochs will take, from a few steps of a copy of the network."""
    step = TrainingStep(copy.deepcopy(network).train(), images.train, compute, teacher=settings.teacher)
    batch = torch.arange(min(settings.batch_size, len(images.train)), device=images.train.pixels.device)
    moves = images.train.draw_moves(len(batch), images.mirror, torch.Generator().manual_seed(0))
    for number in range(6):
        if number == 4:  # the first steps choose algorithms and allocate memory
            compute.synchronize()
            started = time.perf_counter()
        step(batch, moves, rate=1e-6)
    compute.synchronize()
    seconds_per_image = (time.perf_counter() - started) / 2 / len(batch)
    # A training step costs three forward passes, and one of the teacher.
    seconds = seconds_per_image * (len(images.train) + len(images.test) / 3)
    print(f"An epoch takes about {seconds:.0f} s, all of the fine-tuning {epochs * seconds / 60:.1f} minutes")


def _print_epoch(results: dict[str, float], epochs: int) -> None:
    print(
        f"Epoch {results['epoch']:>{len(str(epochs))}}/{epochs}: "
        f"train loss {results['train_loss']:.4f}, accuracy {results['train_accuracy_percent']:.2f}%; "
        f"test loss {results['test_loss']:.4f}, accuracy {results['test_accuracy_percent']:.2f}%; "
        f"{results['seconds']:.0f} s"
    )


def _train_epoch(
    network: nn.Module,
    step: TrainingStep,
    images: Images,
    compute: Compute,
    epoch: int,
    settings: TrainSettings,
    title: str = "Epoch",
) -> dict[str, float]:
    """Train for one epoch; return `train_loss`, `train_accuracy_percent` and the last `learning_rate`."""
    seed = settings.seed * 100_003 + epoch
    torch.manual_seed(seed * 1_009 + distributed.rank())  # for dropout and stochastic depth
    generator = torch.Generator().manual_seed(seed)  # the same in all processes
    count = len(images.train)
    # All random numbers go to the device at once, and the order to where the images are.
    order = torch.randperm(count, generator=generator).to(images.train.pixels.device)
    moves = images.train.draw_moves(count, images.mirror, generator)
    # All batches have one size. The rest, other images in every epoch, is left out.
    steps = max(1, count // settings.batch_size)
    total = settings.epochs * steps
    rates = [learning_rate((epoch - 1) * steps + number, total, settings.lr) for number in range(steps)]
    results = torch.zeros(2, steps, device=compute.device)  # losses and accuracies, read once at the end
    network.train()
    for number in progress(range(steps), f"{title} {epoch}/{settings.epochs}", "batch"):
        batch = slice(number * settings.batch_size, (number + 1) * settings.batch_size)
        results[0, number], results[1, number] = step(order[batch], moves[batch], rates[number])
    losses, accuracies = distributed.sum_over_processes(results).div_(distributed.processes()).cpu()
    if not losses.isfinite().all():
        first = int(losses.isfinite().int().argmin())
        raise NotFinite(
            f"The loss is not finite in epoch {epoch}, step {first + 1} of {steps}, at a learning rate of "
            f"{rates[first]:.2g}: use a lower --lr than {settings.lr}, and --fresh"
        )
    return {
        "train_loss": losses.mean().item(),
        "train_accuracy_percent": 100 * accuracies.mean().item(),
        "learning_rate": rates[-1],
    }
