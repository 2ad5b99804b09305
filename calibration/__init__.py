"""Calibration: prompt sets and the capture of real calls."""
