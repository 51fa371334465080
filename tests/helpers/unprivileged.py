"""Commands in a process that the permissions of files hold for, even if the tests run as root."""

import ctypes
import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection

from helpers.ranks import CONTEXT
from llava_cot import cli


def run_unprivileged(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Run ``llava-cot`` with each of these arguments, and return the exit statuses and what they wrote to stderr."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(commands, theirs))
    process.start()
    theirs.close()
    try:
        return [ours.recv() for _ in commands]
    finally:
        process.join()


def _run(commands: Sequence[Sequence[str]], to: Connection) -> None:
    _drop_capabilities()
    for arguments in commands:
        sys.argv, said, status = ["llava-cot", *arguments], io.StringIO(), 0
        try:
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                cli.main()
        except SystemExit as ended:
            status = ended.code
        to.send((status, said.getvalue()))


def _drop_capabilities() -> None:
    """Give up root's rights. The process stays the owner of root's files, so that it can read what it has to import."""
    if os.geteuid() != 0:
        return
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)  # of this process
    nothing = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(version_3, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")
