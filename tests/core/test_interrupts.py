import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from emtool.core.errors import ConfigError, Interrupted
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


def interrupted_in_a_library(error: Exception | None) -> None:
    """Be interrupted where compiled code calls Python, which answers with an error of its own."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        if error is None:
            raise
        raise error from None


@pytest.mark.parametrize("block", [interruptible, requested])
@pytest.mark.parametrize("error", [None, ValueError("could not determine the shape")])
def test_an_interruption_that_a_library_turns_into_an_error_is_still_one(
    block: Callable[[], AbstractContextManager[object]], error: Exception | None
) -> None:
    with pytest.raises(Interrupted) as caught, block():
        interrupted_in_a_library(error)
    assert caught.value.exit_code == 130


def test_errors_without_an_interruption_and_what_emtool_says_while_it_stops_are_kept() -> None:
    with pytest.raises(ValueError, match="a bug"), interruptible():
        raise ValueError("a bug")
    with pytest.raises(ConfigError, match="cannot be closed"), interruptible():
        interrupted_in_a_library(ConfigError("cannot be closed"))
