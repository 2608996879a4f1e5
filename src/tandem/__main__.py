"""`python -m tandem` is `tandem`."""

from tandem.cli.main import entry_point

if __name__ == "__main__":
    raise SystemExit(entry_point())
