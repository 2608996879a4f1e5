"""The program in front of the server: hands over its arguments, and ends as the fork does.

It stands in for `python -c`, `python -m` and `python FILE`. It becomes the true Python where a fork
would not be the same: with other flags of the interpreter, with other variables that are read while
Python starts or while libraries are imported, or with a standard stream closed.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import struct

_READ_AT_IMPORT = (
    *("PYTHON", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PT_", "DS_", "LD_", "KMP_", "MKL_"),
    *("TORCH_ALLOW", "STUB_", "CC"),
)
# What libraries set while they are imported, for themselves: lm_eval, and torch's compiler.
_SET_BY_LIBRARIES = ("HF_XET_HIGH_PERFORMANCE", "HF_HUB_ENABLE_HF_TRANSFER", "KMP_DUPLICATE_LIB_OK")
_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    """The variables that only count before a library is imported."""
    found = {k: v for k, v in environment.items() if k.startswith(_READ_AT_IMPORT)}
    # A fork does not buffer its streams either, and does not ask the Hub in any case.
    for name in ("PYTHONUNBUFFERED", "HF_HUB_OFFLINE", *_SET_BY_LIBRARIES):
        found.pop(name, None)
    found["PYTHONPATH"] = ""
    return found


def main(known: dict) -> None:
    """Run a program in a fork of the server, and end as it does.

    Args:
        known: the server's address, the true Python, and the server's variables that count at
            import and folders of modules.
    """
    import sys

    arguments = sys.argv[1:]
    if not _can_be_forked(arguments, known):
        os.execv(known["python"], [known["python"], *arguments])
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(known["address"])
    except OSError:  # a test has ended the server, too
        os.execv(known["python"], [known["python"], *arguments])
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for name in _PASSED_ON:
        number = getattr(signal, name)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    ignored = [n for n in _PASSED_ON if signal.getsignal(getattr(signal, n)) == signal.SIG_IGN]
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109 (pathlib takes long to import)
        "ignored": ignored,
    }
    body = json.dumps(request).encode("utf-8", "surrogatepass")
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg(
        [struct.pack("!Q", len(body))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
    )
    connection.sendall(body)
    # Whoever reads what the program writes must see its end when the program ends.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    _end_as(_status(connection, wake))


def _can_be_forked(arguments: list, known: dict) -> bool:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-c", "-m", "-u")):
        return False
    if arguments[0] == "-u" and (
        len(arguments) < 2 or (arguments[1].startswith("-") and arguments[1] not in ("-c", "-m"))
    ):
        return False
    if read_at_import(dict(os.environ)) != known["environment"]:
        return False
    if not set(os.environ.get("PYTHONPATH", "").split(os.pathsep)) <= {"", *known["paths"]}:
        return False
    for stream in (0, 1, 2):
        try:
            os.fstat(stream)
        except OSError:
            return False
    return True


def _status(connection: socket.socket, wake: int) -> int:
    """How the fork ended; signals are passed on to it until then."""
    while True:
        ready, _, _ = select.select([connection, wake], [], [])
        if wake in ready:
            connection.sendall(os.read(wake, 64))
        if connection in ready:
            answer = connection.recv(4)
            if len(answer) < 4:
                os._exit(70)  # the server is gone
            return struct.unpack("!i", answer)[0]


def _end_as(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        os._exit(code)
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
