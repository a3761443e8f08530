"""The SuperLink that a command starts ends with the command."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# a shell's background job is started with SIGINT ignored, and so would be this command
HELD = """
import signal
import time
signal.signal(signal.SIGINT, signal.default_int_handler)
from privtune_flwr.launcher import local_superlink
with local_superlink() as link:
    print(link.pid, link.home, flush=True)
    time.sleep(600)
"""


@pytest.mark.flower
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_ended_takes_its_superlink_along(ending: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", HELD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, home = process.stdout.readline().split()
    family = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
    process.send_signal(ending)
    assert process.wait(timeout=60) != 0
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not Path(home).exists()
