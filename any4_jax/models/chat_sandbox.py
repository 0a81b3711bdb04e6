"""The environment that chat templates of strangers run in: Jinja's sandbox with bounds on time and memory.

Jinja's sandbox keeps a template from the program's objects and from long ranges, but not from loops in loops or from
texts that double. So each pass of a loop or macro counts as a step, and each text that is made counts by its length.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Sized
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

_STEPS = 50_000
_CHARACTERS = 100_000_000
_SECONDS = 20.0
_NUMBER = 1_000_000
_LONG_WIDTH = re.compile(r"\d{7}")
# The filter by which code counts; no template can write its name.
_COUNT = "count a step"


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, with the settings that `transformers` has.

    Attributes:
        steps, characters: what the template may still use.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """An environment that has used nothing yet."""
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self.made
        )
        self.steps, self.characters, self._end = _STEPS, _CHARACTERS, time.monotonic() + _SECONDS
        self.filters = {name: self.bounded(work) for name, work in self.filters.items()}
        # A filter that takes the context isn't computed once and for all when the template is compiled.
        self.filters[_COUNT] = jinja2.pass_context(lambda context, characters: self.step(characters))

    def template(self, source: str) -> jinja2.Template:
        """The template of a text, made to count what it uses.

        Raises:
            jinja2.TemplateSyntaxError: the text is no Jinja.
        """
        tree = self.parse(source)
        _Counting().visit(tree)
        tree.set_environment(self)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def step(self, characters: int) -> None:
        """Counts a pass of a loop or a call of a macro, which writes up to so many characters of the template.

        Raises:
            SecurityError: it is one too many.
        """
        self.steps -= 1
        self._make(characters)
        if self.steps < 0:
            raise SecurityError(f"its loops take more than {_STEPS:,} steps")
        if time.monotonic() > self._end:
            raise SecurityError(f"it takes longer than {_SECONDS:.0f} s")

    def made(self, value: Any) -> Any:
        """Counts what the template made; returns it.

        Raises:
            SecurityError: it is too much in all, or a number that takes too long to compute with.
        """
        if isinstance(value, int) and abs(value) >= 2**64:
            raise SecurityError("a number of it has more than 64 bits")
        if isinstance(value, Sized):
            self._make(len(value))
        return value

    def bounded(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with bounds on the numbers that it gets and on what it makes."""

        @functools.wraps(work)
        def counted(*args: Any, **options: Any) -> Any:
            _check_numbers((*args, *options.values()))
            return self.made(work(*args, **options))

        return counted

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: B902
        """Calls a function or a method of a value; the odd names leave all others to its options."""
        _check_numbers((*args, *options.values()))
        method = getattr(__obj, "__wrapped__", __obj)
        if getattr(method, "__name__", None) in ("format", "format_map"):
            _check_widths(getattr(method, "__self__", None))
        return __self.made(super().call(__context, __obj, *args, **options))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes `left operator right`."""
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            _check_numbers(right if isinstance(right, tuple) else (right,))
        if operator == "**" and abs(right) > 64:
            raise SecurityError(f"an exponent of it is {right}, and at most 64 is allowed")
        if operator == "*":
            for some, times in ((left, right), (right, left)):
                if isinstance(some, Sized) and isinstance(times, int):
                    self._make(len(some) * max(times, 0))
        return self.made(super().call_binop(context, operator, left, right))

    def _make(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise SecurityError(f"it makes more than {_CHARACTERS:,} characters")


class _Counting(NodeTransformer):
    """Makes the code of a template count."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """Each pass counts."""
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        """Each call counts."""
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """`a ~ b` is `[a, b] | join`, and filters count."""
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None, lineno=node.lineno)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        characters = nodes.Const(sum(len(data.data) for data in node.find_all(nodes.TemplateData)))
        step = nodes.Filter(characters, _COUNT, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks the model's own words in templates for training."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """The body alone."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _check_numbers(values: Iterable[Any]) -> None:
    """Refuses widths, counts and sizes that make huge texts."""
    for value in values:
        if isinstance(value, int) and abs(value) > _NUMBER:
            raise SecurityError(f"it passes on a number beyond {_NUMBER:,}")


def _check_widths(form: Any) -> None:
    """Refuses a format with a width of millions of characters."""
    if isinstance(form, str) and _LONG_WIDTH.search(form):
        raise SecurityError(f"it writes with a width beyond {_NUMBER:,}")
