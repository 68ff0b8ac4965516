"""What kaiko-eva's own classes are asked in a process of their own: scripts, as text.

The first argument is an .npz to read, the second one to write.
"""

NETWORKS = r"""
import sys
import numpy as np, torch
from eva.vision.losses import DiceLoss
from eva.vision.metrics import MonaiDiceScore
from eva.vision.metrics.defaults import MulticlassSegmentationMetrics
from eva.vision.models.networks import ABMIL
from eva.vision.models.networks.decoders.segmentation.semantic import common
from eva.vision.models.networks.decoders.segmentation.typings import DecoderInputs

given, out = np.load(sys.argv[1]), {}


def keep(prefix, module):
    for name, value in module.named_parameters():
        out[f"{prefix}/weight/{name}"] = value.detach().numpy()
        out[f"{prefix}/grad/{name}"] = value.grad.numpy()


torch.manual_seed(11)
abmil = ABMIL(input_size=given["bags"].shape[2], output_size=3, projected_input_size=128)
logits = abmil(torch.from_numpy(given["bags"]))
torch.nn.functional.cross_entropy(logits, torch.from_numpy(given["labels"])).backward()
out["abmil/logits"] = logits.detach().numpy()
keep("abmil", abmil)

maps = [torch.from_numpy(given["map0"]), torch.from_numpy(given["map1"])]
truth = torch.from_numpy(given["truth"])
for ignore in (None, 4):
    for name, kind in (("conv", common.ConvDecoderMS), ("linear", common.ConvDecoder1x1),
                       ("single", common.SingleLinearDecoder)):
        torch.manual_seed(12)
        decoder = kind(in_features=sum(m.shape[1] for m in maps), num_classes=4)
        logits = decoder(DecoderInputs(maps, tuple(truth.shape[1:]), None))
        asked = truth if ignore else truth.clamp(max=3)
        loss = DiceLoss(softmax=True, batch=True, ignore_index=ignore)(logits, asked)
        loss.backward()
        prefix = f"{name}/{ignore}"
        out[f"{prefix}/logits"], out[f"{prefix}/loss"] = logits.detach().numpy(), loss.item()
        keep(prefix, decoder)

predicted = torch.from_numpy(given["predicted"])
for ignore, n in ((None, 4), (4, 5)):
    asked = truth if ignore else truth.clamp(max=3)
    metrics = MulticlassSegmentationMetrics(num_classes=n, ignore_index=ignore)
    each = MonaiDiceScore(include_background=True, num_classes=n, reduction="none", ignore_index=ignore)
    for rows in (slice(0, 3), slice(3, None)):
        metrics.update(predicted[rows], asked[rows])
        each.update(predicted[rows], asked[rows])
    out[f"mean/{ignore}"] = metrics.compute()["MonaiDiceScore"].item()
    out[f"each/{ignore}"] = each.compute().numpy()
np.savez(sys.argv[2], **out)
"""

TRAINING = r"""
import sys, tempfile, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from lightning.pytorch import callbacks
from torch import nn
from torchvision import tv_tensors
from eva.core import DataLoader, DataModule, DataloadersSchema, DatasetsSchema, HeadModule, Trainer
from eva.core.data import datasets
from eva.core.metrics import structs
from eva.core.metrics.defaults import MulticlassClassificationMetrics
from eva.core.models.modules.utils import batch_postprocess
from eva.core.models.transforms import AsDiscrete
from eva.core.data.transforms.padding import Pad2DTensor
from eva.vision.losses import DiceLoss
from eva.vision.metrics.defaults import MulticlassSegmentationMetrics
from eva.vision.models.modules import SemanticSegmentationModule
from eva.vision.models.networks import ABMIL
from eva.vision.models.networks.decoders.segmentation import ConvDecoderMS

given, out = np.load(sys.argv[1]), {}
read = []


class Rows(datasets.TorchDataset):
    def __init__(self, rows, item, told=False):
        self.rows, self.item, self.told = rows, item, told

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = int(self.rows[i])
        if self.told:
            read.append(row)
        return self.item(row)

    def prepare_data(self): pass
    def setup(self): pass
    def configure(self): pass
    def validate(self): pass
    def teardown(self): pass


class Told(callbacks.Callback):
    def __init__(self, name, monitor):
        self.name, self.monitor, self.losses, self.scores = name, monitor, [], []

    def on_fit_start(self, trainer, module):
        head = module.head if hasattr(module, "head") else module.decoder
        for key, value in head.state_dict().items():
            out[f"{self.name}/initial/{key}"] = value.clone().numpy()

    def on_train_batch_end(self, trainer, module, outputs, *rest):
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.scores.append(float(trainer.callback_metrics[self.monitor]))


def fit(name, module, item, monitor, batch, patience, **stop):
    torch.manual_seed(5)
    read.clear()
    folder = tempfile.mkdtemp()
    told = Told(name, monitor)
    best = callbacks.ModelCheckpoint(filename="best", save_top_k=1, monitor=monitor, mode="max", dirpath=folder)
    early = callbacks.EarlyStopping(min_delta=0, patience=patience, monitor=monitor, mode="max")
    trainer = Trainer(default_root_dir=folder, callbacks=[told, best, early], logger=False,
                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", **stop)
    loader = lambda shuffle=False: DataLoader(batch_size=batch, shuffle=shuffle, num_workers=0,
                                              prefetch_factor=None, persistent_workers=False, pin_memory=False)
    data = DataModule(
        datasets=DatasetsSchema(train=Rows(given[f"{name}/train"], item, told=True),
                                val=Rows(given[f"{name}/val"], item), test=Rows(given[f"{name}/test"], item)),
        dataloaders=DataloadersSchema(train=loader(True), val=loader(), test=loader()))
    trainer.fit(module, datamodule=data)
    out[f"{name}/read"], out[f"{name}/losses"] = np.array(read), np.array(told.losses)
    out[f"{name}/scores"] = np.array(told.scores)
    found = trainer.test(module, datamodule=data, ckpt_path="best", verbose=False)[0]
    for key, value in found.items():
        out[f"{name}/found/{key}"] = value


pad = Pad2DTensor(pad_size=40)
bags, ends = given["slides/bags"], given["slides/ends"]
starts = np.concatenate([[0], ends[:-1]])
def slide(i):
    return pad(torch.from_numpy(bags[starts[i]:ends[i]])), int(given["slides/labels"][i])

torch.manual_seed(1)
head = ABMIL(input_size=bags.shape[1], output_size=3, projected_input_size=128)
module = HeadModule(head=head, criterion=nn.CrossEntropyLoss(),
                    optimizer=lambda p: torch.optim.AdamW(p, lr=0.001, betas=(0.9, 0.999)),
                    metrics=structs.MetricsSchema(common=MulticlassClassificationMetrics(num_classes=3)))
fit("slides", module, slide, "val/MulticlassAccuracy", 8, 9, max_epochs=30)

def picture(i):
    return [torch.from_numpy(given["pictures/map"][i])], tv_tensors.Mask(torch.from_numpy(given["pictures/mask"][i]))

torch.manual_seed(2)
decoder = ConvDecoderMS(in_features=given["pictures/map"].shape[1], num_classes=4)
module = SemanticSegmentationModule(
    decoder=decoder, criterion=DiceLoss(softmax=True, batch=True),
    optimizer=lambda p: torch.optim.AdamW(p, lr=0.002),
    metrics=structs.MetricsSchema(evaluation=MulticlassSegmentationMetrics(num_classes=4)),
    postprocess=batch_postprocess.BatchPostProcess(predictions_transforms=[AsDiscrete(argmax=True, keepdim=False)]))
fit("pictures", module, picture, "val/MonaiDiceScore", 8, 200, max_steps=32)
np.savez(sys.argv[2], **out)
"""
