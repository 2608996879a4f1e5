"""A process that encodes pieces of a data set: `main`, in an interpreter that `pool` starts.

It reads tasks from its standard input and writes results to its standard output, as messages of
`send` and `receive`, and ends with its input. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import os
import pickle
import struct
import sys
import traceback
from dataclasses import dataclass
from typing import IO, Any

from tandem.data.encoded.encode_chunk import EncodingOptions, encode_chunk
from tandem.data.tokenize.codec import CodecParts
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import UserError

# Batches between two looks for cyclic garbage: jinja's and the JSON parser's objects are many and
# short-lived, and searching them all the time costs a tenth.
_COLLECT_EVERY = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message: what all tasks have in common."""

    parts: CodecParts
    plan: EncodingOptions


@dataclass(frozen=True, slots=True)
class Bug:
    """An error that is nobody's data's fault, as text."""

    trace: str


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message: its length, then its pickle."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message; raises EOFError when the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)


def main() -> None:
    """Answer each task with its batch, a `UserError` or a `Bug`."""
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the messages
    gc.disable()
    try:
        setup: Setup = receive(tasks)
        chat = ChatTokenizer.from_parts(setup.parts)
        for number in range(sys.maxsize):
            chunk, known = receive(tasks)
            try:
                answer: Any = encode_chunk(chat, setup.plan, chunk, known)
            except UserError as error:
                answer = error
            except Exception:
                answer = Bug(traceback.format_exc())
            send(results, answer)
            if number % _COLLECT_EVERY == 0:
                gc.collect()
    except (EOFError, BrokenPipeError):
        pass  # the process that wanted the results is done, or gone
