"""Which pixels of a thumbnail are tissue: a small U-Net, and Otsu + saturation as its baseline.

unet.py        the network, its shipped weights, and `tissue_probability`
otsu.py        the baseline: no weights, no torch
losses.py      binary cross-entropy + Dice on logits
thumbnails.py  synthetic thumbnails of known truth, with what goes wrong on real glass
canvas.py, glass.py   what those are drawn with
tidy.py        specks removed, pinholes filled
train.py       python -m pathfm.segmentation.train: makes the shipped weights
"""
