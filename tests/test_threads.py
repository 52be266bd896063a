"""How threads wait: spinning where nothing else wants a core, sleeping elsewhere."""

import os
from pathlib import Path

import pytest

from resnetlab import threads


@pytest.mark.parametrize(
    ("content", "alone"),
    [
        ("0.09 0.28 0.30 1/87 4242\n", True),
        ("0.00 0.00 0.00 2/87 4242\n", False),
        ("9.00 9.00 9.00 12/2087 4242\n", False),
        ("", False),
        ("0.1 0.2 0.3 some 1\n", False),
    ],
)
def test_a_process_is_alone_where_none_else_is_running(tmp_path: Path, content: str, alone: bool) -> None:
    (tmp_path / "loadavg").write_text(content)
    assert threads.alone(tmp_path / "loadavg") is alone


def test_what_cannot_be_known_is_not_alone(tmp_path: Path) -> None:
    assert not threads.alone(tmp_path / "none")


@pytest.mark.parametrize("alone", [True, False])
def test_threads_spin_only_alone(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    for name in (threads.POLICY, threads.SPINS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    environ = os.environ
    monkeypatch.setattr(threads, "alone", lambda: alone)
    threads.choose_waiting()
    assert environ[threads.POLICY] == "passive"
    assert environ.get(threads.SPINS) == (threads.TURNS if alone else None)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.POLICY, "active")
    monkeypatch.setenv(threads.SPINS, "")
    monkeypatch.delenv(threads.SPINS)
    monkeypatch.setattr(threads, "alone", lambda: True)
    threads.choose_waiting()
    assert os.environ[threads.POLICY] == "active"
    assert threads.SPINS not in os.environ
