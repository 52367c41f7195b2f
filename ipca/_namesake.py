"""Another project on PyPI is called ``ipca`` (instrumented principal components, finance); both cannot be installed."""

from __future__ import annotations

from importlib import metadata


def check_distribution() -> None:
    """Raise ImportError where the distribution ``ipca`` is installed: both would write to one package folder."""
    try:
        other = metadata.distribution("ipca")
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"The distribution 'ipca' {other.version} (instrumented PCA) is installed beside 'ipca-lora', and both provide "
        "the package `ipca`. Uninstall both and install ipca-lora again."
    )
