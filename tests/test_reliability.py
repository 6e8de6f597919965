"""`docs/reliability.md` says what the tests show, no more and no less."""

from tests import reliability


def test_the_page_has_every_row_that_a_test_declares() -> None:
    text = reliability.PAGE.read_text()
    assert text == reliability.page({}, text), "write it with `pytest --write-reliability`"
    assert reliability.NOT_HELD not in text, "a failure is on the page that regrow does not stand"


def test_a_row_says_what_its_test_measured_and_keeps_it() -> None:
    first, *_ = rows = reliability.declared()
    assert len(rows) > 10
    page = reliability.page({first.test: "7 s"}, "")
    assert first.line("7 s") in page.splitlines()
    assert reliability.page({}, page) == page
    assert reliability.NOT_HELD in reliability.page({first.test: reliability.NOT_HELD}, page)
