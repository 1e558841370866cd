"`python -m lmbook`, and the script `lmbook`. (Written by hand: no notebook can export a module of this name.)"

import os
import signal
import sys
from typing import Any


def _stop(number: int, frame: Any) -> None:
    os.write(2, b"\nlmbook: interrupted\n")
    os._exit(130)


def run() -> int:
    "The command. Its parts take seconds to load, and a Ctrl-C meanwhile would end in somebody else's traceback."
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN: signal.signal(signal.SIGINT, _stop)
    from lmbook.cli import main

    signal.signal(signal.SIGINT, before)
    return main()


if __name__ == "__main__": sys.exit(run())
