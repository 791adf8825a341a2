"""The speed of training: images per second of a plain PyTorch loop and of this project's, in turns.

The plain loop is the usual one: a DataLoader, torchvision's transforms image by image, float32, channels first, and the
loss read at every step. Both train the same ResNet-18 on the same images with Adam, in turns, so that a machine whose
speed drifts affects both alike. The medians over the turns are compared.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --dataset Digits    # embedded images, no download
"""

from __future__ import annotations

import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cleanai import cli
from cleanai.data.sources import load_images
from cleanai.exit import run_script
from cleanai.measure.costs import count_macs
from cleanai.measure.provenance import describe_environment
from cleanai.network.models import resnet18_for_small_images
from cleanai.network.training_step import TrainingStep
from cleanai.runtime.checkpoints import write_record
from cleanai.runtime.compute import choose_compute
from cleanai.runtime.progress import progress
from cleanai.runtime.scenario import PROJECT

TURNS = 5
SECONDS_PER_TURN = 10
SETTINGS = {"dataset": "CIFAR10", "batch_size": 128, "lr": 0.001, "precision": "auto"}


class PlainImages(Dataset):
    """Images as torchvision's datasets hand them out: decoded, then transformed one by one."""

    def __init__(self, images):
        self.pixels = images.train.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.train.labels.tolist()
        side = self.pixels.shape[1]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(side, padding=side // 8),
                *([transforms.RandomHorizontalFlip()] if images.mirror else []),
                transforms.ToTensor(),
                transforms.Normalize(images.train.mean.tolist(), images.train.std.tolist()),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def main() -> None:
    args = cli.parse(__doc__, SETTINGS)
    compute = choose_compute(args.device, args.precision, args.deterministic)
    print(compute.description)
    images = load_images(args.dataset, args.data_dir)
    classes = len(images.classes)
    loops = {
        "plain, 0 workers": plain_loop(images, classes, compute.device, args, workers=0),
        "plain, 4 workers": plain_loop(images, classes, compute.device, args, workers=4),
        "CleanAI": our_loop(images.to(compute.device), classes, compute, args),
    }
    seconds_per_step = {name: [] for name in loops}
    steps = {}
    for name, step in loops.items():  # the first steps choose algorithms, take memory and start workers
        timed(step, 3, compute)
        steps[name] = max(2, round(SECONDS_PER_TURN / timed(step, 2, compute)))
    for _ in progress(range(TURNS), "Training", "turn"):
        for name, step in loops.items():
            seconds_per_step[name].append(timed(step, steps[name], compute))
    speeds = {name: args.batch_size / statistics.median(seconds) for name, seconds in seconds_per_step.items()}

    macs = count_macs(resnet18_for_small_images(classes), images.train.pixels[:1].float())
    rate = matrix_rate(compute)
    best_plain = max(speed for name, speed in speeds.items() if name != "CleanAI")
    result = {
        "environment": describe_environment(compute),
        "dataset": {"name": args.dataset, "source": images.source},
        "batch_size": args.batch_size,
        "matrix_rate_tflop_per_s": rate / 1e12,
        "loops": {
            name: {
                "images_per_s": speeds[name],
                "share_of_matrix_rate_percent": 100 * speeds[name] * 6 * macs / rate,  # 2 per MAC, backward twice that
                "seconds_per_step": seconds_per_step[name],
            }
            for name in loops
        },
        "ratio_to_faster_plain_loop": speeds["CleanAI"] / best_plain,
    }
    print(f"\n{table(result)}")
    path = PROJECT / "results" / "speed" / f"training_{args.dataset}_{compute.device.type}.json"
    write_record(path, result)
    print(path)


def table(result):
    """Images per second of each loop, and how they compare."""
    lines = [f"{'Loop':<20}{'images/s':>12}{'share of matrix rate':>24}"]
    for name, loop in result["loops"].items():
        lines.append(f"{name:<20}{loop['images_per_s']:>12,.0f}{loop['share_of_matrix_rate_percent']:>23.1f}%")
    precision = result["environment"]["precision"]
    lines.append(f"Matrix rate in {precision}: {result['matrix_rate_tflop_per_s']:.2f} TFLOP/s")
    lines.append(f"CleanAI over the faster plain loop: {result['ratio_to_faster_plain_loop']:.2f}x")
    return "\n".join(lines)


def plain_loop(images, classes, device, args, workers):
    """One step after the other of the loop that most people write."""
    network = resnet18_for_small_images(classes).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    loader = DataLoader(PlainImages(images), args.batch_size, shuffle=True, drop_last=True, num_workers=workers)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step():
        inputs, labels = (tensor.to(device) for tensor in next(batches))
        optimizer.zero_grad()
        outputs = network(inputs)
        loss = F.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        return loss.item(), (outputs.argmax(1) == labels).sum().item()

    return step


def our_loop(images, classes, compute, args):
    """One step after the other of the loop in `cleanai.network.training`."""
    network = compute.place(resnet18_for_small_images(classes).train())
    step = TrainingStep(network, images.train, compute)
    generator = torch.Generator().manual_seed(0)
    count = len(images.train)

    def batches():
        while True:
            order = torch.randperm(count, generator=generator).to(compute.device)
            moves = images.train.draw_moves(count, images.mirror, generator)
            for start in range(0, count - args.batch_size + 1, args.batch_size):
                batch = slice(start, start + args.batch_size)
                yield order[batch], moves[batch]

    drawn = batches()
    return lambda: step(*next(drawn), rate=args.lr)


def timed(step, count, compute):
    """Seconds per step."""
    compute.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    compute.synchronize()
    return (time.perf_counter() - started) / count


def matrix_rate(compute):
    """Operations per second of the largest of some square matrix products, in the precision of training."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(compute.precision, torch.float32)
    best = 0.0
    for size in (1024, 2048, *((4096, 8192) if compute.device.type == "cuda" else ())):
        a, b = torch.randn(2, size, size, device=compute.device).to(dtype)
        timed(lambda a=a, b=b: a @ b, 2, compute)
        best = max(best, *(2 * size**3 / timed(lambda a=a, b=b: a @ b, 5, compute) for _ in range(3)))
    return best


if __name__ == "__main__":
    run_script(main)
