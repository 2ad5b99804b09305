"""The world of the embedded model: captions, renderer, oracle."""
