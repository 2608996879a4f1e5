"""What a run is asked to do: recipes, their settings, and the flags that stand for them."""
