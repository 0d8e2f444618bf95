"""The command line: the one place that puts the parts together.

``--json`` prints exactly one JSON object on stdout, whatever happens; text for people goes to stderr then.
Exit codes: 0 done; 2 wrong usage, wrong or foreign file, mismatch; 3 done, but images were quarantined; 4 more bad
images than ``--max-bad``; 130 interrupted, resumable.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from io import TextIOWrapper
from typing import Annotated, Any, NoReturn

import typer

from featx.cli import (
    advise,
    backbones,
    card,
    count,
    demo,
    drift,
    explain,
    export,
    extract,
    feedback,
    finetune,
    fit,
    guide,
    label_studio,
    labels,
    predict,
    search,
    serve,
    store,
    studio,
    sweep,
    weights,
)
from featx.cli.terminal import print_json, say
from featx.errors import MAY_BE_MISSING, FeatxError, Interrupted, visible

_INTERRUPTED = 130

_NOT_INSTALLED = (
    "{} is not installed, which this needs. Install all of featx: pip install featx. Without it there are the networks "
    "that come with featx at int8, and models that hold their network (featx guide shipping)."
)
_STDERR = 2

# Typer has brought click along in two ways; wherever it lives, this is the base of its usage errors.
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="featx",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "From a folder of photos with few labels to a classifier you can trust.\n\n"
        "A frozen network looks at every photo once; its embeddings are kept in a store; comparing, choosing and "
        "serving heads on them takes seconds.\n\n"
        "Start with [bold]featx demo[/bold], then: [bold]featx extract photos --out photos.featx[/bold] and "
        "[bold]featx sweep photos.featx[/bold]\n\n"
        "The guide: [bold]featx guide[/bold]"
    ),
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"featx {installed('featx')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


for group in (
    demo,
    studio,
    extract,
    store,
    backbones,
    weights,
    sweep,
    advise,
    labels,
    finetune,
    fit,
    export,
    card,
    predict,
    count,
    explain,
    serve,
    drift,
    feedback,
    label_studio,
    search,
    guide,
):
    group.register(app)


# --- the end ------------------------------------------------------------------------------------------------------


def _fail(message: str, code: int) -> NoReturn:
    say(f"Error: {message}", err=True)
    if "--json" in sys.argv[1:]:
        print_json({"error": message, "exit_code": code})
    sys.stdout.flush()
    raise SystemExit(code)


def _terminate(number: int, frame: object) -> None:
    # One way to stop: SIGTERM (schedulers, systemd) does what Ctrl-C does.
    raise KeyboardInterrupt


def _by_ctrl_c(error: BaseException) -> bool:
    """Whether an error was made of a Ctrl-C: an extension module that is just being imported says ImportError."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or _by_ctrl_c(cause))


def main() -> None:
    """Entry point of ``featx``."""
    faulthandler.enable(_STDERR)  # a crash in a library's native code says where
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, TextIOWrapper):
        # A file name that is no text must not end the output; in JSON the escape even means the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except ClickException as error:
        error.message = visible((error.message or "").removeprefix("Value error, "), keep="\n\t")
        error.show()
        if "--json" in sys.argv[1:]:
            print_json({"error": error.format_message(), "exit_code": 2})
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if isinstance(error, Interrupted) or not _by_ctrl_c(error):
            if isinstance(error, FeatxError):
                _fail(str(error), error.exit_code)
            if isinstance(error, ModuleNotFoundError) and error.name in MAY_BE_MISSING:
                _fail(_NOT_INSTALLED.format(error.name), 2)
            raise
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # Typer makes an exit code, or an error, of Ctrl-C, as its version has it
        _fail("interrupted; run the same command again.", _INTERRUPTED)
    raise SystemExit(code if isinstance(code, int) else 0)
