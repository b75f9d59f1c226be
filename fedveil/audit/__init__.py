"""Runs attacks on what a federation really sent, measures, draws and reports."""
