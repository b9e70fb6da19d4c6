"""Write docs/passes.md from the passes themselves: what they declare, their docstrings and their fields.

Run ``python docs/generate_passes.py``; with ``--check`` nothing is written, and the exit code is 1 if something would
be.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxcompress import Guarantee, Need, Pass, registered_passes

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "passes.md"
HEAD = """\
# Passes

<!-- written by docs/generate_passes.py from the docstrings and fields of the classes; change those -->

Every pass that comes with fxcompress. *Exact* is proved on a float64 copy, *approximate* is measured and held against a
bound where the pass has one, *retrain* is measured and meant to be trained afterwards. Options are given as
`"name:option=value,option=value"` or as arguments of the class. Which pass for what is in [choosing.md](choosing.md).

"""
_NEEDS = {Need.EXAMPLE_INPUTS: "example inputs", Need.CALIBRATION: "calibration data"}
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*)$")
_ELSEWHERE = re.compile(r"^see :class:`\w+`\.$")
_REFERENCE = re.compile(r"\(([^()]*\d{4}, [^()]*arXiv [^()]*)\)")


def own_passes() -> dict[str, type[Pass]]:
    """Those that come with this package, whatever else is installed."""
    found = registered_passes()
    return {name: cls for name, cls in sorted(found.items()) if cls.__module__.startswith("fxcompress.passes.")}


def page() -> str:
    """The whole of docs/passes.md."""
    passes = own_passes()
    rows = [f"| [`{name}`](#{name}) | {cls.guarantee.value} | {_needs(cls)} |" for name, cls in passes.items()]
    table = "\n".join(["| pass | guarantee | needs |", "|---|---|---|", *rows])
    return HEAD + table + "\n\n" + "\n".join(_section(name, cls) for name, cls in passes.items())


def _section(name: str, cls: type[Pass]) -> str:
    prose, _ = _split(inspect.getdoc(cls) or "")
    parts = [f"## {name}", _declared(cls), _markdown(prose)]
    if options := _options(cls):
        parts.append(options)
    if order := _order(cls):
        parts.append(order)
    if references := _references(cls):
        parts.append("References: " + "; ".join(references) + ".")
    source = Path(str(inspect.getsourcefile(cls))).resolve().relative_to(ROOT)
    parts.append(f"Source: [{source}](../{source}), `{cls.__module__.rpartition('.')[0]}.{cls.__qualname__}`.")
    return "\n\n".join(parts) + "\n"


def _declared(cls: type[Pass]) -> str:
    words = {
        Guarantee.EXACT: "**Exact**",
        Guarantee.APPROXIMATE: "**Approximate**",
        Guarantee.RETRAIN: "**Retrain**",
    }
    said = [words[cls.guarantee], f"needs {_needs(cls)}"]
    if Need.CALIBRATION not in cls.needs and cls.observes is not Pass.observes:
        said.append("uses calibration data")
    if not cls.trainable:
        said.append("what it makes cannot be trained")
    if cls.repeat:
        said.append("repeated until nothing is left to do")
    return "; ".join(said) + "."


def _needs(cls: type[Pass]) -> str:
    return " and ".join(words for need, words in _NEEDS.items() if need in cls.needs) or "nothing"


def _order(cls: type[Pass]) -> str:
    said = []
    for word in ("before", "after"):
        names = sorted(getattr(cls, word, ()))
        if names:
            said.append(f"Comes {word} " + ", ".join(f"`{name}`" for name in names) + ".")
    return " ".join(said)


# ------------------------------------------------------------------------------------------------- docstrings
def _split(text: str) -> tuple[str, dict[str, str]]:
    """A docstring without its section of arguments, and what that says of each."""
    prose: list[str] = []
    entries: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.strip() == "Args:":
            inside = True
        elif inside and (match := _ENTRY.match(line)):
            names = match[1].split(", ")
            entries |= dict.fromkeys(names, match[2])
        elif inside and line.startswith("        "):
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
        elif line.strip() or not inside:
            inside = False
            prose.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(prose)).strip(), entries


def _options(cls: type[Pass]) -> str:
    rows = [
        f"| `{field.name}` | `{_cell(str(field.type))}` | `{_default(field)}` | {_cell(_meaning(cls, field.name))} |"
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.init
    ]
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *rows]) if rows else ""


def _meaning(cls: type[Pass], option: str) -> str:
    """What the docstring of the class, or of the nearest one that it comes from, says of ``option``.

    Raises:
        LookupError: none does.
    """
    for base in cls.__mro__:
        _, entries = _split(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
        if option in entries and not _ELSEWHERE.match(entries[option]):
            return _markdown(entries[option])
    raise LookupError(f"no docstring says what the option {option!r} of {cls.__qualname__} means")


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return repr(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`~[\w.]*?(\w+)`", r"`\1`", text)
    text = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _references(cls: type[Pass]) -> list[str]:
    """Papers in brackets, with a number of arXiv, in the docstrings of the class and its module."""
    found: dict[str, str] = {}
    for text in (cls.__doc__, sys.modules[cls.__module__].__doc__):
        for reference in _cited(" ".join((text or "").split())):
            number = re.search(r"arXiv (\d{4}\.\d{4,5})", reference)
            if number:
                linked = reference.replace(number[0], f"[{number[0]}](https://arxiv.org/abs/{number[1]})")
                found.setdefault(number[1], linked)
    return list(found.values())


def _cited(text: str) -> Iterator[str]:
    for match in _REFERENCE.finditer(text):
        yield from (part.strip() for part in match[1].split(";"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether docs/passes.md is up to date")
    arguments = parser.parse_args()
    after = page()
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if before == after:
        return 0
    if arguments.check:
        print("docs/passes.md is not what the passes say; run python docs/generate_passes.py", file=sys.stderr)
        return 1
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
