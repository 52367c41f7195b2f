"""The build: refused checkouts, README on a package index, one wheel from checkout and source distribution."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools, which builds the package, is not installed"
)


def run(command, folder, **environment):
    fixed = {"IPCA_BUILD_CUDA": "0", "IPCA_REPOSITORY_URL": "", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **fixed, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def setup(folder, option, **environment):
    return run([sys.executable, "setup.py", option], folder, **environment)


@pytest.fixture
def tree(tmp_path):
    """The few files that setup.py reads, and the two folders as a checkout holds them: by symbolic links."""
    (tmp_path / "ipca").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "ipca/_version.py", "ipca/_extension.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("kernels", "csrc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.txt").write_text(name)
        (tmp_path / "ipca" / name).symlink_to(f"../{name}")
    return tmp_path


def lose_links(tree, *names):
    """What an unzipped archive and ``core.symlinks=false`` make of a link: a text file with its target."""
    for name in names:
        (tree / "ipca" / name).unlink()
        (tree / "ipca" / name).write_text(f"../{name}")


def test_a_checkout_with_its_links_is_built(tree):
    done = setup(tree, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0.1.0"


@pytest.mark.parametrize("lost", [("kernels",), ("csrc",), ("kernels", "csrc")])
def test_a_checkout_without_its_links_is_refused_and_the_copies_cure_it(tree, lost):
    lose_links(tree, *lost)
    done = setup(tree, "--version")
    assert done.returncode == 1
    said = done.stderr
    assert said.startswith(" and ".join(f"ipca/{name}" for name in lost) + " must be a folder each")
    assert "the package would have no kernels" in said
    cured = run(["bash", "-c", said.splitlines()[-1]], tree)
    assert cured.returncode == 0, cured.stderr
    assert setup(tree, "--version").returncode == 0
    assert {(tree / "ipca" / name / "file.txt").read_text() for name in lost} == set(lost)


def test_a_missing_folder_is_refused_too(tree):
    (tree / "ipca" / "kernels").unlink()
    done = setup(tree, "--version")
    assert done.returncode == 1
    assert "ipca/kernels must be a folder" in done.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_cures_a_checkout_that_was_made_without_links(tree):
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["config", "core.symlinks", "false"]):
        assert run([*git, *command], tree).returncode == 0
    for name in ("kernels", "csrc"):
        (tree / "ipca" / name).unlink()
    run([*git, "checkout", "--", "."], tree)
    assert (tree / "ipca" / "kernels").read_text() == "../kernels"
    said = setup(tree, "--version").stderr
    (cure,) = [line for line in said.splitlines() if "core.symlinks true" in line]
    assert run(["bash", "-c", cure], tree).returncode == 0
    assert (tree / "ipca" / "kernels").is_symlink()
    assert setup(tree, "--version").returncode == 0


def test_the_description_has_the_readmes_own_links_without_a_repository(tree):
    done = setup(tree, "--long-description")
    assert done.returncode == 0, done.stderr
    assert (tree / "README.md").read_text(encoding="utf-8") in done.stdout


def test_the_description_has_absolute_links_where_the_repository_is_known(tree):
    (tree / "README.md").write_text(
        "[a](docs/a.md#b) ![p](docs/p.png) [w](https://w.org/x) [m](mailto:a@b.c) [h](#here) [![i](i.svg)](j.md)"
    )
    done = setup(tree, "--long-description", IPCA_REPOSITORY_URL="https://r.org/o/n/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "[a](https://r.org/o/n/blob/v0.1.0/docs/a.md#b) ![p](https://r.org/o/n/raw/v0.1.0/docs/p.png) "
        "[w](https://w.org/x) [m](mailto:a@b.c) [h](#here) "
        "[![i](https://r.org/o/n/raw/v0.1.0/i.svg)](https://r.org/o/n/blob/v0.1.0/j.md)"
    )


def test_the_build_asks_for_what_it_needs_and_never_for_torch():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("requires =")]
    assert "setuptools" in line
    assert "pybind11" in line  # an isolated build finds the headers of the CUDA extension nowhere else
    assert "torch" not in line


def test_the_oldest_versions_are_the_lower_bounds():
    """One file holds the lower bounds of all requirements as a set, which continuous integration installs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = re.search(r"^dependencies = \[.*?^\[project\.scripts\]", text, flags=re.DOTALL | re.MULTILINE)[0]
    bounds = {}
    for name, bound in re.findall(r'"([\w-]+)>=([\d.]+)', tables):
        bounds[name] = max(Version(bound), bounds.get(name, Version("0")))
    site = ("sphinx", "myst-nb", "furo", "sphinx-copybutton", "nbclient", "ipykernel")
    for tool in ("ruff", "codespell", "mypy", "pre-commit", *site):  # they look at the code and do not run it
        del bounds[tool]
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pinned.items()} == bounds


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a copied checkout, its wheel, its source distribution unpacked, and the wheel of that."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("out")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_build", "api")  # the last two are the built site
    for name in ("ipca", "kernels", "csrc", "docs", "examples"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, checkout)
    wheels = [out / "from_checkout", out / "from_sdist"]
    for folder in wheels:
        folder.mkdir()
    build(checkout, "wheel", wheels[0])
    build(checkout, "sdist", out)
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out, filter="data")
    (unpacked,) = out.glob("ipca*/")
    build(unpacked, "wheel", wheels[1])
    return checkout, unpacked, *(next(folder.glob("*.whl")) for folder in wheels)


def build(folder, kind, out):
    done = run([sys.executable, "-c", f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"], folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(built):
    checkout, _, wheel, _ = built
    wanted = set()
    for folder, _, names in os.walk(checkout / "ipca", followlinks=True):
        wanted |= {Path(folder, name).relative_to(checkout).as_posix() for name in names if not name.endswith(".md")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


@pytest.mark.slow
def test_checkout_and_source_distribution_give_one_wheel(built):
    checkout, unpacked, first, second = built
    assert sorted(zipfile.ZipFile(first).namelist()) == sorted(zipfile.ZipFile(second).namelist())
    assert first.name == second.name
    assert first.name.endswith("py3-none-any.whl")
    for folder in ("docs", "examples"):
        wanted = {path.relative_to(checkout) for path in (checkout / folder).rglob("*") if path.is_file()}
        assert {path.relative_to(unpacked) for path in (unpacked / folder).rglob("*") if path.is_file()} == wanted
    assert not (unpacked / "tests").exists()
