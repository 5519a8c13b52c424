"""The streams that have names: whose rows they are, under which licence, which bytes, scored how. Plain data.

What stands here was read in the public repositories named. Hashes come from published lists (`Source.hashes` says
which, and what of them was recomputed); a hash nobody could confirm is None and is called "not pinned". Licences are
what others collected: check them before use. Nothing here is downloaded by forgetless: the user fetches, hashes are
checked when a stream is loaded.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from forgetless.data.packages import cache_dir
from forgetless.data.readers import OLORA_INSTRUCTIONS


def data_dir() -> Path:
    """$FORGETLESS_DATA, or `data` in the cache: where the benchmarks' files lie."""
    told = os.environ.get("FORGETLESS_DATA")
    return Path(told).expanduser() if told else cache_dir() / "data"


@dataclass(frozen=True)
class Source:
    """Where the files of some data sets come from."""

    name: str
    title: str
    url: str
    revision: str
    licence: str
    hashes: str  # who says so
    folder: str  # below data_dir()
    roots: tuple[str, ...]  # where in `folder` the data sets may lie; the first that is there is used
    fetch: tuple[str, ...]  # commands and addresses; {folder} is data_dir()/folder

    @property
    def place(self) -> Path:
        return data_dir() / self.folder

    @property
    def root(self) -> Path:
        """The folder that holds the data sets' folders; where it is to be, if it is not there."""
        there = (self.place / root for root in self.roots)
        return next((path for path in there if path.is_dir()), self.place / self.roots[0])

    def how_to_get(self) -> str:
        """The commands, one a line."""
        return "\n".join(f"  {line}" for line in self.commands)

    @property
    def commands(self) -> list[str]:
        return [line.format(folder=shlex.quote(str(self.place))) for line in self.fetch]


@dataclass(frozen=True)
class Part:
    """A file of a data set, and how many rows it holds."""

    file: str
    sha256: str | None
    rows: int | None = None


@dataclass(frozen=True)
class DataSet:
    """One task of a stream by name: its files, and the benchmark's own prompt and scorers."""

    name: str
    source: Source
    folder: str  # below source.root
    layout: str  # "olora", "trace" or "llmcl"
    parts: tuple[Part, ...]
    licence: str
    prompt: str
    scorers: tuple[str, ...]  # the first is the headline
    options: tuple[str, ...] | None = None  # None: free answers, or those of labels.json
    max_new_tokens: int = 50
    majority: float | None = None  # share of the commonest answer of test.json, where somebody measured it
    validation: str | int = 0  # "eval": the benchmark's own file; 0: it has none, and all of train is learnt
    notes: tuple[str, ...] = ()
    template: bool = False  # prompts stand in the Alpaca template
    first: int | None = None  # learn from the first rows that can be used
    last: int | None = None  # judge by the last rows that can be used
    unanswered: int = 0  # rows of test.json without an answer, which are left out

    @property
    def path(self) -> Path:
        return self.source.root / self.folder

    @property
    def rows(self) -> tuple[int | None, int | None]:
        """How many are learnt from and judged by, as published."""
        published = {part.file: part.rows for part in self.parts}
        train, test = published.get("train.json"), published.get("test.json", self.last)
        return self.first or train, min(test, self.last) if test and self.last else test

    @property
    def judged_by(self) -> int | None:
        """How many of the published rows have an answer to be judged by."""
        return self.rows[1] and self.rows[1] - self.unanswered


# ---------------------------------------------------------------- the O-LoRA benchmark, orders 1-6

OLORA = Source(
    name="O-LoRA benchmark (CL_Benchmark)",
    title="Wang et al. 2023, arXiv 2310.14152; N-LoRA uses the same files",
    url="https://github.com/cmnfriend/O-LoRA",
    revision="07117e1fc4a5f5ad9308a815a42cee8f46502dc8",
    licence="repository: MIT (second-hand; no LICENSE file was seen). The data sets keep their own, here as "
    "others collected them: check before use",
    hashes="published by Estrellajer/CoDe-LoRA at 3355c00, data/CL_Benchmark_repaired/manifest.json, `source`; all "
    "that could be recomputed from the bytes agree: every labels.json, and train.json of agnews, amazon, CB, COPA, "
    "MNLI, RTE, SST-2",
    folder="olora",
    roots=("CL_Benchmark", "."),
    fetch=(
        "git clone https://github.com/cmnfriend/O-LoRA {folder}",
        "git -C {folder} checkout 07117e1fc4a5f5ad9308a815a42cee8f46502dc8",
    ),
)
_LABELS = {  # labels.json of several data sets are the same bytes
    "stars": "dfe3dbf501f9643d7f3fa24df096f925fb149fb299c1c088f802aaf1ba79050b",
    "good, bad": "5fc1ea677de281f32c30ffa8101bc071d9a521f7f21ba416692a79f08ceee7bb",
    "true, false": "698feb4a00d84d31f33686a729253ee3d70e18709216f67bc4db96d484a2434c",
    "false, true": "8b6e3c014c9ce3c8658be14eca6e51e7f274f79e906b70151ec389d50060211b",
}
# folder: (train rows, its sha256), (test rows, its sha256), sha256 of labels.json, licence
_OLORA_FILES: dict[str, tuple[tuple[int, str], tuple[int, str], str, str]] = {
    "TC/dbpedia": (
        (14000, "fc5154160947f0c6ed0d8576be8eddb9078871a5f8e875cbd6abe043dc4d5073"),
        (7600, "971c1a298668385042ce02b67444e1d45773ce0b8b22abbbc39a2592bbe7c255"),
        "240b2344560e4d0736888d74332f78932525343a053149dfdc131ec1fc604a61",
        "CC BY-SA 3.0 and GFDL",
    ),
    "TC/agnews": (
        (4000, "935fe86eb687d3d09f8b4035103761a94ca15df65a0980b1e7da4346a45d7a2a"),
        (7600, "4cbed43bd30eb2841b053a13cb7b2dc4a2692934fd03832402a53cf557778849"),
        "d44ba5236490d6ae5c8689fcaaae4067d95dc13b14ab41d820634ca714a44e10",
        "non-commercial, research",
    ),
    "TC/yahoo": (
        (10000, "1debade5e795f4a3d0ffadda47d2ffce9f8ce730974e6f90a11c832a442718fd"),
        (7600, "ef13a28c0e9980197f20fbdf74e5ee3ca7d24914509bd471ca7044abcc1c692b"),
        "6cc0d1cc3efe693ab76778216b04c51728ca9a305a3d0b4128a88b965f7003d4",
        "Yahoo Webscope agreement: academic research only",
    ),
    "SC/amazon": (
        (5000, "a77b7a84773ea16b2906c16eb4de05ea87f529b91d5e3209b43060306e02c05f"),
        (7600, "0e3337b659505456dd62089f4099778043d409e54f6e9cacf35154e783fdb6a2"),
        _LABELS["stars"],
        "none found",
    ),
    "SC/yelp": (
        (5000, "d1e7088dd79a418341a1aab21c177167d6b0f1a1c628ed1c66de15f439575de6"),
        (7600, "81223ffe2813179c22a2e93d0524e42cdca354cb9130bdeaa9be9447682a5d88"),
        _LABELS["stars"],
        "Yelp Dataset User Agreement: academic research only",
    ),
    "SC/IMDB": (
        (2000, "0c5a3e7026e7dc3101e23a36726f47633c9a09a45369dd5f95c166aa80b6b43c"),
        (7600, "de3f8a2f182e7fb5e79d87805e95a4f70f1cdc77378b3e7996fa0e9fbe068870"),
        _LABELS["good, bad"],
        "none found",
    ),
    "SC/SST-2": (
        (2000, "dd62d365cee0e4be232a46cf082c12befe6ee711086e5b5325f951a84fad8ae3"),
        (872, "53551b8d2d73f9b36df7fc9811715101bc3189d5b66a0e7981f4a7edee921795"),
        _LABELS["good, bad"],
        "none found",
    ),
    "NLI/MNLI": (
        (3000, "f5a7382106d5fa60d6b6f02ffdd7fe78863fdd0536f0e5e40c1676c67385f2d8"),
        (7600, "cd668846ac2568d19dc5398b0d263bf202546f71fc64466e422c6b3a87d7a1fa"),
        "fe22829f991f10a7be226c2fc44446cd80efb151b8874d448440c521ad34165d",
        "OANC; parts CC BY-SA 3.0, CC BY 3.0, public domain",
    ),
    "NLI/CB": (
        (250, "35750e519950b3dd8760e9acc3f20178ebd3d72cece25647d86a50caa222ea5f"),
        (56, "45ddaa803017cf000f9dbc12abc91902afd4a5faa76c201a3beb7d873debd6bd"),
        "e19ac29e726b7564078e455bd27913400d17ab3d068fb62fca061f8b8aeb79c3",
        "none found",
    ),
    "NLI/RTE": (
        (2000, "f21cc2a55c5ccbf18ea3ca007acd10eb307f3599595dc8e42d52869181e6fd24"),
        (277, "639943ca3a7c3a50883f8ebf17824f0c2f18115d7a373f0d216993d1795d897b"),
        "e87b79b0429b22ac06160e2ad128a161f2f4de3f4886d2725743ed6b5ff0db76",
        "none found",
    ),
    "QQP/QQP": (
        (2000, "1e29436ab691644e714ffe9f6927b6f4f702aaa0bcf152eb3ea18f71540bdfd6"),
        (7600, "5cf8d02e003b10cd91e14589c8b814cc596f3b326115d25d0cac2ba24843cc0f"),
        _LABELS["false, true"],
        "none found",
    ),
    "BoolQA/BoolQA": (
        (2000, "dd6d9d5fa802a8c395a0a5f3c11a69926ca224204d703a1ab26273358ce8e01c"),
        (3270, "91e3495dd0be68a53251bf2ad8f527fa0249a6f23cb89d880ab4fb787d3e9bc9"),
        _LABELS["true, false"],
        "CC BY-SA 3.0",
    ),
    "MultiRC/MultiRC": (
        (2000, "01e48d97b8fddd486a0ec8e866e5cc466a9d1bb4780ee5a53b7854d29eea2c67"),
        (4848, "a2b51ca55c957c05fd67ada938d5c70b5c017c508b5d21e9eab0d51b01995d8c"),
        _LABELS["false, true"],
        "Research and Academic Use License",
    ),
    "WiC/WiC": (
        (2000, "cd7d6f79a50e96150c98a64af076092ed3d04703760043e8a1d073ddc84f0fe7"),
        (638, "a98dcae6134e83eb0ea43c99e1577702860ceb1ce43fda795fb539c414134f5e"),
        _LABELS["true, false"],
        "CC BY-NC 4.0",
    ),
    "COPA/COPA": (
        (400, "2de2a58ccb8e916aa74eeb7d19d5d46e4a72e64d1374b6df76298034a484ca05"),
        (100, "6f426193918e1b8ffb6371a98e118d37f85562390bf12bc1a22b3abec431e89d"),
        "f2314439597c11e286fd3c2fdf8eb70d3739e136f83e9533249ce3ecc43ece3e",
        "none found",
    ),
}


_MAJORITY = {
    "amazon": 0.207, "CB": 0.5, "COPA": 0.55, "QQP": 0.641, "RTE": 0.527, "SST-2": 0.509, "dbpedia": 0.077,
    "agnews": 0.25, "BoolQA": 0.622, "WiC": 0.5,
}  # fmt: skip
_UNANSWERED = {"MNLI": 131}


def _olora(folder: str) -> DataSet:
    (train, train_sha256), (test, test_sha256), labels_sha256, licence = _OLORA_FILES[folder]
    category, name = folder.split("/")
    asks = f" / {OLORA_INSTRUCTIONS[category]} / Option: <labels>" if OLORA_INSTRUCTIONS[category] else ""
    unanswered = _UNANSWERED.get(name, 0)
    note = (
        f"test: {test:,} rows, of which {unanswered} without an answer ('-') are left out; the benchmark counts them "
        "as wrong"
    )
    return DataSet(
        name=name,
        source=OLORA,
        folder=folder,
        layout="olora",
        parts=(
            Part("train.json", train_sha256, train),
            Part("test.json", test_sha256, test),
            Part("labels.json", labels_sha256),
        ),
        licence=licence,
        prompt=f"Task:{category} / Dataset:{name}{asks} / <sentence> / Answer:",
        scorers=("exact_match", "options"),
        majority=_MAJORITY.get(name),
        notes=(note,) if unanswered else (),
        unanswered=unanswered,
    )


_OLORA_SETS = {data.name: data for data in map(_olora, _OLORA_FILES)}


# ---------------------------------------------------------------- TRACE

TRACE = Source(
    name="TRACE",
    title="Wang et al. 2023, arXiv 2310.06762",
    url="https://github.com/BeyonderXX/TRACE",
    revision="462e39f616134f4f819efeb3baea8638c03c7db4 (code); TRACE-Benchmark.zip has the sha256 "
    "11152d50f8a093b1fc9c6c924ec207915d173b9e2d715396ec8f8a837e2668a8",
    licence="repository: MIT (LICENSE at bad6a62). The data sets keep their own, here as others collected them: check "
    "before use",
    hashes="published by Estrellajer/CoDe-LoRA at 3355c00, data/TRACE/SHA256SUMS; not recomputed here. The archive's "
    "sha256 was published by two projects independently",
    folder="trace",
    roots=("TRACE-Benchmark/LLM-CL-Benchmark_5000", "LLM-CL-Benchmark_5000", "."),
    fetch=(
        "download TRACE-Benchmark.zip (77 MB) in a browser from",
        "  https://drive.google.com/file/d/1S0SmU0WEw5okW_XvP2Ns0URflNzZq6sV/view",
        "mkdir -p {folder} && unzip TRACE-Benchmark.zip -d {folder}",
    ),
)
# name: (test rows, sha256 of train, of eval, of test), licence
_TRACE_FILES: dict[str, tuple[int, str, str, str, str]] = {
    "C-STANCE": (
        2000,
        "a67441f42a1c6e346868c969c05ffb7969425e0e89c36e4e3c5f757489437d46",
        "713a0ff3d81bcbbcdc22d4e7a01ff2f286093685e187ae13a3e34df52966c709",
        "fdb99faa9167855924544503ff42373f2e0d0c024166086392b4b4c759107f13",
        "none found",
    ),
    "FOMC": (
        496,
        "0b27cfac6d0f209a5758e88ead315e4734b95f6e926d78903ae299aea3185a0e",
        "6a75f0b0518a106b9a63ace12a3ed814e4d60c0be59cdeeadb1dc73875ed9d83",
        "7ce91cee6dc164a28a9a50d3b691d71e6e13b8e54b5fbe464b78ace307d281bb",
        "CC BY-NC 4.0",
    ),
    "MeetingBank": (
        692,
        "1157e590ba5f2dfb845a993fb7ee7b87adfb6fcad8eaedb67a8259cfd28d1134",
        "ba63ed566702a3a070ab91ee9452e89674c2dfbc296755fcbd490beaae8c2c14",
        "7fee2558382e79eae938b179a8327c0d60eca8159b1ab74d0ec36c9ae57c2518",
        "CC BY-NC-SA 4.0",
    ),
    "Py150": (
        2000,
        "315b14e628ae95ffbfda3e778e77004bdcab2c79c2e462700dffaa42bf0ebdbf",
        "0adb582fbfcf9a9ab67bf8552b87d94a411012da471798af078c0b16a8074d73",
        "f611832ab6c05c36ce8cc09fdf7d0ec17d8d88b33dd4b7d1c3b457cd46056dbc",
        "not established",
    ),
    "ScienceQA": (
        2000,
        "6f74c8433ec1c3d83f97e45a76f8d1ff59006d7e2f8112523a21d97d90400dcf",
        "39ff5218ecf1a1333cb7bc5edc55bed9f5f33842b3e781fab83c36a2e142bd2e",
        "e0bcebb1c2c0782edd4adafa357f3af4d2bbe8eabe2016c09a388dfa8e1971a0",
        "CC BY-NC-SA 4.0 (its card says CC BY-SA 4.0 elsewhere)",
    ),
    "NumGLUE-cm": (
        81,
        "cc14f25cd7b768efe0697e42ceafd24d8b1c8770f4aac5f8bc32abbafa977f49",
        "a6141669d310a7782a6b694d7ed7f3d4369eff3049eced6ffbf2168ddd5f5de0",
        "a0a6c1e4a2f59b0a955680f95e3bc3054a5be4305658003160031d258ece401b",
        "ODC-By (the compilation)",
    ),
    "NumGLUE-ds": (
        325,
        "1d3fe0a38267fa3c3c9fdd42653dbedb90ddbf7fe05e9b78f9f3c0d6d6dc3654",
        "410858278a08f64c87eed942dee936fb18f090465195589d3bf2382c48ffceeb",
        "7aad65a5ea6cb3ee74285a52f8dc32b21dfe94be45c42df379166d8b635fc865",
        "ODC-By (the compilation)",
    ),
    "20Minuten": (
        200,
        "605ae27c447168c91f7f4fa071be06975b1b12e2a910ed7320ea7b274ae1ef18",
        "1b22612cf2c4316d2ded9cb5d21f7bbe916eced53a18dae75f9eb98f83fa4abd",
        "a7c617d5c332df37c8c12d98a3b13ae41bc03f01a63ec515c85e8cd4b2d53487",
        "none found",
    ),
}
# name: (scorers, options): TRACE's metric first.
_LETTERS = ("A", "B", "C")
_TRACE_SCORERS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "C-STANCE": (("choice", "options"), _LETTERS),
    "FOMC": (("choice", "options"), _LETTERS),
    "MeetingBank": (("rouge_l",), None),
    "Py150": (("code_similarity",), None),
    "ScienceQA": (("choice",), None),
    "NumGLUE-cm": (("exact_match", "number"), None),
    "NumGLUE-ds": (("exact_match", "number"), None),
    "20Minuten": (("sari",), None),
}


def _trace(name: str) -> DataSet:
    test, train_sha256, eval_sha256, test_sha256, licence = _TRACE_FILES[name]
    scorers, options = _TRACE_SCORERS[name]
    return DataSet(
        name=name,
        source=TRACE,
        folder=name,
        layout="trace",
        parts=(
            Part("train.json", train_sha256, 5000),
            Part("eval.json", eval_sha256),
            Part("test.json", test_sha256, test),
        ),
        licence=licence,
        prompt="the row's own `prompt`; `answer` follows it directly",
        scorers=scorers,
        options=options,
        max_new_tokens=512,
        validation="eval",
    )


# ---------------------------------------------------------------- I-LoRA's eight: six of TRACE's and two more

MEDMCQA = Source(
    name="MedMCQA",
    title="Pal et al. 2022, arXiv 2203.14371",
    url="https://github.com/medmcqa/medmcqa",
    revision="not pinned",
    licence="Apache-2.0 (the data card)",
    hashes="none published that could be confirmed",
    folder="medmcqa",
    roots=(".",),
    fetch=(
        "follow https://medmcqa.github.io to the data (train.json, dev.json: one object a line) and",
        "put both into {folder}",
    ),
)
JECQA = Source(
    name="JEC-QA",
    title="Zhong et al. 2020, arXiv 1911.12011",
    url="https://jecqa.thunlp.org",
    revision="not pinned",
    licence="not established",
    hashes="none published that could be confirmed",
    folder="jecqa",
    roots=(".",),
    fetch=(
        "get the data at https://jecqa.thunlp.org (what the site asks for was not checked) and",
        "put 0_train.json and 1_train.json into {folder}",
    ),
)
_EXAM: tuple[tuple[str, ...], tuple[str, ...]] = (("choice", "options"), ("A", "B", "C", "D"))
_ILORA_SCORERS = _TRACE_SCORERS | {"NumGLUE-cm": (("number", "exact_match"), None)}
SCORERS = _TRACE_SCORERS | {"medmcqa": _EXAM, "jecqa": _EXAM, "JEC-QA": _EXAM}
"""The scorers and options of `trace:` and `llmcl:` folders of these names."""


def _ilora(name: str) -> DataSet:
    base = _trace(name)
    scorers, options = _ILORA_SCORERS[name]
    return DataSet(
        name=name, source=TRACE, folder=name, layout="llmcl", parts=base.parts, licence=base.licence,
        prompt="Alpaca template around the row's `prompt`", scorers=scorers, options=options, max_new_tokens=128,
        validation="eval", template=True, last=500,
    )  # fmt: skip


def _exam(name: str, source: Source, parts: tuple[Part, ...], note: str) -> DataSet:
    return DataSet(
        name=name, source=source, folder=".", layout="llmcl", parts=parts, licence=source.licence,
        prompt="Alpaca template around the question and its four choices", scorers=_EXAM[0],
        options=_EXAM[1], max_new_tokens=128, notes=(note,), template=True,
        first=5000, last=500,
    )  # fmt: skip


_MEDMCQA = _exam(
    "medmcqa", MEDMCQA, (Part("train.json", None, 182822), Part("dev.json", None, 4183)), "judged by rows of dev.json"
)
_JECQA = _exam(
    "jecqa",
    JECQA,
    (Part("0_train.json", None), Part("1_train.json", None)),
    "I-LoRA's code takes the test rows from the end of 0_train.json, a file that it also learns from",
)


# ---------------------------------------------------------------- the streams


@dataclass(frozen=True)
class Named:
    """A stream of catalogued data sets, in the benchmark's order and under its protocol."""

    meaning: str
    order: str  # where the order of the tasks was read
    prompt: str
    protocol: str  # what a reader of its numbers must know; a note of every run
    tasks: tuple[DataSet, ...]


_OLORA_PROTOCOL = (
    "the benchmark's own protocol: greedy answers of up to 50 tokens, exact match, likelihood scores beside it. Its "
    'prompt names the data set ("Dataset:<name>"), so every row says which task it is from. All its training rows are '
    "learnt; its dev.json is its test.json, so there are no validation rows"
)
_TRACE_PROTOCOL = (
    "TRACE's own metrics and prompts; answer after prompt without a space, up to 512 new tokens. TRACE draws answers "
    "with temperature 0.1; here they are greedy. Validation rows are its eval.json"
)
_ILORA_PROTOCOL = (
    "I-LoRA's protocol as the first release of its code has it (https://github.com/which47/LLMCL, commit "
    "4286b97b5beef405b4be0dd720c75a1ed1bfae5f): the Alpaca template around each prompt, the last 500 test rows, greedy "
    "answers of up to 128 tokens. Not done here: its repetition penalty (1.15), its loss on the prompt, 4-bit weights. "
    "Its template file was not seen; Alpaca-LoRA's is used"
)


def _order(number: int, meaning: str, order: str, names: str) -> dict[str, Named]:
    tasks = tuple(_OLORA_SETS[name] for name in names.split())
    prompt = "the benchmark's own, which names the data set"
    return {f"order-{number}": Named(f"{meaning}, order {number}", order, prompt, _OLORA_PROTOCOL, tasks)}


_LISTED = "as projects that use the benchmark list it; the paper itself was not read"
STREAMS: dict[str, Named] = {
    **_order(1, "the standard benchmark", "scripts_llama/order_1.sh", "dbpedia amazon yahoo agnews"),
    **_order(2, "the standard benchmark", "scripts_llama/order_2.sh", "dbpedia amazon agnews yahoo"),
    **_order(3, "the standard benchmark", "scripts_llama/order_3.sh", "yahoo amazon agnews dbpedia"),
    **_order(
        4, "the long benchmark", _LISTED,
        "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    ),
    **_order(
        5, "the long benchmark", _LISTED,
        "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    ),
    **_order(
        6, "the long benchmark", "logs_and_outputs/long_olora",
        "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    ),
    "trace": Named(
        "TRACE's eight",
        "scripts/train_seq_naive.sh",
        "the rows' own",
        _TRACE_PROTOCOL,
        tuple(map(_trace, _TRACE_FILES)),
    ),
    "ilora": Named(
        "I-LoRA's eight: six of TRACE's and two exams",
        "LLMCL's acc_inference.py",
        "the Alpaca template around the rows' own",
        _ILORA_PROTOCOL,
        (
            *map(_ilora, ("C-STANCE", "FOMC", "MeetingBank", "ScienceQA", "NumGLUE-cm", "20Minuten")),
            _MEDMCQA,
            _JECQA,
        ),
    ),
}  # fmt: skip
