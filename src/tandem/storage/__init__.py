"""Files on disk: folders of stages, hashes, locks, caches. Knows no models and no recipes."""
