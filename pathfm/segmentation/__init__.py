"""Which pixels of a thumbnail are tissue: networks, what they learn from, what they are judged by.

models.py          networks by name, weights with what they were made from; SHIPPED_WEIGHTS
unet.py            the small U-Net          segformer/   SegFormer B0 to B5
predict.py         thumbnails to probabilities: whole, in tiles, several at a time
losses/            eight losses on one soft-count core; loss_terms.py names them in config
train.py           the training loop; train_settings.py, training_data.py what it is given
crops.py           training crops keyed by (seed, batch); augment.py, jpeg.py, templates.py change them
synthetic/         synthetic thumbnails of known truth, with what goes wrong on real glass
truth.py           tissue drawn by hand, in drawn/
scores.py          Dice, IoU, MCC, boundary F, tissue lost, glass taken
thresholds.py      what a model has to be better than: Otsu, CLAM's saturation, HSV, entropy; no torch
probe_*.py         the segmentation probe: heads on frozen tokens of any backbone, their Dice, their protocol
tidy.py            specks removed, pinholes filled
"""
