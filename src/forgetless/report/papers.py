"""BibTeX of the methods' papers, by arXiv number: facts only."""

from __future__ import annotations

import re
from collections.abc import Iterable

PAPERS: dict[str, tuple[str, str, int]] = {
    "2310.14152": (
        "Orthogonal Subspace Learning for Language Model Continual Learning",
        "Wang, Xiao and Chen, Tianze and Ge, Qiming and Xia, Han and Bao, Rong and Zheng, Rui and Zhang, Qi and Gui, "
        "Tao and Huang, Xuanjing",
        2023,
    ),
    "2402.18865": (
        "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning",
        "Ren, Weijieying and Li, Xinlong and Wang, Lei and Zhao, Tianxiang and Qin, Wei",
        2024,
    ),
    "2410.10179": (
        "Is Parameter Collision Hindering Continual Learning in LLMs?",
        "Yang, Shuo and Ning, Kun-Peng and Liu, Yu-Yang and Yao, Jia-Yu and Tian, Yong-Hong and Song, Yi-Bing and "
        "Yuan, Li",
        2024,
    ),
    "1606.09282": ("Learning without Forgetting", "Li and Hoiem", 2016),
    "1612.00796": ("Overcoming catastrophic forgetting in neural networks", "Kirkpatrick and others", 2016),
    "1706.08840": ("Gradient Episodic Memory for Continual Learning", "Lopez-Paz and Ranzato", 2017),
    "1812.00420": ("Efficient Lifelong Learning with A-GEM", "Chaudhry and Ranzato and Rohrbach and Elhoseiny", 2018),
    "1910.07104": ("Orthogonal Gradient Descent for Continual Learning", "Farajtabar and Azizan and Mott and Li", 2019),
    "2403.00812": ("LoRA Meets Dropout under a Unified Framework", "Wang and others", 2024),
    "2404.00228": ("InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", "Liang and Li", 2024),
    "2410.04010": ("Hyperbolic Fine-Tuning for Large Language Models", "Yang and others", 2024),
    "2410.08305": (
        "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank Adaptation",
        "Malinovsky and others",
        2024,
    ),
    "2410.09437": ("MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", "Yang and others", 2024),
    "2410.16801": (
        "Controlled Low-Rank Adaptation with Subspace Regularization for Continued Training on Large Language Models",
        "Lu and others",
        2024,
    ),
    "2411.00623": (
        "Replay-Free Continual Low-Rank Adaptation with Dynamic Memory",
        "Chen, Huancheng and Li, Jingtao and Zhuang, Weiming and Chen, Chen and Lyu, Lingjuan",
        2024,
    ),
    "2501.13198": (
        "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
        "Wu and others",
        2025,
    ),
    "2502.06042": (
        "Scaling Laws for Forgetting during Finetuning with Pretraining Data Injection",
        r"B{\'e}thune and others",
        2025,
    ),
    "2504.07448": (
        "LoRI: Reducing Cross-Task Interference in Multi-Task Low-Rank Adaptation",
        "Zhang and You and Panda and Goldstein",
        2025,
    ),
    "2510.13003": (
        "OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient Fine-Tuning",
        "Xiong and Xie",
        2025,
    ),
    "2512.23017": (
        "Merge before Forget: A Single LoRA Continual Learning via Continual Merging",
        "Qiao, Fuli and Mahdavi, Mehrdad",
        2025,
    ),
    "1906.01076": (
        "Episodic Memory in Lifelong Language Learning",
        "de Masson d'Autume and Ruder and Kong and Yogatama",
        2019,
    ),
    "2104.08691": ("The Power of Scale for Parameter-Efficient Prompt Tuning", "Lester and Al-Rfou and Constant", 2021),
    "2110.07298": (
        "LFPT5: A Unified Framework for Lifelong Few-shot Language Learning Based on Prompt Tuning of T5",
        "Qin and Joty",
        2021,
    ),
    "2112.08654": ("Learning to Prompt for Continual Learning", "Wang and others", 2021),
    "2301.12314": ("Progressive Prompts: Continual Learning for Language Models", "Razdaibiedina and others", 2023),
    "2406.05223": (
        "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient "
        "Fine-tuning",
        "Yang and others",
        2024,
    ),
    "2407.07523": (
        "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning",
        "Diao and Wan and Jia and Zhuge and Zhang and Lu and Chen",
        2024,
    ),
    "2503.02659": ("LoRA-Null: Low-Rank Adaptation via Null Space for Large Language Models", "Tang and others", 2025),
    "2504.07097": (
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
        "Nayak and others",
        2025,
    ),
    "2401.05605": (
        "Scaling Laws for Forgetting When Fine-Tuning Large Language Models",
        "Kalajdzievski, Damjan",
        2024,
    ),
}
"""arXiv number -> title, authors (surnames where no more is known to us), year of the first version; what is not known
is left out of the entry, as all of it is for a number that is not here."""


def bibtex(papers: Iterable[str]) -> str:
    """An entry for each arXiv number, in order; the paper of a method of several parts is a list with commas."""
    numbers = dict.fromkeys(number.strip() for told in papers for number in told.split(","))
    return "\n".join(_entry(number) for number in numbers if number)


def _entry(number: str) -> str:
    title, authors, year = PAPERS.get(number, ("", "", 0))
    first = re.sub(r"[^a-z]", "", re.split(r",| and ", authors)[0].lower())
    key = f"{first}{year}" if authors else "arxiv"
    told = {"title": title and f"{{{title}}}", "author": authors, "year": year or "",
            "eprint": number, "archiveprefix": "arXiv"}  # fmt: skip
    fields = ",\n".join(f"  {name} = {{{value}}}" for name, value in told.items() if value)
    return f"@misc{{{key}_{number.replace('.', '_')},\n{fields}\n}}\n"
