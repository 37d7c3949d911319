"""Experiments someone would run: several trainings, one table."""
