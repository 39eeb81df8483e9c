"""`run_job`, what every job shares: arguments, --help, --dry-run, one-line errors, exit codes."""

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from manta import config as configs
from manta.errors import MantaError

C = TypeVar("C")


def run_job(main: Callable[[C], Any], config_class: type[C]) -> NoReturn:
    """Runs `main(config)` for `python jobs/X.py [config.yaml ...] [key=value ...]`, then exits.

    Exit code: 0 done; 2 a problem that the person can mend, said in one line on stderr;
    1 a defect of Manta or of a library, with its traceback; 130 interrupted.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print((inspect.getdoc(sys.modules[main.__module__]) or "").strip())
        print("\nKeys, with their types and defaults:\n")
        print(configs.help_text(config_class))
        sys.exit(0)
    try:
        config = configs.load(config_class, [a for a in arguments if a != "--dry-run"])
        if "--dry-run" in arguments:
            print(configs.to_yaml(config), end="")
            for key, value in getattr(config, "derived", dict)().items():
                print(f"# {key}: {value}")
            sys.exit(0)
        main(config)
    except MantaError as e:
        print(f"error: {e}", file=sys.stderr)
        _exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command carries on", file=sys.stderr)
        _exit(130)
    except Exception:
        traceback.print_exc()
        _exit(1)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """Leaves with everything printed: the interpreter's own exit lets library threads still alive
    (Ray's, DeepSpeed's) print over the last line or abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "pytest" in sys.modules:
        sys.exit(code)
    if sys.modules.get("ray"):  # (None where an import of it was blocked)
        from manta import cluster

        cluster.disconnect()
    os._exit(code)
