"""DeepSpeed ZeRO-2 and ZeRO-3."""
