"""Imports torch, transformers and tandem once, and forks for each program that a client brings.

As a script it takes the address of a socket and the path of the client, both in a folder of its
own. It ends when its standard input does, and removes the folder.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

# What programs of the tests use of other libraries, which import it only when it is needed.
_LIBRARIES = (
    *("torch.distributed.run", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch.utils.checkpoint", "transformers.models.llama.modeling_llama"),
    *("transformers.models.llama.tokenization_llama", "transformers.generation.utils"),
    *("peft", "accelerate", "datasets", "deepspeed", "safetensors.torch", "pyarrow.parquet"),
    *("huggingface_hub.hf_api", "rich.progress", "pytest"),
)


def import_everything() -> None:
    """Import the libraries and all modules of tandem, load its C kernels, compile templates."""
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # or DeepSpeed imports all of it
    for name in _LIBRARIES:
        importlib.import_module(name)
    del sys.modules["mlflow"]
    package = importlib.import_module("tandem")
    for found in pkgutil.walk_packages(package.__path__, "tandem."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    from tandem.model.cpu.c_kernels import kernels

    kernels()
    from huggingface_hub import ModelCard, ModelCardData

    from tandem.report.html import page_template

    from .rendezvous import name_no_callers
    from .templates import compile_once

    compile_once()
    name_no_callers()
    ModelCard.from_template(ModelCardData())
    page_template()


def serve(address: str) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each client; returns what is asked for in a fork, and None in the server's end."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # A launcher under test passes these on to all children of its process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    for readable in (listener, wake, 0):
        selector.register(readable, selectors.EVENT_READ)
    print("ready", flush=True)
    running: dict[int, socket.socket] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                os.close(0)  # from now on whoever needs a server starts one
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                return None
            if key.fileobj == wake:
                with suppress(BlockingIOError):
                    os.read(wake, 512)
                _report(running, selector)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                try:
                    request, streams = _receive(connection)
                except (EOFError, ValueError, OSError):  # the client was killed meanwhile
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    selector.close()
                    for held in (listener, connection, *running.values()):
                        held.close()
                    os.close(wake)
                    os.close(woken)
                    return request, streams
                for stream in streams:
                    os.close(stream)
                running[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            else:
                _pass_on(key, selector)


def _report(running: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    """Tell the clients of all programs that have ended how they did."""
    for pid, connection in list(running.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with suppress(OSError):
                connection.sendall(struct.pack("!i", status))
            with suppress(KeyError):
                selector.unregister(connection)
            connection.close()
            del running[pid]


def _pass_on(key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
    """Signals to a program, and the death of its client."""
    connection = key.fileobj
    assert isinstance(connection, socket.socket)
    if connection.fileno() < 0:
        return
    try:
        numbers = connection.recv(64)
    except OSError:  # the client was killed before it read how the program ended
        numbers = b""
    with suppress(ProcessLookupError):
        for number in numbers or [signal.SIGKILL]:
            os.kill(key.data, number)
    if not numbers:
        selector.unregister(connection)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    while 0 < len(head) < 8:
        head += connection.recv(8 - len(head))
    if len(head) < 8:
        raise EOFError
    body = bytearray()
    (length,) = struct.unpack("!Q", head)
    while len(body) < length:
        part = connection.recv(length - len(body))
        if not part:
            raise EOFError
        body += part
    return json.loads(body.decode("utf-8", "surrogatepass")), list(streams)


def become(request: dict[str, Any], streams: list[int], client: str) -> list[str]:
    """Take a program's streams, folder, environment and path; returns Python's arguments."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    arguments: list[str] = request["arguments"]
    unbuffered = arguments[0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(line_buffering=stream.isatty())  # type: ignore[union-attr]
    if unbuffered:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in request["ignored"]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.executable = client
    if "torch" in sys.modules:
        import torch

        threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        if threads != "1":
            torch.set_num_threads(int(threads))
    return arguments[1:] if arguments[0] == "-u" else arguments


def run(arguments: list[str]) -> None:
    """Run a program as `python ARGUMENTS` does."""
    kind, rest = arguments[0], arguments[1:]
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = ModuleType("__main__")
        main.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def end(error: BaseException | None) -> None:
    """End the process as Python does after a program, but for taking every module apart."""
    code = 0
    if isinstance(error, SystemExit):
        value = error.code
        code = value & 0xFF if isinstance(value, int) else int(value is not None)
        if value is not None and not isinstance(value, int):
            print(value, file=sys.stderr)
    elif error is not None:
        error.__traceback__ = _own(error.__traceback__)
        traceback.print_exception(error)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as failed:
        print(f"Exception ignored while flushing sys.stdout: {failed}", file=sys.stderr)
        code = 120
    with suppress(OSError):
        sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _own(frames: Any) -> Any:
    """A traceback without the frames of this file and of runpy."""
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__):
        frames = frames.tb_next
    return frames


def _remove(folder: Path) -> None:
    """Remove the server's folder, unless another server has begun to use it."""
    from .python import locked

    with locked(folder):
        if (folder / "pid").read_text() == str(os.getpid()):
            shutil.rmtree(folder)


def main(address: str, client: str) -> None:
    """Serve; in a fork, be the program that was asked for."""
    import_everything()
    gc.collect()
    gc.freeze()
    asked = serve(address)
    if asked is None:
        _remove(Path(address).parent)
        os._exit(0)  # rather than take every module apart
    atexit._clear()
    error: BaseException | None = None
    try:
        run(become(*asked, client))
    except BaseException as raised:
        error = raised
    end(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
