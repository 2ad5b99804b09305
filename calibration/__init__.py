"""Calibration: prompt sets, the capture of real calls (`capture`) and the sets it makes (`sets`)."""
