"""Programs in processes of their own that have torch and nothing else, each at the price of a fork.

A process of Python that has imported torch, and nothing of this package, waits; it forks for every program,
which finds its folder, environment and PYTHONPATH as in a new interpreter.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SERVER = """
import importlib, json, os, signal, sys, traceback
import torch

def run(cwd, environment, out, err):
    signal.alarm(300)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    importlib.invalidate_caches()

def finish(program):
    status = 0
    try:
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    program, *place = json.loads(line)
    child = os.fork()
    if not child:
        run(*place)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
finish(program)
"""


@cache
def _server() -> subprocess.Popen[str]:
    """Started by the first program; no variable of Python's or ours reaches it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("L0KERNELS_", "PYTHON"))}
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(command, cwd="/", env=environment, stdin=-1, stdout=-1, text=True)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    server.communicate()


def run(
    program: str, cwd: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The program's exit status and what it printed; the environment is that of os.environ unless given."""
    given = dict(os.environ if environment is None else environment)
    server = _server()
    assert server.stdin
    assert server.stdout
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        server.stdin.write(json.dumps([program, str(cwd), given, out.name, err.name]) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status, "the process that forks has ended"
        return subprocess.CompletedProcess([program], int(status), out.read(), err.read())
