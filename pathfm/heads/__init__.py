"""Heads on frozen features of slides or pictures: fitted, judged, and told, whatever the head is.

folds.py      folds that keep patients together; parts that must hold every class
fit.py        a head -> the same at its best epoch on validation
result.py     HeadResult: what a probe of heads found, its file, and kaiko-eva's results.json
telling.py    the table
recording.py  once(): what is there under the same key, or a new result: written, tracked, told

`slide_probe` and `segmentation_probe` say what is read, which heads there are and how they are scored.
"""
