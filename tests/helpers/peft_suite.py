"""PEFT's own tests, out of its source distribution, as a package that can be imported; nothing in it is changed."""

import importlib
import os
import sys
import tarfile
import types
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "IPCA_PEFT_SOURCE"
MISSING = f"{VARIABLE} does not name PEFT's source distribution; `make test` downloads it"
_PACKAGE = "peft_tests"


def source():
    """The source distribution, or None."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path and Path(path).is_file() else None


def load(name, folder):
    """The module ``name`` of PEFT's tests, extracted to ``folder``."""
    if _PACKAGE not in sys.modules:
        with tarfile.open(source()) as archive:
            for member in archive.getmembers():
                path = Path(member.name)
                if path.parent.name == "tests" and path.suffix == ".py":
                    member.name = path.name
                    archive.extract(member, folder, filter="data")
        package = types.ModuleType(_PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[_PACKAGE] = package
    with _stand_in("diffusers", StableDiffusionPipeline=None):  # imported there for tests of another kind
        return importlib.import_module(f"{_PACKAGE}.{name}")


@contextmanager
def _stand_in(name, **contents):
    """Let ``import name`` succeed within the block, whether it is installed or not."""
    before = sys.modules.get(name)
    sys.modules[name] = types.SimpleNamespace(**contents)
    yield
    del sys.modules[name]
    if before is not None:
        sys.modules[name] = before
