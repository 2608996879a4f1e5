"""An adapter into its base, and the check of what came out."""
