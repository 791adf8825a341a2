"""What a network must be to be pruned, and how torch_pruning traces its channels."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from typing import Any, Iterator, Mapping

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.parameter import is_lazy

from cleanai import UserError
from cleanai.network.activations import CONSUMERS, not_finite, removed_afterwards
from cleanai.runtime.files import one_line
from cleanai.runtime.foreign import foreign_code
from cleanai.runtime.memory import is_shortage
from cleanai.runtime.progress import progress

LIMIT_S = 600.0  # of the search for groups of channels; ResNet-18 takes a second
# Layers whose weight and bias, where they have one, are parameters.
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_ROUNDS = 3


def refused(network: nn.Module, reason: str) -> UserError:
    """The error for a network that cannot be pruned."""
    return UserError(f"{type(network).__name__} cannot be pruned: {reason}")


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside DataParallel and torch.compile."""
    while isinstance(network, nn.DataParallel) or hasattr(network, "_orig_mod"):
        network = network.module if isinstance(network, nn.DataParallel) else network._orig_mod
    return network


def tensors_in(outputs: Any) -> list[torch.Tensor]:
    """The floating-point tensors in the outputs of a network: a tensor, or lists, mappings and data classes of them."""
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    elif dataclasses.is_dataclass(outputs):
        outputs = list(vars(outputs).values())
    if not isinstance(outputs, (list, tuple)):
        return []
    return [tensor for part in outputs for tensor in tensors_in(part)]


@contextlib.contextmanager
def prepared(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients for all weights, and inputs in the precision and on the device of the weights.

    At the end each module has its mode again, and each parameter, pruned or not, is frozen or not as before. Works
    within torch.no_grad() and torch.inference_mode(), too.
    """
    modes = {module: module.training for module in network.modules()}
    trained = {
        (module, key): parameter.requires_grad
        for module in modes
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    hook = network.register_forward_pre_hook(_as_weights)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            network.eval()
            for module, key in trained:
                parameter = module._parameters[key]
                parameter.requires_grad_(parameter.is_floating_point())
            yield
    finally:
        hook.remove()
        for module, mode in modes.items():
            module.training = mode
        for (module, key), value in trained.items():
            module._parameters[key].requires_grad_(value)


def _as_weights(network: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    weight = next((tensor for tensor in network.parameters() if tensor.is_floating_point()), None)
    return args if weight is None else tuple(values.to(weight.device, weight.dtype) for values in args)


def require_plain(network: nn.Module) -> None:
    """Raise UserError with the reason when a network cannot be pruned for what it consists of."""
    if isinstance(network, (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel)):
        raise refused(network, "prune the network itself, before it is scripted or wrapped")
    for name, module in network.named_modules():
        tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        if any(is_lazy(tensor) for tensor in tensors):
            raise refused(network, f"{name} is lazy and has no weights yet: run a batch through the network first")
        if any(tensor.is_inference() for tensor in tensors):
            raise refused(network, "it was made within torch.inference_mode(): make it outside")
        if any(tensor.is_meta for tensor in tensors):
            raise refused(network, f"{name} has no weights: it is on the meta device")
        if isinstance(module, _WEIGHTED) and not {"weight", "bias"} <= module._parameters.keys():
            raise refused(
                network,
                f"the weight of {name} is computed from others (weight_norm, spectral_norm, ...): make it a plain one, "
                "for example with torch.nn.utils.parametrize.remove_parametrizations",
            )
    if not any(isinstance(module, CONSUMERS) for module in network.modules()):
        raise refused(network, "it has no convolutions or linear layers")


def require_working(network: nn.Module, example: torch.Tensor) -> None:
    """Raise UserError when a network does not run on images `example`, or not twice with the same finite outputs."""
    with prepared(network), torch.no_grad():
        first, second = (tensors_in(run_network(network, example)) for _ in range(2))
    if not all(bool(outputs.isfinite().all()) for outputs in first):
        raise not_finite()
    if any(bool((one - two).abs().gt(1e-2 * one.abs().max()).any()) for one, two in zip(first, second) if one.numel()):
        raise refused(
            network,
            "two passes of the same images differ in evaluation mode: is there a dropout that is always active "
            "(F.dropout without training=self.training)?",
        )


def run_network(network: nn.Module, example: torch.Tensor) -> Any:
    """The outputs for images. UserError when the forward pass fails."""

    def explain(error: BaseException) -> UserError:
        shape = " x ".join(map(str, example.shape))
        reason = f"{type(error).__name__}: {one_line(error)}"
        return refused(network, f"it does not run on a batch of {shape} values alone ({reason})")

    with foreign_code(explain):
        return network(example)


def trace(network: nn.Module, example: torch.Tensor) -> tp.DependencyGraph:
    """The dependency graph of a network, by a forward pass of `example`.

    Raises UserError when torch_pruning cannot trace the forward pass, or when a layer takes no part in it.
    """
    layers = {module: name for name, module in network.named_modules() if isinstance(module, CONSUMERS)}
    idle = dict(layers)
    outputs: list[torch.Tensor] = []

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        idle.pop(layer, None)
        if not args:
            raise refused(network, f"{layers[layer]} is called with a keyword: call it as layer(inputs)")

    def forward(network: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
        with removed_afterwards([layer.register_forward_pre_hook(note) for layer in layers]):
            results = tensors_in(run_network(network, inputs))
        outputs.extend(result for result in results if result.requires_grad)
        if not outputs:
            raise refused(network, "its outputs do not depend on its weights by gradients: return logits")
        return outputs

    with prepared(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside of layers; their groups are left alone
        graph = tp.DependencyGraph()
        try:
            graph.build_dependency(network, example.clone(), forward_fn=forward, verbose=False)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if is_shortage(error):
                raise
            raise refused(
                network, f"torch_pruning cannot trace its channels ({type(error).__name__}: {one_line(error)})"
            ) from error
        # A layer that is not called may be used all the same: an attention reads the weights of its layers.
        weights = [layer.weight for layer in idle]
        used = torch.autograd.grad(sum(result.sum() for result in outputs), weights, allow_unused=True) if idle else ()
        with torch.no_grad():
            network(example)  # some networks keep their activations: these must not keep the graph, nor prevent a copy
    unused = [name for name, gradient in zip(idle.values(), used) if gradient is None]
    if unused:
        raise refused(
            network,
            f"{', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''} take no part in a forward pass in evaluation "
            "mode: build it without them (GoogLeNet: aux_logits=False)",
        )
    return graph


def all_groups(graph: tp.DependencyGraph) -> Iterator[tp.dependency.Group | None]:
    """Every group of torch_pruning, or None for one that it cannot follow.

    In some networks with attention torch_pruning goes round in circles, with more and more indices of channels. It is
    stopped as soon as there are more of them than any layer has features, or when it has followed as many dependencies
    as the graph has several times. Raises UserError after `LIMIT_S` seconds.
    """
    started = time.monotonic()
    layers = [module for module in graph.module2node if isinstance(module, CONSUMERS)]
    dependencies = [dependency for node in graph.module2node.values() for dependency in node.dependencies]
    shapes = [(*layer.weight.shape[:2], getattr(layer, "groups", 1)) for layer in layers]
    features = max((max(one, other * groups) for one, other, groups in shapes), default=0)
    limit = _Limit(features, _ROUNDS * len(dependencies))
    for dependency in dependencies:
        dependency.index_mapping = _Bounded(dependency.index_mapping, limit)
    visited: set[nn.Module] = set()
    for layer in progress(layers, "Tracing channels", "layer"):
        if time.monotonic() - started > LIMIT_S:
            raise refused(graph.model, f"torch_pruning needs more than {LIMIT_S:.0f} s to trace its channels")
        if layer in visited:
            continue
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        limit.followed = 0
        try:
            group = graph.get_pruning_group(layer, cut, list(range(graph.get_out_channels(layer))))
        except (_Circle, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            yield None
            continue
        visited.update(part.dep.layer for part in group if graph.is_out_channel_pruning_fn(part.dep.handler))
        limit.followed = 0
        yield group


class _Circle(Exception):
    pass


@dataclasses.dataclass
class _Limit:
    """The most indices at once and dependencies followed in one group, and the number of those followed."""

    indices: int
    dependencies: int
    followed: int = 0


class _Bounded(list):
    """The index mappings of a dependency of torch_pruning, which raise _Circle beyond a limit."""

    def __init__(self, mappings: list[Any], limit: _Limit) -> None:
        super().__init__(mappings)
        self._limit = limit

    def __iter__(self) -> Iterator[Any]:
        self._limit.followed += 1
        if self._limit.followed > self._limit.dependencies:
            raise _Circle
        return (self._bounded(mapping) for mapping in super().__iter__() if mapping is not None)

    def _bounded(self, mapping: Any) -> Any:
        def apply(indices: Any) -> Any:
            mapped = mapping(indices)
            if len(mapped) > self._limit.indices:
                raise _Circle
            return mapped

        return apply
