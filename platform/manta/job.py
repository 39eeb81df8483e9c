"""`run_job`, which all jobs share: arguments, --help, --dry-run, one-line errors, exit codes."""

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from manta import config as configs
from manta.arguments import is_file
from manta.errors import MantaError
from manta.security import check_versions
from manta.terminal import keep_private, visible, visible_line, visible_output

C = TypeVar("C")

KEYS = """
Keys, with their types and defaults. A str is taken literally (if the type allows null, the word
null means no value). Values of other types are YAML.
"""
# Arguments that select another model, so that the default config does not apply.
OTHER_MODEL = ("model.preset=", "model.family=", "model.depth=", "init.checkpoint=")


def run_job(
    main: Callable[[C], Any], config_class: type[C], default: Path | None = None
) -> NoReturn:
    """Runs `main(config)` for `python jobs/X.py [config.yaml ...] [key=value ...]`, then exits.

    `default` is the config file to use if the arguments name neither a config file nor another
    model.

    Exit code: 0 done (or what `main` returns); 2 a problem that the person can fix, reported in one
    line on stderr; 1 a bug in Manta or in a library, with its traceback; 130 interrupted.

    What the job prints is visible text (terminal.py), and what it writes is its owner's alone.
    """
    keep_private()
    with visible_output():
        _run(main, config_class, default)


def _run(main: Callable[[C], Any], config_class: type[C], default: Path | None) -> NoReturn:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print((inspect.getdoc(sys.modules[main.__module__]) or "").strip())
        print(KEYS)
        if default is not None:
            print(f"  (without a config file, the values in {default} override them)\n")
        print(configs.help_text(config_class))
        sys.exit(0)
    try:
        given = [argument for argument in arguments if argument != "--dry-run"]
        config = configs.load(config_class, with_default(given, default))
        if "--dry-run" in arguments:
            print(configs.to_yaml(config), end="")
            for key, value in getattr(config, "derived", dict)().items():
                print(f"# {key}: {value}")
            sys.exit(0)
        check_versions()
        code = main(config) or 0
    except MantaError as e:
        print(f"error: {visible_line(str(e))}", file=sys.stderr)
        _exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        _exit(130)
    except Exception:
        print(visible(traceback.format_exc()), end="", file=sys.stderr)
        _exit(1)
    _exit(code)


def say(line: str) -> None:
    """Prints a line for a person, without delay even if the output is a file or a pipe."""
    print(line, flush=True)


def with_default(arguments: list[str], default: Path | None) -> list[str]:
    """The arguments, with the default config in front if it applies to them."""
    names_another = any(is_file(a) or a.startswith(OTHER_MODEL) for a in arguments)
    return arguments if default is None or names_another else [str(default), *arguments]


def _exit(code: int) -> NoReturn:
    """Exits with everything printed. During the interpreter's own exit, library threads that are
    still alive (Ray's, DeepSpeed's) can print over the last line or abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "pytest" in sys.modules:
        sys.exit(code)
    if sys.modules.get("ray"):  # (None if an import of it was blocked)
        from manta import cluster

        cluster.disconnect()
    os._exit(code)
