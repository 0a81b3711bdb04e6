"""Pieces of a text: where they lie, and what is refused."""

import numpy as np
import pytest

from any4_jax.data import pieces


@pytest.mark.parametrize(
    ("tokens", "samples", "length", "starts"), [(100, 3, 10, (0, 45, 90)), (12, 3, 10, (0, 1, 2)), (10, 1, 10, (0,))]
)
def test_pieces_are_spread_from_the_first_token_to_the_last(tokens, samples, length, starts) -> None:
    found = pieces(range(7, 7 + tokens), samples, length)
    np.testing.assert_array_equal(found, [np.arange(7 + start, 7 + start + length) for start in starts])
    assert found.dtype == np.int32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((9, 1, 10), "got a text of 9 tokens, need at least the 10 of one piece"),
        ((9, 0, 3), "got 0 samples of 3 tokens"),
        ((9, 2, 0), "got 2 samples of 0 tokens"),
    ],
)
def test_what_cant_be_cut_is_refused(arguments, words) -> None:
    tokens, samples, length = arguments
    with pytest.raises(ValueError, match=words):
        pieces(np.arange(tokens), samples, length)
