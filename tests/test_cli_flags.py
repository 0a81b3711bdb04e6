"""Flags of the command line: they are the fields of methods, and of the methods inside them."""

import argparse
import dataclasses
from typing import ClassVar, Literal

import pytest
from toy_methods import EvenInputs, Nested

from any4_jax.cli import main
from any4_jax.cli.errors import CommandLineError
from any4_jax.cli.methods import add_method, method_from
from any4_jax.cli.options import add_fields, build
from any4_jax.methods import CATALOGUE, NF4, Any4, AnyMethod, Int
from any4_jax.methods.rtn import RoundToNearest
from any4_jax.methods.spec import method_from_json, method_to_json


@dataclasses.dataclass(frozen=True)
class Toy:
    """A method of no use.

    Attributes:
      bits: width of a code.
      steps, start: where it begins.
      share: how much of it, 100% at most;
        told on two lines.
    """

    bits: Literal[2, 4] = 4
    share: float = 0.5
    steps: int | None = 3
    start: Literal["zero", "one"] | None = None
    refine: bool = False
    clip: bool = True
    scale_dtype: str = "bfloat16"
    inner: "Inner" = dataclasses.field(default_factory=lambda: Inner())

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"share={self.share} is more than 1; pass less")


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 1


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_fields(parser, Toy)
    return build(Toy, parser.parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "fields"),
    [
        ((), {}),
        (("--bits", "2"), {"bits": 2}),
        (("--share", "0.25"), {"share": 0.25}),
        (("--steps", "7"), {"steps": 7}),
        (("--steps", "none"), {"steps": None}),
        (("--start", "one"), {"start": "one"}),
        (("--start", "none"), {"start": None}),
        (("--refine", "--no-clip"), {"refine": True, "clip": False}),
        (("--scale-dtype", "float16"), {"scale_dtype": "float16"}),
    ],
)
def test_flags_from_fields(argv, fields):
    assert parse(*argv) == Toy(**fields)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--bits", "3"), "need one of 2, 4"),
        (("--bits", "none"), "need one of 2, 4"),
        (("--steps", "many"), "invalid int value: 'many'"),
        (("--start", "two"), "need one of zero, one"),
        (("--scale-dtype", "bf17"), "need a dtype"),
        (("--inner", "x"), "unrecognized"),
    ],
)
def test_flags_refuse(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert words in capsys.readouterr().err


def test_a_value_that_the_dataclass_refuses_is_a_wrong_command_line():
    with pytest.raises(CommandLineError, match="share=2.0 is more than 1"):
        parse("--share", "2")


def test_a_field_without_meaning_on_a_command_line_is_named():
    @dataclasses.dataclass
    class Odd:
        table: tuple = ()

    with pytest.raises(TypeError, match=r"Odd\.table"):
        add_fields(argparse.ArgumentParser(), Odd)


def test_help_has_docstring_and_default():
    parser = argparse.ArgumentParser()
    add_fields(parser, Toy)
    text = " ".join(parser.format_help().split())
    assert "width of a code. (default: 4)" in text
    assert "100% at most; told on two lines. (default: 0.5)" in text
    assert "--start zero|one|none where it begins. (default: none)" in text


@pytest.fixture
def nested(monkeypatch):
    """A method that wraps another, in the catalogue for one test."""
    monkeypatch.setitem(CATALOGUE, Nested.name, Nested)
    return ["quantize", "tiny", "out", "--method", Nested.name]


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], Nested()),
        (["--inner-bits", "3", "--no-by-site"], Nested(Int(3), by_site=False)),
        (["--inner", "any4", "--inner-bits", "3"], Nested(Any4(bits=3))),
        (["--inner", "toy-nested", "--inner-inner", "nf4"], Nested(Nested(NF4()))),
        (["--inner", "toy-nested", "--inner-inner-group-size", "32"], Nested(Nested(Int(4, group_size=32)))),
    ],
    ids=str,
)
def test_methods_inside_methods_have_flags(flags, method, nested):
    argv = [*nested, *flags]
    parser = argparse.ArgumentParser()
    add_method(parser, argv)
    assert method_from(parser.parse_args(argv[3:])) == method


def test_a_flag_of_another_inner_method_is_refused(nested, capsys):
    assert main([*nested, "--inner", "nf4", "--inner-bits", "3"]) == 2
    assert "unrecognized arguments: --inner-bits" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Maybe(Int):
    """A method that may wrap others.

    Attributes:
      first, second, third: what it may wrap: anything, one of ours, one that rounds.
    """

    name: ClassVar[str] = "toy-maybe"
    first: AnyMethod | None = None
    second: Any4 | None = Any4(bits=3)
    third: RoundToNearest | None = None


@pytest.mark.parametrize(
    ("flags", "method"),
    [
        ([], Maybe()),
        (["--first", "none", "--bits", "3"], Maybe(bits=3)),
        (["--first", "nf4", "--first-group-size", "32"], Maybe(first=NF4(group_size=32))),
        (["--first", "toy-maybe", "--first-third", "nf4"], Maybe(first=Maybe(third=NF4()))),
        (["--second", "none", "--third", "int"], Maybe(second=None, third=Int())),
        (["--second-bits", "2"], Maybe(second=Any4(bits=2))),
    ],
    ids=str,
)
def test_an_inner_method_may_be_none(flags, method, monkeypatch):
    monkeypatch.setitem(CATALOGUE, Maybe.name, Maybe)
    argv = ["--method", Maybe.name, *flags]
    parser = argparse.ArgumentParser()
    add_method(parser, argv)
    assert method_from(parser.parse_args(argv)) == method
    assert method_from_json(method_to_json(method)) == method
    assert "(default: none)" in parser.format_help()


def test_none_is_refused_where_a_method_must_be(nested, monkeypatch, capsys):
    assert main([*nested, "--inner", "none"]) == 2
    assert "--inner: invalid choice: 'none'" in capsys.readouterr().err
    assert main(["quantize", "tiny", "out", "--method", "none"]) == 2

    @dataclasses.dataclass(frozen=True)
    class Free(EvenInputs):
        name: ClassVar[str] = "toy-free"
        inner: AnyMethod | None = None

    monkeypatch.setitem(CATALOGUE, Free.name, Free)
    argv = ["--method", Free.name, "--inner", "none"]
    parser = argparse.ArgumentParser()
    add_method(parser, argv)
    assert method_from(parser.parse_args(argv), Nested.name) == Nested(), "a rule's method takes what it can"


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_method_shows_its_fields(name, capsys):
    assert main(["quantize", "--method", name, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(CATALOGUE[name]):
        assert "--" + field.name.replace("_", "-") in shown
