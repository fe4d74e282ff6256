"""The W-A-KV setting reads, prints and refuses."""

import pytest

from configs.errors import UserError
from quant.bits import LADDER, Bits


@pytest.mark.parametrize("text", ["4-4-4", "4-8-16", "16-16-16", "2-3-8"])
def test_bits_print_as_they_were_written(text: str) -> None:
    assert str(Bits.parse(text)) == text


def test_the_three_numbers_are_weights_activations_and_cache() -> None:
    bits = Bits.parse("4-8-16")
    assert (bits.weights, bits.activations, bits.kv) == (4, 8, 16)


@pytest.mark.parametrize(
    "text", ["", "4", "4-4", "4-4-4-4", "a-b-c", "4-4-9", "1-4-4", "0-16-16", "-4-4-4", "4.0-4-4", "32-4-4"]
)
def test_nonsense_is_a_user_error_of_one_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Bits.parse(text)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_the_ladder_has_the_papers_columns() -> None:
    assert [str(bits) for bits in LADDER] == ["16-16-16", "4-8-16", "4-8-8", "4-4-16", "4-4-4"]
    assert [bits.is_full for bits in LADDER] == [True, False, False, False, False]
