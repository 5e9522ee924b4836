"""``python -m lostreg``: the same as the command ``lostreg``."""

from lostreg.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
