"""Run a command whose notebooks find the libraries imported: `python notebooks/preloaded.py sh notebooks/smoke.sh`.

With the smallest values a notebook imports for longer than it computes. Here one process imports what notebooks need,
and every papermill and every kernel that the command starts is a fork of it: `python -m MODULE` without the imports.
Elsewhere than on Linux, where a fork after such imports is not safe, the command just runs.
"""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

MODULES = ["papermill.cli", "ipykernel.zmqshell", "matplotlib.pyplot", "timm", "ax.api.client", "sionna.phy"]
LIBRARY = Path(__file__).parents[1] / "lib/tokmerge"
KERNEL = """{{"display_name": "Python 3", "language": "python",
"argv": ["{0}", "-S", "{1}", "{2}", "ipykernel_launcher", "-f", "{{connection_file}}"]}}"""
PAPERMILL = """#!/bin/sh
exec "{0}" -S "{1}" "{2}" papermill "$@"
"""


def serve(command: list[str]) -> int:
    """Run the command, its papermills and kernels in forks of this process; its exit status."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        words = (sys.executable, Path(__file__).resolve(), f"{folder}/socket")
        for name, text in (("kernels/python3/kernel.json", KERNEL), ("papermill", PAPERMILL)):
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.format(*words))
            file.chmod(0o755)
        os.environ |= {"JUPYTER_PATH": folder, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        server.bind(words[-1])
        server.listen()
        running = subprocess.Popen(command)  # what it asks for meanwhile waits
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # read at the import
        for name in [*MODULES, *(f"tokmerge.{file.parent.name}.{file.stem}" for file in LIBRARY.glob("*/[!_]*.py"))]:
            importlib.import_module(name)
        server.settimeout(0.1)
        forks = []
        while running.poll() is None:
            forks = [fork for fork in forks if not os.waitpid(fork, os.WNOHANG)[0]]
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            with connection:
                forks.append(os.fork())
                if not forks[-1]:
                    os._exit(answer(connection))
        return running.returncode


def answer(connection: socket.socket) -> int:
    """In a fork: run the module that was asked for, where it was asked for; its exit status, which is sent as well."""
    words, outputs, *_ = socket.recv_fds(connection, 1 << 16, 2)
    folder, module, *arguments = words.decode().split("\0")
    os.setsid()
    for output, standard in zip(outputs, (1, 2), strict=True):
        os.dup2(output, standard)
    os.chdir(folder)
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # a kernel ends with it
    sys.argv, sys.path[0], status = [module, *arguments], folder, 0
    connection.send(str(os.getpid()).encode())
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    connection.send(str(status).encode())
    return status


def ask(address: str, *words: str) -> int:
    """`python -m` of the words in a fork of the process at the address, signals handed on; its exit status."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, ["\0".join((os.getcwd(), *words)).encode()], [1, 2])
        fork = int(server.recv(16))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(fork, number))
        return int(server.recv(16) or 1)


if __name__ == "__main__":
    if sys.argv[1].endswith("/socket"):
        sys.exit(ask(*sys.argv[1:]))
    if sys.platform != "linux":
        os.execvp(sys.argv[1], sys.argv[1:])
    sys.exit(serve(sys.argv[1:]))
