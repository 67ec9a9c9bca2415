"""Pages keep to the limits of their prose (``python -m tests.support.prose``)."""

import pytest

from tests.support.prose import LIMITS, PAGE, ROOT, Limits, faults, sentences, words


@pytest.mark.parametrize("page", LIMITS)
def test_a_page_keeps_its_limits(page):
    assert not faults((ROOT / page).read_text(), LIMITS[page])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One two. Three `a.b; c` four!", ["One two.", "Three `a·b· c` four!"]),
        ("# Head\n\n| a. B | c |\n\n- An item\n- another one\n", ["An item", "another one"]),
        ("A [link. Text](page.md) of 0.93 points.", ["A link.", "Text of 0.93 points."]),
        ("Before\nit.\n\n```python\nx = 1. A\n```\n\n![A. B](c.png)\n", ["Before it."]),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_what_is_too_much_is_told():
    long = "word " * 21 + "end."
    assert faults(long, PAGE)[-1].startswith("22 words in a sentence, at most 20: word")
    assert faults("one; two; three.", PAGE) == ["2 semicolons, at most 0: one; two; three."]
    assert faults("One two. Three four.", Limits(1, 5, words=3)) == [
        "4 words, at most 3",
        "2.0 words a sentence, at most 1",
    ]
    assert words("a – 1 `code here`") == 4
