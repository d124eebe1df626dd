"""`lookm` and `python -m lookm`: the command line, which Ctrl-C ends at any moment without a traceback."""

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130


def stop(*_: Any) -> None:
    """Leave at once: what is being imported or loaded would turn an exception into errors of its own."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGINT, stop)
    from lookm.cli import app

    app(prog_name="lookm")


if __name__ == "__main__":
    main()
