"""The reference runtime: opens a bundle and draws, without torch."""
