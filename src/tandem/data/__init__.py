"""From files to micro-batches: reading, formats, tokens, truncation, packing."""
