"""A request to stop is noted once, however often it is sent, and a second one is the end."""

import signal
import time

import pytest

from resnetlab import stopping
from resnetlab.stopping import StoppedAtOnce, noted


def test_signals_sent_together_are_one_request_and_a_later_one_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    requests: list[int] = []
    with noted(requests.append):
        signal.raise_signal(signal.SIGTERM)
        now[0] += stopping.TOGETHER / 2
        signal.raise_signal(signal.SIGTERM)  # torchrun hands on what its processes have had already
        signal.raise_signal(signal.SIGINT)
        assert requests == [signal.SIGTERM]
        now[0] += stopping.TOGETHER
        with pytest.raises(StoppedAtOnce) as caught:
            signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_status == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_the_embedding_program_handles_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python knows no handler that C has set, so none could be put back."""
    own, set_for = signal.getsignal, []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGINT else own(number))
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_for.append(number))
    with noted(print):
        pass
    assert signal.SIGTERM in set_for and signal.SIGINT not in set_for
