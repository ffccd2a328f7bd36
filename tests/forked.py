"""Commands as a user types them, each a process of its own; what takes seconds to import they share.

`python forked.py` is a server that has imported the commands and forks for each line of its input. What belongs to a
start (the modules that are imported, signals, ranks of torchrun) is for tests that start the console script itself.
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SHARED = (
    *(f"consistency.commands.{name}" for name in ("train", "sample", "edit", "evaluate", "prepare")),
    "sklearn.datasets",
)


def command(name: str, *arguments: str, cwd: Path, code: int = 0) -> str:
    """Run consistency-NAME in the folder `cwd`; what it wrote. It must end with `code`."""
    server = _server()
    with tempfile.NamedTemporaryFile("r") as output:
        request = {"name": name, "arguments": [str(argument) for argument in arguments]}
        server.stdin.write(json.dumps({**request, "cwd": str(cwd), "output": output.name}) + "\n")
        server.stdin.flush()
        ended, said = server.stdout.readline(), output.read()
    assert ended == f"{code}\n", f"consistency-{name} {' '.join(arguments)} ended with {ended}{said}"
    return said


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # it ends with its input
    return server


def serve() -> None:
    """Answer each request with an exit code; a child returns from here into the end of its command."""
    sys.path.pop(0)  # the folder of this file
    cli = importlib.import_module("consistency.cli")
    for name in SHARED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            for stream, file in ((0, os.devnull), (1, request["output"]), (2, request["output"])):
                os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), stream)
            os.chdir(request["cwd"])
            sys.argv = [f"consistency-{request['name']}", *request["arguments"]]
            getattr(cli, request["name"])()
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
