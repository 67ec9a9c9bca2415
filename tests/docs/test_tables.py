"""The tables of the documentation are the code's own."""

import pytest

from tests.support.adapter_tables import DOCS, TABLES, between


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_table_is_what_the_code_says(page, name):
    found = between(name).search((DOCS / page).read_text())
    assert found[0] == found[1] + TABLES[page, name]() + found[2], (
        "python -m tests.support.adapter_tables writes it"
    )
