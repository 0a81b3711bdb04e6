"""Generated code: what passes, what is kept from it, and pass@k by hand."""

import socket
import sys
from types import SimpleNamespace

import pytest

from any4_jax.evaluation import code_runs, confined
from any4_jax.evaluation.code_runs import pass_at_k, passes
from any4_jax.evaluation.harness_tasks import _code

RIGHT = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(2, 3) == 5\n"


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    try:
        passes("")
    except OSError as refused:
        pytest.skip(f"{refused}")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (RIGHT + TESTS, True),
        (RIGHT.replace("+", "-") + TESTS, False),
        ("raise SystemExit(0)\n" + TESTS, False),
        ("import os\nos._exit(0)\n" + TESTS, False),
        ("this is no Python", False),
        ("import json, math\nassert math.pi > 3", True),
        ("a = bytearray(2**30)", False),
        ("open('a', 'w').write('a')\nassert open('a').read() == 'a'", True),
        ("with open('a', 'wb') as f:\n    f.write(bytes(2**21))", False),
        ("import os\nassert not os.environ.get('HOME') and os.listdir('.') == ['program.py']", True),
    ],
)
def test_what_passes(program: str, expected: bool) -> None:
    assert passes(program) == expected


def test_no_connection_leaves_the_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        socket.create_connection(("127.0.0.1", port), 1).close()  # from here it works
        assert not passes(connect)
    assert passes(f"try:\n    {connect.replace(chr(10), chr(10) + '    ')}\nexcept OSError:\n    pass")


def test_time_ends() -> None:
    assert not passes("import time\ntime.sleep(60)", seconds=1)


def test_pass_at_k_by_hand(monkeypatch) -> None:
    monkeypatch.setattr(code_runs, "passes", lambda program: program.startswith("right"))
    found, results = pass_at_k(["t", "t"], [["right", "wrong", "wrong"], ["wrong"] * 3], [1, 2, 5])
    assert results == [[True, False, False], [False] * 3]
    assert found == {"pass@1": pytest.approx(1 / 6), "pass@2": pytest.approx(1 / 3)}


def test_the_harness_gets_this_metric(monkeypatch) -> None:
    loaded = []
    evaluate = SimpleNamespace(load=loaded.append)
    monkeypatch.setitem(sys.modules, "evaluate", evaluate)
    with _code(allowed=True):
        metric = evaluate.load("code_eval")
        evaluate.load("rouge")
    assert metric.compute(references=[TESTS], predictions=[[RIGHT]], k=[1])[0] == {"pass@1": 1.0}
    assert evaluate.load == loaded.append and loaded == ["rouge"]
    with _code(allowed=False), pytest.raises(ValueError, match="unsafe"):
        evaluate.load("code_eval").compute(references=[TESTS], predictions=[[RIGHT]], k=[1])


def test_systems_without_namespaces_are_told(monkeypatch, tmp_path) -> None:
    script = tmp_path / "refused.py"
    script.write_text(f"raise SystemExit({confined.REFUSED})")
    monkeypatch.setattr(confined, "__file__", str(script))
    with pytest.raises(OSError, match="a process without a network, which this system doesn't allow"):
        passes("")
