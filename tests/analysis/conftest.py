"""What several files of this folder need."""

import pytest


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    from matplotlib.figure import Figure

    figures, plain = [], Figure.savefig

    def kept(figure, *args, **options):
        figures.append(figure)
        return plain(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures
