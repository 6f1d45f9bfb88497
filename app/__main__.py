"""The program `embedding-gateway`, and `python -m app`: told what to do with signals first of all."""

import os
import signal


def main() -> None:
    """As `app.cli.main`."""
    # What is imported takes a second, or several where processor time is short. A stop must be heard meanwhile, also by
    # process 1 of a container, which gets no signal that has no handler; and a reload must not be the end.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:  # else it is ignored, as by what a script has started beside itself
        signal.signal(signal.SIGINT, _end)
    from app import cli

    signal.signal(signal.SIGINT, interrupt)
    cli.main()


def _end(number: int, _frame: object) -> None:
    # At once: an exception may be lost in what is being imported, and where that is a library in C be a crash of it.
    os._exit(128 + number)


if __name__ == "__main__":
    main()
