"""The program `embedding-gateway`, and `python -m app`: told what to do with signals first of all."""

import signal
import sys


def main() -> None:
    """As `app.cli.main`."""
    # What is imported takes a second, or several where processor time is short. A stop must be heard meanwhile, also by
    # process 1 of a container, which gets no signal that has no handler; and a reload must not be the end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        from app import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
