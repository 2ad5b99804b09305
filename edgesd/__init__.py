"""edgesd: Stable-Diffusion-family models onto phones, browsers and laptops."""

__version__ = "0.1.0"
