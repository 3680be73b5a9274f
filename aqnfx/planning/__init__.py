"""Sensitivity and a budget -> a precision plan."""
