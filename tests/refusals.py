"""Calls that must be refused in one sentence."""

import pytest


def check(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message and len(message) < 400
    missing = [word for word in words.split() if word not in message]
    assert not missing, f"{missing} not in: {message}"
