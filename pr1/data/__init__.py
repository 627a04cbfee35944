"""Datasets: each is a sequence of records (`pr1.records`), checked whole before any long work begins."""
