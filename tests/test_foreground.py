import subprocess
import sys

import pytest
import typer

from flows.foreground import reported

HANGING = """
import threading, time
from flows import foreground
foreground._LONGEST_END_S = 0.5
threading.Thread(target=time.sleep, args=(100,)).start()  # Python waits for it
foreground.end_soon(130)
raise SystemExit(130)
"""


def test_a_program_that_a_library_keeps_from_ending_ends_with_its_own_exit_code():
    assert subprocess.run([sys.executable, "-c", HANGING], timeout=60).returncode == 130


def test_what_fails_of_an_interruption_is_told_as_one(capsys):
    def fail_while_interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise ConnectionError("the server has ended, too")

    with pytest.raises(typer.Exit) as end, reported(debug=False):
        fail_while_interrupted()
    assert end.value.exit_code == 130
    assert "interrupted" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as end, reported(debug=False):
        raise ConnectionError("nobody interrupted")
    assert end.value.exit_code == 1
