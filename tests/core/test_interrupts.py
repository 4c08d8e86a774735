import os
import signal

import pytest

from emtool.core.interrupts import interruptible, requested


def test_sigusr1_with_nothing_to_save_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with interruptible():
        os.kill(os.getpid(), signal.SIGUSR1)
        with requested() as requests:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.save
    assert signal.getsignal(signal.SIGUSR1) == before
    assert capfd.readouterr().err == "emtool: SIGUSR1: there is nothing to save now\n"
