"""Evaluation: benchmarks, scoring rules, runs that resume, statistics, and the tables of the paper."""
