"""`edgesd` and `python -m edgesd`. Loading the command line takes a moment, and Ctrl-C is as clean then as later."""

from __future__ import annotations

import sys

from edgesd.errors import INTERRUPTED


def main() -> None:
    """Entry point of the command line."""
    try:
        from edgesd.cli import main as run

        run()
    except KeyboardInterrupt:
        print(f"edgesd: {INTERRUPTED}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
