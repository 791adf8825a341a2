"""Dependency groups: channels of several layers that can only be removed together, and the layers that read them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from cleanai import UserError
from cleanai.network.trial import copied
from cleanai.pruning.layers import sharing_modules
from cleanai.pruning.tracing import LIMIT_S, all_groups, prepared, refused, run_network, tensors_in, trace
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.progress import say

# The functions of torch_pruning that remove a channel from a layer that reads it, that produces it, and that
# processes each channel by itself.
READ_FUNCTIONS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
_WRITE_FUNCTIONS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
_PASS_FUNCTIONS = (
    tp.prune_depthwise_conv_out_channels,
    tp.prune_batchnorm_out_channels,
    tp.prune_instancenorm_out_channels,
    tp.prune_prelu_out_channels,
)

_UNCLEAR = "operations that torch_pruning cannot follow"


@dataclass
class Group:
    """Channels of several layers that can only be removed together.

    They are removed in units: one channel, or where a convolution has groups, the same channel of each of its groups.
    """

    name: str  # of the first layer that produces these channels
    item: tp.dependency.Group
    channels: int
    units: int
    consumers: dict[nn.Module, torch.Tensor]  # per layer that reads them (I,): the unit of each input, or -1
    spreads: dict[nn.Module, int]  # per consumer: features per channel, behind a flatten
    producers: dict[nn.Module, torch.Tensor]  # per layer that produces or passes them (O,): the unit of each output

    def inputs(self, layer: nn.Module) -> torch.Tensor:
        """The inputs at which `layer` reads the units: (units, channels per unit), within one of its groups."""
        unit = self.consumers[layer][:: self.spreads[layer]]
        unit = unit[: len(unit) // getattr(layer, "groups", 1)]
        return unit.argsort(stable=True)[(unit < 0).sum() :].reshape(self.units, -1)

    def remove(self, graph: tp.DependencyGraph, units: list[int]) -> None:
        """Remove `units` from the network that `graph` was made from."""
        channels = [first + unit for first in range(0, self.channels, self.units) for unit in units]
        root = self.item[0].dep
        item = graph.get_pruning_group(root.layer, root.pruning_fn, channels)
        item.prune()
        for part in item:
            norm = part.dep.layer
            if isinstance(norm, _InstanceNorm) and norm.running_mean is not None:  # torch_pruning forgets these
                kept = torch.ones_like(norm.running_mean, dtype=torch.bool)
                kept[part.idxs] = False
                norm.running_mean, norm.running_var = norm.running_mean[kept], norm.running_var[kept]


def find_groups(network: nn.Module, example: torch.Tensor) -> tuple[tp.DependencyGraph, list[Group]]:
    """The dependency graph of a network, by a forward pass of `example`, and the groups of which units can be removed.

    A group may have come down to one unit, which stays. Left out are channels that reach the network's outputs,
    channels that a layer norm or the like mixes (without some of them the others would change), and those of weights
    that two layers share. The network stays as it was. Raises UserError as `trace` and `all_groups` do.
    """
    graph, found = _find(network, example)
    return graph, [group for group in found if isinstance(group, Group)]


def _find(network: nn.Module, example: torch.Tensor) -> tuple[tp.DependencyGraph, list[Group | str]]:
    """As `find_groups`, with the reason in place of each group that cannot be removed."""
    graph = trace(network, example)
    names = {module: name for name, module in network.named_modules()}
    shared = sharing_modules(network)
    found = []
    for item in all_groups(graph):
        reason = _UNCLEAR if item is None else _obstacle(item, names, shared)
        found.append(reason or _group(item, names) or _UNCLEAR)
    return graph, found


def _obstacle(item: tp.dependency.Group, names: dict[nn.Module, str], shared: set[nn.Module]) -> str | None:
    """What the channels of a group reach that does not let them be removed, if there is such a thing."""
    for part in item:
        layer, cut = part.dep.layer, part.dep.pruning_fn
        if isinstance(layer, nn.Parameter):
            return "a parameter outside of the layers"
        if part.dep.target.type == tp.ops.OPTYPE.OUTPUT:
            return "its outputs"
        if layer in names and cut not in READ_FUNCTIONS + _WRITE_FUNCTIONS + _PASS_FUNCTIONS:
            return type(layer).__name__
        if layer in shared:
            return "weights that two layers share"
    return None if any(part.dep.pruning_fn in READ_FUNCTIONS for part in item) else "its outputs"


def _group(item: tp.dependency.Group, names: dict[nn.Module, str]) -> Group | None:
    """A group of torch_pruning as ours, or None when its indices do not fit its layers."""
    channels, parallels = len(item[0].idxs), {_parallel(part.dep.layer) for part in item}
    parallel = max(parallels)
    if channels % parallel or any(parallel % other for other in parallels):
        return None
    units = channels // parallel
    consumers: dict[nn.Module, torch.Tensor] = {}
    producers: dict[nn.Module, torch.Tensor] = {}
    for part in item:
        layer, cut = part.dep.layer, part.dep.pruning_fn
        if layer not in names:
            continue
        reads = cut in READ_FUNCTIONS
        width = cut.__self__.get_in_channels(layer) if reads else cut.__self__.get_out_channels(layer)
        if width is None:  # a PReLU of one parameter
            continue
        if max(part.idxs) >= width or None in part.root_idxs:
            return None
        unit = (consumers if reads else producers).setdefault(layer, torch.full((width,), -1))
        unit[torch.tensor(part.idxs)] = torch.tensor(part.root_idxs) % units
    spreads = {layer: _spread(unit) if isinstance(layer, nn.Linear) else 1 for layer, unit in consumers.items()}
    if not all(_is_even(unit, units, spreads[layer], layer) for layer, unit in consumers.items()):
        return None
    return Group(names[item[0].dep.layer], item, channels, units, consumers, spreads, producers)


def _spread(unit: torch.Tensor) -> int:
    """The number of consecutive inputs with the same unit."""
    runs = unit.unique_consecutive(return_counts=True)
    return int(runs[1][runs[0] >= 0].min())


def _is_even(unit: torch.Tensor, units: int, spread: int, layer: nn.Module) -> bool:
    """Whether a layer reads every unit (I,) equally often, `spread` inputs at a time."""
    parallel = getattr(layer, "groups", 1)
    first = unit[: len(unit) // parallel]
    counts = first[first >= 0].bincount(minlength=units)
    runs = unit[::spread].repeat_interleave(spread)[: len(unit)]
    return bool((counts == counts[0]).all()) and torch.equal(runs, unit) and len(unit) % spread == 0


def _parallel(layer: nn.Module) -> int:
    """The groups of a convolution; 1 for a depthwise convolution, whose channels can be removed one by one."""
    groups = getattr(layer, "groups", 1)
    return 1 if groups == getattr(layer, "out_channels", None) else groups


def sound_groups(network: nn.Module, example: torch.Tensor) -> set[str]:
    """The names of the groups whose removal has the same effect as zeroing their channels, at least one.

    Some networks reorder channels in a way that torch_pruning misreads; it would then remove the wrong ones. Such
    groups are found by trying, on copies in double precision, and are left alone. Raises UserError, with the reason,
    when no group remains.
    """
    found = [
        "layers of one channel" if isinstance(each, Group) and each.units == 1 else each
        for each in _find(network, example)[1]
    ]
    names = [group.name for group in found if isinstance(group, Group)]
    with prepared(network):
        trials = _Trials(network, example)
        sound = trials.sound_among(names)
    if not sound:
        reasons = sorted(
            {reason for reason in found if isinstance(reason, str)} - ({"its outputs"} if names else set())
        )
        reasons += ["code that needs all of them"] if names else []
        raise refused(network, f"it has no channels that can be removed; they reach {', '.join(reasons)}")
    return sound


class _Trials:
    """Compares, on copies of a network, removing channels with zeroing them."""

    def __init__(self, network: nn.Module, example: torch.Tensor) -> None:
        self._network, self._example, self._double = network, example, True
        self._deadline, self._told = time.monotonic() + LIMIT_S, False
        try:
            self._outputs(self._copy())
        except UserError:  # it computes in a precision of its own
            self._double = False

    def _copy(self) -> nn.Module:
        trial = copied(self._network)
        return trial.double() if self._double else trial

    def _outputs(self, network: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return [outputs.double() for outputs in tensors_in(run_network(network, self._example))]

    def sound_among(self, names: list[str]) -> set[str]:
        """The names of the groups that are sound: all together, or those that are in a half, and so on."""
        if time.monotonic() > self._deadline:
            raise refused(self._network, f"the search for its channels takes more than {LIMIT_S:.0f} s")
        if self.are_sound(names):
            return set(names)
        if not self._told and len(names) > 1:
            say(f"Trying which of {len(names)} groups of channels can be removed")
            self._told = True
        half = len(names) // 2
        return self.sound_among(names[:half]) | self.sound_among(names[half:]) if half else set()

    def are_sound(self, names: list[str]) -> bool:
        """Whether removing a random third of the units of these groups has the same effect as zeroing them."""
        trial = self._copy()
        graph, groups = find_groups(trial, self._example)
        generator = torch.Generator().manual_seed(0)
        zeroed: dict[nn.Module, torch.Tensor] = {}
        cuts = []
        for group in groups:
            if group.name not in names:
                continue
            cut = torch.randperm(group.units, generator=generator)[: max(1, group.units // 3)]
            cuts.append((group, cut.tolist()))
            for layer, unit in group.consumers.items():
                zeroed[layer] = zeroed.get(layer, torch.zeros(len(unit), dtype=torch.bool)) | torch.isin(unit, cut)

        def zero(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
            mask = (~zeroed[layer]).to(args[0])
            return args[0] * (mask if isinstance(layer, nn.Linear) else mask.reshape(-1, *[1] * (args[0].ndim - 2)))

        before = self._outputs(trial)
        hooks = [layer.register_forward_pre_hook(zero) for layer in zeroed]
        expected = self._outputs(trial)
        for hook in hooks:
            hook.remove()
        try:
            for group, cut in cuts:
                group.remove(graph, cut)
            actual = self._outputs(trial)
        except (UserError, RuntimeError, AssertionError, LookupError, ValueError) as error:
            if is_shortage(error):
                raise
            return False  # the wrong channels were removed: shapes clash
        rounding = 1e-9 if self._double else 1e-3
        return all(
            now.shape == then.shape
            and bool((now - then).abs().max() <= 1e-3 * (then - first).abs().max() + rounding * first.abs().max())
            for now, then, first in zip(actual, expected, before)
            if first.numel()
        )
