"""The training stages and the merge, one function each."""
