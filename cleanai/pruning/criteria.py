"""The pruning criteria: a score for each channel of a dependency group, as importances for torch_pruning.

A criterion is a class with one method, `scores`, and an entry in CRITERIA.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
import torch_pruning as tp
from torch import nn

from cleanai.network.activations import MOMENTS, ChannelStatistics, divide
from cleanai.pruning.groups import READ_FUNCTIONS, Group
from cleanai.pruning.least_squares import greedy_order, kernels


class ActivationImportance(tp.importance.Importance):
    """Scores channels by the inputs of their consumers: the layers that read them.

    Called with a group of torch_pruning, returns a 1-D tensor, one score per channel of its root: the sum of the
    scores that the consumers give. Scores order the channels within a group; how many channels each group loses is
    decided in another way (see `prune_to_budget`).

    `statistics` must be set first, from `record_statistics` of the current network, with at least `moments`.
    """

    moments: Sequence[str] = tuple(MOMENTS)
    statistics: dict[nn.Module, ChannelStatistics]

    def __call__(self, group: tp.dependency.Group) -> torch.Tensor:
        scores = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for item in group:
            if item.dep.pruning_fn in READ_FUNCTIONS:
                of_layer = self.scores(item.dep.layer, self.statistics[item.dep.layer])
                scores.index_add_(0, torch.tensor(item.root_idxs), of_layer[torch.tensor(item.idxs)])
        return scores

    def scores(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """The score (C,) of each input channel of `layer`."""
        raise NotImplementedError


class NeuronCoverageImportance(ActivationImportance):
    """Neuron Coverage: the activity of a channel on the calibration images.

    Over all images and positions of a layer's input x, per channel j:

    - `mean_absolute`: m_j = mean of abs(x_j), after a ReLU the plain mean (Molchanov et al. 2016, arXiv 1611.06440);
    - `normalized_mean`: m_j / max m, in [0, 1];
    - `frequency`: f_j = share of values above zero (1 - APoZ of Network Trimming, arXiv 1607.03250);
    - `combined`: (m_j / max m + f_j) / 2.
    """

    def __init__(self, metric: str = "normalized_mean"):
        self.metric = metric
        means = "mean_absolute" if metric != "frequency" else "frequency"
        self.moments = (means, "frequency") if metric == "combined" else (means,)

    def scores(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """The coverage (C,) of each input channel of `layer` by the chosen metric."""
        if self.metric == "mean_absolute":
            return statistics.mean_absolute
        if self.metric == "frequency":
            return statistics.frequency
        normalized = statistics.normalized_mean
        return normalized if self.metric == "normalized_mean" else (normalized + statistics.frequency) / 2


class WandaImportance(ActivationImportance):
    """WANDA, weight times activation (Sun et al. 2023, arXiv 2306.11695), for channels.

    S_oj = (sum over kernel positions of abs(W_oj)) * ||X_j||, for input channel j and output o; ||X_j|| is the root of
    the channel's second moment. WANDA compares weights within an output, so a channel's score is its share
    S_oj / sum_j S_oj, averaged over the outputs o.
    """

    moments = ("second_moment",)

    def scores(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """The share (C,) of each input channel in the layer's outputs, averaged over the outputs."""
        activations = statistics.second_moment.sqrt().reshape(getattr(layer, "groups", 1), 1, -1)
        products = kernels(layer, 1).abs().sum(3).cpu() * activations
        return divide(products, products.sum(-1, keepdim=True)).mean(1).flatten() / products.shape[0]


class OBSImportance(tp.importance.Importance):
    """Optimal Brain Surgeon for channels: each channel is the one without which the consumers' outputs lose least then.

    Their other weights are meant to be adjusted optimally, see `greedy_order`. A channel's score is its place in that
    order. `groups`, and the Gram matrices of their consumers' inputs, `grams`, must be set first.
    """

    groups: Sequence[Group]
    grams: dict[nn.Module, torch.Tensor]

    def __call__(self, group: tp.dependency.Group) -> torch.Tensor:
        (known,) = (each for each in self.groups if each.item is group)
        layers = list(known.consumers)
        order = greedy_order(
            layers,
            [self.grams[layer] for layer in layers],
            [known.inputs(layer) for layer in layers],
            [known.spreads[layer] for layer in layers],
        )
        return order.argsort().double().repeat(known.channels // known.units)


# By the names in `runtime/methods.py`.
CRITERIA: dict[str, Callable[[], tp.importance.Importance]] = {
    "Coverage": NeuronCoverageImportance,
    "Wanda": WandaImportance,
}
