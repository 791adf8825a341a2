"""Which channels can only go together, what reads them, and whether cutting them is safe."""
from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import nn

from cleanai import UserError
from cleanai.network.activations import CONSUMERS

# How torch_pruning takes a channel out of a layer that reads it, that makes it, and that handles each for itself.
READING = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
_WRITING = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
_PASSING = (
    tp.prune_depthwise_conv_out_channels,
    tp.prune_batchnorm_out_channels,
    tp.prune_instancenorm_out_channels,
    tp.prune_prelu_out_channels,
)


@dataclass
class Group:
    """Channels of several layers that can only go together.

    What goes at a time is a unit: one channel, or where a convolution has groups, the same one of each of its groups.
    """

    name: str  # of the first layer that makes these channels
    item: tp.dependency.Group
    channels: int
    units: int
    readers: dict[nn.Module, torch.Tensor]  # per layer and input (I,): the unit that it carries, -1 for another group's
    spreads: dict[nn.Module, int]  # per layer: inputs that one channel is spread over, by a flatten
    handled: dict[nn.Module, float]  # per layer that makes or passes these channels: outputs lost with one of them

    def inputs(self, layer: nn.Module) -> torch.Tensor:
        """Where `layer` reads the units: (units, channels per unit), counted within one of its groups."""
        unit = self.readers[layer][:: self.spreads[layer]]
        unit = unit[: len(unit) // getattr(layer, "groups", 1)]
        return unit.argsort(stable=True)[(unit < 0).sum() :].reshape(self.units, -1)

    def remove(self, graph: tp.DependencyGraph, units: list[int]) -> None:
        """Cut `units` out of the network that `graph` was made from."""
        channels = [first + unit for first in range(0, self.channels, self.units) for unit in units]
        root = self.item[0].dep
        graph.get_pruning_group(root.layer, root.pruning_fn, channels).prune()


def find_groups(network: nn.Module, example: torch.Tensor) -> tuple[tp.DependencyGraph, list[Group]]:
    """The groups of a network whose channels some layer reads, by a forward pass of `example`, and their graph.

    Left out are the outputs of the network, and channels that a layer norm or the like mixes: without some of them the
    others would not be the same. Raises UserError when torch_pruning cannot follow the forward pass, or when a layer
    takes no part in it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about parameters outside of layers: groups that hold one are left out
            # Evaluation mode: tracing must not move the running statistics of batch norm.
            graph = tp.DependencyGraph().build_dependency(network.eval(), example_inputs=example)
        items = list(graph.get_all_groups())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{type(network).__name__} cannot be pruned: torch_pruning cannot follow the way of its channels "
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
    """A group of torch_pruning as ours, or None if it cannot be cut."""
    channels, parallels = len(item[0].idxs), {_parallel(part.dep.layer) for part in item}
    parallel = max(parallels)
    if channels == parallel or channels % parallel or any(parallel % other for other in parallels):
        return None
    units = channels // parallel
    readers: dict[nn.Module, torch.Tensor] = {}
    handled: dict[nn.Module, float] = {}
    for part in item:
        layer, cut = part.dep.layer, part.dep.pruning_fn
        if cut in READING:
            inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            unit = readers.setdefault(layer, torch.full((inputs,), -1))
            unit[torch.tensor(part.idxs)] = torch.tensor(part.root_idxs) % units
        elif cut in _WRITING or cut in _PASSING:
            handled[layer] = handled.get(layer, 0) + len(part.idxs) / channels
        elif layer in names or isinstance(layer, nn.Parameter) or part.dep.target.type == tp.ops.OPTYPE.OUTPUT:
            return None
    spreads = {layer: _spread(unit) if isinstance(layer, nn.Linear) else 1 for layer, unit in readers.items()}
    return Group(names[item[0].dep.layer], item, channels, units, readers, spreads, handled) if readers else None


def _spread(unit: torch.Tensor) -> int:
    """How many inputs in a row carry the same unit."""
    runs = unit.unique_consecutive(return_counts=True)
    return int(runs[1][runs[0] >= 0].min())


def _parallel(layer: nn.Module) -> int:
    """The groups of a convolution; one for a depthwise convolution, whose channels can go singly."""
    groups = getattr(layer, "groups", 1)
    return 1 if groups == getattr(layer, "out_channels", None) else groups


def sound_groups(network: nn.Module, example: torch.Tensor) -> set[str]:
    """The names of the groups that can be cut safely: the network then does what it did with these channels silenced.

    Where channels are reordered in a way that torch_pruning takes for another one, it would cut others than it was
    asked to: such groups are found by trying, on copies in double precision, and left alone.
    """
    names = [group.name for group in find_groups(network, example)[1]]
    if _is_sound(network, example, names):
        return set(names)
    return {name for name in names if _is_sound(network, example, [name])}


def _is_sound(network: nn.Module, example: torch.Tensor, names: list[str]) -> bool:
    """Whether a third of the units of these groups, chosen at random, can be cut safely."""
    trial, example = copy.deepcopy(network).double().eval(), example.double()
    graph, groups = find_groups(trial, example)
    generator = torch.Generator().manual_seed(0)
    silenced: dict[nn.Module, torch.Tensor] = {}
    cuts = []
    for group in groups:
        if group.name not in names:
            continue
        cut = torch.randperm(group.units, generator=generator)[: max(1, group.units // 3)]
        cuts.append((group, cut.tolist()))
        for layer, unit in group.readers.items():
            silenced[layer] = silenced.get(layer, torch.zeros(len(unit), dtype=torch.bool)) | torch.isin(unit, cut)

    def silence(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        mask = (~silenced[layer]).to(args[0])
        return args[0] * (mask if isinstance(layer, nn.Linear) else mask[:, None, None])

    with torch.no_grad():
        before = trial(example)
        hooks = [layer.register_forward_pre_hook(silence) for layer in silenced]
        expected = trial(example)
        for hook in hooks:
            hook.remove()
        try:
            for group, cut in cuts:
                group.remove(graph, cut)
            actual = trial(example)
        except (RuntimeError, AssertionError, IndexError, ValueError):  # torch_pruning lost its way, or shapes clash
            return False
    difference = (actual - expected).abs().max()
    return bool(difference <= 1e-3 * (expected - before).abs().max() + 1e-9 * before.abs().max())
