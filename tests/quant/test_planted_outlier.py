"""Sheet 21, proof C: what one planted channel does to 4-bit activations, against the published table."""

import itertools

import pytest

from quant.planted_outlier import OutlierRow, planted_outlier_table

# a -> excess kurtosis, SNR (dB), share rounded to zero, SNR after a randomized Hadamard (dB)
PUBLISHED = {
    0: (0.00, 17.5, 0.18, 17.6),
    5: (0.3, 15.7, 0.22, 17.4),
    10: (4.4, 11.7, 0.35, 17.4),
    30: (190, 3.9, 0.74, 16.5),
    100: (1406, 0.0, 0.999, 13.5),
    300: (1953, 0.0, 1.00, 8.4),
}


@pytest.fixture(scope="module")
def table() -> list[OutlierRow]:
    return planted_outlier_table()


def test_each_row_is_the_published_one(table: list[OutlierRow]) -> None:
    assert [row.a for row in table] == list(PUBLISHED)
    for row, (kurtosis, snr, zeroed, rotated) in zip(table, PUBLISHED.values(), strict=True):
        assert row.snr_db == pytest.approx(snr, abs=0.5)
        assert row.rotated_snr_db == pytest.approx(rotated, abs=0.5)
        assert row.zeroed == pytest.approx(zeroed, abs=0.01)
        # Fourth moments of single draws: the published small values have one digit.
        assert row.excess_kurtosis == pytest.approx(kurtosis, rel=0.02, abs=0.3)


def test_a_larger_outlier_never_helps(table: list[OutlierRow]) -> None:
    for smaller, larger in itertools.pairwise(table):
        assert larger.excess_kurtosis > smaller.excess_kurtosis
        assert larger.zeroed > smaller.zeroed
        assert larger.snr_db <= smaller.snr_db
        assert larger.rotated_snr_db <= smaller.rotated_snr_db


def test_rotation_repairs_most_but_not_all_of_it(table: list[OutlierRow]) -> None:
    assert all(row.rotated_snr_db > row.snr_db for row in table if row.a)
    assert table[-1].rotated_snr_db < table[0].rotated_snr_db - 8
