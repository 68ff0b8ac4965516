"""Frozen features -> figures: eva's heads, logistic regression, kNN and few-shot, on arrays.

In reading order: `parts` (which rows train, select and report), `protocol` (what eva sets for which
data set), `orders` (initial heads and batches), `heads` (all runs and learning rates as one tensor),
`selecting` (what validation decides), `scores` (eva's metrics), `linear` (L-BFGS), `few_shot`; then what the
verb is made of: `settings`, `scoring` (answers -> figures), `measuring`, `result`, `telling`, `files`, `matrices`,
`recording`.
"""
