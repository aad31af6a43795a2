"""The workloads. Importing this package fills ``benchmarks.battery.task.WORKLOADS``, in the order of the report."""

# isort: off
from benchmarks.battery.task import WORKLOADS
from benchmarks.battery.workloads import digit_networks, images, texts, tables, science, finetuning, classics
# isort: on

__all__ = ["WORKLOADS", "classics", "digit_networks", "finetuning", "images", "science", "tables", "texts"]
