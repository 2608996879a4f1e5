"""Direct Preference Optimization; `tandem dpo --help` describes the flags."""

import sys

from tandem.cli.main import entry_point

if __name__ == "__main__":
    sys.argv[1:1] = ["dpo"]
    sys.exit(entry_point())
