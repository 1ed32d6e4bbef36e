"""`python -m llava_core` is `llava`."""

from llava_core.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
