"""Data files and Hub data sets, as rows that know where they came from."""
