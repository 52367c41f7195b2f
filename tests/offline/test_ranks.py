"""The environment of Ranks; several processes are tested in tests/cli/test_init_again.py."""

import pytest

from ipca.offline.ranks import Ranks


def test_a_team_needs_all_of_its_environment():
    assert Ranks.from_environment("cpu", {}) == Ranks(0, 1)
    assert Ranks.from_environment("cpu", {"RANK": "0", "WORLD_SIZE": "1"}) == Ranks(0, 1)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but RANK is not set; start the processes with torchrun"):
        Ranks.from_environment("cpu", {"WORLD_SIZE": "2"})
