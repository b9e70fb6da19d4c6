"""The report: its arithmetic, its two forms, and that it travels with its graph."""

from __future__ import annotations

import copy
import dataclasses
import enum
import io
import json
import math
import pickle

import pytest
import torch
from torch import fx, nn

import fxcompress
from fxcompress import PassRecord, Report, UsageError
from fxcompress.report import RefusalRecord, Total, attach, detach, plain

RECORD = PassRecord(
    name="halve",
    options={"ratio": 0.5},
    guarantee="approximate",
    sites=2,
    refusals=(RefusalRecord("conv", "features.0", "grouped"),),
    error=0.25,
    error_in_dtype=0.25,
    verified=True,
    verification="error 2.5e-01",
    parameters_before=2_000_000,
    parameters_after=500_000,
    macs_before=4_000,
    macs_after=3_000,
    bytes_before=8 * 1024**2,
    bytes_after=2 * 1024**2,
    seconds=1.5,
    details=({"node": "a", "target": "a", "rank": 3}, {"node": "b", "target": "b", "rank": 4}),
    warnings=("mind the gap",),
)
TOTAL = Total(2_000_000, 500_000, 4_000, 3_000, 8 * 1024**2, 2 * 1024**2, 2.0)


def graph() -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_the_dict_has_exactly_these_keys() -> None:
    data = Report((RECORD,), TOTAL).to_dict()
    assert set(data) == {"passes", "total", "sensitivity"}
    sizes = {f"{what}_{when}" for what in ("parameters", "macs", "bytes") for when in ("before", "after")}
    assert set(data["total"]) == {*sizes, "cr_p", "cr_f", "seconds", "warnings"}
    wanted = {"name", "guarantee", "sites", "refusals", "error", "seconds", "details", *sizes}
    assert set(data["passes"][0]) == {*wanted, "options", "error_in_dtype", "verified", "verification", "warnings"}
    assert data["passes"][0]["sites"] == 2
    assert data["passes"][0]["refusals"] == [{"node": "conv", "target": "features.0", "reason": "grouped"}]
    assert data["passes"][0]["details"][1] == {"node": "b", "target": "b", "rank": 4}


def test_reductions_are_percent() -> None:
    assert TOTAL.cr_p == 75.0
    assert TOTAL.cr_f == 25.0
    assert dataclasses.replace(TOTAL, macs_before=None, macs_after=None).cr_f is None
    assert dataclasses.replace(TOTAL, parameters_before=0, parameters_after=0).cr_p == 0.0


def test_json_is_strict_and_comes_back() -> None:
    unmeasured = dataclasses.replace(RECORD, error=None, macs_before=None, macs_after=None, details=())
    original = Report((RECORD, unmeasured), TOTAL)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert Report.from_dict(json.loads(original.to_json(), parse_constant=refuse)) == original
    assert json.loads(original.to_json())["passes"][1]["error"] is None


@pytest.mark.parametrize("data", [{}, {"passes": [{}], "total": {}}, {"passes": 3, "total": {"seconds": 1}}, []])
def test_from_dict_refuses_other_things(data: object) -> None:
    with pytest.raises(UsageError, match="no report of fxcompress"):
        Report.from_dict(data)  # type: ignore[arg-type]


def test_plain_values() -> None:
    class Side(enum.Enum):
        LEFT = "left"

    values = {
        1: torch.tensor([1.5, math.inf]),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "side": Side.LEFT,
        "nan": math.nan,
        "set": {3, 1},
        "nested": [(1, None, True)],
    }
    made = plain(values)
    assert made == {
        "1": [1.5, "inf"],
        "size": [2, 3],
        "dtype": "torch.float16",
        "side": "left",
        "nan": "nan",
        "set": [1, 3],
        "nested": [[1, None, True]],
    }
    json.dumps(made, allow_nan=False)


def test_the_table() -> None:
    unverified = dataclasses.replace(RECORD, name="second", error=None, verified=False, verification="unverified: why")
    text = str(Report((RECORD, unverified), dataclasses.replace(TOTAL, warnings=("look out",))))
    lines = text.splitlines()
    for column in ("pass", "guarantee", "sites", "refusals", "error", "parameters", "MACs", "bytes", "seconds"):
        assert column in lines[0]
    for cell in ("halve", "approximate", "2.5e-01", "2.00 M -> 500.00 k", "4.00 k -> 3.00 k", "8.00 MiB -> 2.00 MiB"):
        assert cell in lines[2]
    assert "unverified" in lines[3]
    assert lines[4].startswith("total")
    assert "CR-P 75.00%   CR-F 25.00%" in text
    for line in ("second: unverified: why", "halve: warning: mind the gap", "warning: look out"):
        assert line in lines


def test_the_table_without_macs() -> None:
    total = dataclasses.replace(TOTAL, macs_before=None, macs_after=None)
    assert "CR-F unknown" in str(Report((), total))
    assert "- -> -" in str(Report((), total))


def test_histories_join() -> None:
    later = Total(500_000, 250_000, 3_000, 1_000, 2 * 1024**2, 1024**2, 3.0)
    joined = Report((RECORD,), TOTAL).followed_by(Report((RECORD, RECORD), later))
    assert len(joined.passes) == 3
    assert joined.total == Total(2_000_000, 250_000, 4_000, 1_000, 8 * 1024**2, 1024**2, 5.0)


def test_macs_of_different_inputs_are_not_added_up() -> None:
    later = dataclasses.replace(TOTAL, macs_before=9_000)
    joined = Report((RECORD,), TOTAL).followed_by(Report((), later))
    assert joined.total.macs_before is joined.total.macs_after is joined.total.cr_f is None
    assert "different example inputs" in joined.total.warnings[0]


def test_no_report() -> None:
    for model in (graph(), nn.Linear(2, 2)):
        with pytest.raises(UsageError, match="has no report"):
            fxcompress.report(model)


def test_it_survives_copies_and_pickling_in_any_order() -> None:
    gm = graph()
    contents = Report((RECORD,), TOTAL)
    attach(gm, contents)
    keys = list(gm.state_dict())

    def saved(model: fx.GraphModule) -> fx.GraphModule:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def pickled(model: fx.GraphModule) -> fx.GraphModule:
        return pickle.loads(pickle.dumps(model))

    for steps in ([copy.deepcopy], [pickled], [saved], [copy.deepcopy, pickled], [pickled, copy.deepcopy, saved]):
        again = gm
        for step in steps:
            again = step(again)
        assert fxcompress.report(again) == contents
        assert list(again.state_dict()) == keys
        x = torch.randn(3, 2)
        assert torch.equal(again(x), gm(x))


def test_attach_replaces_and_detach_takes_away() -> None:
    gm = graph().eval()
    attach(gm, Report((RECORD,), TOTAL))
    attach(gm, Report((), TOTAL))
    assert fxcompress.report(gm) == Report((), TOTAL)
    assert not any(module.training for module in gm.modules())
    assert detach(gm) == Report((), TOTAL)
    assert detach(gm) is None
    assert [name for name, _ in gm.named_modules()] == ["", "0", "1"]
