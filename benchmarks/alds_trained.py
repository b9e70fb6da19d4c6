"""Compress, then train again: low-rank methods and channel pruning on small networks trained here, on real digits.

The protocol of Figure 3 of the ALDS paper (arXiv 2107.11442) on small data: a network is trained, compressed once to
each CR-P (reduction of parameters in percent), and trained again by the last part of the same schedule (learning-rate
rewinding). Data are the 1,797 handwritten digits of scikit-learn (8 x 8, enlarged to 16 x 16), of which 597 are the
test set; networks are ResNet-20 and a VGG-style net of six convolutions, both with batch norm and one input channel.
Given are test accuracies less that of the trained network, in percentage points, the mean over seeds.

Run ``python benchmarks/alds_trained.py [--networks resnet20,vgg] [--seeds 1] [--epochs 25] [--retrain 8]``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import publish
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import FxCompressError, TraceWarning
from fxcompress.pass_base import Pass
from fxcompress.passes.low_rank import Alds, AldsPlus, Pca, Svd, SvdEnergy
from fxcompress.passes.pruning import PruneChannels

_RATIOS = (0.5, 0.75, 0.9, 0.95)
_BATCH, _RATE, _TEST = 64, 0.1, 597


def methods(ratio: float) -> dict[str, Pass]:
    """What is compared, by name."""
    return {
        "ALDS (published)": Alds(ratio, error="operator", solver="minimax"),
        "ALDS+ (published)": AldsPlus(ratio, error="operator", solver="minimax"),
        "frobenius, sum": Alds(ratio),
        "frobenius, sum, four schemes": AldsPlus(ratio),
        "activation, sum": Alds(ratio, error="activation"),
        "SVD": Svd(ratio),
        "SVD-Energy": SvdEnergy(ratio),
        "PCA": Pca(ratio),
        "FT": PruneChannels(ratio, measure="params", scope="global", importance="filter-threshold"),
        "PFP": PruneChannels(ratio, measure="params", scope="global", importance="pfp"),
    }


# --------------------------------------------------------------------------------------------------------- networks
class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


def resnet20() -> nn.Module:
    """He et al. 2016 (arXiv 1512.03385), section 4.2, with projections."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    width = 16
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(3):
            layers.append(_Block(width, outputs, stride if i == 0 else 1))
            width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def vgg() -> nn.Module:
    """Pairs of convolutions, each pair followed by a pooling."""
    layers: list[nn.Module] = []
    width = 1
    for outputs in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(width, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            width = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, 128), nn.ReLU(), nn.Linear(128, 10))


NETWORKS = {"resnet20": resnet20, "vgg": vgg}


# --------------------------------------------------------------------------------------------------------- training
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate((images - images.mean()) / images.std(), size=16, mode="bilinear")
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train_ = order[:_TEST], order[_TEST:]
    return images[train_], labels[train_], images[test], labels[test]


def train(model: nn.Module, data: Sequence[Tensor], epochs: int, last: int, seed: int) -> None:
    """SGD with momentum and a cosine schedule over ``epochs``, of which only the ``last`` are run; images are shifted
    by up to two pixels."""
    images, labels = data[:2]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = math.ceil(len(images) / _BATCH)
    model.train()
    for epoch in range(epochs - last, epochs):
        for step, index in enumerate(torch.randperm(len(images), generator=generator).split(_BATCH)):
            if len(index) < 2:
                continue
            rate = _RATE * 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / epochs))
            optimizer.param_groups[0]["lr"] = rate
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            optimizer.zero_grad()
            F.cross_entropy(model(images[index].roll((dy, dx), (2, 3))), labels[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    model.eval()


def accuracy(model: nn.Module, data: Sequence[Tensor]) -> float:
    """On the test images."""
    with torch.no_grad():
        return float((model(data[2]).argmax(1) == data[3]).double().mean())


def measure(name: str, seed: int, epochs: int, retrain: int) -> list[dict[str, Any]]:
    """Train one network, and compress it by each method to each size."""
    data = digits()
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    train(model, data, epochs, epochs, seed)
    original = accuracy(model, data)
    print(f"{name}, seed {seed}: {original:.2%}", flush=True)
    records = []
    calibration = list(data[0][:256].split(_BATCH))
    for ratio in _RATIOS:
        for method, pass_ in methods(ratio).items():
            record: dict[str, Any] = {"network": name, "seed": seed, "ratio": ratio, "method": method}
            record["original"] = original
            start = time.process_time()
            try:
                small = fxcompress.compile(model, [pass_], data[0][:2], calibration=calibration, verify=False)
            except FxCompressError as error:
                record["error"] = str(error)
            else:
                total = fxcompress.report(small).total
                record |= {"cr_p": total.cr_p, "cr_f": total.cr_f, "compress": time.process_time() - start}
                record["before"] = accuracy(small, data)
                train(small, data, epochs, retrain, seed)
                record["after"] = accuracy(small, data)
            records.append(record)
            print(
                method, f"{ratio:.0%}", record.get("before"), record.get("after"), record.get("error", ""), flush=True
            )
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """A row for each network and method; for each ratio CR-P / CR-F and the change of accuracy after training."""
    rows = []
    for network in dict.fromkeys(r["network"] for r in records):
        for method in dict.fromkeys(r["method"] for r in records):
            row = [network, method]
            for ratio in _RATIOS:
                mine = [
                    r for r in records if (r["network"], r["method"], r["ratio"]) == (network, method, ratio)
                ]  # fmt: skip
                good = [r for r in mine if "error" not in r]
                if not good or len(good) < len(mine):
                    row.append("not reachable")
                    continue
                cr_p, cr_f = (statistics.mean(r[k] for r in good) for k in ("cr_p", "cr_f"))
                change = 100 * statistics.mean(r["after"] - r["original"] for r in good)
                row.append(f"{cr_p:.1f} / {cr_f:.1f}: {change:+.1f}")
            rows.append(row)
    headers = ["network", "method", *(f"CR-P {100 * r:.0f}%" for r in _RATIOS)]
    lines = [publish.markdown(rows, headers), "", "CR-P / CR-F in %: change of test accuracy in points."]
    found: dict[str, list[float]] = {}
    for r in records:
        found.setdefault(r["network"], []).append(r["original"])
    lines += [f"{network} as trained: {100 * statistics.mean(v):.1f}%." for network, v in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="resnet20,vgg")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--retrain", type=int, default=8)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", TraceWarning)
    records = []
    for name in arguments.networks.split(","):
        for seed in range(arguments.seeds):
            records += measure(name, seed, arguments.epochs, arguments.retrain)
    publish.publish("alds_trained", table(records), records, write=not arguments.no_write)


if __name__ == "__main__":
    main()
