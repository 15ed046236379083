"""What is not urgent leaves processors to others."""

import threading

from diffusion import threads


def test_only_the_thread_that_is_not_urgent_rests(monkeypatch) -> None:
    slept = []
    monkeypatch.setattr(threads.time, "sleep", slept.append)
    threads.rest(2.0)
    with threads.resting(3):
        threads.rest(2.0)
        other = threading.Thread(target=threads.rest, args=(5.0,))
        other.start()
        other.join()
    threads.rest(2.0)
    assert slept == [6.0]
