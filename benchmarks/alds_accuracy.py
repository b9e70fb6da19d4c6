"""What low-rank methods leave of a trained network without any training, and what a short recovery brings back.

EfficientNet-Lite0 with its ImageNet weights, batch norms folded, decomposed to fewer parameters by every combination of
error measure and solver, and by the baselines. Calibration data are random crops of five photographs. Held out are
other crops of these five (*same photos*), and crops of three photographs that nothing has seen (*other photos*). *Same
class* is the share of crops with the class that the original gives, the error that of the logits (Frobenius norms).

``--recover`` then trains the best two for a few epochs to give the logits of the original on the calibration crops
(mean squared error, Adam), and looks at the same crops again.

Run ``python benchmarks/alds_accuracy.py [--ratios 0.1,0.2,0.4] [--calibration 64] [--held-out 96] [--recover 5]``.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import Any

import publish
import torch
from photos import BATCH, HeldOut, cells, compared, draw, logits_of
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.demo_inputs import load_model
from fxcompress.errors import PreconditionError, TraceWarning
from fxcompress.passes.low_rank import Alds, AldsPlus, LearnedRank, Pca, Svd, SvdEnergy


def variants(ratio: float) -> dict[str, Alds]:
    """What is compared, by name; ``k`` is the number of slices."""
    found: dict[str, Alds] = {"ALDS as published (operator, minimax)": Alds(ratio, error="operator", solver="minimax")}
    for error in ("operator", "bound", "residual", "frobenius", "activation"):
        for solver in ("minimax", "sum"):
            found[f"{error}, {solver}"] = Alds(ratio, error=error, solver=solver)  # type: ignore[arg-type]
    del found["operator, minimax"]  # the first
    found |= {
        "ALDS+ as published": AldsPlus(ratio, error="operator", solver="minimax"),
        "frobenius, sum, four schemes": AldsPlus(ratio),
        "noise, sum": Alds(ratio, error="noise"),
        "frobenius, sum, sensitivity": Alds(ratio, sensitivity=True),
        "noise, sum, sensitivity": Alds(ratio, error="noise", sensitivity=True),
        "activation, sum, sensitivity": Alds(ratio, error="activation", sensitivity=True),
        "ablation: operator, minimax, k = 1": Alds(ratio, error="operator", solver="minimax", slices=1),
        "ablation: operator, minimax, k = 2": Alds(ratio, error="operator", solver="minimax", slices=2),
        "ablation: operator, constant ratio, k free": Alds(ratio, error="operator", solver="constant"),
        "SVD (constant ratio)": Svd(ratio),
        "SVD-Energy": SvdEnergy(ratio),
        "PCA": Pca(ratio),
        "L-Rank (allocation)": LearnedRank(ratio),
    }
    return found


def measure(graph: fx.GraphModule, pass_: Alds, calibration: Tensor, held_out: HeldOut) -> dict[str, Any]:
    """Decompose ``graph`` and compare; seconds are processor time."""
    start = time.process_time()
    try:
        found = fxcompress.compile(
            graph, [pass_], calibration[:1], calibration=list(calibration.split(BATCH)), verify=False
        )
    except PreconditionError as error:
        return {"error": str(error)}
    total = fxcompress.report(found).total
    record = {"seconds": time.process_time() - start, "cr_p": total.cr_p, "cr_f": total.cr_f}
    return record | compared(found, held_out) | {"graph": found}


def recovered(model: fx.GraphModule, calibration: Tensor, expected: Tensor, epochs: int) -> nn.Module:
    """``model`` trained to give ``expected`` on the calibration crops; batch norms are folded, so eval mode will do."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for index in torch.randperm(len(calibration), generator=generator).split(BATCH):
            optimizer.zero_grad()
            (model(calibration[index]) - expected[index]).square().mean().backward()
            optimizer.step()
    return model


def table(records: list[dict[str, Any]]) -> str:
    """A row for each ratio and variant."""
    rows = []
    for r in records:
        if "error" in r:
            rows.append([r["variant"], f"{100 * r['ratio']:.0f}%", "refused", *[""] * 6])
            continue
        rows.append([r["variant"], f"{100 * r['ratio']:.0f}%", f"{r['cr_p']:.1f}%", f"{r['cr_f']:.1f}%", *cells(r)])
        rows[-1].append(f"{r['seconds']:.0f}")
    headers = ["error, solver", "asked", "CR-P", "CR-F", "same class", "other photos", "error", "other photos", "s"]
    return publish.markdown(rows, headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", default="0.1,0.2,0.4")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=96, help="crops of each kind")
    parser.add_argument("--recover", type=int, default=5, help="epochs")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model()
    calibration, held_out = draw(model, arguments.calibration, arguments.held_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)  # about training mode
        graph = fxcompress.compile(model, ["remove-identity", "fold-batch-norm"], calibration[:1])
    records = []
    for ratio in map(float, arguments.ratios.split(",")):
        found = []
        for name, pass_ in variants(ratio).items():
            found.append({"variant": name, "ratio": ratio, **measure(graph, pass_, calibration, held_out)})
            print(table(found[-1:]).splitlines()[-1], flush=True)
        good = [r for r in found if "error" not in r and r["variant"][:8] != "ablation"]
        best = sorted(good, key=lambda r: -r["seen"]["same"] - r["unseen"]["same"])[:2]
        for r in best if arguments.recover else ():
            start = time.process_time()
            trained = recovered(r["graph"], calibration, logits_of(model, calibration), arguments.recover)
            again = {**r, "variant": f"{r['variant']}, recovered", "seconds": time.process_time() - start}
            found.append(again | compared(trained, held_out))
            print(table(found[-1:]).splitlines()[-1], flush=True)
        records += [{k: v for k, v in r.items() if k != "graph"} for r in found]
    publish.publish("alds_accuracy", table(records), records, write=not arguments.no_write)


if __name__ == "__main__":
    main()
