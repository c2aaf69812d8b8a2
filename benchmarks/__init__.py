"""Benchmarks: hypertune next to the searches it has to beat, on the same estimator, folds and seconds.

python -m benchmarks list
python -m benchmarks digits --seeds 5
"""
