"""Dependency groups: channels of several layers that can only be removed together, and the layers that read them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.network.activations import CONSUMERS
from cleanai.runtime.memory import is_shortage

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
    producers: dict[nn.Module, float]  # per layer that produces or passes them: outputs per channel

    def inputs(self, layer: nn.Module) -> torch.Tensor:
        """The inputs at which `layer` reads the units: (units, channels per unit), within one of its groups."""
        unit = self.consumers[layer][:: self.spreads[layer]]
        unit = unit[: len(unit) // getattr(layer, "groups", 1)]
        return unit.argsort(stable=True)[(unit < 0).sum() :].reshape(self.units, -1)

    def remove(self, graph: tp.DependencyGraph, units: list[int]) -> None:
        """Remove `units` from the network that `graph` was made from."""
        channels = [first + unit for first in range(0, self.channels, self.units) for unit in units]
        root = self.item[0].dep
        graph.get_pruning_group(root.layer, root.pruning_fn, channels).prune()


def find_groups(network: nn.Module, example: torch.Tensor) -> tuple[tp.DependencyGraph, list[Group]]:
    """The dependency graph of a network, by a forward pass of `example`, and its groups that some layer reads.

    The network's outputs are left out, and channels that a layer norm or the like mixes: without some of them the
    others would change. Raises UserError when torch_pruning cannot follow the forward pass, or when a layer takes no
    part in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parameters outside of layers; `_group` leaves these out
            # Evaluation mode: tracing must not move the running statistics of batch norm.
            graph = tp.DependencyGraph().build_dependency(network.eval(), example_inputs=example)
        items = list(graph.get_all_groups())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_shortage(error):
            raise
        raise UserError(
            f"{type(network).__name__} cannot be pruned: torch_pruning cannot trace its channels "
            f"({type(error).__name__}: {error})"
        ) from error
    names = {module: name for name, module in network.named_modules()}
    idle = [name for module, name in names.items() if isinstance(module, CONSUMERS) and module not in graph.module2node]
    if idle:
        raise UserError(
            f"{type(network).__name__} cannot be pruned: {', '.join(idle[:3])}{', ...' if len(idle) > 3 else ''} take "
            "no part in a forward pass in evaluation mode: build it without them (GoogLeNet: aux_logits=False)"
        )
    groups = [_group(item, names) for item in items]
    return graph, [group for group in groups if group is not None]


def _group(item: tp.dependency.Group, names: dict[nn.Module, str]) -> Group | None:
    """A group of torch_pruning as ours, or None when its channels cannot be removed."""
    channels, parallels = len(item[0].idxs), {_parallel(part.dep.layer) for part in item}
    parallel = max(parallels)
    if channels == parallel or channels % parallel or any(parallel % other for other in parallels):
        return None
    units = channels // parallel
    consumers: dict[nn.Module, torch.Tensor] = {}
    producers: dict[nn.Module, float] = {}
    for part in item:
        layer, cut = part.dep.layer, part.dep.pruning_fn
        if cut in READ_FUNCTIONS:
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            unit = consumers.setdefault(layer, torch.full((inputs,), -1))
            unit[torch.tensor(part.idxs)] = torch.tensor(part.root_idxs) % units
        elif cut in _WRITE_FUNCTIONS or cut in _PASS_FUNCTIONS:
            producers[layer] = producers.get(layer, 0) + len(part.idxs) / channels
        elif layer in names or isinstance(layer, nn.Parameter) or part.dep.target.type == tp.ops.OPTYPE.OUTPUT:
            return None
    spreads = {layer: _spread(unit) if isinstance(layer, nn.Linear) else 1 for layer, unit in consumers.items()}
    name = names[item[0].dep.layer]
    return Group(name, item, channels, units, consumers, spreads, producers) if consumers else None


def _spread(unit: torch.Tensor) -> int:
    """The number of consecutive inputs with the same unit."""
    runs = unit.unique_consecutive(return_counts=True)
    return int(runs[1][runs[0] >= 0].min())


def _parallel(layer: nn.Module) -> int:
    """The groups of a convolution; 1 for a depthwise convolution, whose channels can be removed one by one."""
    groups = getattr(layer, "groups", 1)
    return 1 if groups == getattr(layer, "out_channels", None) else groups


def sound_groups(network: nn.Module, example: torch.Tensor) -> set[str]:
    """The names of the groups whose removal has the same effect as zeroing their channels.

    Some networks reorder channels in a way that torch_pruning misreads; it would then remove the wrong ones. Such
    groups are found by trying, on copies in double precision, and are left alone.
    """
    names = [group.name for group in find_groups(network, example)[1]]
    if _is_sound(network, example, names):
        return set(names)
    return {name for name in names if _is_sound(network, example, [name])}


def _is_sound(network: nn.Module, example: torch.Tensor, names: list[str]) -> bool:
    """Whether removing a random third of the units of these groups has the same effect as zeroing them."""
    trial, example = copy.deepcopy(network).double().eval(), example.double()
    graph, groups = find_groups(trial, example)
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
        return args[0] * (mask if isinstance(layer, nn.Linear) else mask[:, None, None])

    with torch.no_grad():
        before = trial(example)
        hooks = [layer.register_forward_pre_hook(zero) for layer in zeroed]
        expected = trial(example)
        for hook in hooks:
            hook.remove()
        try:
            for group, cut in cuts:
                group.remove(graph, cut)
            actual = trial(example)
        except (RuntimeError, AssertionError, IndexError, ValueError) as error:
            if is_shortage(error):
                raise
            return False  # the wrong channels were removed: shapes clash
    difference = (actual - expected).abs().max()
    return bool(difference <= 1e-3 * (expected - before).abs().max() + 1e-9 * before.abs().max())
