"""The standard set, as `make bench` runs it; arguments are added to every training command.

All rungs on 60M parameters, then tandem, the plain loop and TRL's best on 10M and 150M with fewer
records, the engine's parts, generation for pairs, the sweeps, and the GPU part where CUDA is.
Results go to benchmarks/results; `--resume` goes on with an interrupted run.
"""

from __future__ import annotations

import sys

from . import gpu, pairs, parts, sweeps, training

_FEW = ["--sides", "tandem", "plain", "trl", "--plain-batches", "1", "--trl-batches", "1"]
TRAINING: tuple[list[str], ...] = (
    ["--size", "60"],
    ["--size", "10", *_FEW, "--pairs", "32", "--conversations", "64"],
    ["--size", "150", *_FEW, "--pairs", "16", "--conversations", "32", "--trl-packed"],
)


def main() -> None:
    """Run everything."""
    added = sys.argv[1:]
    resume = ["--resume"] if "--resume" in added else ["--save"]
    for command in TRAINING:
        training.main([*command, "--save", *added])
    parts.main(["--save"])
    pairs.main(["--save"])
    sweeps.main(resume)
    gpu.main(resume)


if __name__ == "__main__":
    main()
