"""What a notebook calls as `cleanai.prune` and `cleanai.measure_sweep`: networks and images of one's own."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Sequence

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.data.images import ImageSet, are_large
from cleanai.network.activations import has_finite_weights
from cleanai.network.trial import copied, try_outputs, try_run
from cleanai.pruning.criteria import CRITERIA
from cleanai.pruning.layers import find_layers
from cleanai.pruning.pruner import prune_to_budget
from cleanai.pruning.repair import most_images
from cleanai.pruning.settings import PruneImages, PruneSettings
from cleanai.pruning.tracing import require_plain, unwrapped
from cleanai.runtime.compute import Compute, choose_compute
from cleanai.search import FURTHEST, Limits, prune_to_limits
from cleanai.sweep import Sweep, measure_network, sweep_criteria

STEPS = 3
LEAST_IMAGES = 16
REPAIR_IMAGES = 1024
_NEED_GRADIENTS = tuple(
    getattr(tp.importance, f"{kind}Importance")
    for kind in ("Taylor", "Hessian", "GroupTaylor", "GroupHessian", "OBDC")
    if hasattr(tp.importance, f"{kind}Importance")
)


def prune(
    network: nn.Module,
    images: ImageSet,
    ratio: float | str | None = 0.3,
    criterion: str | tp.importance.Importance = "wanda",
    macs_ratio: float | str | None = "same",
    round_to: Sequence[int] = PruneSettings.round_to,
    accept_drop: float | None = None,
    keep_layers: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, Any]]:
    """Return a pruned copy of a trained network, and a report. The network itself does not change.

        pruned, report = cleanai.prune(network, cleanai.image_set("my_pictures", size=224), ratio=0.3)

    `ratio` is the share of the parameters to remove, `macs_ratio` that of the multiply-accumulates: "same" as `ratio`.
    None leaves one of them free. Small networks meet few of them exactly: then the nearest is taken, if it is within 2
    points, and a line says so. With `ratio="auto"` it goes on in steps of 5% of both costs, up to the last one after
    which the accuracy on `images` is no more than `accept_drop` points lower. `images` (`cleanai.image_set`, at least
    16, better some hundred) are as the network was trained on; their labels are used with "auto" alone. Measure the
    accuracy on other images.
    `criterion` is the name of a method in `CRITERIA` ("wanda", "coverage", your own) or of a baseline ("OBS",
    "L2 magnitude", "random choice"), capitals do not matter; or an importance, an instance. Layer widths are multiples
    of the first number in `round_to` that can meet the ratios. Layers whose names match a pattern in `keep_layers`
    ("layer4.*") keep their output channels. It prunes in 3 steps, with full repair (`prune_to_budget`).

    The copy is in evaluation mode, on the network's device; fine-tune it as any network. The work is done there if it
    is a CUDA device, else on the first CUDA device there is, else on the CPU. The report is that of `prune_to_budget`:
    `steps`, `layers`, `sensitivity`; with "auto" also `path` and `ended_by` (`prune_to_limits`). Raises UserError, in
    one sentence, when an argument is wrong, the network cannot be pruned, or the ratios cannot be met.
    """
    _check_drop(ratio, macs_ratio, accept_drop)
    auto = ratio == "auto"
    shares = (FURTHEST, macs_ratio and FURTHEST) if auto else _shares(ratio, macs_ratio)
    settings = PruneSettings(*shares, STEPS, _multiples(round_to), nearest=True, keep_layers=_patterns(keep_layers))
    importance = _importance(criterion)
    with _Workplace(network) as place:
        find_layers(unwrapped(place.network), settings.keep_layers)
        used = _prune_images(place.network, place.prepared(images))
        pruned = place.network
        if auto:
            _require_labels(place.network, used.calibration, "images")
            limits = Limits(accept_drop)
            pruned, report, _ = prune_to_limits(place.network, importance, used, place.compute, settings, limits)
        else:
            report, _ = prune_to_budget(pruned, importance, used, place.compute, settings)
        return pruned.to(place.home), report


def measure_sweep(
    network: nn.Module,
    images: ImageSet,
    test: ImageSet,
    ratios: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
) -> dict[str, Any]:
    """Measure the accuracy after pruning copies of a network to several ratios, by every criterion and baseline.

    `images` are those of `prune`, `test` other images with their labels. Each of the rising `ratios` is removed of the
    parameters and of the multiply-accumulates alike, with repair and without fine-tuning. Returns `original`, the
    network's `accuracy_percent`, `parameters` and `macs` (multiply-accumulates for one image), and `points`: a list of
    the same with `criterion` and `ratio`. The network does not change. Raises UserError as `prune` does, and when
    `test` has labels of one class only, or of more classes than the network.
    """
    if not isinstance(ratios, (list, tuple)) or not ratios or not all(map(_is_share, ratios)):
        raise UserError(f"ratios is {ratios!r}: give a list of shares between 0 and 1, for example [0.2, 0.4, 0.6]")
    if list(ratios) != sorted(set(ratios)):
        raise UserError(f"ratios must rise, and are {', '.join(f'{ratio:g}' for ratio in ratios)}")
    with _Workplace(network) as place:
        used = _prune_images(place.network, place.prepared(images))
        test = place.prepared(test, "test", least=1)
        _require_labels(place.network, test, "test")
        # Widths that meet the highest ratio may not meet the others: any width, so that small networks meet all.
        sweep = Sweep(place.network, [float(ratio) for ratio in ratios], used, test, place.compute, round_to=(1,))
        return {"original": measure_network(place.network, test, place.compute), "points": sweep.run()}


class _Workplace:
    """A copy of a network where it is pruned: on its own CUDA device, else on the first one, else on the CPU.

    `home` is the device of the network. A context manager, which leaves PyTorch's current CUDA device as it was.
    """

    def __init__(self, network: nn.Module) -> None:
        if not isinstance(network, nn.Module):
            raise UserError(
                f"network is a {type(network).__name__}, and must be a torch.nn.Module: the trained network"
            )
        tensors = [*network.parameters(), *network.buffers()]
        devices = {tensor.device for tensor in tensors} or {torch.device("cpu")}
        if len(devices) > 1 or next(iter(devices)).type == "meta":
            names = ", ".join(sorted(map(str, devices)))
            raise UserError(f"The network's weights are on {names}: move it to one device, network.to('cpu')")
        others = sorted({str(tensor.dtype)[6:] for tensor in tensors if tensor.is_floating_point()} - {"float32"})
        if others:
            raise UserError(f"The network has {others[0]} weights, and must have float32 ones: give network.float()")
        require_plain(unwrapped(network))
        if not has_finite_weights(network) or any(bool(tensor.isnan().any()) for tensor in tensors):
            raise UserError("The network holds weights that are not finite: its training has failed")
        self.home = next(iter(devices))
        self.network = copied(network).eval()

    def __enter__(self) -> _Workplace:
        self._current = torch.cuda.current_device() if torch.cuda.is_available() else None
        chosen = choose_compute("auto", "auto")
        if chosen.precision == "float16":  # too small for the values of some networks, and nothing is trained here
            chosen = choose_compute("auto", "float32")
        device = self.home if self.home.type == "cuda" else chosen.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Channels last is faster, but many networks reshape with `view`, which fails on it.
        self.compute: Compute = replace(chosen, device=device, memory_format=torch.contiguous_format)
        self.compute.place(self.network)
        return self

    def __exit__(self, *_: object) -> None:
        if self._current is not None:
            torch.cuda.set_device(self._current)

    def prepared(self, images: ImageSet, name: str = "images", least: int = LEAST_IMAGES) -> ImageSet:
        """The images on the device. UserError when the network does not take them."""
        if not isinstance(images, ImageSet):
            raise UserError(f"{name} is a {type(images).__name__}: make it with cleanai.image_set(folder or tensor)")
        if len(images) < least:
            raise UserError(f"{name} holds {len(images)} images: give at least {least}")
        device = self.compute.device
        images = images.to(device, are_large(device, images))
        images = replace(images, memory_format=self.compute.memory_format)
        try_run(self.network, next(images.batches(2))[0], name)
        return images


def _prune_images(network: nn.Module, images: ImageSet) -> PruneImages:
    """All of the images to score channels on, and as many for the repair as fit into memory."""
    most = most_images(network, next(images.batches(1))[0])
    return PruneImages(images, images.sample(min(REPAIR_IMAGES, most), seed=0))


def _require_labels(network: nn.Module, images: ImageSet, name: str) -> None:
    """UserError when the accuracy of a network cannot be measured on these images, called `name`."""
    outputs = try_outputs(network, next(images.batches(2))[0], name).shape[1:]
    labels = images.labels.unique().tolist()
    if len(labels) == 1:
        raise UserError(f"{name} has images of one class only: give image_set the labels of a tensor, or class folders")
    if len(outputs) > 1 or labels[-1] >= outputs[0]:
        shape = "x".join(map(str, outputs))
        raise UserError(f"{name} has the label {labels[-1]}, and the network gives {shape} scores per image")


def _check_drop(ratio: float | str | None, macs_ratio: float | str | None, accept_drop: float | None) -> None:
    if ratio != "auto" and accept_drop is not None:
        raise UserError("accept_drop is for ratio='auto'")
    if ratio == "auto" and macs_ratio not in ("same", None):
        raise UserError(f"macs_ratio is {macs_ratio!r}: with ratio='auto' give 'same' or None")
    is_number = isinstance(accept_drop, Real) and not isinstance(accept_drop, bool)
    if ratio == "auto" and not (is_number and 0 < accept_drop < 100):
        raise UserError(f"accept_drop is {accept_drop!r}: with ratio='auto' give percentage points, for example 1.0")


def _shares(ratio: float | None, macs_ratio: float | str | None) -> tuple[float | None, float | None]:
    if macs_ratio == "same":
        macs_ratio = ratio
    for name, share in (("ratio", ratio), ("macs_ratio", macs_ratio)):
        if share is not None and not _is_share(share):
            raise UserError(f"{name} is {share!r}: give a share between 0 and 1, both excluded, for example {name}=0.3")
    if ratio is None and macs_ratio is None:
        raise UserError("ratio and macs_ratio are both None: nothing would be removed")
    return tuple(None if share is None else float(share) for share in (ratio, macs_ratio))  # type: ignore


def _is_share(share: object) -> bool:
    return isinstance(share, Real) and not isinstance(share, bool) and 0 < share < 1


def _multiples(round_to: Sequence[int]) -> tuple[int, ...]:
    multiples = tuple(round_to) if isinstance(round_to, (list, tuple)) else (round_to,)
    if not multiples or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in multiples):
        raise UserError(f"round_to is {round_to!r}: give whole numbers of at least 1, for example round_to=(16, 8, 1)")
    return tuple(map(int, multiples))


def _patterns(keep_layers: Sequence[str]) -> tuple[str, ...]:
    patterns = keep_layers if isinstance(keep_layers, (list, tuple)) else (keep_layers,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"keep_layers is {keep_layers!r}: give names of layers, for example ['conv1', 'layer4.*']")
    return tuple(patterns)


def _importance(criterion: str | tp.importance.Importance) -> tp.importance.Importance:
    if isinstance(criterion, str):
        known = {name.casefold(): make for name, make in {**sweep_criteria(), **CRITERIA}.items()}
        if criterion.casefold() not in known:
            names = ", ".join(sorted(known))
            raise UserError(f"There is no criterion {criterion!r}: use one of {names}, or an importance, an instance")
        criterion = known[criterion.casefold()]()
    if isinstance(criterion, _NEED_GRADIENTS):
        raise UserError(f"{type(criterion).__name__} needs gradients, which pruning does not compute: use another one")
    if not isinstance(criterion, tp.importance.Importance):
        raise UserError(
            f"criterion is {criterion!r}: give a name, for example 'wanda', or an instance of an importance"
        )
    return criterion
