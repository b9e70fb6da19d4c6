"""Names to passes: what is accepted, and what each mistake is told."""

from __future__ import annotations

import dataclasses
import enum
from importlib import metadata
from typing import Any, ClassVar, Literal

import pytest

import fxcompress
from fxcompress import Guarantee, Pass, UsageError, registry
from fxcompress.registry import registered_passes, resolve, resolve_all


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


@dataclasses.dataclass(frozen=True)
class Plain(Pass):
    name: ClassVar[str] = "plain"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT


@dataclasses.dataclass(frozen=True)
class Options(Pass):
    name: ClassVar[str] = "with-options"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    ratio: float = 0.5
    count: int = 1
    label: str = "a"
    flag: bool = False
    layers: tuple[str, ...] = ()
    sizes: tuple[int, int] | None = None
    side: Side = Side.LEFT
    mode: Literal["fast", "slow"] = "fast"

    def __post_init__(self) -> None:
        if self.ratio > 1:
            raise ValueError("ratio is the fraction removed, at most 1")


@dataclasses.dataclass(frozen=True)
class Required(Pass):
    ratio: float
    name: ClassVar[str] = "required"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT


@dataclasses.dataclass(frozen=True)
class BuiltIn(Pass):
    name: ClassVar[str] = "remove-identity"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT


class NoDataclass(Pass):
    name = "no-dataclass"
    guarantee = Guarantee.EXACT


NOT_A_PASS = 3


class Distribution:
    def __init__(self, name: str) -> None:
        self.name = name


class Entry:
    """What ``importlib.metadata`` gives, without an installed package behind it."""

    def __init__(self, name: str, value: Any, distribution: str = "plugin", target: str = "plugin:thing") -> None:
        self.name, self.value, self.dist, self._loaded = name, target, Distribution(distribution), value

    def load(self) -> Any:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


BUILT_IN = Entry("remove-identity", BuiltIn, "fxcompress", "fxcompress.passes.remove_identity:RemoveIdentity")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*entries: Entry) -> None:
        monkeypatch.setattr(metadata, "entry_points", lambda group: [*entries] if group == registry.GROUP else [])

    install(BUILT_IN, Entry("plain", Plain), Entry("with-options", Options), Entry("required", Required))
    return install


def test_registered_passes_by_name(installed: Any) -> None:
    assert registered_passes() == {
        "remove-identity": BuiltIn,
        "plain": Plain,
        "with-options": Options,
        "required": Required,
    }
    assert fxcompress.registered_passes is registered_passes


def test_objects_classes_and_names(installed: Any) -> None:
    one = Plain()
    assert resolve(one) is one
    assert resolve(Plain) == one == resolve("plain") == resolve(" plain ")
    assert resolve_all([one, "plain", Plain]) == [one, one, one]
    assert resolve_all("plain") == resolve_all(one) == resolve_all(Plain) == [one]
    assert resolve_all([]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ratio=0.25", Options(ratio=0.25)),
        ("ratio=1", Options(ratio=1.0)),
        ("count=3,label=b", Options(count=3, label="b")),
        ("label=3", Options(label="3")),
        ("label='a,b'", Options(label="a,b")),
        ("flag=True", Options(flag=True)),
        ("layers=['a', 'b'], count=2", Options(layers=("a", "b"), count=2)),
        ("sizes=(1, 2)", Options(sizes=(1, 2))),
        ("sizes=None", Options(sizes=None)),
        ("side=right", Options(side=Side.RIGHT)),
        ("side=RIGHT", Options(side=Side.RIGHT)),
        ("mode=slow", Options(mode="slow")),
    ],
)
def test_options_in_a_name(installed: Any, text: str, expected: Options) -> None:
    found = resolve(f"with-options:{text}")
    assert found == expected
    assert [type(getattr(found, f.name)) for f in dataclasses.fields(Options)] == [
        type(getattr(expected, f.name)) for f in dataclasses.fields(Options)
    ]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("plian", "did you mean 'plain'"),
        ("with_options", "did you mean 'with-options'"),
        ("zzz", "Passes: plain, remove-identity, required, with-options"),
        ("with-options:speed=1", "no option 'speed'; its options: ratio, count"),
        ("plain:speed=1", "its options: none"),
        ("with-options:ratio", "option=value"),
        ("with-options:ratio=half", "'ratio' of pass 'with-options' is float; 'half' is str"),
        ("with-options:ratio=True", "is bool"),
        ("with-options:count=1.5", "is int; '1.5' is float"),
        ("with-options:flag=1", "'flag' of pass 'with-options' is bool"),
        ("with-options:sizes=(1,)", "sizes"),
        ("with-options:layers=[1]", "layers"),
        ("with-options:side=up", "side"),
        ("with-options:mode=medium", "mode"),
        ("with-options:ratio=2", "fraction removed, at most 1"),
        ("required", "needs the option 'ratio'"),
        (Required, "needs the option 'ratio'"),
        (NoDataclass, "dataclass"),
        (NoDataclass(), "dataclass"),
        (None, "not None (NoneType)"),
        (dict, "a pass is a Pass object"),
    ],
)
def test_mistakes_are_named(installed: Any, spec: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize("passes", [3, None, {"plain": 1}, {1, 2}])
def test_passes_must_be_a_list(installed: Any, passes: Any) -> None:
    with pytest.raises(UsageError, match="`passes` is a list"):
        resolve_all(passes)


def test_a_duplicate_name_names_both(installed: Any) -> None:
    installed(BUILT_IN, Entry("plain", Plain, "one", "one:P"), Entry("plain", Plain, "two", "two:P"))
    for call in (registered_passes, lambda: resolve("plain")):
        with pytest.raises(UsageError, match=r"registered twice, by one \(one:P\) and by two \(two:P\)"):
            call()


def test_an_entry_that_is_no_pass(installed: Any) -> None:
    installed(BUILT_IN, Entry("three", NOT_A_PASS))
    with pytest.raises(UsageError, match=r"'three' of plugin \(plugin:thing\) is 3, which is no subclass of Pass"):
        registered_passes()


def test_an_entry_under_another_name(installed: Any) -> None:
    installed(BUILT_IN, Entry("other", Plain))
    with pytest.raises(UsageError, match=r"registered as 'other' but Plain.name is 'plain'"):
        resolve("other")


def test_a_broken_plugin_fails_only_when_asked_for(installed: Any) -> None:
    cause = ImportError("no module named 'frobnicate'")
    installed(BUILT_IN, Entry("broken", cause), Entry("plain", Plain))
    assert resolve("plain") == Plain()
    with pytest.raises(
        UsageError, match=r"'broken' of plugin .* cannot be imported: ImportError: .*frobnicate"
    ) as caught:
        resolve("broken")
    assert caught.value.__cause__ is cause
    with pytest.warns(UserWarning, match="frobnicate"):
        assert set(registered_passes()) == {"remove-identity", "plain"}


@pytest.mark.parametrize("entries", [(), (Entry("plain", Plain),)])
def test_not_installed(installed: Any, entries: tuple[Entry, ...]) -> None:
    installed(*entries)
    for call in (registered_passes, lambda: resolve("remove-identity")):
        with pytest.raises(UsageError, match="pip install"):
            call()
    assert resolve(Plain()) == Plain()
