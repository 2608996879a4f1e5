"""Merge an adapter into its base model; `tandem merge --help` describes the flags."""

import sys

from tandem.cli.main import entry_point

if __name__ == "__main__":
    sys.argv[1:1] = ["merge"]
    sys.exit(entry_point())
