"""What is installed is what is in the tree."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk() -> set[str]:
    """Every folder of the engine and of passes/ that holds Python files, by the name it is installed under."""
    roots = {"fxcompress": ROOT / "fxcompress", "fxcompress.passes": ROOT / "passes"}
    found = set()
    for name, root in roots.items():
        for path in root.rglob("*.py"):
            inside = path.parent.relative_to(root).parts
            if inside[:1] != ("passes",):
                found.add(".".join((name, *inside)))
    return found


def python_files() -> set[str]:
    return {
        str(Path(*name.split("."), path.name)) for name in packages_on_disk() for path in folder_of(name).glob("*.py")
    }


def folder_of(package: str) -> Path:
    parts = package.split(".")
    return ROOT.joinpath(*parts[1:]) if parts[:2] == ["fxcompress", "passes"] else ROOT.joinpath(*parts)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist of the tree and the wheel made from that sdist's contents."""
    out = tmp_path_factory.mktemp("built")
    source = out / "source"
    leave_out = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "results")
    shutil.copytree(ROOT, source, symlinks=True, ignore=leave_out)
    build(source, "build_sdist", out)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "unpacked", filter="data")
    build(next((out / "unpacked").iterdir()), "build_wheel", out)
    return out


def build(source: Path, hook: str, out: Path) -> None:
    code = f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_package_is_listed() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_the_wheel_holds_every_file(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if name.endswith(".py")} == python_files()
    assert "fxcompress/py.typed" in names
    assert {"fxcompress/reporting/page.css", "fxcompress/reporting/page.js"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_passes_cannot_be_imported_under_a_second_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "import it as 'fxcompress.passes'" in done.stderr


def test_the_link_leads_to_the_same_files() -> None:
    link = ROOT / "fxcompress" / "passes"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "passes"


def test_registered_names_are_those_of_the_classes() -> None:
    registered = metadata.distribution("fxcompress").entry_points.select(group="fxcompress.passes")
    assert {entry.name for entry in registered} == set(PROJECT["project"]["entry-points"]["fxcompress.passes"])
    assert all(entry.load().name == entry.name for entry in registered)
