"""Files that were damaged, or made to do harm: always an error of this package, nothing run, no memory to speak of.

``FXCOMPRESS_FUZZ`` is how many damaged copies are tried (default 1,500; the slow test takes 20,000 of each kind).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import fxcompress
from fxcompress.serialization import FILES, GRAPH_FILE, REPORT_FILE, WEIGHTS_FILE
from tests.serialization.saved import GRAPHS, resigned

COUNT = int(os.environ.get("FXCOMPRESS_FUZZ", "1500"))
_ALLOWANCE = 2 << 20
"""Bytes of Python objects besides twice the files: code of the graph, a message, imports."""
_READS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")
_FORBIDDEN = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pty.", "webbrowser.", "pickle.")
_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    writes = event == "open" and isinstance(arguments[1], str) and any(c in arguments[1] for c in "wax+")
    if writes or (event.startswith(_FORBIDDEN) and event not in _READS):
        _watched.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of good files, by kind."""
    root = tmp_path_factory.mktemp("saved")
    for name, (make, _, _) in GRAPHS.items():
        fxcompress.save(make(), root / name)
        fxcompress.load(root / name)  # imports everything that loading does
    return {name: root / name for name in GRAPHS}


def attempt(folder: Path, trace_memory: bool = False) -> fx.GraphModule | None:
    """What loading gives; ``None`` if it is refused. Anything but a refusal or a graph fails."""
    global _watched
    size = sum(f.stat().st_size for f in folder.iterdir())
    if trace_memory:
        tracemalloc.start()
    _watched = seen = []
    try:
        return fxcompress.load(folder)
    except fxcompress.FxCompressError:
        return None
    finally:
        _watched = None
        if trace_memory:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= 2 * size + _ALLOWANCE, f"{peak} bytes for files of {size}"
        assert not seen, seen


# ------------------------------------------------------------------------------------------------ bytes
def _byte_damage(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(5)
    at = rng.randrange(max(len(data), 1))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :] if data else data
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + rng.randrange(1, 64) :]
    return (2 ** rng.randrange(1, 64)).to_bytes(8, "little") + data[8:]  # the size of a header, mostly


@pytest.mark.parametrize("file", FILES)
def test_damaged_bytes(file: str, saved: dict[str, Path], tmp_path: Path) -> None:
    _damage_bytes(file, saved, tmp_path, COUNT // 3)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_damaged_bytes_often(file: str, saved: dict[str, Path], tmp_path: Path) -> None:
    _damage_bytes(file, saved, tmp_path, 20_000)


def _damage_bytes(file: str, saved: dict[str, Path], folder: Path, count: int) -> None:
    for i in range(count):
        rng = random.Random(f"{file} {i}")
        name = rng.choice([n for n in saved if (saved[n] / file).exists()])
        _fresh(saved[name], folder / "copy")
        good = (folder / "copy" / file).read_bytes()
        bad = _byte_damage(rng, good)
        (folder / "copy" / file).unlink()
        (folder / "copy" / file).write_bytes(bad)
        found = attempt(folder / "copy", trace_memory=i % 10 == 0)
        # A report's words and numbers can be others and still be a report; graphs and weights are checked.
        assert found is None or bad == good or file == REPORT_FILE, f"{name} {i}: loaded what was damaged"


def _fresh(good: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in good.iterdir():
        os.link(file, folder / file.name)


# -------------------------------------------------------------------------------------------- structure
_EVIL = (
    "__class__", "__import__('os').system('touch pwned')", "os.system", "builtins.eval", "builtins.exec",
    "builtins.__import__", "builtins.open", "torch.load", "torch.hub.load", "torch.ops.aten.from_file.default",
    "torch.ops.aten.save", "torch.utils.cpp_extension.load", "torch.jit.load", "torch.from_file", "posix.system",
    "fxcompress.cli.main", "fxcompress.modules.MethodCall", "fxcompress.modules.Refill", "torch.fx.GraphModule",
    "torch.nn.modules.module.Module", "torch.nn.modules.lazy.LazyModuleMixin", "torch.nn.modules.linear.LazyLinear",
    "subprocess.Popen", "pickle.loads", "builtins.getattr", "operator.attrgetter", "operator.methodcaller",
    "../../../etc/passwd", "/etc/passwd", "a.b.c", "", ".", "..", "a..b", "self", "None", "x\ny", "x'", 'x"', "x\\",
    "x = __import__('os').system('touch pwned')", "*", "**", "*args", "**kwargs", "forward", "_modules", "training",
    "_forward_hooks", "__dict__", "__globals__", "__reduce__", "apply_", "map_", "data_ptr", "numpy", "share_memory_",
    "format", "x" * 10_000, "é", "lambda", "class", "torch", "inf", "output", "placeholder", "call_function",
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, True, None)


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _evil_value(rng: random.Random) -> Any:
    word = rng.choice(_EVIL)
    return rng.choice(
        (
            word, rng.choice(_NUMBERS), [], {}, [word], {word: word}, _deep(rng.choice((5, 200, 700))),
            {"object": word}, {"node": word}, {"tensor": rng.choice(_NUMBERS)}, {"module": rng.choice(_NUMBERS)},
            {"tuple": [{"object": word}, word]}, {"record": [word, {word: 1}]}, {"instance": [word, {word: 1}]},
            {"member": [word, word]}, {"dtype": word}, {"device": word}, {"device": "cuda:9999999999999"},
            {"slice": [1, word, 0]}, {"range": [0, 2**62, 1]}, {"range": [0, 1, 0]}, {"size": [2**62, -1]},
            {"dict": [[word, 1], [[1], 2]]}, {"float": word}, {"complex": [word, 1]}, {"set": [[1]]},
            {"slice": [{"object": word}, 1, 1]}, {"memory_format": word}, {"layout": word}, {"unknown": 1},
        )
    )  # fmt: skip


def _places(value: Any, depth: int = 50) -> Iterator[tuple[Any, Any]]:
    """Every container with a key or position in it."""
    if not depth:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items):
        yield value, key
        yield from _places(part, depth - 1)


def _structural_damage(rng: random.Random, graph: Any) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(graph))
        owner, key = rng.choice(places)
        if not (isinstance(owner, dict) and key in owner) and not (isinstance(owner, list) and key < len(owner)):
            continue
        other_owner, other_key = rng.choice(places)
        kind = rng.randrange(7)
        if kind <= 2:
            owner[key] = _evil_value(rng)
        elif kind == 3:
            del owner[key]
        elif kind == 4 and isinstance(owner, dict):
            owner[rng.choice(_EVIL)] = owner.pop(key)
        elif kind == 5 and isinstance(owner, list):
            owner.insert(key, json.loads(json.dumps(owner[key])))
        elif isinstance(owner[key], bool | int):
            owner[key] = rng.choice(_NUMBERS)
        elif isinstance(other_owner, dict) and other_key in other_owner:
            owner[key] = json.loads(json.dumps(other_owner[other_key]))
    return graph


def test_damaged_structure(saved: dict[str, Path], tmp_path: Path) -> None:
    _damage_structure(saved, tmp_path, COUNT)


@pytest.mark.slow
def test_damaged_structure_often(saved: dict[str, Path], tmp_path: Path) -> None:
    _damage_structure(saved, tmp_path, 20_000)


def _damage_structure(saved: dict[str, Path], folder: Path, count: int) -> None:
    graphs = {name: (path / GRAPH_FILE).read_text() for name, path in saved.items()}
    loaded = 0
    for i in range(count):
        rng = random.Random(i)
        name = rng.choice(sorted(saved))
        bad = _structural_damage(rng, json.loads(graphs[name]))
        _fresh(saved[name], folder / "copy")
        _sign(folder / "copy", bad)
        loaded += attempt(folder / "copy", trace_memory=i % 10 == 0) is not None
    assert loaded < count  # another number may be another good graph, but not always
    assert not list(Path.cwd().glob("pwned")) + list(folder.rglob("pwned"))


def _sign(folder: Path, graph: Any) -> None:
    """Write ``graph`` and put its digest into the weights' header, in place."""
    old = hashlib.sha256((folder / GRAPH_FILE).read_bytes()).hexdigest().encode()
    data = json.dumps(graph).encode()
    weights = (folder / WEIGHTS_FILE).read_bytes()
    for file, content in (
        (GRAPH_FILE, data),
        (WEIGHTS_FILE, weights.replace(old, hashlib.sha256(data).hexdigest().encode(), 1)),
    ):
        (folder / file).unlink()
        (folder / file).write_bytes(content)


# --------------------------------------------------------------------------------------------- by hand
def _module_that_contains_itself(graph: Any) -> Any:
    graph["modules"][0]["modules"] = {"again": 0}
    return graph


def _root_inside_a_leaf(graph: Any) -> Any:
    graph["modules"][0]["modules"] = {"again": len(graph["modules"]) - 1}
    return graph


def _nodes(graph: Any) -> list[Any]:
    return graph["modules"][-1]["graph"]["nodes"]


def _node_that_reads_itself(graph: Any) -> Any:
    _nodes(graph)[-1]["args"] = [{"node": "output"}]
    return graph


def _node_that_reads_a_later_one(graph: Any) -> Any:
    _nodes(graph)[1]["args"] = [{"node": _nodes(graph)[-2]["name"]}]
    return graph


def _attribute_of_all_objects(graph: Any) -> Any:
    _nodes(graph)[1:1] = [
        {"op": "call_function", "name": "a", "target": "builtins.getattr", "args": [{"node": "x"}, "__class__"]}
    ]
    return graph


def _attribute_by_a_list(graph: Any) -> Any:
    _attribute_of_all_objects(graph)
    _nodes(graph)[1]["args"][1] = {"tuple": ["__class__"]}
    return graph


def _code_as_a_default(graph: Any) -> Any:
    _nodes(graph)[0]["target"] = "x=__import__('os').system('touch pwned')"
    return graph


def _code_as_a_keyword(graph: Any) -> Any:
    _nodes(graph)[-2]["kwargs"] = {"a=__import__('os').system('touch pwned'), b": 1}
    return graph


def _code_as_a_name(graph: Any) -> Any:
    _nodes(graph)[0]["name"] = "x; import os; os.system('touch pwned')"
    return graph


def _code_in_a_path(graph: Any) -> Any:
    path = "a\"), __import__('os').system('touch pwned'), getattr(self, \"b"
    graph["modules"][-1]["modules"][path] = 0
    _nodes(graph)[1].update(op="call_module", target=path)
    return graph


def _method_of_no_tensor(graph: Any) -> Any:
    _nodes(graph)[-2].update(op="call_method", target="format", args=["{0.__class__}", {"node": "x"}])
    return graph


def _method_in_the_way(graph: Any) -> Any:
    next(m for m in graph["modules"] if "attributes" in m)["attributes"]["forward"] = {"object": "builtins.pow"}
    return graph


def _call_in_the_way(graph: Any) -> Any:
    next(m for m in graph["modules"] if "attributes" in m)["attributes"]["_compiled_call_impl"] = {
        "object": "builtins.pow"
    }
    return graph


def _class_in_the_way(graph: Any) -> Any:
    next(m for m in graph["modules"] if "attributes" in m)["attributes"]["__class__"] = {"object": "builtins.pow"}
    return graph


def _huge_tensor(graph: Any) -> Any:
    graph["tensors"][0].update(shape=[2**40, 2**20])
    return graph


def _huge_view(graph: Any) -> Any:
    graph["tensors"][0].update(strides=[2**40] * len(graph["tensors"][0]["shape"]), offset=2**50)
    return graph


def _later_version(graph: Any) -> Any:
    return {**graph, "version": 2}


HARMFUL = (
    _module_that_contains_itself, _root_inside_a_leaf, _node_that_reads_itself, _node_that_reads_a_later_one,
    _attribute_of_all_objects, _attribute_by_a_list, _code_as_a_default, _code_as_a_keyword, _code_as_a_name,
    _code_in_a_path, _method_of_no_tensor, _method_in_the_way, _call_in_the_way, _class_in_the_way, _huge_tensor,
    _huge_view, _later_version,
)  # fmt: skip


@pytest.mark.parametrize("change", HARMFUL)
def test_harmful_files_are_refused(change: Any, saved: dict[str, Path], tmp_path: Path) -> None:
    _fresh(saved["plain"], tmp_path / "copy")
    resigned(tmp_path / "copy", change)
    assert attempt(tmp_path / "copy", trace_memory=True) is None
    assert not list(Path.cwd().glob("pwned"))


def test_keywords_of_structured_inputs_hold_no_code(saved: dict[str, Path], tmp_path: Path) -> None:
    def change(graph: Any) -> Any:
        inputs = graph["modules"][-1]["graph"]["pytree"]["inputs"]
        inputs[2][1][1] = ["a': __import__('os').system('touch pwned'), 'b"]
        return graph

    _fresh(saved["structured"], tmp_path / "copy")
    resigned(tmp_path / "copy", change)
    assert attempt(tmp_path / "copy") is None


def test_a_resigned_file_without_changes_loads(saved: dict[str, Path], tmp_path: Path) -> None:
    _fresh(saved["plain"], tmp_path / "copy")
    resigned(tmp_path / "copy", lambda graph: graph)
    assert attempt(tmp_path / "copy") is not None


def test_weights_of_another_graph_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    _fresh(saved["plain"], tmp_path / "copy")
    (tmp_path / "copy" / WEIGHTS_FILE).unlink()
    shutil.copy(saved["pruned"] / WEIGHTS_FILE, tmp_path / "copy" / WEIGHTS_FILE)
    with pytest.raises(fxcompress.SerializationError, match="another save"):
        fxcompress.load(tmp_path / "copy")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, "NaN", "\xff", "", "null", "[]"])
def test_json_that_is_none_of_ours(text: str, saved: dict[str, Path], tmp_path: Path) -> None:
    for file in (GRAPH_FILE, REPORT_FILE):
        _fresh(saved["plain"], tmp_path / "copy")
        (tmp_path / "copy" / file).unlink()
        (tmp_path / "copy" / file).write_bytes(text.encode("latin1"))
        assert attempt(tmp_path / "copy") is None


def test_missing_files_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(fxcompress.SerializationError, match=GRAPH_FILE):
        fxcompress.load(tmp_path)
    _fresh(saved["plain"], tmp_path / "copy")
    (tmp_path / "copy" / WEIGHTS_FILE).unlink()
    with pytest.raises(fxcompress.SerializationError, match="weights"):
        fxcompress.load(tmp_path / "copy")


def test_flipped_weights_are_found_only_when_checked(saved: dict[str, Path], tmp_path: Path) -> None:
    _fresh(saved["plain"], tmp_path / "copy")
    data = bytearray((saved["plain"] / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "copy" / WEIGHTS_FILE).unlink()
    (tmp_path / "copy" / WEIGHTS_FILE).write_bytes(bytes(data))
    with pytest.raises(fxcompress.SerializationError, match="checksum"):
        fxcompress.load(tmp_path / "copy")
    assert isinstance(fxcompress.load(tmp_path / "copy", check=False), torch.nn.Module)
