"""The two criteria, as importances for torch_pruning: a score for each channel of a dependency group."""
from __future__ import annotations

import torch
import torch_pruning as tp
from torch import nn

from cleanai.activations import ChannelStatistics

# The ways in which torch_pruning cuts a channel out of a layer that reads it.
CONSUMING = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


class ActivationImportance(tp.importance.Importance):
    """Scores channels by what reaches the layers that read them.

    Called with a group of torch_pruning, returns a 1-D tensor, one score per channel of its root. Every layer that
    reads the group gives each of its channels a share, the shares of a layer summing to one, and a channel's score is
    the sum of its shares: a channel that many layers read matters to each of them. As shares are fractions of what a
    layer receives, they can be compared over layers whatever their scale.

    `statistics` must be set before, from `record_statistics` of the network as it is.
    """

    statistics: dict[nn.Module, ChannelStatistics]

    def __call__(self, group: tp.dependency.Group) -> torch.Tensor:
        scores = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for item in group:
            if item.dep.pruning_fn in CONSUMING:
                shares = self.shares(item.dep.layer, self.statistics[item.dep.layer])
                scores.index_add_(0, torch.tensor(item.root_idxs), shares[torch.tensor(item.idxs)])
        return scores

    def shares(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """The share (C,) of each input channel of `layer` in what it receives."""
        raise NotImplementedError


class NeuronCoverageImportance(ActivationImportance):
    """Neuron Coverage: how active a channel is on the calibration images.

    Over all images and positions of a layer's input x, per channel j:

    - `mean_absolute`: m_j = mean of abs(x_j), after a ReLU the plain mean (Molchanov et al. 2016, arXiv 1611.06440);
    - `normalized_mean`: m_j / max m, in [0, 1], the busiest channel of the layer being 1;
    - `frequency`: f_j = share of values above zero (1 - APoZ of Network Trimming, arXiv 1607.03250);
    - `combined`: (m_j / max m + f_j) / 2.

    Shares are taken of these, so what divides a whole layer cancels: `normalized_mean` and `mean_absolute` choose the
    same channels.
    """

    def __init__(self, metric: str = "normalized_mean"):
        self.metric = metric

    def coverage(self, statistics: ChannelStatistics) -> torch.Tensor:
        """The coverage (C,) of each channel by the chosen metric."""
        if self.metric == "mean_absolute":
            return statistics.mean_absolute
        if self.metric == "frequency":
            return statistics.frequency
        normalized = _divide(statistics.mean_absolute, statistics.mean_absolute.max())
        return normalized if self.metric == "normalized_mean" else (normalized + statistics.frequency) / 2

    def shares(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """Each channel's part in the layer's summed coverage."""
        coverage = self.coverage(statistics)
        return _divide(coverage, coverage.sum())


class WandaImportance(ActivationImportance):
    """WANDA, weight times activation (Sun et al. 2023, arXiv 2306.11695), for channels.

    S_oj = (sum over kernel positions of abs(W_oj)) * ||X_j|| is what input channel j can add to output o; ||X_j|| is
    the root of the channel's second moment. As WANDA compares weights within an output, a channel's share is
    S_oj / sum_j S_oj, averaged over the outputs o.
    """

    def shares(self, layer: nn.Module, statistics: ChannelStatistics) -> torch.Tensor:
        """Each channel's part in what the layer's outputs are made of, averaged over the outputs."""
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
