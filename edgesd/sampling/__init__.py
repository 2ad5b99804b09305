"""Any diffusers scheduler as a table; the names that users know."""
