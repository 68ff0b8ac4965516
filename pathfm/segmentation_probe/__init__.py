"""Pictures judged pixel by pixel: heads on maps of frozen patch tokens, as kaiko-eva fits them.

pictures.py   a data set -> Pictures: tiles and masks at the input size, splits, patients
decoders.py   the heads: eva's conv decoder, SegFormer's all-MLP decoder, one linear layer
scores.py     Dice of each picture and class; the loss that eva fits with
fit.py        the protocol: one run, its best epoch, its Dice tables
runs.py       several runs, on given splits or folds, with an interval over patients
leaks.py      which pictures, or tiles of them, a model had seen in pretraining

Maps of tokens of any model: `models.maps`.
"""
