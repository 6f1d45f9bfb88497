"""Entry point of `embedding-gateway` and `python -m app`: sets up signals, and numpy, before anything is imported."""

import os
import signal


def main() -> None:
    """Runs `app.cli.main`."""
    # Imports take a second, or several if processor time is short. A stop must work meanwhile, also for process 1 of a
    # container, which receives no signal without a handler; and a reload must not end the process.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # otherwise ignored, as in a script's background job
        signal.signal(signal.SIGINT, _end)
    # numpy would start a thread per core, for products larger than any here. Where it may start none, it would end the
    # process as if by Ctrl-C.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from app import cli

    signal.signal(signal.SIGINT, interrupt)
    cli.main()


def _end(number: int, _frame: object) -> None:
    # At once: an exception may be lost in a module being imported, or crash it if it is written in C.
    os._exit(128 + number)


if __name__ == "__main__":
    main()
