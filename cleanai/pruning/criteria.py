"""The two criteria, as importances for torch_pruning: a score for each channel of a dependency group."""
from __future__ import annotations

from typing import Sequence

import torch
import torch_pruning as tp
from torch import nn

from cleanai.network.activations import MOMENTS, ChannelStatistics
from cleanai.pruning.groups import READING


class ActivationImportance(tp.importance.Importance):
    """Scores channels by what reaches the layers that read them.

    Called with a group of torch_pruning, returns a 1-D tensor, one score per channel of its root: the sum of the scores
    that the layers which read the group give, since a channel that many layers read matters to each of them. Scores
    put the channels of one group in order; groups are not compared by them (see `prune_to_budget`).

    `statistics` must be set before, from `record_statistics` of the network as it is, with `moments` at least.
    """

    moments: Sequence[str] = tuple(MOMENTS)
    statistics: dict[nn.Module, ChannelStatistics]

    def __call__(self, group: tp.dependency.Group) -> torch.Tensor:
        scores = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for item in group:
            if item.dep.pruning_fn in READING:
                of_layer = self.scores(item.dep.layer, self.statistics[item.dep.layer])
                scores.index_add_(0, torch.tensor(item.root_idxs), of_layer[torch.tensor(item.idxs)])
        return scores

    def scores(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """The score (C,) of each input channel of `layer`."""
        raise NotImplementedError


class NeuronCoverageImportance(ActivationImportance):
    """Neuron Coverage: how active a channel is on the calibration images.

    Over all images and positions of a layer's input x, per channel j:

    - `mean_absolute`: m_j = mean of abs(x_j), after a ReLU the plain mean (Molchanov et al. 2016, arXiv 1611.06440);
    - `normalized_mean`: m_j / max m, in [0, 1], the busiest channel of the layer being 1;
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
        normalized = _divide(statistics.mean_absolute, statistics.mean_absolute.max())
        return normalized if self.metric == "normalized_mean" else (normalized + statistics.frequency) / 2


class WandaImportance(ActivationImportance):
    """WANDA, weight times activation (Sun et al. 2023, arXiv 2306.11695), for channels.

    S_oj = (sum over kernel positions of abs(W_oj)) * ||X_j|| is what input channel j can add to output o; ||X_j|| is
    the root of the channel's second moment. As WANDA compares weights within an output, a channel's score is its share
    S_oj / sum_j S_oj, averaged over the outputs o.
    """

    moments = ("second_moment",)

    def scores(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """Each input channel's part (C,) in what the layer's outputs are made of, averaged over the outputs."""
        products = weight_sums(layer) * statistics.second_moment.sqrt().reshape(getattr(layer, "groups", 1), 1, -1)
        return _divide(products, products.sum(-1, keepdim=True)).mean(1).flatten() / products.shape[0]


def weight_sums(layer: nn.Module) -> torch.Tensor:
    """abs(W) summed over kernel positions: (groups, outputs per group, inputs per group) float64."""
    weight = layer.weight.detach().double().cpu().abs()
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.Linear):
        return weight[None]
    if isinstance(layer, nn.ConvTranspose2d):  # (inputs, outputs per group, kernel)
        return weight.sum((2, 3)).reshape(groups, -1, weight.shape[1]).transpose(1, 2)
    return weight.sum((2, 3)).reshape(groups, -1, weight.shape[1])


def _divide(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """`values / total`, and zeros where the total is zero: a layer that receives nothing misses nothing."""
    return torch.where(total > 0, values / total, torch.zeros_like(values))
