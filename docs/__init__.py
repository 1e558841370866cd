"""Configuration of the docs site; the prose is in `nbs/`."""
