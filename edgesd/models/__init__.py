"""Checkpoints in: loading, export-friendly modules, the torch session, counting."""
