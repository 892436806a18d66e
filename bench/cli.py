"""What the scripts of bench share as commands: their help, and a quiet end where nobody reads on."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


def parser(doc: str | None, example: str) -> argparse.ArgumentParser:
    """`doc`: the script's docstring, a paragraph; `example`: script and options as one would type them."""
    return argparse.ArgumentParser(description=doc, epilog=f"Example: python bench/{example}")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with the status of `main`; quietly if its output is cut, as ``| head`` does."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        code = 128 + signal.SIGPIPE  # what a shell calls it
    sys.exit(code)
