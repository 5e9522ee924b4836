"""``python -m lostreg``: the command line, for launchers that start modules."""

import sys

from lostreg.cli.main import main

sys.exit(main())
