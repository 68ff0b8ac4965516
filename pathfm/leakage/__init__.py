"""What a backbone was pretrained on travels with it, and is compared with what it is tested on.

    digests.py   256 bits of a picture that copies of it share
    seen.py      PretrainedOn: slides, patients and sampled patches of a cohort, a small file
    check.py     leaks(): which samples of a data set were in it; refuse_or_mark()
    beside.py    what was found, in a file beside the features
    corpora.py   the same for the slides of a corpus, and for bags of their features

docs/uncertainty.md says what is found, and what cannot be.
"""

from pathfm.leakage.beside import check_beside, marks_of, read_beside, salt_at_hand
from pathfm.leakage.check import (
    Evidence,
    Leaks,
    Policy,
    check_pictures,
    check_slides,
    leaks,
    refuse_or_mark,
    seen_by,
)
from pathfm.leakage.corpora import check_bags, check_corpus, mark_of_bags, slides_of
from pathfm.leakage.digests import DIGEST_BYTES, digest_batch, digest_picture, distances
from pathfm.leakage.seen import PRETRAINED_ON, PretrainedOn, Stage, patient_ids, slide_keys

__all__ = [
    "DIGEST_BYTES",
    "PRETRAINED_ON",
    "Evidence",
    "Leaks",
    "Policy",
    "PretrainedOn",
    "Stage",
    "check_bags",
    "check_beside",
    "check_corpus",
    "check_pictures",
    "check_slides",
    "digest_batch",
    "digest_picture",
    "distances",
    "leaks",
    "mark_of_bags",
    "marks_of",
    "patient_ids",
    "read_beside",
    "refuse_or_mark",
    "salt_at_hand",
    "seen_by",
    "slide_keys",
    "slides_of",
]
