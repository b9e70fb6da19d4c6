"""The MACs of all functions that contract, against ``FlopCounterMode``, which counts kernels and not by formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress.analysis import cost
from fxcompress.analysis.contractions import einsum_macs
from tests.analysis.counting import counted, graph_of, measured, rand

aten = torch.ops.aten

# Everything that FlopCounterMode can judge, as function, method, operator, ATen overload and module.
JUDGED: Mapping[str, tuple[Any, tuple[Tensor, ...]]] = {
    "mm": (torch.mm, (rand(2, 3), rand(3, 5))),
    "Tensor.mm": ("mm", (rand(2, 3), rand(3, 5))),
    "aten.mm.default": (aten.mm.default, (rand(2, 3), rand(3, 5))),
    "aten.mm": (aten.mm, (rand(2, 3), rand(3, 5))),
    "@": (lambda a, b: a @ b, (rand(4, 2, 3), rand(3, 5))),
    "__rmatmul__": ("__rmatmul__", (rand(3, 5), rand(2, 3))),
    "linalg.matmul": (torch.linalg.matmul, (rand(4, 2, 3), rand(3, 5))),
    "bmm": (torch.bmm, (rand(4, 2, 3), rand(4, 3, 5))),
    "Tensor.bmm": ("bmm", (rand(4, 2, 3), rand(4, 3, 5))),
    "aten.bmm.default": (aten.bmm.default, (rand(4, 2, 3), rand(4, 3, 5))),
    "addmm": (torch.addmm, (rand(5), rand(2, 3), rand(3, 5))),
    "addmm by keyword": (lambda a, b, c: torch.addmm(a, mat2=c, mat1=b), (rand(5), rand(2, 3), rand(3, 5))),
    "aten.addmm.default": (aten.addmm.default, (rand(5), rand(2, 3), rand(3, 5))),
    "baddbmm": (torch.baddbmm, (rand(4, 2, 5), rand(4, 2, 3), rand(4, 3, 5))),
    "linear": (F.linear, (rand(4, 2, 3), rand(5, 3), rand(5))),
    "linear by keyword": (lambda x, w: F.linear(weight=w, input=x), (rand(4, 2, 3), rand(5, 3))),
    "aten.linear.default": (aten.linear.default, (rand(2, 3), rand(5, 3))),
    "nn.Linear": (nn.Linear(3, 5), (rand(4, 2, 3),)),
    "inner": (torch.inner, (rand(2, 3), rand(5, 3))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), (rand(2, 3, 4), rand(3, 4, 5))),
    "multi_dot": (lambda *m: torch.linalg.multi_dot(m), (rand(2, 3), rand(3, 4), rand(4, 5))),
    "chain_matmul": (lambda *m: torch.linalg.multi_dot(m), (rand(4, 5), rand(5, 2), rand(2, 6), rand(6, 3))),
    "matrix_power": (lambda a: torch.linalg.matrix_power(a, 3), (rand(2, 3, 3),)),
    "conv2d same": (lambda x, w: F.conv2d(x, w, padding="same"), (rand(1, 2, 5, 6), rand(4, 2, 3, 3))),
    "conv1d unbatched": (F.conv1d, (rand(2, 5), rand(4, 2, 3))),
    "aten.conv2d.default": (aten.conv2d.default, (rand(1, 2, 5, 6), rand(4, 2, 3, 3))),
    "aten.convolution": (
        lambda x, w: aten.convolution.default(x, w, None, [2], [1], [1], False, [0], 2),
        (rand(3, 4, 9), rand(6, 2, 3)),
    ),
    "aten.convolution transposed": (
        lambda x, w: aten.convolution.default(x, w, None, [2], [1], [1], True, [1], 2),
        (rand(3, 4, 9), rand(4, 3, 3)),
    ),
    "conv circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (rand(1, 2, 5, 6),)),
    "sdpa": (F.scaled_dot_product_attention, (rand(2, 4, 5, 8), rand(2, 4, 7, 8), rand(2, 4, 7, 6))),
    "sdpa grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        (rand(2, 4, 5, 8), rand(2, 2, 5, 8), rand(2, 2, 5, 8)),
    ),
    "bilinear as einsum": (
        lambda a, w, b: torch.einsum("ni,oij,nj->no", a, w, b),
        (rand(2, 3), rand(5, 3, 4), rand(2, 4)),
    ),
    "nn.RNN": (nn.RNN(3, 4, num_layers=2, nonlinearity="relu"), (rand(5, 2, 3),)),
    "nn.GRU": (nn.GRU(3, 4, batch_first=True, bidirectional=True), (rand(2, 5, 3),)),
    "nn.LSTM": (nn.LSTM(3, 4, num_layers=2, proj_size=2, bias=False), (rand(5, 2, 3),)),
    "nn.LSTM unbatched": (nn.LSTM(3, 4), (rand(5, 3),)),
    "nn.LSTMCell": (nn.LSTMCell(3, 4), (rand(2, 3),)),
    "nn.GRUCell": (nn.GRUCell(3, 4), (rand(3),)),
    "nn.RNNCell": (nn.RNNCell(3, 4, nonlinearity="relu"), (rand(2, 3),)),
    "nn.TransformerEncoderLayer": (nn.TransformerEncoderLayer(8, 2, 16).eval(), (rand(5, 2, 8),)),
    "nn.Transformer": (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (rand(2, 5, 8), rand(2, 3, 8))),
    "nothing": (nn.Sequential(nn.BatchNorm1d(3), nn.ELU(), nn.Softmax(1)), (rand(2, 3),)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("case", JUDGED)
def test_against_flop_counter(case: str) -> None:
    function, tensors = JUDGED[case]
    call = getattr(torch.Tensor, function) if isinstance(function, str) else function
    found = counted(function, *tensors)
    assert found == measured(call, *tensors)
    assert (found > 0) == (case != "nothing")


# What FlopCounterMode does not know.
BY_HAND: Mapping[str, tuple[Any, tuple[Tensor, ...], int]] = {
    "mv": (torch.mv, (rand(2, 3), rand(3)), 6),
    "matmul with a vector": (torch.matmul, (rand(3), rand(3, 5)), 15),
    "addmv": (torch.addmv, (rand(2), rand(2, 3), rand(3)), 6),
    "dot": (torch.dot, (rand(7), rand(7)), 7),
    "Tensor.dot": ("dot", (rand(7), rand(7)), 7),
    "aten.dot": (aten.dot.default, (rand(7), rand(7)), 7),
    "addmm_": ("addmm_", (rand(2, 5), rand(2, 3), rand(3, 5)), 30),
    "addbmm": (torch.addbmm, (rand(2, 5), rand(4, 2, 3), rand(4, 3, 5)), 4 * 2 * 3 * 5),
    "linear of a vector": (F.linear, (rand(3), rand(5, 3)), 15),
    "linear to a scalar": (F.linear, (rand(2, 3), rand(3)), 6),
    "bilinear": (F.bilinear, (rand(2, 3), rand(2, 4), rand(5, 3, 4)), 2 * 5 * 3 * 4 + 2 * 5 * 4),
    "nn.Bilinear": (nn.Bilinear(3, 4, 5), (rand(2, 3), rand(2, 4)), 2 * 5 * 3 * 4 + 2 * 5 * 4),
    "conv_tbc": (torch.conv_tbc, (rand(6, 2, 3), rand(3, 3, 5), rand(5)), 4 * 2 * 5 * 3 * 3),
    "dot inside a function that is measured": (lambda x, y: torch.tensordot(x, y, 1), (rand(7), rand(7)), 7),
    "aten attention kernel": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        (rand(1, 2, 5, 8), rand(1, 2, 7, 8), rand(1, 2, 7, 8)),
        2 * (2 * 5 * 7 * 8),
    ),
    "outer product": (torch.outer, (rand(2), rand(3)), 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand_where_flop_counter_is_blind(case: str) -> None:
    function, tensors, expected = BY_HAND[case]
    assert counted(function, *tensors) == expected


def test_packed_sequences() -> None:
    """Two sequences of 3 and 1 steps: 4 steps, at 4 gates, 2 inputs and a state of 3."""
    packed = nn.utils.rnn.pack_sequence([rand(3, 2), rand(1, 2)])
    assert cost(graph_of(nn.LSTM(2, 3), 1), (packed,)).macs == 4 * 4 * 3 * (2 + 3)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dimensions, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    groups, kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kinds = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
    channels_in, channels_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    options = {"padding": draw(st.integers(0, 1)), "dilation": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
    module = kinds[dimensions][transposed](channels_in, channels_out, kernel, stride, groups=groups, **options)
    batch = [draw(st.integers(1, 2))] if draw(st.booleans()) else []
    return module, rand(*batch, channels_in, *(draw(st.integers(5, 7)) for _ in range(dimensions)))


@given(convolutions())
def test_any_convolution(drawn: tuple[nn.Module, Tensor]) -> None:
    module, x = drawn
    assert counted(module, x) == measured(module, x) > 0


@st.composite
def einsums(draw: st.DrawFn) -> tuple[str, list[tuple[int, ...]]]:
    """Equations of 1 to 4 operands with labels a to e, with or without output, ellipsis, and broadcast sizes of 1."""
    sizes = {label: draw(st.integers(1, 4)) for label in "abcde"}
    hidden = [draw(st.integers(1, 3)) for _ in range(2)]
    terms, shapes = [], []
    for _ in range(draw(st.integers(1, 4))):
        labels = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True))
        shape = [sizes[label] if draw(st.integers(0, 5)) else 1 for label in labels]
        spread = draw(st.integers(0, 2)) if draw(st.booleans()) else None
        at = draw(st.integers(0, len(labels)))
        if spread is not None:
            labels.insert(at, "...")
            shape[at:at] = hidden[len(hidden) - spread :]
        terms.append("".join(labels))
        shapes.append(tuple(shape))
    used = sorted({letter for term in terms for letter in term if letter != "."})
    output = ""
    if draw(st.booleans()):
        kept = draw(st.lists(st.sampled_from(used), unique=True))
        output = "->" + ("..." if any("..." in term for term in terms) else "") + "".join(kept)
    return ", ".join(terms) + output, shapes


@given(einsums())
def test_any_einsum(drawn: tuple[str, list[tuple[int, ...]]]) -> None:
    equation, shapes = drawn
    tensors = [rand(*shape) for shape in shapes]
    left_to_right = measured(aten.einsum.default, equation, tensors)
    assert einsum_macs(equation, shapes) == left_to_right
    assert counted(lambda *operands: aten.einsum.default(equation, operands), *tensors) == left_to_right
    expected = measured(torch.einsum, equation, *tensors)  # by another path, if opt_einsum is installed
    assert counted(lambda *operands: torch.einsum(equation, *operands), *tensors) == expected


def test_einsum_by_hand() -> None:
    chain = "ab,bc,cd,de->ae", [(2, 3), (3, 5), (5, 7), (7, 11)]
    assert einsum_macs(*chain) == 2 * 3 * 5 + 2 * 5 * 7 + 2 * 7 * 11
    assert einsum_macs(*chain, path=[2, 3, 0, 1, 0, 1]) == 5 * 7 * 11 + 2 * 3 * 5 + 2 * 5 * 11
    assert einsum_macs("...ij,...jk", [(6, 1, 2, 3), (4, 3, 5)]) == 6 * 4 * 2 * 3 * 5
    assert einsum_macs("ii,ij->j", [(3, 3), (3, 2)]) == 6
    assert einsum_macs("ij,jk->", [(2, 3), (3, 4)]) == 3, "i and k are summed before the product"
    assert einsum_macs("i,j->ij", [(2,), (3,)]) == 0, "products that are not added up"


def test_einsum_with_a_path_and_with_sublists() -> None:
    tensors = rand(2, 3), rand(3, 5), rand(5, 7)
    aten_path = aten.einsum.default
    assert counted(lambda *t: aten_path("ab,bc,cd->ad", t, path=[1, 2, 0, 1]), *tensors) == measured(
        aten_path, "ab,bc,cd->ad", tensors, path=[1, 2, 0, 1]
    )
    assert counted(lambda a, b, _: torch.einsum(a, [0, 1], b, [1, 2]), *tensors) == 30


class FakeOptEinsum:
    @staticmethod
    def contract_path(equation: str, *operands: Tensor, optimize: str) -> tuple[list[tuple[int, int]], None]:
        return [(1, 2), (0, 1)], None


def test_einsum_follows_opt_einsum_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.opt_einsum.m, "enabled", True)
    monkeypatch.setattr(torch.backends.opt_einsum, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.opt_einsum, "get_opt_einsum", lambda: FakeOptEinsum)
    tensors = rand(2, 3), rand(3, 5), rand(5, 7)
    expected = measured(torch.einsum, "ab,bc,cd->ad", *tensors)
    assert counted(lambda *t: torch.einsum("ab,bc,cd->ad", *t), *tensors) == expected == 3 * 5 * 7 + 2 * 3 * 7


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(1, 3), max_size=2),
    st.tuples(*[st.integers(2, 4)] * 3),
)
def test_any_matmul(left: list[int], right: list[int], sizes: tuple[int, int, int]) -> None:
    """Batch dimensions broadcast against each other."""
    common = min(len(left), len(right))
    if common:
        left[-common:] = [1 if i % 2 else size for i, size in enumerate(right[-common:])]
    rows, inner, columns = sizes
    a, b = rand(*left, rows, inner), rand(*right, inner, columns)
    assert counted(torch.matmul, a, b) == measured(torch.matmul, a, b) == (a @ b).numel() * inner


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([(None, None), (6, None), (6, 3)]),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["plain", "batch_first", "unbatched"]),
)  # fmt: skip
def test_any_multi_head_attention(
    heads: int, length: int, keys: int, widths: tuple[int | None, int | None],
    bias_kv: bool, zero: bool, weights: bool, layout: str,
) -> None:  # fmt: skip
    width = 4 * heads
    kdim, vdim = (size or width for size in widths)
    options = {"kdim": widths[0], "vdim": widths[1], "add_bias_kv": bias_kv, "add_zero_attn": zero}
    module = nn.MultiheadAttention(width, heads, batch_first=layout == "batch_first", **options)
    batch = {"plain": (2,), "batch_first": (2,), "unbatched": ()}[layout]

    def sequence(steps: int, features: int) -> Tensor:
        return rand(*((*batch, steps) if layout == "batch_first" else (steps, *batch)), features)

    inputs = sequence(length, width), sequence(keys, kdim), sequence(keys, vdim)
    graph = fx.Graph()
    placeholders = tuple(graph.placeholder(name) for name in "qkv")
    graph.output(graph.call_module("m", placeholders, {"need_weights": weights}))
    gm = fx.GraphModule(nn.ModuleDict({"m": module}), graph)
    assert cost(gm, inputs).macs == measured(module, *inputs, need_weights=weights)
    tokens, total = length * math.prod(batch), keys * math.prod(batch)
    attention = 2 * tokens * width * (keys + bias_kv + zero)
    assert cost(gm, inputs).macs == 2 * tokens * width**2 + total * width * (kdim + vdim) + attention
