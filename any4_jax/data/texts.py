"""The bundled texts: written for this library, in plain ASCII, under its licence."""

from importlib import resources


def _text(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="ascii")


def prompt() -> str:
    """The default calibration text, about 300 words.

    It has a story, a news report, a function, worked arithmetic and facts, so that one short pass exercises all input
    channels of a layer.
    """
    return _text("prompt.txt")


def essays() -> str:
    """About 4,500 words of varied English prose. The demo measures perplexity on it, so it doesn't calibrate on it."""
    return _text("essays.txt")


def stories() -> str:
    """About 1,500 words of very simple children's stories, for models trained on nothing else.

    Stories are separated by blank lines.
    """
    return _text("stories.txt")


def prose() -> str:
    """The essays, then the stories: some 8,000 tokens to calibrate on where no text of the model's own domain
    is at hand.
    """
    return essays() + stories()
