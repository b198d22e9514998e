"""Synthetic papers with question/answer pairs: what the demo model is trained and judged on.

A paper is a handful of invented facts (a dataset, its size, a metric, a baseline ...), each told in one of several
sentences and asked for in one of several questions. Entities are put together from syllables, so a held-out paper
names things that training never saw: the model has to copy, not to remember.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

HELD_OUT_SEED = 1_000_000_007
"""Papers of this seed judge the model; training draws from seeds below it."""

_HEAD = [
    "Vor",
    "Zel",
    "Qua",
    "Tri",
    "Mar",
    "Del",
    "Pho",
    "Kin",
    "Sol",
    "Bra",
    "Nov",
    "Ure",
    "Lum",
    "Gar",
    "Hex",
    "Ori",
    "Pel",
    "Tau",
    "Wim",
    "Yar",
    "Cos",
    "Fen",
    "Jun",
    "Rho",
    "Ax",
]
_TAIL = [
    "lex",
    "dra",
    "mis",
    "tor",
    "nel",
    "via",
    "zon",
    "rix",
    "pad",
    "gem",
    "lor",
    "bit",
    "sen",
    "qui",
    "mon",
    "tas",
    "vec",
    "dal",
    "fur",
    "kem",
]
_METHOD_END = ["Net", "Former", "Rank", "Tag", "Parse", "Gen", "Fuse", "Link", "Flow", "Mix"]
_DATA_END = ["Bank", "QA", "Set", "Corpus", "Eval", "Bench", "Dial", "News", "Web", "Text"]
_BASE_END = ["LSTM", "CNN", "CRF", "SVM", "GRU", "Base", "Encoder", "Tree"]

_TASKS = [
    f"{how} {what}"
    for how in [
        "neural",
        "cross-lingual",
        "few-shot",
        "multi-document",
        "open-domain",
        "biomedical",
        "legal",
        "conversational",
    ]
    for what in (
        "question answering",
        "summarization",
        "parsing",
        "relation extraction",
        "sentiment analysis",
        "entity linking",
        "dialogue generation",
        "text simplification",
        "keyphrase extraction",
        "stance detection",
    )
]
_METRICS = [
    "accuracy",
    "F1",
    "BLEU",
    "ROUGE-L",
    "exact match",
    "perplexity",
    "mean average precision",
    "recall",
    "precision",
    "METEOR",
]
_UNITS = [
    "sentences",
    "documents",
    "dialogues",
    "questions",
    "tweets",
    "abstracts",
    "articles",
    "reviews",
    "queries",
    "paragraphs",
]
_LANGUAGES = [
    "English",
    "German",
    "Swahili",
    "Hindi",
    "Arabic",
    "Finnish",
    "Korean",
    "Turkish",
    "Czech",
    "Yoruba",
    "Spanish",
    "Urdu",
    "Basque",
    "Tamil",
]
_SOURCES = [
    "Wikipedia",
    "Twitter",
    "court records",
    "clinical notes",
    "news sites",
    "Reddit threads",
    "patents",
    "scientific papers",
    "film subtitles",
    "product reviews",
    "school exams",
    "customer calls",
]
_PEOPLE = ["annotators", "experts", "linguists", "students", "crowd workers", "physicians", "lawyers", "native speakers"]
_COUNTS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"]
_ARCHITECTURES = [
    "a graph neural network",
    "a pointer network",
    "a variational autoencoder",
    "a bidirectional LSTM",
    "a pretrained transformer",
    "a convolutional encoder",
    "a memory network",
    "a conditional random field",
    "a mixture of experts",
    "a siamese encoder",
]

# One entry per kind of fact: how the paper tells it, and how it is asked for. `{kind}` is any fact of the same paper.
_SENTENCES: dict[str, list[str]] = {
    "method": [
        "We propose {method}, a new approach to {task}.",
        "This paper presents {method}, a model for {task}.",
        "We introduce {method} and apply it to {task}.",
        "Here we describe {method}, which advances {task}.",
    ],
    "dataset": [
        "We evaluate on {dataset}.",
        "Experiments are carried out on the {dataset} dataset.",
        "To test our claims we collect {dataset}.",
        "All results are obtained on {dataset}.",
        "For training and evaluation we rely on {dataset}.",
    ],
    "size": [
        "The data consists of {size}.",
        "In total, it contains {size}.",
        "It comprises {size} after filtering.",
        "We end up with {size} for our experiments.",
    ],
    "metric": [
        "Systems are compared by {metric}.",
        "We report {metric} as the main measure.",
        "Performance is measured with {metric}.",
        "As evaluation measure we use {metric}.",
    ],
    "score": [
        "Our model reaches a score of {score}.",
        "The best run obtains {score}.",
        "We achieve {score} on the test set.",
        "The final system scores {score}.",
    ],
    "baseline": [
        "We compare with {baseline}.",
        "As a strong baseline we take {baseline}.",
        "The main competitor is {baseline}.",
        "Earlier work, notably {baseline}, serves as the baseline.",
    ],
    "gain": [
        "This is an improvement of {gain} over earlier work.",
        "Our model outperforms the previous best by {gain}.",
        "The gain over the state of the art is {gain}.",
        "We beat all other systems by a margin of {gain}.",
    ],
    "language": [
        "The texts are written in {language}.",
        "We focus on {language}.",
        "All material is in {language}.",
        "Our study is limited to {language}.",
    ],
    "source": [
        "The texts were gathered from {source}.",
        "Our raw material stems from {source}.",
        "We crawl {source} to obtain examples.",
        "Examples are drawn from {source}.",
    ],
    "people": [
        "Labels were provided by {people}.",
        "Each example was judged by {people}.",
        "We hired {people} for the annotation.",
        "The annotation was done by {people}.",
    ],
    "architecture": [
        "The model is built on {architecture}.",
        "At its core lies {architecture}.",
        "Technically, we extend {architecture}.",
        "Our system relies on {architecture}.",
    ],
    "hardware": [
        "Training takes {hardware}.",
        "The model is trained for {hardware}.",
        "Fitting all parameters needs {hardware}.",
        "Optimization was run for {hardware}.",
    ],
}
_QUESTIONS: dict[str, list[str]] = {
    "method": ["What is the name of the proposed method?", "Which model do the authors propose?"],
    "task": ["Which task is addressed in this paper?", "What is {method} used for?"],
    "dataset": ["Which dataset do they use?", "What data do they evaluate on?", "Which dataset is {method} tested on?"],
    "size": ["How large is the dataset?", "How much data do they use?", "What is the size of {dataset}?"],
    "metric": ["Which metric is used for evaluation?", "How do they measure performance?"],
    "score": ["What score does their model obtain?", "How well does {method} perform?"],
    "baseline": ["Which baseline do they compare with?", "What is {method} compared to?"],
    "gain": ["By how much do they improve over previous work?", "How large is the improvement?"],
    "language": ["Which language do they study?", "What language is the data in?"],
    "source": ["Where does the data come from?", "What is the source of the texts?"],
    "people": ["Who annotated the data?", "How many people labelled the examples?"],
    "architecture": ["What architecture is the model based on?", "What is {method} built on?"],
    "hardware": ["How long does training take?", "What does it take to train {method}?"],
}
_OPENERS = [
    "Research on {task} has made great progress.",
    "Recent years have seen growing interest in {task}.",
    "Despite much work, {task} remains hard.",
    "Many applications need reliable {task}.",
    "",
]
_FILLERS = [
    "We discuss limitations at the end.",
    "An error analysis shows where the approach fails.",
    "This finding is in line with earlier work.",
    "Further details are given below.",
    "Our contributions are summarized as follows.",
    "The remainder of this paper is organized as usual.",
]


@dataclass(frozen=True)
class SyntheticPaper:
    """One invented paper: its text, its facts by kind, and every question that the text answers."""

    title: str
    abstract: str
    introduction: str
    facts: dict[str, str]

    def questions(self, kind: str) -> list[str]:
        """All ways to ask for the fact `kind` of this paper, which the paper must tell."""
        return [q.format(**self.facts) for q in _QUESTIONS[kind] if _tells(self.facts, q)]

    def answers(self) -> dict[str, str]:
        """Every question about this paper and its one right answer."""
        return {question: self.facts[kind] for kind in self.facts for question in self.questions(kind)}


def make_paper(seed: int) -> SyntheticPaper:
    """The paper of this seed, the same on every machine and Python version."""
    rng = random.Random(seed)
    facts = {
        "method": _name(rng, _METHOD_END),
        "task": rng.choice(_TASKS),
        "dataset": _name(rng, _DATA_END),
        "size": f"{_thousands(rng)} {rng.choice(_UNITS)}",
        "metric": rng.choice(_METRICS),
        "score": f"{rng.randint(20, 98)}.{rng.randint(0, 9)}",
        "baseline": f"{_name(rng, [''])}-{rng.choice(_BASE_END)}",
        "gain": f"{rng.randint(0, 9)}.{rng.randint(1, 9)} points",
        "language": rng.choice(_LANGUAGES),
        "source": rng.choice(_SOURCES),
        "people": f"{rng.choice(_COUNTS)} {rng.choice(_PEOPLE)}",
        "architecture": rng.choice(_ARCHITECTURES),
        "hardware": f"{rng.randint(2, 90)} hours on {rng.choice(_COUNTS)} GPUs",
    }
    optional = [kind for kind in _SENTENCES if kind not in ("method", "dataset")]
    told = ["method", "dataset", *rng.sample(optional, rng.randint(3, 5))]
    body = told[1:]
    rng.shuffle(body)
    cut = rng.randint(2, len(body) - 1)
    known = {"method", "task", "dataset", *told}
    kept = {kind: text for kind, text in facts.items() if kind in known}

    def tell(kinds: list[str]) -> str:
        return " ".join(rng.choice(_SENTENCES[kind]).format(**facts) for kind in kinds)

    abstract = [rng.choice(_OPENERS).format(**facts), tell(["method"]), tell(body[:cut])]
    introduction = [tell(body[cut:])]
    introduction.insert(rng.randint(0, 1), rng.choice(_FILLERS))
    return SyntheticPaper(
        title=f"{facts['method']} for {facts['task']}",
        abstract=" ".join(part for part in abstract if part),
        introduction=" ".join(introduction),
        facts=kept,
    )


def held_out_papers(count: int) -> list[SyntheticPaper]:
    """`count` papers that no training run has seen."""
    return [make_paper(HELD_OUT_SEED + i) for i in range(count)]


def _tells(facts: dict[str, str], template: str) -> bool:
    return all(name in facts for name in ("method", "dataset") if f"{{{name}}}" in template)


def _name(rng: random.Random, endings: list[str]) -> str:
    return rng.choice(_HEAD) + rng.choice(_TAIL) + rng.choice(["", *_TAIL]) + rng.choice(endings)


def _thousands(rng: random.Random) -> str:
    return f"{rng.randint(1, 99)},{rng.randint(0, 9)}00"
