"""How active the channels of a network are on some images, and which are dead."""

from __future__ import annotations

from typing import Any, Sequence

from torch import nn

from cleanai.data.images import ImageSet
from cleanai.network.activations import record_statistics
from cleanai.runtime.compute import Compute

LISTED_CHANNELS = 20  # of a layer; of more dead ones there is only the number


def measure_activity(
    network: nn.Module, layers: Sequence[str], images: ImageSet, compute: Compute, title: str = "Activity of channels"
) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """The activity of the channels that each of `layers` reads, by its name; and the dead channels among them.

    `active_percent` is the mean `frequency`, `normalized_mean_percent` the mean `normalized_mean` of the channels. A
    channel is dead when all its values are zero on all images: of each layer that has some, its name as `layer`, their
    `count`, and their indices as `channels`, but only if they are at most LISTED_CHANNELS.
    """
    statistics = record_statistics(network, images, compute, title, ("mean_absolute", "frequency"))
    activity, dead = {}, []
    for name in layers:
        channels = statistics[network.get_submodule(name)]
        activity[name] = {
            "active_percent": 100 * channels.frequency.mean().item(),
            "normalized_mean_percent": 100 * channels.normalized_mean.mean().item(),
        }
        zero = (channels.mean_absolute == 0).nonzero().flatten().tolist()
        if zero:
            listed = {"channels": zero} if len(zero) <= LISTED_CHANNELS else {}
            dead.append({"layer": name, "count": len(zero), **listed})
    return activity, dead
