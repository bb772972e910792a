"""How does a run stop early? SIGTERM and SIGINT ask it to; it saves and leaves at its next step."""

import os
import signal
import threading
from collections import deque
from typing import Any

import jax

from resvariants.processes import anywhere


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has saved what it had.

    Attributes:
      signal: the number of the signal that asked; programs leave with exit status 128 + signal.
    """

    def __init__(self, number: int, message: str):
        """`message` says how to go on."""
        super().__init__(message)
        self.signal = number


class Interrupts:
    """A context in which the first SIGTERM or SIGINT is only noted; a second one acts at once.

    In other threads than the main one, which cannot handle signals, it does nothing.

    Attributes:
      received: the signal's number here, or 0.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        """Notes nothing yet."""
        self.received = 0
        # Among several processes the question before this one is answered: nobody need wait.
        self._asked: deque[Any] = deque(maxlen=1 if jax.process_count() == 1 else 2)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self):
        """Starts noting."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        """Handles signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: of other code than Python's

    def __call__(self) -> bool:
        """Whether to stop: whether any process was asked to. All ask at the same points."""
        self._asked.append(anywhere(self.received != 0))
        return bool(self._asked[0])

    @property
    def name(self) -> str:
        """The signal's; SIGTERM if only another process received one."""
        return signal.Signals(self.received or signal.SIGTERM).name

    def _note(self, number, frame):
        self.received = number
        for each in self.SIGNALS:
            signal.signal(each, self._before[each] or signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"{name}: saving and stopping; once more to stop without\n".encode())
