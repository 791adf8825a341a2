"""docs/own-network.md: its examples run as they are written, the files with PyTorch or ONNX Runtime alone."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import cleanai.sweep
from cleanai.runtime.packages import LEAST_TORCH
from cleanai.runtime.scenario import PROJECT

EXAMPLES = dict(
    re.findall(
        r"<!-- example: ([\w ]+) -->\n+```python\n(.*?)```",
        (PROJECT / "docs" / "own-network.md").read_text(encoding="utf-8"),
        flags=re.S,
    )
)
# A process that has neither the project nor what it prunes with.
ALONE = "import sys\nfor name in ('cleanai', 'torch_pruning', {}):\n    sys.modules[name] = None\n"
NEW = torch.__version__ >= LEAST_TORCH


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder in which the examples up to the saved files have run, and their variables."""
    folder = tmp_path_factory.mktemp("own network")
    random = torch.Generator().manual_seed(0)
    for place in ("my_pictures/cat", "my_pictures/dog", "my_test_pictures/cat", "my_test_pictures/dog"):
        (folder / place).mkdir(parents=True)
        for number in range(10):
            pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=random)
            Image.fromarray(pixels.numpy()).save(folder / place / f"{number}.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation of a picture that a phone took upright
    Image.open(folder / "my_pictures" / "cat" / "0.png").save(folder / "picture.jpg", exif=turned)
    variables = {}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cleanai.sweep, "BASELINES", {})  # they take their time
        for name in ("prune", "sweep", *(["save"] if NEW else []), "onnx"):
            exec(EXAMPLES[name], variables)
    return folder, variables


def _alone(program, without, folder):
    """The logits that a program finds in a process without the project and these packages, and what it prints."""
    program = ALONE.format(", ".join(map(repr, without))) + program + "print(json.dumps(logits.tolist()))\n"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    answer, logits = result.stdout.splitlines()
    return torch.tensor(json.loads(logits)), answer


def test_the_network_is_pruned_and_measured(page):
    _, variables = page
    parameters = [sum(p.numel() for p in variables[name].parameters()) for name in ("network", "pruned")]
    assert 1 - parameters[1] / parameters[0] == pytest.approx(0.3, abs=0.02)
    assert [point["ratio"] for point in variables["sweep"]["points"]] == [0.2, 0.4, 0.2, 0.4]


@pytest.mark.parametrize(
    ("example", "without"), [("load pt2", ["torchvision"]), ("load onnx", ["torch", "torchvision"])]
)
def test_saved_files_give_the_outputs_without_the_project(page, example, without):
    if example == "load pt2" and not NEW:
        pytest.skip("PyTorch has no torch.export")
    folder, variables = page
    logits, answer = _alone(EXAMPLES[example], without, folder)
    (folder / "one").mkdir(exist_ok=True)
    shutil.copy(folder / "picture.jpg", folder / "one")
    images = cleanai.image_set(folder / "one", size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with torch.inference_mode():
        expected = variables["pruned"](next(images.batches(1))[0])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert answer == ["cat", "dog"][int(expected.argmax())]
