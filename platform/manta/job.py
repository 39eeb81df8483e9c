"""`run_job`, which all jobs share: arguments, --help, --dry-run, one-line errors, exit codes."""

import contextlib
import errno
import functools
import inspect
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from manta import config as configs
from manta.arguments import is_file
from manta.errors import MantaError
from manta.security import check_versions
from manta.terminal import keep_private, line, message, visible, visible_output

C = TypeVar("C")

KEYS = """
Keys, with their types and defaults. A str is taken literally (if the type allows null, the word
null means no value). Values of other types are YAML.
"""
# Arguments that select another model, so that the default config does not apply.
OTHER_MODEL = ("model.preset=", "model.family=", "model.depth=", "init.checkpoint=")

# The system's errors about a file or folder of a person's, with what to do about each.
_FULL = "free some space there, then run the same command again"
_CLOSED = "allow this account to read and write there, or choose another place"
OF_A_PLACE = {
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
    errno.EACCES: _CLOSED, errno.EPERM: _CLOSED, errno.EROFS: _CLOSED,
    errno.ENAMETOOLONG: "shorten the name", errno.ELOOP: "mend the symbolic link",
    errno.EIO: "check the disk", errno.ESTALE: "mount the file system again",
}  # fmt: skip


def run_job(
    main: Callable[[C], Any],
    config_class: type[C],
    default: Path | None = None,
    others: Mapping[str, Path] | None = None,
) -> NoReturn:
    """Runs `main(config)` for `python jobs/X.py [config.yaml ...] [key=value ...]`, then exits.

    `default` is the config file to use if the arguments name neither a config file nor another
    model; `others` has config files to use instead where an argument, as kind=chat, is among them.

    Exit code: 0 done (or what `main` returns); 2 a problem that the person can fix (a full disk
    too), reported in one line on stderr; 1 a bug in Manta or in a library, with its traceback, or a
    standard output that cannot be written, with one line; 130 interrupted; 141 nobody reads the
    output any more (`| head`), without a line; 128 + the number of the signal that ended it.

    What the job prints is visible text (terminal.py), and what it writes is its owner's alone.
    """
    keep_private()
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a terminal that has not every character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with visible_output():
            code = _run(main, config_class, default, others or {})
            print(end="", flush=True)  # as the last output may fail too
    except MantaError as e:
        print(f"error: {message(e)}", file=sys.stderr)
        _exit(2)
    except SystemExit:
        number = _ended_by()
        if number is None:
            raise
        print(f"ended by {number.name}; run the same command to continue", file=sys.stderr)
        _exit(128 + number)
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        _exit(130)
    except Exception as e:
        if isinstance(e, OSError) and _is_of_output(e):
            if isinstance(e, BrokenPipeError):
                _exit(141)  # as the shell counts a program that SIGPIPE ends
            print(f"error: standard output cannot be written: {e.strerror}", file=sys.stderr)
            _exit(1)
        if isinstance(e, OSError) and e.errno in OF_A_PLACE:
            print(f"error: {line(str(e))}; {OF_A_PLACE[e.errno]}", file=sys.stderr)
            _exit(2)
        print(visible(traceback.format_exc()), end="", file=sys.stderr)
        _exit(1)
    _exit(code)


def _run(
    main: Callable[[C], Any],
    config_class: type[C],
    default: Path | None,
    others: Mapping[str, Path],
) -> int:
    """Does what the command line asks for; returns the exit code."""
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print((inspect.getdoc(sys.modules[main.__module__]) or "").strip())
        print(KEYS)
        if default is not None:
            print(f"  (without a config file, the values in {default} override them)")
            for argument, file in others.items():
                print(f"  (with {argument}, those in {file})")
            print()
        print(configs.help_text(config_class))
        return 0
    given = [argument for argument in arguments if argument != "--dry-run"]
    config = configs.load(config_class, with_default(given, default, others), hint)
    if "--dry-run" in arguments:
        print(configs.to_yaml(config), end="")
        for key, value in getattr(config, "derived", dict)().items():
            print(f"# {key}: {value}")
        return 0
    check_versions()
    return main(config) or 0


def say(text: str) -> None:
    """Prints a line for a person, without delay even if the output is a file or a pipe."""
    print(text, flush=True)


def hint(text: str) -> None:
    """Prints a line about what a job does, or what to do next, to standard error. Standard output
    has only what was asked for, so that another program can read it."""
    print(end="", flush=True)  # so that a terminal shows both in their order
    print(visible(text), file=sys.stderr, flush=True)


@functools.cache
def hint_once(text: str) -> None:
    """Prints a line as `hint` does, unless this process has done so."""
    hint(text)


def with_default(
    arguments: list[str], default: Path | None, others: Mapping[str, Path] | None = None
) -> list[str]:
    """The arguments, with the default config in front if it applies to them, or the one of `others`
    that an argument chooses."""
    chosen = [file for argument, file in (others or {}).items() if argument in arguments]
    default = chosen[-1] if chosen else default
    names_another = any(is_file(a) or a.startswith(OTHER_MODEL) for a in arguments)
    return arguments if default is None or names_another else [str(default), *arguments]


def _ended_by() -> signal.Signals | None:
    """The signal that ended this process through an exception, as those that Ray takes do."""
    if not sys.modules.get("ray"):  # (None if an import of it was blocked)
        return None
    from manta.cluster import ending

    return ending.settle()


def _is_of_output(error: OSError) -> bool:
    """Whether it is standard output that fails with this error, and not another file or socket.
    Writes an empty line to find out."""
    try:
        print(flush=True)
    except OSError as e:
        return e.errno == error.errno
    return False


def _exit(code: int) -> NoReturn:
    """Exits with everything printed. During the interpreter's own exit, library threads that are
    still alive (Ray's, DeepSpeed's) can print over the last line or abort."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # (None: closed from the start)
        with contextlib.suppress(OSError):  # `code` says already that the output failed
            stream.flush()
    if "pytest" in sys.modules:
        sys.exit(code)
    if sys.modules.get("ray"):  # (None if an import of it was blocked)
        from manta.cluster import connection

        connection.disconnect()
    os._exit(code)
