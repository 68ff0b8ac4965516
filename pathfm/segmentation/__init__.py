"""Which pixels of a thumbnail are tissue: a small U-Net, and Otsu + saturation as its baseline.

unet.py        the network, its shipped weights, and `tissue_probability`
thresholds.py  what it has to be better than: Otsu, CLAM's saturation, HSV, entropy; no torch
truth.py       tissue drawn by hand, in drawn/
scores.py      Dice, IoU, MCC, boundary F, tissue lost, glass taken
losses/        eight losses on one soft-count core; loss_terms.py names them in config
thumbnails.py  synthetic thumbnails of known truth, with what goes wrong on real glass
canvas.py, glass.py   what those are drawn with
tidy.py        specks removed, pinholes filled
train.py       python -m pathfm.segmentation.train: makes the shipped weights
"""
