"""Networks from Python files of the user's, and those of torchvision by their full name."""

import pytest
import torch
from torch import nn

from cleanai import UserError
from cleanai.network.models import build, imagenet_url, load_network, save_network
from tests.helpers import SMALL_MODEL, parameter_count
from tests.small_network import SmallNetwork

FACTS = {"model": SMALL_MODEL, "classes": list("abcd"), "image_size": [16, 16]}


def test_a_network_from_a_file_of_the_user_and_its_neighbours(tmp_path):
    (tmp_path / "parts_of_my_net.py").write_text("WIDTH = 7\n", encoding="utf-8")
    text = "from torch import nn\nfrom parts_of_my_net import WIDTH\n\n\ndef make(classes):\n"
    (tmp_path / "my_net.py").write_text(f"{text}    return nn.Conv2d(3, classes * WIDTH, 1)\n", encoding="utf-8")
    network = build(f"{tmp_path / 'my_net.py'}:make", 5)
    assert isinstance(network, nn.Conv2d) and network.out_channels == 35
    (tmp_path / "my_net.py").write_text(f"{text}    return nn.Conv2d(3, classes, 1)\n", encoding="utf-8")
    assert build(f"{tmp_path / 'my_net.py'}:make", 5).out_channels == 5, "a changed file is read again"


def test_a_relative_path_starts_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parameter_count(build("tests/small_network.py:SmallNetwork", 4)) == parameter_count(SmallNetwork(4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "which does not exist"),
        ("class Net(:\n", r"SyntaxError.*line 1"),
        ("import torch\n\nx = torch.nothing_of_that_name\n", r"line 3: cannot be imported: AttributeError"),
        ("import no_such_package_anywhere\n", r"line 1: .*ModuleNotFoundError"),
        ("raise SystemExit(3)\n", r"line 1: .*SystemExit"),
        ("Other = 1\n", "no function or class of that name"),
        ("Net = 1\n", "no function or class of that name"),
        ("class Net:\n    def __init__(self):\n        pass\n", r"Net\(10\) fails: TypeError"),
        (
            "def Net(classes):\n    def deep():\n        return {}[classes]\n\n    return deep()\n",
            r"line 3: .*KeyError",
        ),
        ("def Net(classes):\n    return classes\n", "returns a int, not a network"),
        ("import torch\n\n\ndef Net(classes):\n    return torch.nn.Linear\n", "returns a type, not a network"),
        ("from torch import nn\n\n\ndef Net(classes):\n    return nn.LazyLinear(classes)\n", r"Net\(10\).*lazy layers"),
        (
            "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self, classes):\n"
            "        super().__init__(3, classes)\n\n    def get_extra_state(self):\n        return {}\n",
            r"has _extra_state in its state dict, which is no tensor",
        ),
        (
            "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self, classes):\n"
            "        super().__init__(3, classes)\n\n    def state_dict(self):\n        return {}[3]\n",
            r"line 9: Net\(10\) has a state dict that fails: KeyError",
        ),
    ],
)
def test_a_file_that_gives_no_network_is_named_with_the_line_that_fails(text, expected, tmp_path):
    path = tmp_path / "my_net.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected) as error:
        build(f"{path}:Net", 10)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_resnet18_of_torchvision_has_its_own_stem():
    network = build("torchvision:resnet18", 3)
    assert network.conv1.kernel_size == (7, 7) and isinstance(network.maxpool, nn.MaxPool2d)
    assert network.fc.out_features == 3
    assert build("ResNet18", 3).conv1.kernel_size == (3, 3)
    assert imagenet_url("torchvision:resnet18") == imagenet_url("ResNet18")


def test_imagenet_weights_for_a_network_of_the_user_are_refused():
    with pytest.raises(UserError, match="--weights none, or a file"):
        imagenet_url(SMALL_MODEL)
    for model in ("NoSuchNet", "torchvision:NoSuchNet"):
        with pytest.raises(UserError, match=rf"no network called {model}"):
            build(model, 10)


def test_a_checkpoint_never_chooses_the_code_that_runs(tmp_path):
    torch.manual_seed(0)
    network = SmallNetwork(4)
    save_network(tmp_path / "c.pth", network, FACTS)
    with pytest.raises(UserError, match=r"c\.pth holds a network from .*small_network\.py"):
        load_network(tmp_path / "c.pth")
    with pytest.raises(UserError, match="is made for the model"):
        load_network(tmp_path / "c.pth", "tests/other.py:Net")
    loaded = load_network(tmp_path / "c.pth", SMALL_MODEL)
    assert torch.equal(loaded.classifier.weight, network.classifier.weight)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [("{}['x']", "works: KeyError: 'x'"), ("(x, x)", "its outputs are tuple")],
)
def test_a_file_that_was_edited_since_the_network_was_saved_is_one_sentence(returned, expected, tmp_path):
    text = "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self, classes):\n"
    text += "        super().__init__()\n        self.last = nn.Linear(3, classes)\n\n    def forward(self, x):\n"
    own = tmp_path / "own.py"
    own.write_text(f"{text}        return self.last(x.mean((2, 3)))\n", encoding="utf-8")
    save_network(tmp_path / "c.pth", build(f"{own}:Net", 4), {**FACTS, "model": f"{own}:Net"})
    assert load_network(tmp_path / "c.pth", f"{own}:Net").last.out_features == 4
    own.write_text(f"{text}        return {returned}\n", encoding="utf-8")
    with pytest.raises(UserError, match=expected) as error:
        load_network(tmp_path / "c.pth", f"{own}:Net")
    assert "\n" not in str(error.value)


def test_a_shortage_of_memory_is_no_fault_of_the_file(tmp_path):
    text = "def Net(classes):\n    raise RuntimeError('CUDA out of memory')\n"
    (tmp_path / "my_net.py").write_text(text, encoding="utf-8")
    with pytest.raises(RuntimeError, match="out of memory"):
        build(f"{tmp_path / 'my_net.py'}:Net", 10)
