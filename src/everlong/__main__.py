"""``python -m everlong`` is ``everlong``."""

from everlong.cli.app import main

if __name__ == "__main__":
    main()
