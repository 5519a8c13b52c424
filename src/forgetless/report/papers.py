"""BibTeX of the methods' papers, by arXiv number: facts only."""

from __future__ import annotations

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
    "2401.05605": (
        "Scaling Laws for Forgetting When Fine-Tuning Large Language Models",
        "Kalajdzievski, Damjan",
        2024,
    ),
}
"""arXiv number -> title, authors, year of the first version. A number that is not here gives an entry without them."""


def bibtex(numbers: list[str]) -> str:
    """An entry for each arXiv number, in order."""
    return "\n".join(_entry(number) for number in dict.fromkeys(numbers) if number)


def _entry(number: str) -> str:
    title, authors, year = PAPERS.get(number, ("", "", 0))
    key = f"{authors.partition(',')[0].lower()}{year}" if authors else "arxiv"
    told = {"title": title and f"{{{title}}}", "author": authors, "year": year or "",
            "eprint": number, "archiveprefix": "arXiv"}  # fmt: skip
    fields = ",\n".join(f"  {name} = {{{value}}}" for name, value in told.items() if value)
    return f"@misc{{{key}_{number.replace('.', '_')},\n{fields}\n}}\n"
