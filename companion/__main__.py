"""`python -m companion` is `llava`."""

from companion.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
