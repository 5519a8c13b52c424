"""Sequential fine-tuning: one adapter, trained on task after task. The naive sequence; it forgets.

L_t = CE(task t)   "SeqLoRA" in Wang et al. 2023 (arXiv 2310.14152)
"""

from forgetless.methods.base import ADAPTER, Method


class Sequential(Method):
    paper = "2310.14152"
    adopts = ADAPTER
    summary = "one adapter trained on, task after task (the naive sequence)"
    off = {}  # it is the plain one
