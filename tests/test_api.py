"""`cleanai.prune` and `cleanai.measure_sweep`, as a notebook calls them."""

import copy
import re

import pytest
import torch
import torch_pruning as tp
from torch import nn

import cleanai.sweep
from cleanai import UserError, image_set, measure_sweep, prune
from cleanai.pruning.criteria import CRITERIA, WandaImportance
from cleanai.pruning.tracing import unwrapped
from cleanai.runtime.methods import METHODS
from tests.helpers import parameter_count


class Views(nn.Module):
    """A network as many are written: it reshapes with `view`."""

    def __init__(self, outputs=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 20, 3),
            nn.ReLU(),
        )
        self.middle = nn.Linear(20 * 6 * 6, 24)
        self.last = nn.Linear(24, outputs)

    def forward(self, images):
        features = self.features(images)
        return self.last(self.middle(features.view(features.size(0), -1)).relu())


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Views()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return image_set(pixels, labels=torch.arange(48) % 3)


def _state(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_a_copy_is_pruned_and_the_network_stays_as_it_is(network, images):
    before = _state(network)
    pruned, report = prune(network, images, ratio=0.4)
    assert network.training and _same(_state(network), before)
    removed = 100 * (1 - parameter_count(pruned) / parameter_count(network))
    assert removed == pytest.approx(report["steps"][-1]["parameters_removed_percent"], abs=0.01)
    assert 38 < removed < 42 and 38 < report["steps"][-1]["macs_removed_percent"] < 42.5
    widths = {layer["name"]: layer["channels_after"] for layer in report["layers"]}
    assert widths["features.0"] == pruned.features[0].out_channels < 12
    assert pruned(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert not pruned.training


def test_the_nearest_ratio_is_taken_and_said_where_a_network_is_small(network, images, capsys):
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 144, 3))
    _, report = prune(small, images, ratio=0.24, macs_ratio=None, round_to=1)
    last = report["steps"][-1]["parameters_removed_percent"]
    assert abs(last - 24) > 0.1 and abs(last - 24) < 2
    assert f"the nearest: {last:.2f}%" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^ratio 0\.96 .*cannot be met in this network: the nearest is .*%") as error:
        prune(small, images, ratio=0.96, macs_ratio=None, round_to=1)
    assert "--" not in str(error.value)


class ByIndex(tp.importance.Importance):
    """Scores that remove the last channels first."""

    def __call__(self, group):
        return torch.arange(len(group[0].idxs), dtype=torch.float32).flip(0)


def test_a_criterion_is_a_name_of_any_case_or_an_instance(network, images, monkeypatch):
    monkeypatch.setitem(CRITERIA, "Mine", ByIndex)
    for criterion in ("mINE", ByIndex()):
        kept = prune(network, images, 0.3, criterion, None, round_to=[1])[0].features[0].weight
        assert len(kept) < 12 and torch.equal(kept, network.features[0].weight[: len(kept)])
    for given in (network, nn.DataParallel(network)):
        pruned, _ = prune(given, images, 0.3, ByIndex(), None, [1], keep_layers="features.0")
        assert unwrapped(pruned).features[0].out_channels == 12


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ratio": 30}, "ratio is 30: give a share between 0 and 1"),
        ({"ratio": 0}, "ratio is 0: "),
        ({"ratio": float("nan")}, "ratio is nan: "),
        ({"ratio": "0.3"}, "ratio is '0.3': "),
        ({"ratio": True}, "ratio is True: "),
        ({"macs_ratio": 1.0}, r"macs_ratio is 1\.0: "),
        ({"macs_ratio": "most"}, "macs_ratio is 'most': "),
        ({"ratio": None}, "both None"),
        ({"ratio": "auto"}, "accept_drop is None: with ratio='auto' give percentage points"),
        ({"ratio": "auto", "accept_drop": 0}, "accept_drop is 0: "),
        ({"accept_drop": 1.0}, "accept_drop is for ratio='auto'"),
        ({"ratio": "auto", "accept_drop": 1.0, "macs_ratio": 0.2}, "macs_ratio is 0.2: with ratio='auto' give 'same'"),
        (
            {"ratio": "auto", "accept_drop": 1.0, "images": image_set(torch.zeros(20, 3, 16, 16, dtype=torch.uint8))},
            "images has images of one class only",
        ),
        (
            {"keep_layers": ["features.9"]},
            r"No layer matches 'features\.9'.*the layers are features.0, features.4, mid",
        ),
        ({"keep_layers": 3}, "keep_layers is 3: "),
        ({"round_to": ()}, r"round_to is \(\): "),
        ({"round_to": [8, 0]}, r"round_to is \[8, 0\]: "),
        ({"round_to": "8"}, "round_to is '8': "),
        ({"criterion": "wandaa"}, "no criterion 'wandaa': use one of coverage, .*wanda"),
        ({"criterion": WandaImportance}, "an instance"),
        ({"criterion": tp.importance.TaylorImportance()}, "needs gradients"),
        ({"criterion": None}, "criterion is None"),
        ({"images": torch.zeros(3, 3, 16, 16)}, "images is a Tensor: make it with cleanai.image_set"),
        ({"images": "photos"}, "images is a str: "),
        ({"network": "resnet18"}, "network is a str"),
        ({"network": nn.Sequential(nn.Flatten(), nn.Linear(768, 3))}, "no channels that can be removed"),
    ],
)
def test_a_wrong_argument_is_one_sentence(network, images, change, expected):
    before = _state(network)
    with pytest.raises(UserError, match=expected) as error:
        prune(**{"network": network, "images": images, **change})
    assert "\n" not in str(error.value) and "--" not in str(error.value)
    assert _same(_state(network), before)


def test_images_and_networks_that_do_not_fit_are_one_sentence(network, images):
    small = image_set(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
    few = image_set(torch.zeros(5, 3, 16, 16, dtype=torch.uint8))
    spoilt = copy.deepcopy(network)
    with torch.no_grad():
        spoilt.last.bias[0] = float("nan")
    two = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).to("meta"))
    with torch.inference_mode():
        made_in_inference_mode = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 2))
    for wrong_network, wrong_images, expected in (
        (network, small, r"Views does not take images of 3 x 8 x 8 \(.*image_set\(folder, size=N\)"),
        (network, few, "images holds 5 images: give at least 16"),
        (copy.deepcopy(network).double(), images, r"has float64 weights, .*network\.float\(\)"),
        (copy.deepcopy(network).half(), images, "has float16 weights"),
        (spoilt, images, "not finite"),
        (two, images, "on cpu, meta"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)), images, "2 is lazy"),
        (made_in_inference_mode, images, r"within torch\.inference_mode\(\): make it outside"),
        (torch.jit.ScriptModule(), images, "before it is scripted"),
    ):
        with pytest.raises(UserError, match=expected) as error:
            prune(wrong_network, wrong_images)
        assert "\n" not in str(error.value)


def test_a_sweep_measures_every_criterion_at_every_ratio(network, images, monkeypatch):
    monkeypatch.setattr(cleanai.sweep, "BASELINES", {"random choice": tp.importance.RandomImportance})
    monkeypatch.setattr(cleanai.sweep, "METHODS", {"Wanda": METHODS["Wanda"]})
    before = _state(network)
    sweep = measure_sweep(network, images, images, ratios=[0.2, 0.5])
    assert _same(_state(network), before)
    assert sweep["original"]["parameters"] == parameter_count(network)
    names = ["WANDA", "random choice"]
    assert [(p["criterion"], p["ratio"]) for p in sweep["points"]] == [(n, r) for n in names for r in (0.2, 0.5)]
    for point in sweep["points"]:
        assert 1 - point["parameters"] / parameter_count(network) == pytest.approx(point["ratio"], abs=0.02)
        assert 0 <= point["accuracy_percent"] <= 100

    one_class = image_set(images.pixels)
    unknown = image_set(images.pixels, labels=torch.arange(48) % 4)
    for test, ratios, expected in (
        (one_class, [0.2], "of one class only"),
        (unknown, [0.2], "test has the label 3, and the network gives 3 scores"),
        (images, [0.5, 0.2], "ratios must rise"),
        (images, [], "ratios is "),
        (images, [20], "ratios is "),
        (images, 0.2, "ratios is "),
    ):
        with pytest.raises(UserError, match=expected) as error:
            measure_sweep(network, images, test, ratios)
        assert not re.search("--|\n", str(error.value))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prone'"):
        cleanai.prone  # noqa: B018
