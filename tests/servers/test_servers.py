"""Servers compute from an exported adapter what the live model does; each is skipped by name where it is missing."""

import pytest

from tests.servers.cases import IN_PEFT, NATIVE, write_cases
from tests.servers.page import page
from tests.servers.servers import PAGE, SERVERS, TOLERANCE, measure, python_of


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    write_cases(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("server", SERVERS)
def test_the_server_computes_what_the_live_model_does(server, request):
    if python_of(server) is None:
        pytest.skip(f"{SERVERS[server]} is not installed; make servers SERVERS={server} installs it")
    rows = measure(server, request.getfixturevalue("cases"))
    assert {row.adapter for row in rows} == {"base", *NATIVE, *IN_PEFT}
    assert all(row.moved > 0.1 for row in rows if row.adapter not in ("base", "not trained"))
    assert {row.adapter: row.difference for row in rows if row.difference > TOLERANCE} == {}


def test_the_page_is_that_of_the_rows():
    assert PAGE.read_text() == page()
