"""Refitting a layer to what it is to give, against ``lstsq`` and convolutions themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxcompress.analysis.refit import NotRefitted, Sums, _basis, _Rows, _take, _with_samples, refit

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    st.integers(1, 12), st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 100),
    st.sampled_from([1.0, 1e3]),
)  # fmt: skip
def test_whatever_the_rows_the_fit_is_not_worse(n: int, c: int, out: int, bias: bool, seed: int, offset: float) -> None:
    """Few rows or many, dependent or not: the error that is claimed is the error there is, and is no larger."""
    layer = nn.Linear(c, out, bias=bias).double()
    torch.nn.init.normal_(layer.weight)
    zeros = torch.zeros(2, c, dtype=torch.float64)
    values = [(draw(n, c, seed=seed) + offset, draw(n, out, seed=seed + 1)), (zeros, draw(2, out))]
    x, y = (torch.cat(v) for v in zip(*values, strict=True))
    with torch.no_grad():
        before = float((layer(x) - y).norm() / y.norm())
        try:
            found = refit(layer, values)
        except NotRefitted:
            return
        change = found.change()
        if change is None:
            return
        d, s = change
        layer.weight.copy_((found.weight + d)[0].mT)
        if bias:
            layer.bias += s.flatten()
        after = float((layer(x) - y).norm() / y.norm())
    assert found.errors() == pytest.approx((before, after), rel=1e-6, abs=1e-6)
    assert after <= before * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("bias", [True, False])
def test_sums_give_the_ridge_regression_of_all_rows(bias: bool) -> None:
    """Against ``lstsq`` on the rows with the ridge below them, in whatever parts the rows come."""
    x, r = draw(1, 50, 4) + 3, draw(1, 50, 2, seed=1) - 5
    sums = Sums.of(x[:, :7], r[:, :7], bias)
    for part in (slice(7, 7), slice(7, 8), slice(8, 50)):
        sums = sums.merged(Sums.of(x[:, part], r[:, part], bias))
    a, b = (v[0] - v[0].mean(0) * bias for v in (x, r))
    scale = (0.1 * (a.T @ a).diagonal().mean()).sqrt()
    wanted = torch.linalg.lstsq(torch.cat([a, scale * torch.eye(4)]), torch.cat([b, torch.zeros(4, 2)])).solution
    d = sums.solution(0.1)
    assert d is not None
    torch.testing.assert_close(d[0], wanted)
    s = sums.shift(d)
    assert sums.error(d, s) == pytest.approx(float((r - x @ d - s).square().sum()))
    assert bias or not s.any()


def test_fewer_rows_than_unknowns_is_the_same_problem() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 3).double()
    values = [(draw(10, 20), draw(10, 3, seed=1))]
    rows = _Rows(layer, values, None)
    basis = _basis(rows)
    assert basis.shape == (20, 10)
    [(x, _, _)] = rows
    torch.testing.assert_close(x[0] @ basis @ basis.T, x[0])
    # the ridge is relative to the mean of the diagonal, which is over fewer there
    r = draw(1, 10, 3, seed=2)
    wanted = Sums.of(x, r, True).solution(0.2)
    found = Sums.of(x @ basis, r, True).solution(0.1)
    assert found is not None
    torch.testing.assert_close(basis @ found[0], wanted[0])  # type: ignore[index]
    lifted, whole = Sums.of(x @ basis, r, True).lifted(basis), Sums.of(x, r, True)
    for field in ("mean_x", "mean_r", "gram", "cross"):
        torch.testing.assert_close(getattr(lifted, field), getattr(whole, field))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_row_is_what_the_convolution_multiplies(rank: int, groups: int, mode: str) -> None:
    torch.manual_seed(0)
    options: list[dict[str, Any]] = [{"padding": "same"}, {"padding": "valid", "stride": 2}]
    options.append({"padding": (2, 0, 1)[:rank], "stride": (1, 2, 3)[:rank]})
    for option in options:
        kernel, dilation = (3, 2, 1)[:rank], (1, 2, 1)[:rank]
        layer = CONV[rank](4, 6, kernel, dilation=dilation, groups=groups, padding_mode=mode, **option).double()
        x = draw(2, 4, *(6, 7, 5)[:rank])
        y = layer(x).detach()
        chosen = torch.arange(y[0, 0].numel()).flip(0).expand(2, -1)
        taken, given_out = _take(layer, *_with_samples(layer, x, y), chosen)
        w = layer.weight.detach().reshape(groups, 6 // groups, -1)
        found = torch.einsum("ngd,god->ngo", taken, w).flatten(1) + layer.bias.detach()  # type: ignore[union-attr]
        torch.testing.assert_close(found, given_out)
        torch.testing.assert_close(given_out, y.flatten(2).flip(2).transpose(1, 2).flatten(0, 1))
        assert _with_samples(layer, x[0], y[0])[0].shape == (1, *x.shape[1:])


def test_noise_is_not_fitted() -> None:
    """What the missing channels gave cannot be told from the rest: where rows are few the ridge stays large."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 1).double()
    x, truth = draw(2000, 30), draw(2000, 1, seed=1)
    found = refit(layer, [(x[:40], layer(x[:40]).detach() + truth[:40])])
    assert found.ridge is None or found.ridge >= 1
    change = found.change()
    assert change is None or change[0].norm() < 0.5
