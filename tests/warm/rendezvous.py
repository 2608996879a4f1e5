"""torch's launcher without its search for names that nobody reads.

At each step of a rendezvous it walks the stack, with the source of every frame, to name its caller
in a log that is switched off. Where many modules are imported, a start of it takes a second so.
"""

from __future__ import annotations

from torch.distributed.elastic.rendezvous import dynamic_rendezvous


def name_no_callers() -> None:
    """Leave the callers' names out of what torch's launcher would log."""
    dynamic_rendezvous.get_method_name = lambda depth=2: ""
