"""Cohorts: which slides belong to a study, where they are, who they are of, what may be told of that.

sources.py   find_cohort(): paths, globs, buckets, tables, manifests -> Cohort
table.py     Cohort and CohortRow; splits that tear nothing apart
options.py   the --cohort.* options        columns.py, records.py   tables: CSV, TSV, Parquet
listing.py   slides below a prefix         gdc.py, idc.py           manifests of public archives
names.py     what file names say           overrides.py             µm/px that a person gives
salting.py   ids instead of names          reading.py               one row -> its index
twins.py     the same image in several files
"""

from pathfm.cohorts.options import CohortOptions
from pathfm.cohorts.overrides import MppOverrides, check_mpp
from pathfm.cohorts.reading import index_row
from pathfm.cohorts.records import read_csv, write_csv
from pathfm.cohorts.row import CohortRow, Skipped
from pathfm.cohorts.salting import Salt
from pathfm.cohorts.sources import absent, find_cohort, read_cohort
from pathfm.cohorts.table import Cohort
from pathfm.cohorts.twins import find_twins, fingerprint

__all__ = [
    "Cohort",
    "CohortOptions",
    "CohortRow",
    "MppOverrides",
    "Salt",
    "Skipped",
    "absent",
    "check_mpp",
    "find_cohort",
    "find_twins",
    "fingerprint",
    "index_row",
    "read_cohort",
    "read_csv",
    "write_csv",
]
