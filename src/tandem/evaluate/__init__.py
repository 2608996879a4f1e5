"""Measuring models on tasks and on data of your own."""
