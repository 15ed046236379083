import subprocess
import sys

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
